"""Gates in a model: their parameters, their mean sizes, and setting them to zero."""

from typing import Any

import torch
from torch import nn

from starlayers.surgery.gated import GatedMLP
from starlayers.surgery.hidden import GatedHidden
from starlayers.surgery.install import StarLayer, installed, role_of
from starlayers.surgery.linear_layers import Projection, dtype_and_device, projection
from starlayers.surgery.projection import StarProjection
from starlayers.surgery.site import attribute, join

__all__ = ["gate_parameters", "gate_sizes", "reset_gates"]

#: rows of random input over which the size of a gate is averaged
PROBE_ROWS = 16


def gate_sizes(model: nn.Module) -> dict[str, float]:
    """Return the mean |gate| of every star layer, by name.

    The mean is over standard normal input, the same at every call. 0 means that a layer computes
    what it did before `starify`; 0.05 to 0.3 is usual after fine-tuning.

    Example:
        >>> from starlayers.surgery import starify
        >>> model = starify(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)))
        >>> gate_sizes(model)
        {'0': 0.0}
        >>> _ = nn.init.constant_(model[0].gate.bias, 0.25)
        >>> gate_sizes(model)
        {'0': 0.25}
    """
    return {name_of(path, star): gate_size(star) for path, _, star in installed(model)}


def gate_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that `starify` added to a model.

    Example:
        >>> from starlayers.surgery import starify
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> optimizer.add_param_group({"params": gate_parameters(starify(model))})
        >>> [tuple(p.shape) for p in optimizer.param_groups[1]["params"]]
        [(8, 4), (8,)]
    """
    gates = [gate for _, _, star in installed(model) if (gate := gate_of(star)) is not None]
    return list(dict.fromkeys(p for gate in gates for p in gate.parameters()))


def reset_gates(model: nn.Module) -> nn.Module:
    """Set every gate of a model to zero, in place.

    A model starified on the meta device needs this after `to_empty` and after loading its weights.

    Returns:
        `model` itself.

    Example:
        >>> from starlayers.surgery import starify
        >>> with torch.device("meta"):
        ...     model = starify(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)))
        >>> model = reset_gates(model.to_empty(device="cpu"))
        >>> model[0].gate.weight.abs().max().item()
        0.0
    """
    for _, _, star in installed(model):
        if isinstance(star, (StarProjection, GatedHidden)):
            star.reset_gate()
        elif star.star.grown:
            star.star_grown.reset()  # type: ignore[operator, union-attr]
    return model


def gate_size(star: StarLayer) -> float:
    """Return the mean |gate| of one star layer.

    It is 0 without a gate and on the meta device. For grown products it is the mean |f2(x)|, the
    factor that was zero at first.
    """
    gate = gate_of(star)
    if gate is None or any(p.is_meta for p in star.parameters()):
        return 0.0
    inp = first_layer(star)
    sizes = projection(inp) or Projection(1, 1)
    dtype, device = dtype_and_device(inp)
    generator = torch.Generator("cpu").manual_seed(0)
    n = sizes.in_features
    shape = (PROBE_ROWS, n, 1, 1) if sizes.channels_first else (PROBE_ROWS, n)
    x = torch.randn(shape, generator=generator, device="cpu").to(device, dtype)
    with torch.no_grad():
        factor: Any = gate.f2 if isinstance(star, GatedMLP) else gate
        return float(factor(x).abs().float().mean())


def gate_of(star: StarLayer) -> nn.Module | None:
    """Return the gate or the grown products of a star layer, if any."""
    if isinstance(star, StarProjection):
        return star.gate
    if isinstance(star, GatedHidden):
        return star.star_gate  # type: ignore[return-value]
    return star.star_grown if star.star.grown else None  # type: ignore[return-value]


def first_layer(star: StarLayer) -> nn.Module:
    """Return the model's own linear layer whose output is activated."""
    if isinstance(star, StarProjection):
        return star.inp
    return attribute(star, star.star.site.inp)  # type: ignore[no-any-return]


def name_of(path: str, star: StarLayer) -> str:
    """Return the name of a star layer's first linear layer; `path` is its owner's."""
    return join(path, role_of(star).site.inp)
