"""Mixtures of experts: star experts in transformers' experts interface."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from starlayers.activations import ACTIVATIONS
from starlayers.dispatch import Plan, declined, plan_early, plan_star
from starlayers.functional import star_packed_product
from starlayers.recompute import recomputed
from starlayers.surgery.adopted import Adopted, adopt
from starlayers.surgery.experts_gate import (
    DTYPES,
    Gate,
    gate_width,
    verify_gate,
    without_weights,
)
from starlayers.surgery.experts_loop import Loop, loop_over_experts, verify_loop
from starlayers.surgery.snapshot import Snapshot, signature
from starlayers.surgery.stacked_weights import stacked_experts

__all__ = ["StarExperts"]

#: name of the gate's method in transformers' experts interface
GATE = "_apply_gate"


@dataclass
class ExpertsRole:
    """Settings of a `StarExperts`, kept in its attribute `star`.

    Args:
        original: the class that the experts had before.
        act_name: name of the activation in `ACTIVATIONS`.
        gate: state of the experts on which the verification of their gate rests.
        own_loop: the loop of the class, as it was compared with ours.
        autocast: autocast leaves the gate as it is.
        width: the only number of channels for which the gate was verified, 0 for any.
        loop: why the class's own loop over the experts is kept, "" if ours can replace it.
        recompute: save only the input for the backward pass.
    """

    original: type[nn.Module]
    act_name: str
    gate: Snapshot
    own_loop: Snapshot
    autocast: bool = False
    width: int = 0
    loop: str = ""
    recompute: bool = False

    def __post_init__(self) -> None:
        _mark_constant()

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        _mark_constant()


class StarExperts(Adopted):
    """Experts of a foreign model, `W2 (act(x W1) * x V1)` each, with the product of the core.

    It is a base class beside the model's own: experts of class C become a `StarC`, which is a C
    with all its attributes. All else is the model's: its implementation of the experts
    (`config._experts_implementation`: "grouped_mm", "batched_mm", "eager", ...) multiplies the
    matrices and calls `_apply_gate` for the product. The model's own gate runs where no kernel
    does, and where it is not as it was verified.

    Example:
        >>> from starlayers import starify
        >>> from transformers import MixtralConfig, MixtralModel
        >>> config = MixtralConfig(
        ...     vocab_size=9, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        ...     num_attention_heads=2, num_key_value_heads=1, num_local_experts=4)
        >>> experts = starify(MixtralModel(config), mode="fuse").layers[0].mlp.experts
        >>> isinstance(experts, StarExperts), type(experts).__name__, experts.star.act_name
        (True, 'StarMixtralExperts', 'silu')
    """

    star: ExpertsRole

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.star.recompute and torch.is_grad_enabled():
            return recomputed(self._star_forward, *args, **kwargs)
        return self._star_forward(*args, **kwargs)

    def _star_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        # the place for whole experts in one kernel, once the core has a grouped one
        if implementation(self) == "eager" and len(args) == 3 and self._star_loops(args[0]):
            return loop_over_experts(self, *args, **kwargs)
        return super().forward(*args, **kwargs)  # type: ignore[no-any-return]

    def _star_loops(self, x: Tensor) -> bool:
        """Return True to run our loop: most classes write the product into theirs."""
        if self.star.loop or plan_early(x) is not None:
            return False
        reason = self.star_obstacle() or self.star.own_loop.change(self, self.star.original.forward)
        return not reason or declined(reason, "these experts").fused

    def _apply_gate(self, gate_up_out: Tensor) -> Tensor:
        if self.star_plan(gate_up_out).fused:
            return star_packed_product(gate_up_out, self.star.act_name)
        return super()._apply_gate(gate_up_out)  # type: ignore[misc, no-any-return]

    def star_plan(self, h: Tensor) -> Plan:
        """Return the plan for the product of both halves of `h` (rows, 2 f).

        Raises:
            RuntimeError: the backend is "triton" and no kernel applies, or the gate is not as it
                was verified.
        """
        x1, x2 = h.chunk(2, -1)
        plan = plan_star(x1, x2, self.star.act_name)
        if not plan.fused:
            return plan
        reason = self.star_obstacle()
        known = h.ndim == 2 and h.shape[-1] == (self.star.width or h.shape[-1])
        if not reason and not (known and h.dtype in DTYPES):
            reason = f"the gate was not verified for {h.dtype} of shape {tuple(h.shape)}"
        if not reason and not self.star.autocast and torch.is_autocast_enabled(h.device.type):
            reason = "autocast changes the model's own gate"
        return declined(reason, "these experts") if reason else plan

    def star_obstacle(self) -> str:
        """Return why the gate is not as it was verified, "" if it is."""
        return str(_change_of(self))

    def extra_repr(self) -> str:
        role = self.star
        parts = [super().extra_repr(), f"act={role.act_name}", "recompute=True" * role.recompute]
        return ", ".join(filter(None, parts))


def _change_of(experts: StarExperts) -> str:
    """Return what has changed of a gate; under a compiler, what has changed by then."""
    role = experts.star
    return role.gate.change(experts, _gate_of(role.original))


@cache
def _mark_constant() -> None:
    """Make compilers call `_change_of` once; not at import, because it loads the compiler."""
    torch.compiler.assume_constant_result(_change_of)  # type: ignore[no-untyped-call]


def _gate_of(kind: type[nn.Module]) -> Any:
    return getattr(kind, GATE)


def implementation(experts: nn.Module) -> str:
    """Return the experts implementation that a module's config names, "" if none."""
    name = getattr(getattr(experts, "config", None), "_experts_implementation", None)
    return name or ""


def adopt_experts(
    experts: nn.Module, gate: Gate, loop: Loop, *, recompute: bool = False
) -> StarExperts:
    """Change the class of verified experts to a `StarExperts`, in place."""
    original, children = type(experts), [name for name, _ in experts.named_children()]
    others = [name for name in children if name not in gate.reads]
    role = ExpertsRole(
        original,
        gate.act_name,
        Snapshot(experts, _gate_of(original), others, names=gate.reads, method=GATE),
        Snapshot(experts, original.forward, children, names=()),
        gate.autocast,
        gate.width,
        loop.reason,
        recompute,
    )
    star: StarExperts = adopt(experts, StarExperts, role)
    return star


# finding


class Names(Protocol):
    """Selection of names, as `find.NameFilter`."""

    def __contains__(self, name: str, /) -> bool: ...


@dataclass(frozen=True)
class ExpertsFinding:
    """Experts of a model that are no star experts yet.

    Args:
        path: name of the experts module.
        experts: the module.
        gate: what is known of its gate.
    """

    path: str
    experts: nn.Module
    gate: Gate


def installed_experts(model: nn.Module) -> Iterator[tuple[str, StarExperts]]:
    """Yield name and module of all star experts."""
    for path, module in model.named_modules():
        if isinstance(module, StarExperts):
            yield path, module


def experts_names(model: nn.Module) -> list[str]:
    """Return the names of all modules of experts, star experts among them."""
    return [path for path, _, _ in _experts(model)]


def find_experts(model: nn.Module, selected: Names) -> list[ExpertsFinding]:
    """Return the selected experts of a model that are no star experts, each verified."""
    return [
        ExpertsFinding(path, m, Gate("", reason) if reason else cached(verify_gate, m))
        for path, m, reason in _experts(model)
        if path in selected and not isinstance(m, StarExperts)
    ]


#: results by function and signature, and the objects whose ids are in it
_results: dict[Any, tuple[Any, Any]] = {}
MOST_RESULTS = 256


def cached(verify: Callable[[nn.Module], Any], experts: nn.Module) -> Any:
    """Return `verify(experts)`, once for experts that differ in nothing but their weights."""
    own, kept = signature(without_weights(experts))
    rows = ACTIVATIONS.values()
    key = verify, own, gate_width(experts), tuple(map(id, rows))
    if key not in _results:
        if len(_results) >= MOST_RESULTS:
            _results.clear()
        _results[key] = verify(experts), (kept, *rows)
    return _results[key][0]


def _experts(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield name and module of experts; the reason is for those outside of the interface."""
    inside: set[int] = set()
    for path, module in model.named_modules():
        if id(module) in inside:
            continue
        served = has_interface(module)
        reason = "" if served else stacked_experts(path, module)
        if served or reason:
            inside.update(map(id, module.modules()))
            yield path, module, reason


def has_interface(module: nn.Module) -> bool:
    """Return True for experts under transformers' `use_experts_implementation`."""
    options = ("config", "has_gate", "is_transposed")
    return hasattr(type(module), GATE) and all(name in vars(module) for name in options)


# starify, report and records


def update_experts(model: nn.Module, selected: Names, mode: str, *, recompute: bool = False) -> int:
    """Serve the selected experts in mode "fuse"; return the number of star experts then."""
    if mode == "fuse":
        for found in find_experts(model, selected):
            if found.gate.reason is None:
                adopt_experts(found.experts, found.gate, cached(verify_loop, found.experts))
    stars = list(installed_experts(model))
    for path, experts in stars:
        if path in selected:
            experts.star.recompute |= recompute
    return len(stars)


def experts_message(model: nn.Module, selected: Names) -> str:
    """Return why `starify` left the experts of a model, "" if it has none."""
    found = find_experts(model, selected)
    if stars := sum(f.gate.reason is None for f in found):
        return (
            f"its {stars} modules of experts already are stars; mode='fuse' serves them, and grow "
            "is not offered for experts"
        )
    return "; ".join(dict.fromkeys(f"{f.path}: {f.gate.reason}" for f in found[:3]))


def experts_rows(model: nn.Module, selected: Names) -> dict[str, tuple[str, str]]:
    """Return state and detail of the experts of a model for a `Report`, by name."""
    rows = {}
    for path, experts in installed_experts(model):
        if path in selected:
            parts = [experts.star.act_name, _ways(experts)]
            if obstacle := experts.star_obstacle():
                parts.append(f"the model's own gate runs: {obstacle}")
            rows[path] = "fused", ", ".join(filter(None, parts))
    for f in find_experts(model, selected):
        detail = f"{f.gate.act_name}, mode='fuse' serves it, grow is not offered for experts"
        ready = f.gate.reason is None
        rows[f.path] = ("is a star", detail) if ready else ("skipped", f.gate.reason or "")
    return rows


def _ways(experts: StarExperts) -> str:
    """Return the implementation in effect, and whether it leaves the product to the gate."""
    name = implementation(experts)
    if "forward" in vars(experts):
        return f"{name}, by a forward that was replaced on the instance".removeprefix(", ")
    if name == "eager" and experts.star.loop:
        return f"eager, where {experts.star.loop}"
    if name in ("sonicmoe", "deepgemm_megamoe"):
        return f"{name}, which has its own product"
    return name


def experts_record(model: nn.Module) -> list[dict[str, Any]]:
    """Return the star experts of a model as data that JSON can hold."""
    return [
        {"owner": path, "act": experts.star.act_name, "recompute": experts.star.recompute}
        for path, experts in installed_experts(model)
    ]


def apply_experts_record(experts: nn.Module, record: dict[str, Any]) -> None:
    """Make recorded experts star experts; they are verified, which needs no weights.

    Raises:
        ValueError: their gate is not the recorded star.
    """
    if isinstance(experts, StarExperts):
        return
    gate = (
        cached(verify_gate, experts) if has_interface(experts) else Gate("", "no experts interface")
    )
    if gate.act_name != record["act"]:
        raise ValueError(
            f"the record of {record['owner']!r} tells of experts with {record['act']}, but of this "
            f"{type(experts).__name__} it says: {gate.reason or 'activation ' + gate.act_name}"
        )
    adopt_experts(
        experts, gate, cached(verify_loop, experts), recompute=record.get("recompute", False)
    )
