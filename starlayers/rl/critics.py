"""The state-action star: products of state and action in critics, new and trained."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from starlayers.functional import star_product
from starlayers.rl.trunks import NORMS, KeepsInit, build_trunk

__all__ = ["ProductTerm", "ProductTrunk"]


class ProductTrunk(KeepsInit):
    """A trunk of Q(s, a) that multiplies state and action.

    The first layer is `act(norm(Ws s)) * norm(Wa a) + W [s, a] + b`, the star operation over two
    inputs beside the usual path over their concatenation; star layers follow. Without the norms
    the gradient in the action grows with the state's embedding, which is known to destabilise
    actors; each branch is therefore normalised unless `norm="none"`.

    Shapes: (batch, states + actions), as SB3's critics concatenate them -> (batch, out_features).

    Args:
        states, actions: channels of either.
        net_arch: widths, at least one.
        act: a row of `ACTIVATIONS`.
        norm: a row of `NORMS`, or "none".

    Raises:
        ValueError: an empty `net_arch`, an unknown norm.

    Source of the idea: multiplicative critics such as Schaul et al., "Universal Value Function
    Approximators", ICML 2015; the warning is Bjorck et al., "Towards Deeper Deep
    Reinforcement Learning with Spectral Normalization", NeurIPS 2021.

    Example:
        >>> ProductTrunk(3, 1, [32, 32])(torch.randn(8, 4)).shape
        torch.Size([8, 32])
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
        normalise = nn.Identity if norm == "none" else NORMS[norm]
        self.in_features, self.out_features = states + actions, net_arch[-1]
        self.sizes, self.act = [states, actions], act
        self.state = nn.Linear(states, first)
        self.action = nn.Linear(actions, first)
        self.both = nn.Linear(states + actions, first)
        self.state_norm, self.action_norm = normalise(first), normalise(first)
        self.tail = build_trunk("star", first, rest, act=act, norm=None if norm == "none" else norm)

    def forward(self, x: Tensor) -> Tensor:
        s, a = torch.split(x, self.sizes, -1)
        product = star_product(
            self.state_norm(self.state(s)), self.action_norm(self.action(a)), self.act
        )
        return self.tail(product + self.both(x))  # type: ignore[no-any-return]


class ProductTerm(nn.Module):
    """A critic's network with a product of state and action beside it.

    `Q(s, a) = q([s, a]) + head(tanh(Ws s + bs) * (Wa a + ba))` with a zero head: `q` to the bit at
    first. A network over the concatenation has to learn such products; here they are given, and
    the bounded state branch keeps the gradient in the action bounded.

    Shapes: (batch, states + actions), as SB3's critics concatenate them -> that of `q`.

    Args:
        q: the critic's own network, with its gates if it has any.
        states, actions: channels of either.
        outputs: of `q`; quantiles have one each.
        width: products.

    Example:
        >>> q = nn.Linear(4, 1)
        >>> x = torch.randn(8, 4)
        >>> torch.equal(ProductTerm(q, 3, 1, 1, 16)(x), q(x))
        True
    """

    def __init__(self, q: nn.Module, states: int, actions: int, outputs: int, width: int) -> None:
        super().__init__()
        first = next(q.parameters())
        where: dict[str, Any] = {"dtype": first.dtype, "device": first.device}
        self.q = q
        self.sizes = [states, actions]
        self.state = nn.Linear(states, width, **where)
        self.action = nn.Linear(actions, width, **where)
        self.head = nn.Linear(width, outputs, bias=False, **where)
        nn.init.zeros_(self.head.weight)
        self.train(q.training)

    def forward(self, x: Tensor) -> Tensor:
        s, a = torch.split(x, self.sizes, -1)
        product = star_product(self.state(s), self.action(a), "tanh")
        return self.q(x) + self.head(product)  # type: ignore[no-any-return]
