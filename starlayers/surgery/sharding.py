"""Tensor-parallel plans of transformers for starified models."""

import re
from typing import Any

from torch import nn

from starlayers.surgery.gated import GatedMLP
from starlayers.surgery.hidden import GatedHidden
from starlayers.surgery.install import installed
from starlayers.surgery.projection import LowRankGate, ScaleGate, StarProjection
from starlayers.surgery.site import join

#: style of a packed layer -> style of products that its owner adds channel by channel
UNPACKED = {"packed_colwise": "colwise"}


def settle_tp_plans(model: nn.Module) -> None:
    """Match the tensor-parallel plans of a model's parts to their star layers, in place.

    Grown products and gates are divided as the layer is whose channels they multiply, so that
    `from_pretrained(..., distributed_config=DistributedConfig(tp_size=2))` divides them too. A
    part without star layers gets its own plan back.
    """
    for part in model.modules():
        plan = vars(part).get("_tp_plan")
        if isinstance(plan, dict):
            added, removed = vars(part).pop("star_tp_plan", ({}, {}))
            plan = {name: style for name, style in plan.items() if name not in added} | removed
            added, removed = _changes(part, plan)
            if added:
                vars(part)["star_tp_plan"] = added, removed
            vars(part)["_tp_plan"] = {n: s for n, s in plan.items() if n not in removed} | added


def _changes(model: nn.Module, plan: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the rules that star layers add to a plan, and those that they replace."""
    added: dict[str, str] = {}
    moved: set[str] = set()
    for path, _, star in installed(model):
        if isinstance(star, GatedMLP):
            style = plan.get(_wildcard(join(path, star.star.site.inp)))
            if star.star.grown and style is not None:
                style = UNPACKED.get(style, style)
                added |= {_wildcard(join(path, f"star_grown.{f}")): style for f in ("f1", "f2")}
            continue
        if isinstance(star, GatedHidden):
            style = plan.get(_wildcard(join(path, star.star.site.inp)))
            rules = {} if style is None else _gate_rules(star.star_gate, style)
            added |= {_wildcard(join(path, f"star_{key}")): v for key, v in rules.items()}
            continue
        name = _wildcard(join(path, star.site.inp))
        if (style := plan.get(name)) is not None:
            moved.add(name)
            added[f"{name}.inp"] = style
            added |= {
                f"{name}.{key}": value for key, value in _gate_rules(star.gate, style).items()
            }
    # a rule is for all layers of a name: it stays for those that are not starified
    plain = {_wildcard(n) for n, m in model.named_modules() if not isinstance(m, StarProjection)}
    return added, {name: plan[name] for name in moved - plain}


def _gate_rules(gate: Any, style: str) -> dict[str, str]:
    """Return the rules of a gate beside a layer divided by `style`, by name in the projection."""
    if isinstance(gate, LowRankGate):
        return {"gate.up": style}  # every process has all of the thin input
    if isinstance(gate, ScaleGate):
        divided = style == "colwise"  # otherwise every process has all channels
        return {"gate": "local_params", "gate.weight": style} if divided else {}
    return {"gate": style}


def _wildcard(name: str) -> str:
    """Return a module's name as plans have it, `layers.*.mlp` for `layers.0.mlp`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
