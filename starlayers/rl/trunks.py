"""Trunks of policies and critics: star layers, and the nets people compare them with."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from stable_baselines3.common.policies import BasePolicy
from torch import Tensor, nn

from starlayers.activations import get_activation
from starlayers.modules import StarBlock, positive_int
from starlayers.rl.stack import GATE_GAIN, PackedStar, StarStack
from starlayers.surgery.recipes import recognise

__all__ = [
    "NETS",
    "NORMS",
    "Trunk",
    "activation_row",
    "build_trunk",
]

Norm = Callable[[int], nn.Module]
#: a row of `ACTIVATIONS`, or a class as SB3 takes it
Activation = str | type[nn.Module]

#: name of a norm -> its layer for so many channels
NORMS: dict[str, Norm] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


class KeepsInit(nn.Module):
    """A module that knows its own start values, also under the orthogonal initialisation of SB3.

    PPO, A2C and their kin re-initialise every `nn.Linear` below a policy (`ortho_init=True`, the
    default) through `Module.apply`. What the layers mean is then lost: a residual branch that
    began at zero is none any more. Here `reset_star(gain)` has the last word.

    Example:
        >>> from functools import partial
        >>> block = build_trunk("star_residual", 4, [8])
        >>> _ = block.apply(partial(BasePolicy.init_weights, gain=2**0.5))
        >>> block[1].mlp.g.weight.abs().max().item()
        0.0
    """

    def apply(self, fn: Callable[[nn.Module], Any]) -> "KeepsInit":
        super().apply(fn)
        if isinstance(fn, partial) and fn.func is BasePolicy.init_weights:
            self.reset_star(fn.keywords.get("gain", 1.0))
        return self

    def reset_star(self, gain: float) -> None:
        """Give each branch of a star its own orthogonal start, and blocks what they begin with."""
        for module in self.modules():
            if isinstance(module, PackedStar | StarStack):
                module.reset_branches(gain)
            if isinstance(module, StarBlock):
                nn.init.orthogonal_(module.mlp.f2.weight, GATE_GAIN)
                end_in_zero(module)
            if isinstance(module, SimBaBlock):
                module.reset_parameters()


class Trunk(nn.Sequential, KeepsInit):
    """Layers from `in_features` to `out_features` channels, one per entry of SB3's `net_arch`.

    Shapes: (batch, in_features) -> (batch, out_features).

    Example:
        >>> trunk = build_trunk("star", 4, [32, 16])
        >>> trunk(torch.randn(8, 4)).shape, trunk.out_features
        (torch.Size([8, 16]), 16)
    """

    def __init__(self, layers: Sequence[nn.Module], in_features: int, out_features: int) -> None:
        super().__init__(*layers)
        self.in_features, self.out_features = in_features, out_features


class Dense(nn.Sequential):
    """A linear layer of a D2RL trunk: the trunk's input joins the input of all but the first."""


class D2RLTrunk(Trunk):
    """The trunk of D2RL: every layer after the first sees the trunk's input again.

    Shapes: (batch, in_features) -> (batch, out_features).
    Source: Sinha et al., "D2RL: Deep Dense Architectures in Reinforcement Learning", 2020,
    arXiv 2010.09163.

    Example:
        >>> build_trunk("d2rl", 4, [32, 32])[1][0].in_features
        36
    """

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i, layer in enumerate(self):
            y = layer(torch.cat([y, x], -1) if i else y)
        return y


class SimBaBlock(nn.Module):
    """The residual block of SimBa: `x + W2 relu(W1 norm(x))`, four times as wide inside.

    Shapes: (batch, dim) -> (batch, dim).
    Source: Lee et al., "SimBa: Simplicity Bias for Scaling Up Parameters in Deep Reinforcement
    Learning", ICLR 2025, arXiv 2410.09754. Its running norm of observations is left to
    `VecNormalize`.

    Example:
        >>> SimBaBlock(8, "relu", nn.LayerNorm)(torch.randn(2, 8)).shape
        torch.Size([2, 8])
    """

    def __init__(self, dim: int, act: Activation, norm: Norm) -> None:
        super().__init__()
        self.norm = norm(dim)
        self.inp, self.out = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.act = activation_module(act)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as published: He's normal weights, no bias."""
        for layer in (self.inp, self.out):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.act(self.inp(self.norm(x))))  # type: ignore[no-any-return]


class ActivationLayer(nn.Module):
    """A row of `ACTIVATIONS` as a module.

    Example:
        >>> ActivationLayer("relu6")(torch.tensor([7.0]))
        tensor([6.])
    """

    def __init__(self, act: str) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return get_activation(self.act).fn(x)

    def extra_repr(self) -> str:
        return repr(self.act)


def end_in_zero(block: StarBlock) -> None:
    """Make a residual star block the identity, as deep residual nets start best."""
    nn.init.zeros_(block.mlp.g.weight)
    nn.init.zeros_(block.mlp.g.bias)


Layers = Iterator[nn.Module]


def _star(
    dim: int, widths: Sequence[int], act: Any, norm: Norm | None, before: Norm | None
) -> Layers:
    for width in widths:
        if before:
            yield before(dim)
        yield PackedStar(dim, width, act=act)
        if norm:
            yield norm(width)
        dim = width


def _mlp(
    dim: int, widths: Sequence[int], act: Any, norm: Norm | None, before: Norm | None
) -> Layers:
    for width in widths:
        if before:
            yield before(dim)
        yield nn.Linear(dim, width)
        if norm:
            yield norm(width)
        yield activation_module(act)
        dim = width


def _d2rl(
    dim: int, widths: Sequence[int], act: Any, norm: Norm | None, before: Norm | None
) -> Layers:
    seen = dim
    for width in widths:
        yield Dense(*_mlp(seen, [width], act, norm, before))
        seen = width + dim


def _residual(
    dim: int,
    widths: Sequence[int],
    act: Any,
    norm: Norm | None,
    before: Norm | None,
    *,
    star: bool,
) -> Layers:
    """An embedding, a block per entry, and a norm; the layout of SimBa."""
    width, norm = widths[0], norm or nn.LayerNorm
    if before:
        yield before(dim)
    yield nn.Linear(dim, width)
    for _ in widths:
        if star:
            block = StarBlock(width, expansion=2, act=act, offset=1.0, pre=norm(width))
            end_in_zero(block)
            yield block
        else:
            yield SimBaBlock(width, act, norm)
    yield norm(width)


#: name of a net -> the layers of its trunk
NETS: dict[str, Callable[..., Layers]] = {
    "star": _star,
    "star_residual": partial(_residual, star=True),
    "mlp": _mlp,
    "d2rl": _d2rl,
    "simba": partial(_residual, star=False),
}
RESIDUAL = ("star_residual", "simba")


def build_trunk(
    net: str,
    in_features: int,
    net_arch: Sequence[int],
    *,
    act: Activation = "relu",
    norm: str | None = None,
    before: Norm | None = None,
) -> Trunk:
    """A trunk of the named net, with one layer or residual block per entry of `net_arch`.

    Args:
        net: a row of `NETS`.
        in_features: channels of the input.
        net_arch: widths; empty for the identity. Residual nets need equal ones.
        act: a row of `ACTIVATIONS`; for nets without stars any class, as SB3 takes it.
        norm: a row of `NORMS`: behind the product of a star, before the activation of a linear
            layer, before a residual block (which always has one); "none" or `None` for none.
        before: makes one more norm in front of each layer, from its channels.

    Raises:
        ValueError: an unknown net or norm, a width below 1, unequal widths of a residual net.
        TypeError: a width that is no integer.

    Example:
        >>> build_trunk("simba", 4, [32, 32])(torch.randn(8, 4)).shape
        torch.Size([8, 32])
    """
    if net not in NETS:
        raise ValueError(f"unknown net {net!r}, choose one of {', '.join(NETS)}")
    norm = None if norm == "none" else norm
    act = activation_row(act) if "star" in net else activation(act)
    if norm is not None and norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}, choose one of {', '.join(NORMS)} or None")
    widths = [positive_int(net, f"net_arch[{i}]", width) for i, width in enumerate(net_arch)]
    if net in RESIDUAL and len(set(widths)) > 1:
        raise ValueError(f"net={net!r} adds its blocks up: net_arch={widths} needs equal widths")
    layers: list[nn.Module] = []
    if widths:
        layers = list(NETS[net](in_features, widths, act, norm and NORMS[norm], before))
    kind = D2RLTrunk if net == "d2rl" else Trunk
    return kind(layers, in_features, widths[-1] if widths else in_features)


def activation(given: str | type[nn.Module] | None) -> Activation:
    """The name of a row of `ACTIVATIONS`, or the class, that a user gave.

    Raises:
        TypeError, ValueError: neither a class nor the name of a row.

    Example:
        >>> activation("swiglu"), activation(None), activation(nn.ELU).__name__
        ('silu', 'identity', 'ELU')
    """
    if given is None or isinstance(given, str):
        return get_activation(given).name
    if not (isinstance(given, type) and issubclass(given, nn.Module)):
        raise TypeError(
            "activation_fn must be a name from ACTIVATIONS or a class such as nn.Tanh, "
            f"got {given!r}"
        )
    return given


def activation_module(act: Activation) -> nn.Module:
    """A module of what `activation` returns.

    Example:
        >>> activation_module(nn.ELU), activation_module("relu6")
        (ELU(alpha=1.0), ActivationLayer('relu6'))
    """
    return act() if isinstance(act, type) else ActivationLayer(act)


def activation_row(given: str | type[nn.Module] | None) -> str:
    """The row of `ACTIVATIONS` that a name, or an activation class as SB3 takes it, stands for.

    Raises:
        ValueError: no row computes what the class does, or no row has the name.
        TypeError: neither a name nor a module class.

    Example:
        >>> activation_row(nn.Tanh), activation_row("gelu"), activation_row(None)
        ('tanh', 'gelu', 'identity')
    """
    found = activation(given)
    row = found if isinstance(found, str) else recognise(found())
    if row is None:
        raise ValueError(
            f"activation_fn={given.__name__}: a star layer needs a row of ACTIVATIONS, and no row "  # type: ignore[union-attr]
            "computes that; register_activation adds one, to be given by its name"
        )
    return row
