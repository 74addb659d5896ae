"""MLPs that already are stars: their own layers, names and weights on the core's fused forward."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from starlayers.backend import fused_mlp_blocker, recomputed, star_blocker
from starlayers.functional import star_packed, star_product
from starlayers.modules import StarMLP
from starlayers.surgery.site import (
    Projection,
    Site,
    attribute,
    dtype_and_device,
    halves,
    projection,
)

__all__ = ["GatedMLP", "Grown", "Role", "adopt", "grow", "release"]


@dataclass
class Role:
    """What a `GatedMLP` knows beside the attributes of the module it was.

    Args:
        site: the names of its layers.
        original: the class it had.
        row: the row of `ACTIVATIONS` its activation is, where one was recognised.
        between: names of the modules between the product and the last projection, in order.
        fused: use the core's kernels; otherwise the model's own activation, to the last bit.
        recompute: save only the input for the backward.

    Example:
        >>> Role(Site("gated", "gated", "gate", "act", "down", up="up"), nn.Module, "silu").fused
        True
    """

    site: Site
    original: type[nn.Module]
    row: str | None
    between: tuple[str, ...] = ()
    fused: bool = True
    recompute: bool = False
    #: products added per channel
    grown: int = 0


@dataclass
class _View:
    """A gated MLP as the fused ops read one; made anew for each call, since layers get replaced."""

    f1: nn.Linear
    f2: nn.Linear
    g: nn.Linear
    act: str
    in_features: int
    hidden_features: int
    out_features: int
    recompute: bool
    combine: str = "mul"
    rank: int = 1
    offset: float = 0.0
    coefficients: str = "fixed"


class GatedMLP(nn.Module):
    """What a gated MLP becomes: `out(act(gate(x)) * up(x))`, or the same from a packed projection.

    Not constructed: `starify` changes the class of an existing module, which keeps its identity,
    children, parameter names, hooks and mode; `revert` gives the class back.

    Shapes: (..., in) -> (..., out), those of the module it was.

    Example:
        >>> from starlayers.surgery import starify
        >>> class MLP(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.gate_proj = nn.Linear(4, 8)
        ...         self.up_proj = nn.Linear(4, 8)
        ...         self.down_proj = nn.Linear(8, 4)
        ...         self.act_fn = nn.SiLU()
        ...     def forward(self, x):
        ...         return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        >>> mlp = starify(MLP(), mode="fuse")
        >>> type(mlp).__name__, [name for name, _ in mlp.named_children()]
        ('GatedMLP', ['gate_proj', 'up_proj', 'down_proj', 'act_fn'])
    """

    star: Role

    # What is ours has a prefix: the module may hold layers of any name.

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        (x,) = (*args, *kwargs.values())  # the model may call its MLP by keyword
        view = self._star_view()
        if view is not None and fused_mlp_blocker(view, x) is None:
            from starlayers.kernels.layer import fused_star_mlp  # defines the ops, on first use

            return fused_star_mlp(view, x, None)
        if self.star.recompute and torch.is_grad_enabled():
            return recomputed(self._star_eager, x)
        return self._star_eager(x)

    def star_sizes(self) -> tuple[int, int, int]:
        """Input, hidden and output channels."""
        site = self.star.site
        inp = projection(attribute(self, site.inp)) or Projection(0, 0)
        out = projection(attribute(self, site.out or "")) or Projection(0, 0)
        return inp.in_features, out.in_features, out.out_features

    def star_hidden(self, x: Tensor) -> Tensor:
        """What the last projection takes: the product, grown and with what follows it."""
        h = self._star_product(x)
        for name in self.star.between:
            h = attribute(self, name)(h)
        return h

    def _star_view(self) -> StarMLP | None:
        """The whole MLP for one fused op, where nothing but its three layers is at work."""
        role, site = self.star, self.star.site
        if not role.fused or role.row is None or role.grown or site.form != "gated":
            return None
        if self.training and any(_drops(attribute(self, name)) for name in role.between):
            return None
        n, f, out = self.star_sizes()
        f1, f2, g = (attribute(self, name) for name in (site.inp, site.up or "", site.out or ""))
        return cast(StarMLP, _View(f1, f2, g, role.row, n, f, out, role.recompute))

    def _star_eager(self, x: Tensor) -> Tensor:
        h = self.star_hidden(x)
        out = attribute(self, self.star.site.out or "")
        dtype = getattr(getattr(out, "weight", None), "dtype", h.dtype)
        if dtype.is_floating_point and dtype != h.dtype:  # T5 keeps its last projection in fp32
            h = h.to(dtype)
        return out(h)  # type: ignore[no-any-return]

    def _star_product(self, x: Tensor) -> Tensor:
        role, site = self.star, self.star.site
        act: Callable[[Tensor], Tensor] = attribute(self, site.act)
        row = role.row if role.fused else None
        h = attribute(self, site.inp)(x)
        a, b = halves(h, site) if site.up is None else (h, attribute(self, site.up)(x))
        whole = row is not None and site.up is None and not site.gate_last
        if whole and star_blocker(a, b, row) is None:
            y = star_packed(h, row)
        else:
            y = _times(a, b, act, row)
        if role.grown:
            grown: Any = self.star_grown
            pairs = _times(grown.f1(x), grown.f2(x), act, row)
            y = y + pairs.unflatten(-1, (role.grown, -1)).sum(-2)
        return y

    def extra_repr(self) -> str:
        extras = {"was": self.star.original.__name__, "act": self.star.row}
        flags = {name: getattr(self.star, name) for name in ("fused", "recompute", "grown")}
        return ", ".join(f"{k}={v}" for k, v in {**extras, **flags}.items() if v)


def _times(a: Tensor, b: Tensor, act: Callable[[Tensor], Tensor], row: str | None) -> Tensor:
    """The star of two branches, by the core where `act` is one of its rows."""
    if row is not None and star_blocker(a, b, row) is None:
        return star_product(a, b, row)
    return act(a) * b


class Grown(nn.Module):
    """The products that were added to a gated MLP: two linear layers, the second zero at first.

    Its owner runs them, with its own activation; the outputs lie as (rank, hidden).

    Example:
        >>> Grown(4, 8, 2, bias=False).f2.weight.shape
        torch.Size([16, 4])
    """

    def __init__(self, n: int, hidden: int, rank: int, **factory: Any) -> None:
        super().__init__()
        self.f1 = nn.Linear(n, rank * hidden, **factory)
        self.f2 = skip_init(nn.Linear, n, rank * hidden, **factory)
        self.reset()

    def reset(self) -> None:
        """Make the products zero, by their second factors, and the first ones random."""
        self.f1.reset_parameters()
        for parameter in self.f2.parameters():
            nn.init.zeros_(parameter)


def adopt(module: nn.Module, role: Role) -> GatedMLP:
    """Change the class of a module in place to `GatedMLP`."""
    module.star = role  # type: ignore[assignment]
    module.__class__ = GatedMLP
    assert isinstance(module, GatedMLP)
    return module


def release(module: GatedMLP) -> nn.Module:
    """Give a module its own class back, and drop the products that were added."""
    original = module.star.original
    module._modules.pop("star_grown", None)
    del module.star
    module.__class__ = original  # type: ignore[assignment]
    return module


def grow(module: GatedMLP, rank: int) -> None:
    """Add `rank` products per channel to a gated MLP, whose second factors are zero."""
    inp = attribute(module, module.star.site.inp)
    n, f, _ = module.star_sizes()
    dtype, device = dtype_and_device(inp)
    bias = getattr(inp, "bias", None) is not None
    grown = Grown(n, f, rank, bias=bias, dtype=dtype, device=device)
    module.star_grown = grown.train(module.training)
    module.star.grown = rank


def _drops(module: Any) -> bool:
    return not isinstance(module, nn.Identity) and getattr(module, "p", 1.0) > 0.0
