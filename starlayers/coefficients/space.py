"""What about coefficients there is to choose, as ranges for a search, and its use on a model."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from starlayers.coefficients.optional import needs
from starlayers.coefficients.scaling import Products, star_layers

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

__all__ = ["apply_initialisation", "coefficient_space"]

LAYER_SCALE = "layer_scale_"


def coefficient_space(layers: int = 0) -> "dict[str, BaseDistribution]":
    """The choices there are about the coefficients of star layers, as a space for `search`.

    | name | values | what it is for |
    | --- | --- | --- |
    | `l1`, `l2`, `balance` | 1e-6 .. 1, log | strengths of the penalties (`CoefficientPenalty`) |
    | `gain1`, `gain2` | 1/4 .. 4, log | factors of the branches' initial weights |
    | `offset` | 0 .. 1 | what the second branch has more at the start |
    | `rank` | 1 .. 4 | products per channel, `StarOp(rank=)` |
    | `coefficients` | fixed, scale, dynamic | `StarOp(coefficients=)` |
    | `layer_scale_0`, ... | 1/4 .. 4, log | factor of layer i's products at the start |

    It is a plain dict: take out what is settled, change what is not. `rank` and `coefficients` are
    for the constructor, the strengths for the loss, the others for `apply_initialisation`.

    Args:
        layers: star layers with a scale of their own; with 0 there are none.

    Raises:
        ImportError: without Optuna.
        ValueError: `layers` is negative.

    Example:
        >>> space = coefficient_space(layers=2)
        >>> len(space), space["layer_scale_1"]
        (10, FloatDistribution(high=4.0, log=True, low=0.25, step=None))
    """
    needs("coefficient_space", "optuna")
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if layers < 0:
        raise ValueError(f"coefficient_space: layers must be at least 0, got {layers}")
    factors = ["gain1", "gain2", *(f"{LAYER_SCALE}{i}" for i in range(layers))]
    return {
        **{name: FloatDistribution(1e-6, 1.0, log=True) for name in ("l1", "l2", "balance")},
        "offset": FloatDistribution(0.0, 1.0),
        "rank": IntDistribution(1, 4),
        "coefficients": CategoricalDistribution(("fixed", "scale", "dynamic")),
        **{name: FloatDistribution(0.25, 4.0, log=True) for name in factors},
    }


@torch.no_grad()
def apply_initialisation(model: nn.Module, values: Mapping[str, Any]) -> nn.Module:
    """Change the initial distribution of a new model's star layers, and return the model.

    The branches h1, h2 of layer i become `gain1 * h1` and `s_i * (offset + gain2 * h2)`, in their
    weights and biases, or in the `scale` and `shift` that a layer has; what is missing is 1, and 0
    for `offset`. Call it once, before training.

    Args:
        values: of a trial, `trial.params`; names of other things are passed over.

    Raises:
        ValueError: a scale for a layer that the model does not have, an offset for a layer without
            biases, or no star layers.

    Example:
        >>> from starlayers import StarOp
        >>> op = StarOp(16, 8)
        >>> before = op.f1.weight.std()
        >>> (apply_initialisation(op, {"gain1": 2.0, "rank": 1}).f1.weight.std() / before).item()
        2.0
    """
    found = star_layers("apply_initialisation", model)
    for name in values:
        if name.startswith(LAYER_SCALE) and int(name.removeprefix(LAYER_SCALE)) >= len(found):
            raise ValueError(
                f"apply_initialisation: there is no layer for {name}={values[name]}; the model has "
                f"{len(found)} star layers"
            )
    offset = values.get("offset", 0.0)
    for i, (name, products) in enumerate(found.items()):
        op = products.op
        home = op._parameters.get("shift", op.f2.bias)
        if offset and home is None:
            raise ValueError(
                f"apply_initialisation: offset={offset} goes into the second branch's bias, and "
                f"layer {name!r} has none; build it with bias=True"
            )
        for f, gain in ((op.f1, "gain1"), (op.f2, "gain2")):
            for parameter in f.parameters():
                parameter.mul_(values.get(gain, 1.0))
        if offset and home is not None:
            home.add_(offset)
        if (scale := values.get(f"{LAYER_SCALE}{i}", 1.0)) != 1.0:
            now = Products("apply_initialisation", name, op)
            now.write(torch.full((now.rows,), float(scale)))
    return model
