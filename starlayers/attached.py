"""Names of what keeps fused paths from linear layers, for the reasons that plans give."""

from collections.abc import Mapping

import torch
from torch import nn

from starlayers.dispatch import FORWARDS, exporting, is_plain
from starlayers.plans import PLAIN

__all__ = ["attached"]


def attached(layers: Mapping[str, nn.Module | None]) -> str:
    """Return in words what keeps fused paths from linear layers.

    Example:
        >>> attached({"f1": nn.Linear(2, 2), "g": nn.Identity()})
        'g is an Identity, not nn.Linear'
    """
    for name, layer in layers.items():
        if hasattr(getattr(layer, "_parameters", {}).get("weight"), "device_mesh"):
            return f"{name} is divided over processes, its weight is a DTensor"
        kind = type(layer)
        where = f"{kind.__module__}.{kind.__name__}"
        if kind is not nn.Linear:
            article = "an" if kind.__name__[0] in "AEIOU" else "a"
            what = f"{article} {kind.__name__}, not nn.Linear"
            if torch.nn.utils.parametrize.is_parametrized(layer):  # type: ignore[arg-type]
                what = "parametrised"
            elif "lora" in where.lower() or where.startswith("peft."):
                what = f"an adapter, {where}; merge it to fuse"
            elif "quant" in where.lower() or "bnb" in where.lower() or "bits" in where.lower():
                what = f"quantised, {where}"
            return f"{name} is {what}"
        if is_plain(layer, nn.Linear):
            weight = layer._parameters.get("weight")  # type: ignore[union-attr]
            if weight is None or "bias" not in layer._parameters:  # type: ignore[union-attr]
                return f"{name} has a weight or bias that is no parameter of it"
            if not (type(weight) in PLAIN or exporting()):
                return f"{name} has a weight of type {type(weight).__name__}"
            continue
        if kind.forward is not FORWARDS[kind] or "forward" in layer.__dict__:
            return f"{name} has a forward that was replaced"
        return f"{name} has hooks"
    return f"{', '.join(layers)} do not fit together"
