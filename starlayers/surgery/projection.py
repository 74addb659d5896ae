"""The star projection: an MLP's first layer, its activation, and the gate beside them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from starlayers.backend import recomputed
from starlayers.functional import star_product
from starlayers.surgery.site import Projection, Site, dtype_and_device, projection

__all__ = [
    "AnnealedActivation",
    "LowRankGate",
    "ScaleGate",
    "StarProjection",
    "make_gate",
    "parse_gate",
]


class AnnealedActivation(nn.Module):
    """An activation on its way to none: `(1 - t) * act(x) + t * x`, t a number from 0 to 1.

    Shapes: (...) -> (...).

    Example:
        >>> AnnealedActivation(nn.ReLU(), 0.25)(torch.tensor([-1.0, 1.0]))
        tensor([-0.2500,  1.0000])
    """

    def __init__(self, act: nn.Module | Callable[[Tensor], Tensor], t: float = 0.0) -> None:
        super().__init__()
        self.act = act
        self.t = t

    def forward(self, x: Tensor) -> Tensor:
        if self.t == 0.0:
            return self.act(x)
        # act may work in place, as nn.ReLU(inplace=True) does
        return x if self.t == 1.0 else torch.lerp(self.act(x.clone()), x, self.t)

    def extra_repr(self) -> str:
        return f"t={self.t}"


class ScaleGate(nn.Module):
    """A gate that is one learned number per channel, whatever the input; zero at first.

    Shapes: any -> (hidden,), or (hidden, 1, 1) for maps.

    Example:
        >>> ScaleGate(Projection(2, 3), dtype=torch.float32, device="cpu")(torch.ones(5, 2))
        Parameter containing:
        tensor([0., 0., 0.], requires_grad=True)
    """

    def __init__(
        self, sizes: Projection, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        shape = (sizes.out_features, 1, 1) if sizes.channels_first else (sizes.out_features,)
        self.weight = nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight

    def extra_repr(self) -> str:
        return str(len(self.weight))


class LowRankGate(nn.Module):
    """A gate through `rank` channels, `up(down(x))`, with a zero `up`.

    Shapes: (..., in) -> (..., hidden), or the same at dimension 1 for maps.

    Example:
        >>> gate = LowRankGate(Projection(4, 6), 2, dtype=torch.float32, device="cpu")
        >>> gate(torch.randn(3, 4)).shape
        torch.Size([3, 6])
    """

    def __init__(
        self, sizes: Projection, rank: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        n, f, first = sizes
        self.down = _linear(Projection(n, rank, first), zero=False, dtype=dtype, device=device)
        self.up = _linear(Projection(rank, f, first), zero=True, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))  # type: ignore[no-any-return]


def _linear(
    sizes: Projection, *, zero: bool, dtype: torch.dtype, device: torch.device | str
) -> nn.Module:
    n, f, channels_first = sizes
    kind: Any = nn.Conv2d if channels_first else nn.Linear
    factory: dict[str, Any] = {"bias": zero, "dtype": dtype, "device": device}
    # what is made zero draws no random numbers first
    make = partial(skip_init, kind) if zero else kind
    layer: nn.Module = make(n, f, 1, **factory) if channels_first else make(n, f, **factory)
    if zero:
        zero_(layer)
    return layer


def parse_gate(spec: str) -> tuple[str, int]:
    """The kind of a gate and its rank: "full", "scale" or "low_rank=r".

    Raises:
        TypeError: `spec` is not a string.
        ValueError: it is none of the three, or the rank is no integer of at least 1.

    Example:
        >>> parse_gate("low_rank=8"), parse_gate("full")
        (('low_rank', 8), ('full', 0))
    """
    if not isinstance(spec, str):
        raise TypeError(f"gate must be 'full', 'scale' or 'low_rank=r', got {spec!r}")
    kind, _, rank = spec.partition("=")
    if kind in ("full", "scale") and not rank:
        return kind, 0
    if kind == "low_rank" and rank.isdecimal() and int(rank) >= 1:
        return kind, int(rank)
    raise ValueError(
        f"unknown gate {spec!r}, choose 'full', 'scale' or 'low_rank=r' with r of at least 1, "
        "as in 'low_rank=8'"
    )


def make_gate(spec: str, inp: nn.Module) -> nn.Module:
    """A zero gate for the projection `inp`, in its type and on its device.

    Raises:
        TypeError, ValueError: as `parse_gate`.

    Example:
        >>> make_gate("full", nn.Linear(4, 8)).weight.abs().max().item()
        0.0
    """
    kind, rank = parse_gate(spec)
    sizes = projection(inp)
    if sizes is None:
        raise ValueError(f"{type(inp).__name__} is no linear layer or 1x1 convolution")
    dtype, device = dtype_and_device(inp)
    if kind == "scale":
        return ScaleGate(sizes, dtype=dtype, device=device)
    if kind == "low_rank":
        return LowRankGate(sizes, rank, dtype=dtype, device=device)
    return _linear(sizes, zero=True, dtype=dtype, device=device)


def zero_(gate: nn.Module) -> None:
    """Make a gate zero, and leave the random half of a low-rank one as it is."""
    last = gate.up if isinstance(gate, LowRankGate) else gate
    for parameter in last.parameters():  # type: ignore[union-attr]
        nn.init.zeros_(parameter)


class StarProjection(nn.Module):
    """The first half of a starified MLP: `act(inp(x)) * (1 + gate(x))`.

    Shapes: those of `inp`, (..., in) -> (..., hidden). With a zero gate the result equals
    `act(inp(x))` to the bit in every dtype, because it is computed as `a + a * gate(x)`; a small
    gate is not rounded away beside the 1 either.

    Args:
        inp: the model's own projection, called as it is: its hooks, adapters and weights stay.
        act: the model's own activation.
        gate: the new branch.
        site: where the MLP lies, so that it can be taken out again.
        spec: the name of the gate, as in `make_gate`.
        row: the row of `ACTIVATIONS` that `act` is, where one was recognised.
        fused: take the product through the core's kernels, which round once but are not held to
            the last bit of `act`; needs `row`.
        recompute: save only `x` for the backward.

    Example:
        >>> inp = nn.Linear(4, 8)
        >>> site = Site("chain", "plain", "0", "1", "2")
        >>> star = StarProjection(inp, nn.GELU(), make_gate("full", inp), site, spec="full")
        >>> x = torch.randn(2, 4)
        >>> torch.equal(star(x), nn.GELU()(inp(x)))
        True
    """

    def __init__(
        self,
        inp: nn.Module,
        act: nn.Module | Callable[[Tensor], Tensor],
        gate: nn.Module,
        site: Site,
        *,
        spec: str,
        row: str | None = None,
        fused: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.inp = inp
        self.act = act
        self.gate = gate
        self.site = site
        self.spec = spec
        self.row = row
        self.fused = fused
        self.recompute = recompute
        #: attributes of the owner that had to change with it, and what they were
        self.undo: dict[str, Any] = {}
        self.train(inp.training)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return recomputed(self._star, x, *args, **kwargs)
        return self._star(x, *args, **kwargs)

    def _star(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        h = self.inp(x, *args, **kwargs)
        if self.fused and self.row is not None:
            return star_product(h, self.gate(x).to(h.dtype), self.row, offset=1.0)
        a = self.act(h)
        return torch.addcmul(a, a, self.gate(x).to(a.dtype))

    def star_hidden(self, x: Tensor) -> Tensor:
        """What the last projection takes: the output itself."""
        return self._star(x)

    # Models ask the projection they once had for its type and sizes.
    @property
    def weight(self) -> Tensor:
        """The weight of the model's own projection."""
        return self.inp.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The bias of the model's own projection."""
        return self.inp.bias  # type: ignore[return-value]

    @property
    def in_features(self) -> int:
        """Channels of the input."""
        return (projection(self.inp) or Projection(0, 0)).in_features

    @property
    def out_features(self) -> int:
        """Channels of the product."""
        return (projection(self.inp) or Projection(0, 0)).out_features

    def reset_gate(self) -> None:
        """Make the gate zero again; what a gate made on the meta device needs once it is real."""
        if isinstance(self.gate, LowRankGate):
            self.gate.down.reset_parameters()  # type: ignore[operator]
        zero_(self.gate)

    def extra_repr(self) -> str:
        extras = [f"gate={self.spec!r}"]
        extras += [name for name in ("fused", "recompute") if getattr(self, name)]
        return ", ".join(extras)
