"""Trunks of policies and critics: star layers and the nets they compete with."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from stable_baselines3.common.policies import BasePolicy
from torch import Tensor, nn

from starlayers.activations import get_activation
from starlayers.checks import positive_int
from starlayers.modules import GATE_GAIN, StarBlock, StarMLP
from starlayers.rl.stack import PackedStar, StarStack
from starlayers.surgery.verify_act import name_of_act

#: makes a norm over so many channels
Norm = Callable[[int], nn.Module]
#: name of an activation in `ACTIVATIONS`, or a module class as SB3 takes it
Activation = str | type[nn.Module]

#: name of a norm -> its layer for so many channels
NORMS: dict[str, Norm] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


class KeepsInit(nn.Module):
    """Module whose own initialisation survives SB3's `ortho_init`.

    On-policy algorithms re-initialise every `nn.Linear` of a policy through `Module.apply`
    (`ortho_init=True`, the default). A residual branch that began at zero is then no longer zero.
    Here `reset_star(gain)` runs after that and initialises the star layers again.
    """

    def apply(self, fn: Callable[[nn.Module], Any]) -> "KeepsInit":
        super().apply(fn)
        if isinstance(fn, partial) and fn.func is BasePolicy.init_weights:
            self.reset_star(fn.keywords.get("gain", 1.0))
        return self

    def reset_star(self, gain: float) -> None:
        """Initialise star branches one by one, and residual blocks as when built."""
        for module in self.modules():
            if isinstance(module, PackedStar | StarStack):
                module.reset_branches(gain)
            if isinstance(module, StarBlock):
                nn.init.orthogonal_(module.mlp.f2.weight, GATE_GAIN)
                zero_output(module)
            if isinstance(module, SimBaBlock):
                module.reset_parameters()


class Trunk(nn.Sequential, KeepsInit):
    """Layers in sequence, one per entry of SB3's `net_arch`.

    Shapes: (batch, in_features) -> (batch, out_features).
    """

    def __init__(self, layers: Sequence[nn.Module], in_features: int, out_features: int) -> None:
        super().__init__(*layers)
        self.in_features, self.out_features = in_features, out_features


class Dense(nn.Sequential):
    """Linear layer of a `D2RLTrunk` with its norms and activation."""


class D2RLTrunk(Trunk):
    """Trunk of D2RL: every layer after the first takes the trunk's input as well.

    Shapes: (batch, in_features) -> (batch, out_features).
    Source: Sinha et al., "D2RL: Deep Dense Architectures in Reinforcement Learning", 2020,
    arXiv 2010.09163.
    """

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i, layer in enumerate(self):
            y = layer(torch.cat([y, x], -1) if i else y)
        return y


class SimBaBlock(nn.Module):
    """Residual block of SimBa: `x + W2 relu(W1 norm(x))`, four times as wide inside.

    Shapes: (batch, dim) -> (batch, dim).
    Source: Lee et al., "SimBa: Simplicity Bias for Scaling Up Parameters in Deep Reinforcement
    Learning", ICLR 2025, arXiv 2410.09754. Its running norm of observations is left to
    `VecNormalize`.
    """

    def __init__(self, dim: int, act: Activation, norm: Norm) -> None:
        super().__init__()
        self.norm = norm(dim)
        self.inp, self.out = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.act = activation_module(act)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as published: He's normal weights, zero biases."""
        for layer in (self.inp, self.out):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.act(self.inp(self.norm(x))))  # type: ignore[no-any-return]


class ActivationLayer(nn.Module):
    """Activation of `ACTIVATIONS` as a module."""

    def __init__(self, act: str) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return get_activation(self.act).fn(x)

    def extra_repr(self) -> str:
        return repr(self.act)


def star_residual(dim: int, act: str, pre: nn.Module, post: nn.Module | None = None) -> StarBlock:
    """Make a residual star block that is the identity at first."""
    block = StarBlock(dim, StarMLP(dim, 2 * dim, act=act, offset=1.0), pre=pre, post=post)
    zero_output(block)
    return block


def zero_output(block: StarBlock) -> None:
    """Zero the last layer of a residual star block, which makes it the identity."""
    nn.init.zeros_(block.mlp.g.weight)
    nn.init.zeros_(block.mlp.g.bias)


def _star(dim: int, width: int, act: Any, norms: Sequence[Norm]) -> list[nn.Module]:
    return [PackedStar(dim, width, act=act), *(norm(width) for norm in norms)]


def _dense(dim: int, width: int, act: Any, norms: Sequence[Norm]) -> list[nn.Module]:
    return [nn.Linear(dim, width), *(norm(width) for norm in norms), activation_module(act)]


NETS: dict[str, Callable[..., Any]] = {
    "star": _star,
    "star_residual": lambda width, act, norm: star_residual(width, act, norm(width)),
    "mlp": _dense,
    "d2rl": _dense,
    "simba": SimBaBlock,
}
"""Layer of each net, or the residual block behind its first layer, by name.

The names are those of the option `net` of the star policies.

Example:
    >>> from starlayers.rl import NETS
    >>> list(NETS)
    ['star', 'star_residual', 'mlp', 'd2rl', 'simba']
"""
RESIDUAL = ("star_residual", "simba")


def build_trunk(
    net: str,
    in_features: int,
    net_arch: Sequence[int],
    *,
    act: Activation = "relu",
    norm: str | None = None,
    norm_before: Norm | None = None,
) -> Trunk:
    """Build a trunk with one layer or residual block per entry of `net_arch`.

    Args:
        net: a name in `NETS`.
        in_features: channels of the input.
        net_arch: widths; empty for the identity. Residual nets need equal ones.
        act: a name in `ACTIVATIONS`; nets without stars also take any module class, as SB3 does.
        norm: a name in `NORMS`. It goes behind the product of a star, before the activation of a
            linear layer, and before a residual block (which always has one, "layer" by default);
            "none" or `None` for none.
        norm_before: makes one more norm in front of each layer, from its channels.
    """
    if net not in NETS:
        raise ValueError(f"unknown net {net!r}, choose one of {', '.join(NETS)}")
    norm = None if norm == "none" else norm
    act = activation_name(act) if "star" in net else parse_activation(act)
    if norm is not None and norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}, choose one of {', '.join(NORMS)} or None")
    widths = [positive_int(net, f"net_arch[{i}]", width) for i, width in enumerate(net_arch)]
    if net in RESIDUAL and len(set(widths)) > 1:
        raise ValueError(f"net={net!r} has residual blocks: net_arch={widths} needs equal widths")
    before, norms = [norm_before] if norm_before else [], [NORMS[norm]] if norm else []
    layers: list[nn.Module] = []
    if net in RESIDUAL and widths:
        width, make_norm = widths[0], NORMS[norm or "layer"]
        layers = [*(make(in_features) for make in before), nn.Linear(in_features, width)]
        layers += [NETS[net](width, act, make_norm) for _ in widths]
        layers += [make_norm(width)]
    else:
        again = in_features if net == "d2rl" else 0
        for dim, width in zip([in_features, *(width + again for width in widths)], widths):
            layer = [*(make(dim) for make in before), *NETS[net](dim, width, act, norms)]
            layers += [Dense(*layer)] if again else layer
    trunk_class = D2RLTrunk if net == "d2rl" else Trunk
    return trunk_class(layers, in_features, widths[-1] if widths else in_features)


def parse_activation(activation_fn: str | type[nn.Module] | None) -> Activation:
    """Return the name in `ACTIVATIONS`, or the module class, that a user passed."""
    if activation_fn is None or isinstance(activation_fn, str):
        return get_activation(activation_fn).name
    if not (isinstance(activation_fn, type) and issubclass(activation_fn, nn.Module)):
        raise TypeError(
            "activation_fn must be a name from ACTIVATIONS or a class such as nn.Tanh, "
            f"got {activation_fn!r}"
        )
    return activation_fn


def activation_module(act: Activation) -> nn.Module:
    """Make a module of an activation's name or class; pickled policies refer to this function."""
    return act() if isinstance(act, type) else ActivationLayer(act)


def activation_factory(activation_fn: str | type[nn.Module] | None) -> Callable[[], nn.Module]:
    """Return a function without arguments that makes the activation, as SB3 calls it."""
    act = parse_activation(activation_fn)
    return act if isinstance(act, type) else partial(activation_module, act)


def activation_name(activation_fn: str | type[nn.Module] | None) -> str:
    """Return the name in `ACTIVATIONS` of an activation passed by name or by class."""
    act = parse_activation(activation_fn)
    if isinstance(act, str):
        return act
    name = name_of_act(act())
    if name is None:
        raise ValueError(
            f"activation_fn={act.__name__}: a star layer needs an activation of ACTIVATIONS, and "
            "none computes that; add it with register_activation and pass its name"
        )
    return name
