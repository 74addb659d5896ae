"""Critics that multiply state and action: `ProductTrunk`, `ProductTerm`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from starlayers.functional import star_product
from starlayers.rl.trunks import NORMS, KeepsInit, build_trunk


class ProductTrunk(KeepsInit):
    """Trunk of Q(s, a) that multiplies state and action.

    The first layer is `act(norm(Ws s + bs)) * norm(Wa a + ba) + W [s, a] + b`: a star operation
    over two inputs, plus the usual linear layer over their concatenation; star layers follow.
    Without the norms the gradient with respect to the action grows with the state's embedding,
    which is known to destabilise actors; each branch is therefore normalised unless `norm="none"`.

    Shapes: (batch, states + actions), as SB3's critics concatenate them -> (batch, out_features).

    Args:
        states: channels of the state.
        actions: channels of the action.
        net_arch: widths, at least one.
        act: name of the activation in `ACTIVATIONS`.
        norm: "layer", "rms" or "none".

    Raises:
        ValueError: an empty `net_arch`, an unknown norm.

    Source of the idea: multiplicative critics such as Schaul et al., "Universal Value Function
    Approximators", ICML 2015; the warning is Bjorck et al., "Towards Deeper Deep
    Reinforcement Learning with Spectral Normalization", NeurIPS 2021.

    Example:
        >>> from stable_baselines3 import SAC
        >>> kwargs = {"net": {"pi": "mlp", "qf": "product"}, "net_arch": [32]}
        >>> model = SAC("StarMlpPolicy", "Pendulum-v1", policy_kwargs=kwargs, device="cpu")
        >>> trunk = model.critic.qf0[0]
        >>> trunk.state.in_features, trunk.action.in_features, trunk.out_features
        (3, 1, 32)
    """

    def __init__(
        self,
        states: int,
        actions: int,
        net_arch: Sequence[int],
        *,
        act: str = "relu",
        norm: str = "layer",
    ) -> None:
        if not net_arch:
            raise ValueError("net='product' needs a layer for its product: net_arch=[] has none")
        if norm != "none" and norm not in NORMS:
            raise ValueError(f"unknown norm {norm!r}, choose one of {', '.join(NORMS)} or 'none'")
        super().__init__()
        first, *rest = net_arch
        make_norm = nn.Identity if norm == "none" else NORMS[norm]
        self.in_features, self.out_features = states + actions, net_arch[-1]
        self.sizes, self.act = [states, actions], act
        self.state = nn.Linear(states, first)
        self.action = nn.Linear(actions, first)
        self.both = nn.Linear(states + actions, first)
        self.state_norm, self.action_norm = make_norm(first), make_norm(first)
        self.tail = build_trunk("star", first, rest, act=act, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        s, a = torch.split(x, self.sizes, -1)
        product = star_product(
            self.state_norm(self.state(s)), self.action_norm(self.action(a)), self.act
        )
        return self.tail(product + self.both(x))  # type: ignore[no-any-return]


class ProductTerm(nn.Module):
    """Critic network plus a learned product of state and action, zero at first.

    `Q(s, a) = q([s, a]) + head(tanh(Ws s + bs) * (Wa a + ba))`. The head starts at zero, so that
    the sum equals `q` to the bit. A network over the concatenation has to learn such products from
    data; here they are part of the formula, and the bounded branch of the state keeps the gradient
    with respect to the action bounded. `starify(model, product=width)` adds one to each critic.

    Shapes: (batch, states + actions), as SB3's critics concatenate them -> that of `q`.

    Args:
        q: the critic's own network, with its gates if it has any.
        states: channels of the state.
        actions: channels of the action.
        outputs: channels of `q`'s output: one, or one for each quantile.
        width: number of products.

    Example:
        >>> q = nn.Linear(4, 1)
        >>> x = torch.randn(8, 4)
        >>> torch.equal(ProductTerm(q, 3, 1, 1, 16)(x), q(x))
        True
    """

    def __init__(self, q: nn.Module, states: int, actions: int, outputs: int, width: int) -> None:
        super().__init__()
        first = next(q.parameters())
        factory: dict[str, Any] = {"dtype": first.dtype, "device": first.device}
        self.q = q
        self.sizes = [states, actions]
        self.state = nn.Linear(states, width, **factory)
        self.action = nn.Linear(actions, width, **factory)
        self.head = nn.Linear(width, outputs, bias=False, **factory)
        nn.init.zeros_(self.head.weight)
        self.train(q.training)

    def forward(self, x: Tensor) -> Tensor:
        s, a = torch.split(x, self.sizes, -1)
        product = star_product(self.state(s), self.action(a), "tanh")
        return self.q(x) + self.head(product)  # type: ignore[no-any-return]
