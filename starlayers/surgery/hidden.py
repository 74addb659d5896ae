"""Hidden layers that compute linear map and activation in one forward, with a gate."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from starlayers.dispatch import Plan
from starlayers.recompute import recomputed
from starlayers.surgery.adopted import Adopted, adopt, input_name
from starlayers.surgery.projection import LowRankGate, gated, make_gate, zero_
from starlayers.surgery.site import Site, attribute, parent_of
from starlayers.surgery.snapshot import Snapshot


@dataclass
class HiddenRole:
    """Settings of a `GatedHidden`, kept in its attribute `star`.

    Args:
        site: name of its linear layer.
        original: the class that the module had before `starify`.
        spec: the gate, as in `make_gate`.
        recompute: save only the input for the backward pass.
        fused: kept for `mode="fuse"`; the module's own forward runs all the same.
        input_name: name by which the module's forward takes its input.
        snapshot: state of the module when it was verified.
    """

    site: Site
    original: type[nn.Module]
    spec: str
    recompute: bool = False
    fused: bool = False
    input_name: str = ""
    snapshot: Snapshot | None = None


class GatedHidden(Adopted):
    """Hidden layer `y = act(inp(x))` of a foreign model, with a gate: `y * (1 + gate(x))`.

    Its own forward computes `y`, so the activation may be written into it: diffusers' `GELU`, ESM's
    `EsmIntermediate`. The gate is the child `star_gate`; no other name in a state dict changes. It
    is computed as `y + y * gate(x)`, so that a zero gate changes no bit.

    `starify` gives a module of class `C` the class `StarC`, which derives from this one and from
    `C`. A call with other arguments than the input, and a module that was changed after `starify`,
    are errors: whether the gate still fits was not verified.

    Shapes: (..., in) -> (..., hidden), as before.

    Example:
        >>> from starlayers.surgery import revert, starify
        >>> class Widen(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.proj = nn.Linear(4, 8)
        ...     def forward(self, x):
        ...         return torch.relu(self.proj(x))
        >>> class MLP(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = nn.ModuleList([Widen(), nn.Linear(8, 4)])
        ...     def forward(self, x):
        ...         return self.net[1](self.net[0](x))
        >>> mlp, x = MLP(), torch.randn(2, 4)
        >>> before = mlp(x)
        >>> starify(mlp).net[0]
        StarWiden(
          gate='full'
          (proj): Linear(in_features=4, out_features=8, bias=True)
          (star_gate): Linear(in_features=4, out_features=8, bias=True)
        )
        >>> torch.equal(mlp(x), before), isinstance(mlp.net[0], Widen)
        (True, True)
        >>> type(revert(mlp).net[0]) is Widen
        True
    """

    star: HiddenRole

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = self._star_require_as_verified(args, kwargs)
        call: Callable[[Tensor], Tensor] = super().forward
        if self.star.recompute and torch.is_grad_enabled():
            return recomputed(self._star_gated, x, call)
        return self._star_gated(x, call)

    def _star_gated(self, x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        y = call(x)
        return gated(y, self.star_gate(x))  # type: ignore[operator]

    def _star_require_as_verified(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the input of a call, and raise an error if it or the module is another."""
        name, x = type(self).__name__, self._star_input(args, kwargs)
        if x is None:
            raise TypeError(
                f"{name} has a gate and takes its input alone, of 2 to 4 dimensions, got "
                f"{len(args)} positional arguments and the keywords {sorted(kwargs)}; revert gives "
                "the model's layer back"
            )
        called = [part for part, _ in self.named_modules()]  # so that hooks act
        if change := self._star_change(called):
            raise RuntimeError(
                f"{name} was changed after starify: {change}. Its gate was verified with what it "
                "was: change it back, or revert"
            )
        return x

    def star_plan(self, *args: Any, **kwargs: Any) -> Plan:
        """Return the plan for a call: always the module's own forward, and why."""
        return Plan("eager", "its activation is written into its forward")

    def reset_gate(self) -> None:
        """Set the gate to zero, and draw the first layer of a low-rank gate anew."""
        gate: Any = self.star_gate
        if isinstance(gate, LowRankGate):
            gate.down.reset_parameters()  # type: ignore[operator]
        zero_(gate)

    def extra_repr(self) -> str:
        flags = ["recompute"] if self.star.recompute else []
        return ", ".join(filter(None, (super().extra_repr(), f"gate={self.star.spec!r}", *flags)))


def install_hidden(owner: nn.Module, site: Site, spec: str, *, recompute: bool) -> GatedHidden:
    """Give the module around a linear layer a gate, and the class `StarC`."""
    module, leaf = parent_of(owner, site.inp)
    kind = type(module)
    role = HiddenRole(
        replace(site, inp=leaf, out=None),
        kind,
        spec,
        recompute,
        input_name=input_name(module),
        snapshot=Snapshot(module, kind.forward, [leaf]),
    )
    gate = make_gate(spec, attribute(module, leaf)).train(module.training)
    star: GatedHidden = adopt(module, GatedHidden, role)
    star.star_gate = gate
    return star
