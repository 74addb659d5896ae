"""The gates in a model: how large they are, their parameters, their names."""

import torch
from torch import nn

from starlayers.surgery.gated import GatedMLP, Grown
from starlayers.surgery.install import installed, role_of
from starlayers.surgery.projection import StarProjection
from starlayers.surgery.site import (
    Projection,
    attribute,
    dtype_and_device,
    join,
    projection,
)

__all__ = ["gate_of", "gate_parameters", "gate_size", "gate_sizes", "name_of", "reset_gates"]


def gate_size(star: StarProjection | GatedMLP) -> float:
    """The mean absolute gate on standard normal input; 0 means that the layer is as it was made.

    Example:
        >>> from starlayers.surgery import starify
        >>> model = starify(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)))
        >>> gate_size(model[0])
        0.0
    """
    gate = gate_of(star)
    if gate is None or any(p.is_meta for p in star.parameters()):
        return 0.0
    inp = star.inp if isinstance(star, StarProjection) else attribute(star, star.star.site.inp)
    sizes = projection(inp) or Projection(1, 1)
    dtype, device = dtype_and_device(inp)
    generator = torch.Generator("cpu").manual_seed(0)
    n = sizes.in_features
    shape = (16, n, 1, 1) if sizes.channels_first else (16, n)
    x = torch.randn(shape, generator=generator, device="cpu").to(device, dtype)
    with torch.no_grad():
        # of products that were added, the second factor is what was zero
        return float((gate.f2 if isinstance(gate, Grown) else gate)(x).abs().float().mean())


def gate_sizes(model: nn.Module) -> dict[str, float]:
    """`gate_size` of every star layer by name: healthy fine-tuning ends at 0.05 to 0.3.

    Example:
        >>> from starlayers.surgery import starify
        >>> gate_sizes(starify(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))))
        {'0': 0.0}
    """
    return {name_of(path, star): gate_size(star) for path, _, star in installed(model)}


def gate_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that starify has added to a model, for an optimizer of their own.

    Example:
        >>> from starlayers.surgery import starify
        >>> model = starify(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)))
        >>> [tuple(p.shape) for p in gate_parameters(model)]
        [(8, 4), (8,)]
    """
    gates = [gate for _, _, star in installed(model) if (gate := gate_of(star)) is not None]
    return list(dict.fromkeys(p for gate in gates for p in gate.parameters()))


def reset_gates(model: nn.Module) -> nn.Module:
    """Make every gate zero: after a model starified on the meta device was given real weights.

    Example:
        >>> from starlayers.surgery import starify
        >>> with torch.device("meta"):
        ...     model = starify(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)))
        >>> model = reset_gates(model.to_empty(device="cpu"))
        >>> model[0].gate.weight.abs().max().item()
        0.0
    """
    for _, _, star in installed(model):
        if isinstance(star, StarProjection):
            star.reset_gate()
        elif star.star.grown:
            star.star_grown.reset()  # type: ignore[operator, union-attr]
    return model


def gate_of(star: StarProjection | GatedMLP) -> nn.Module | None:
    """What surgery has added to a star layer: its gate, its grown products, or nothing."""
    if isinstance(star, StarProjection):
        return star.gate
    return star.star_grown if star.star.grown else None  # type: ignore[return-value]


def name_of(path: str, star: StarProjection | GatedMLP) -> str:
    """The name of a star layer's first projection in the model."""
    return join(path, role_of(star).site.inp)
