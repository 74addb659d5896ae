"""Gated MLPs of existing models (SwiGLU, GEGLU), fused or grown."""

import re
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
    plan_early,
    plan_mlp,
    plan_star,
)
from starlayers.functional import star_packed, star_product
from starlayers.kernels.layer import run_mlp
from starlayers.kernels.registration import compute_dtype
from starlayers.recompute import recomputed
from starlayers.surgery.adopted import Adopted, star_class
from starlayers.surgery.grown import Grown
from starlayers.surgery.linear_layers import Projection, projection
from starlayers.surgery.site import Site, attribute, with_new_names
from starlayers.surgery.snapshot import Snapshot

__all__ = ["GatedMLP"]


@dataclass
class Role:
    """Settings of a `GatedMLP`, kept in its attribute `star`.

    Args:
        site: names of its layers.
        original: the class that the module had before `starify`.
        act_name: name of its activation in `ACTIVATIONS`, `None` if it is not one of them.
        between: names of the modules between the product and the last layer, in order.
        after: names of the modules after the last layer, in order.
        fused: use the kernels of the core; otherwise the module's own forward, to the last bit.
        recompute: save only the input for the backward pass.
        up_first: call the second branch first, as the forward did.
        casts: convert the product to the dtype of the last layer's weight, as the forward did.
        grown: number of products per channel that `grow` added.
        input_name: name by which the module's forward takes its input.
        snapshot: state of the module when it was verified.
    """

    site: Site
    original: type[nn.Module]
    act_name: str | None
    between: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    fused: bool = True
    recompute: bool = False
    grown: int = 0
    input_name: str = ""
    snapshot: Snapshot | None = None
    up_first: bool = False
    casts: bool = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(with_new_names(state))


class GatedMLP(Adopted):
    """Gated MLP of a foreign model, `out(act(gate(x)) * up(x))`, computed by the core.

    `gate` and `up` may be the halves of one packed linear layer. With r grown products (`f1`, `f2`
    in the child `star_grown`) it computes `out(act(gate(x)) * up(x) + sum_r act(f1(x)) * f2(x))`.

    It has no constructor: `starify` gives a module of class `C` the class `StarC`, which derives
    from this one and from `C`. So the module keeps its identity, attributes, methods, children,
    parameter names, hooks and mode, `isinstance(module, C)` holds, and `revert` gives the class
    back. What is not as it was verified runs the forward of `C`: other arguments, a replaced or
    hooked part, a changed option. `star_plan(x)` has the reason.

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
        >>> starify(mlp, mode="fuse")
        StarSwiGLU(
          act=silu, fused=True
          (gate_proj): Linear(in_features=4, out_features=8, bias=True)
          (up_proj): Linear(in_features=4, out_features=8, bias=True)
          (down_proj): Linear(in_features=8, out_features=4, bias=True)
          (act_fn): SiLU()
        )
        >>> torch.allclose(mlp(x), before, atol=1e-6), isinstance(mlp, SwiGLU)
        (True, True)
        >>> type(revert(mlp)) is SwiGLU
        True
    """

    star: Role

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        role, plan = self.star, self.star_plan(*args, **kwargs)
        if plan.weights is not None:
            (x,) = (*args, *kwargs.values())
            act, recompute = role.act_name, role.recompute
            y = run_mlp(plan.path, x, plan.weights, act, 0.0, recompute=recompute)
            return self._star_after(y)
        call: Callable[..., Any] = self.star_original
        if role.grown:
            self._star_require_as_verified(args, kwargs)
            call = self.star_definition
        elif plan.fused:
            call = self.star_definition
        if role.recompute and torch.is_grad_enabled():
            return recomputed(call, *args, **kwargs)
        return call(*args, **kwargs)

    def star_original(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the MLP by the forward of the class that it had."""
        return super().forward(*args, **kwargs)

    def star_sizes(self) -> tuple[int, int, int]:
        """Return the numbers of input, hidden and output channels."""
        site = self.star.site
        inp = projection(attribute(self, site.inp)) or Projection(0, 0)
        hidden = inp.out_features if site.form == "gated" else inp.out_features // 2
        out = projection(attribute(self, site.out)) if site.out else None
        return inp.in_features, hidden, hidden if out is None else out.out_features

    def star_plan(self, *args: Any, **kwargs: Any) -> Plan:
        """Return the plan for a call: what runs, or why it is the module's own forward.

        A fused path is one op for the whole MLP, or "star" for the product alone, where a layer is
        not a plain `nn.Linear`.

        Raises:
            RuntimeError: the backend is "triton" or "cpu" and cannot serve the MLP.
        """
        role, site = self.star, self.star.site
        if not role.fused:
            return Plan("eager", "the model's own activation was asked for, to the last bit")
        x = self._star_input(args, kwargs)
        reason = ""
        if role.act_name is None:
            reason = "no activation of the table computes what the model's does"
        elif x is None:
            reason = "the call has other arguments than one input of a kind that was verified"
        elif torch.compiler.is_compiling():
            # a compiler guards what the module's own forward reads, and fuses the product itself
            return Plan("eager", "being compiled: the compiler sees the module's own forward")
        else:
            reason = self._star_change()
        if reason or x is None:
            return declined(reason, f"this {type(self).__name__}")
        layers = {name: attribute(self, name) for name in site.layers}
        odd = False  # a layer is not a plain `nn.Linear`
        if len(layers) < 3:
            reason = "it has one packed layer, or none after the product: no op for these"
        elif role.grown:
            reason = "it has grown products: no op for these"
        elif any(acts(attribute(self, name)) for name in role.between):
            reason = "a module acts between the product and its last layer"
        else:
            weights = plain_weights(*layers.values())
            if weights is not None:
                plan = plan_mlp(x, weights, role.act_name, recompute=role.recompute)
                if plan.fused:
                    return plan
            odd = weights is None
            reason = attached(layers) if odd else plan.reason
        early = plan_early(x)
        if early is not None:  # no kernel for the product either
            return Plan("eager", f"{reason}; its product alone: {early.reason}" if odd else reason)
        # the product alone: its branches have the dtype that linear layers give them
        h = x.new_empty(1, dtype=compute_dtype(x)).expand(*x.shape[:-1], self.star_sizes()[1])
        plan = plan_star(h, h, role.act_name)
        return plan if plan.fused else Plan("eager", reason)

    def star_definition(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the MLP by its own layers and the product of the core."""
        (x,) = (*args, *kwargs.values())
        role, site = self.star, self.star.site
        b = attribute(self, site.up)(x) if site.up is not None and role.up_first else None
        h = attribute(self, site.inp)(x)
        if site.up is not None:
            y = self._star_product(h, attribute(self, site.up)(x) if b is None else b)
        elif role.fused and role.act_name is not None and not site.gate_last:
            y = star_packed(h, role.act_name)
        else:
            y = self._star_product(*split_packed(h, gate_last=site.gate_last))
        if role.grown:
            y = y + self._star_grown_product(x, y)
        for name in role.between:
            y = attribute(self, name)(y)
        if site.out is None:
            return y
        out = attribute(self, site.out)
        if role.casts:  # T5 keeps its last layer in float32
            dtype = getattr(getattr(out, "weight", None), "dtype", y.dtype)
            y = y.to(dtype) if dtype.is_floating_point and dtype != y.dtype else y
        return self._star_after(out(y))

    def _star_grown_product(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the sum of the grown products; raise an error if `y` has another size."""
        grown: Any = self.star_grown
        product = grown(x, self._star_product) if x.shape[-1] == grown.f1.in_features else None
        # sizes of the results, of which a process of tensor parallelism has a part
        if product is None or product.shape[-1] != y.shape[-1]:
            hidden = grown.f1.out_features // grown.rank
            raise RuntimeError(
                f"{type(self).__name__} has grown products of {grown.f1.in_features} to {hidden} "
                f"channels, its layers now compute {x.shape[-1]} to {y.shape[-1]}: starify after "
                "pruning, or revert"
            )
        return product  # type: ignore[no-any-return]

    def _star_after(self, y: Tensor) -> Tensor:
        for name in self.star.after:
            y = attribute(self, name)(y)
        return y

    def _star_product(self, a: Tensor, b: Tensor) -> Tensor:
        """Return `act(a) * b`, by the core if it is as verified, else by the module's own act."""
        role = self.star
        own = torch.compiler.is_compiling() or not role.fused or self._star_change() != ""
        if role.act_name is not None and (role.site.act is None or not own):
            return star_product(a, b, role.act_name)
        act = attribute(self, role.site.act or "")
        return act(a) * b  # type: ignore[no-any-return]

    def _star_require_as_verified(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise an error where grown products are no part of what a call would compute."""
        name, act = type(self).__name__, self.star.site.act
        if self._star_input(args, kwargs) is None:
            raise TypeError(
                f"{name} has grown products, and takes its input alone, a dense tensor of 2 to 4 "
                "dimensions of a usual float type, no parameter and without attributes of yours; "
                f"got {_in_words(args, kwargs)}; revert gives the model's MLP back"
            )
        called = [part for part in (act, *self.star.between) if part is not None]
        change = self._star_change(called)
        if change and not (
            act and re.match(rf"(the (class|forward) of )?{re.escape(act)}\b", change)
        ):
            raise RuntimeError(
                f"{name} was changed after starify: {change}. Its grown products were verified "
                "with what it was: change it back, or revert"
            )

    def extra_repr(self) -> str:
        details = {name: getattr(self.star, name) for name in ("fused", "recompute", "grown")}
        details = {"act": self.star.act_name, **details}
        added = ", ".join(f"{name}={value}" for name, value in details.items() if value)
        return ", ".join(filter(None, (super().extra_repr(), added)))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if isinstance(grown := self._modules.get("star_grown"), Grown):
            grown.settle_pickled(self.star.grown)
        if type(self) is GatedMLP:  # pickled by an earlier version
            self.__class__ = star_class(self.star.original, GatedMLP)  # type: ignore[assignment]


def split_packed(h: Tensor, *, gate_last: bool) -> tuple[Tensor, Tensor]:
    """Split the output of a packed layer: first the activated branch."""
    first, second = h.chunk(2, -1)
    return (second, first) if gate_last else (first, second)


def _in_words(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    given = [*args, *kwargs.values()]
    if len(given) == 1 and isinstance(given[0], Tensor):
        (x,) = given
        kind = type(x).__name__
        if x.is_nested:
            return f"a nested {kind}"
        under = " under autocast" if torch.is_autocast_enabled(x.device.type) else ""
        return f"a {kind} of shape {tuple(x.shape)}, {x.dtype}, {x.layout}{under}"
    return f"{len(args)} positional arguments and the keywords {sorted(kwargs)}"


#: modules of PyTorch that are the identity in eval mode; a class derived from one may be anything
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


def acts(module: nn.Module) -> bool:
    """Return True unless a module is the identity: a dropout that drops nothing now."""
    if type(module) in DROPOUTS:
        return module.training and module.p > 0  # type: ignore[operator, return-value]
    return type(module) is not nn.Identity
