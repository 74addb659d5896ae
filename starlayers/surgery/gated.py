"""Gated MLPs of existing models (SwiGLU, GEGLU), fused or grown."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from starlayers.attached import attached
from starlayers.dispatch import (
    Plan,
    declined,
    plain_weights,
    plan_mlp,
    plan_star,
)
from starlayers.functional import star_packed, star_product
from starlayers.kernels.layer import run_mlp
from starlayers.recompute import recomputed
from starlayers.surgery.grown import Grown
from starlayers.surgery.linear_layers import Projection, projection
from starlayers.surgery.site import Site, attribute, with_new_names

__all__ = ["GatedMLP"]


@dataclass
class Role:
    """Settings of a `GatedMLP`, kept in its attribute `star`.

    Args:
        site: names of its layers.
        original: the class that the module had before `starify`.
        act_name: name of its activation in `ACTIVATIONS`, `None` if it is not one of them.
        between: names of the modules between the product and the last layer, in order.
        fused: use the kernels of the core; otherwise the module's own activation, to the last bit.
        recompute: save only the input for the backward pass.
        grown: number of products per channel that `grow` added.
    """

    site: Site
    original: type[nn.Module]
    act_name: str | None
    between: tuple[str, ...] = ()
    fused: bool = True
    recompute: bool = False
    grown: int = 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(with_new_names(state))


class GatedMLP(nn.Module):
    """Gated MLP of a foreign model, `out(act(gate(x)) * up(x))`, computed by the core.

    `gate` and `up` may be the halves of one packed linear layer. With r grown products (`f1`, `f2`
    in the child `star_grown`) it computes `out(act(gate(x)) * up(x) + sum_r act(f1(x)) * f2(x))`.

    It has no constructor: `starify` changes the class of an existing module in place, which keeps
    its identity, children, parameter names, hooks and mode, and `revert` gives the class back.

    Shapes: (..., in) -> (..., out), as before.

    Example:
        >>> from starlayers.surgery import revert, starify
        >>> class SwiGLU(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.gate_proj = nn.Linear(4, 8)
        ...         self.up_proj = nn.Linear(4, 8)
        ...         self.down_proj = nn.Linear(8, 4)
        ...         self.act_fn = nn.SiLU()
        ...     def forward(self, x):
        ...         return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        >>> mlp, x = SwiGLU(), torch.randn(2, 4)
        >>> before = mlp(x)
        >>> isinstance(starify(mlp, mode="fuse"), GatedMLP)
        True
        >>> torch.allclose(mlp(x), before, atol=1e-6)
        True
        >>> isinstance(revert(mlp), SwiGLU)
        True
    """

    star: Role

    # Names that this class adds begin with "star": the module may have layers of any other name.

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if isinstance(grown := self._modules.get("star_grown"), Grown):
            grown.settle_pickled(self.star.grown)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        (x,) = (*args, *kwargs.values())  # the model may pass its MLP's input by keyword
        plan, role = self.star_plan(x), self.star
        if plan.weights is not None:
            act, recompute = role.act_name, role.recompute
            return run_mlp(plan.path, x, plan.weights, act, 0.0, recompute=recompute)
        if self.star.recompute and torch.is_grad_enabled():
            return recomputed(self._star_eager, x)
        return self._star_eager(x)

    def star_sizes(self) -> tuple[int, int, int]:
        """Return the numbers of input, hidden and output channels."""
        site = self.star.site
        inp = projection(attribute(self, site.inp)) or Projection(0, 0)
        out = projection(attribute(self, site.out or "")) or Projection(0, 0)
        return inp.in_features, out.in_features, out.out_features

    def star_plan(self, x: Tensor) -> Plan:
        """Return the plan for one fused op: what runs, or why it is the definition.

        Raises:
            RuntimeError: the backend is "triton" or "cpu" and cannot serve the MLP.
        """
        role, site = self.star, self.star.site
        if not role.fused:
            return Plan("eager", "the model's own activation was asked for, to the last bit")
        if role.act_name is None:
            return Plan("eager", "no activation of the table computes what the model's does")
        if role.grown or site.form != "gated":
            return Plan("eager", "it has grown products or one packed layer: no op for these")
        if self.training and any(is_active_dropout(attribute(self, n)) for n in role.between):
            return Plan("eager", "a dropout acts before its last layer")
        layers = {name or "": attribute(self, name or "") for name in (site.inp, site.up, site.out)}
        weights = plain_weights(*layers.values())
        if weights is None:
            return declined(attached(layers), "this GatedMLP")
        return plan_mlp(x, weights, role.act_name, recompute=role.recompute)

    def _star_eager(self, x: Tensor) -> Tensor:
        h = self._star_product(x)
        for name in self.star.between:
            h = attribute(self, name)(h)
        out = attribute(self, self.star.site.out or "")
        dtype = getattr(getattr(out, "weight", None), "dtype", h.dtype)
        if dtype.is_floating_point and dtype != h.dtype:  # T5 keeps its last layer in float32
            h = h.to(dtype)
        return out(h)  # type: ignore[no-any-return]

    def _star_product(self, x: Tensor) -> Tensor:
        role, site = self.star, self.star.site
        act: Callable[[Tensor], Tensor] = attribute(self, site.act)
        act_name = role.act_name if role.fused else None
        h = attribute(self, site.inp)(x)
        if site.up is None:
            a, b = split_packed(h, gate_last=site.gate_last)
        else:
            a, b = h, attribute(self, site.up)(x)
        packed = act_name is not None and site.up is None and not site.gate_last
        if packed and plan_star(a, b, act_name).fused:
            y = star_packed(h, act_name)
        else:
            y = _product(a, b, act, act_name)
        if role.grown:
            y = y + self.star_grown(x, lambda a, b: _product(a, b, act, act_name))  # type: ignore[operator]
        return y

    def extra_repr(self) -> str:
        details = {"was": self.star.original.__name__, "act": self.star.act_name}
        details |= {name: getattr(self.star, name) for name in ("fused", "recompute", "grown")}
        return ", ".join(f"{name}={value}" for name, value in details.items() if value)


def split_packed(h: Tensor, *, gate_last: bool) -> tuple[Tensor, Tensor]:
    """Split the output of a packed layer: first the activated branch."""
    first, second = h.chunk(2, -1)
    return (second, first) if gate_last else (first, second)


def _product(a: Tensor, b: Tensor, act: Callable[[Tensor], Tensor], act_name: str | None) -> Tensor:
    """Return `act(a) * b`, by a kernel if `act_name` is given and a kernel can run."""
    if act_name is not None and plan_star(a, b, act_name).fused:
        return star_product(a, b, act_name)
    return act(a) * b


def adopt(module: nn.Module, role: Role) -> GatedMLP:
    """Change the class of a module to `GatedMLP`, in place."""
    module.star = role  # type: ignore[assignment]
    module.__class__ = GatedMLP
    assert isinstance(module, GatedMLP)
    return module


def release(module: GatedMLP) -> nn.Module:
    """Give a module its original class back, and remove grown products."""
    original = module.star.original
    module._modules.pop("star_grown", None)
    del module.star
    module.__class__ = original  # type: ignore[assignment]
    return module


def is_active_dropout(module: Any) -> bool:
    """Return True if a module may change its input in train mode.

    It is one between product and last layer, which `verify` found to be the identity in eval mode.
    A module without a dropout rate `p` may do anything in train mode.
    """
    return not isinstance(module, nn.Identity) and getattr(module, "p", 1.0) > 0.0
