"""Search space of coefficients, and its values applied to a model."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from starlayers.checks import positive_int
from starlayers.coefficients.optional import require
from starlayers.coefficients.scaling import ProductScaler, star_layers

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

__all__ = ["apply_initialisation", "coefficient_space"]

LAYER_SCALE = "layer_scale_"

#: choices of `method`: a sampler of Optuna, the package that it needs, and its settings. Optuna's
#: own population of 50 would be half of a usual search
METHODS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tpe": ("TPESampler", "optuna", {}),
    "gp": ("GPSampler", "scipy", {}),
    "cma": ("CmaEsSampler", "cmaes", {"warn_independent_sampling": False}),
    "nsga2": ("NSGAIISampler", "optuna", {"population_size": 20}),
    "random": ("RandomSampler", "optuna", {}),
}

Space = Mapping[str, "BaseDistribution"]


def coefficient_space(layers: int = 0) -> "dict[str, BaseDistribution]":
    """Return a space for `search`: all choices about the coefficients of star layers.

    | name | values | use |
    | --- | --- | --- |
    | `l1`, `l2`, `balance` | 1e-6 .. 1, log | strengths of the penalties (`CoefficientPenalty`) |
    | `gain1`, `gain2` | 1/4 .. 4, log | factors of the branches' initial weights |
    | `offset` | 0 .. 1 | constant added to the second branch at the start |
    | `rank` | 1 .. 4 | products per channel, `RankStarMLP(rank=)` |
    | `coefficients` | fixed, scale, dynamic | `StarMLP`, `ScaledStarMLP`, `DynamicStarMLP` |
    | `layer_scale_0`, ... | 1/4 .. 4, log | factor of layer i's products at the start |

    The result is a plain dict: remove or change entries as needed. `rank` and `coefficients` are
    for the constructor, the strengths for the loss, the others for `apply_initialisation`.

    Args:
        layers: number of star layers with a scale of their own, `layer_scale_0` and so on.

    Raises:
        ImportError: Optuna is not installed.
        ValueError: `layers` is negative.

    Example:
        >>> space = coefficient_space(layers=2)
        >>> len(space), space["layer_scale_1"]
        (10, FloatDistribution(high=4.0, log=True, low=0.25, step=None))
    """
    require("coefficient_space", "optuna")
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
    """Change the initial distribution of the star layers of a new model.

    The branches h1, h2 of layer i become `gain1 * h1` and `s_i * (offset + gain2 * h2)`, with
    `s_i = layer_scale_i`. The factors go into the weights and biases, or into `scale` and `shift`
    of a layer that has them. Missing values are 1, and 0 for `offset`. Call it once, before
    training.

    Args:
        model: a model with star layers, changed in place.
        values: values of a trial, `trial.params`; other names are ignored.

    Returns:
        The model.

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
    layers = star_layers("apply_initialisation", model)
    for name in values:
        if name.startswith(LAYER_SCALE) and int(name.removeprefix(LAYER_SCALE)) >= len(layers):
            raise ValueError(
                f"apply_initialisation: there is no layer for {name}={values[name]}; the model has "
                f"{len(layers)} star layers"
            )
    offset = values.get("offset", 0.0)
    for i, (name, products) in enumerate(layers.items()):
        op = products.op
        (w1, b1), (w2, b2) = op.branch_layers()
        shift = op._parameters.get("shift", b2)
        if offset and shift is None:
            raise ValueError(
                f"apply_initialisation: offset={offset} goes into the second branch's bias, and "
                f"layer {name!r} has none; build it with bias=True"
            )
        for parameters, gain in (((w1, b1), "gain1"), ((w2, b2), "gain2")):
            for parameter in parameters:
                if parameter is not None:
                    parameter.mul_(values.get(gain, 1.0))
        if offset and shift is not None:
            shift.add_(offset)
        if (scale := values.get(f"{LAYER_SCALE}{i}", 1.0)) != 1.0:
            scaler = ProductScaler("apply_initialisation", name, op)  # of the changed weights
            scaler.write(torch.full((scaler.products,), float(scale)))
    return model


def search_settings(
    owner: str, method: str, seed: int, directions: str | Sequence[str], space: Any, trials: int
) -> dict[str, Any]:
    """Return the settings of a study; raise an error that names a wrong one."""
    directions = [directions] if isinstance(directions, str) else list(directions)
    if method not in METHODS:
        raise ValueError(f"{owner}: unknown method {method!r}, choose one of {', '.join(METHODS)}")
    for d in directions:
        if d not in ("maximize", "minimize"):
            raise ValueError(f"{owner}: unknown direction {d!r}, choose maximize or minimize")
    if not directions or (method == "cma" and len(directions) > 1):
        raise ValueError(
            f"{owner}: method {method!r} needs at least one direction, 'cma' only one (use 'nsga2' "
            f"for several), got {directions}"
        )
    positive_int(owner, "trials", trials)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{owner}: seed must be an integer, got {seed!r}")
    if seed < 0:
        raise ValueError(f"{owner}: seed must be at least 0, got {seed}")
    for package in ("optuna", METHODS[method][1]):
        require(owner, package)
    settings = {"method": method, "seed": seed, "directions": directions}
    return settings if space is None else {**settings, "space": _space_json(owner, method, space)}


def _space_json(owner: str, method: str, space: Any) -> dict[str, str]:
    """Return a space in Optuna's JSON; raise an error if `method` cannot draw from it."""
    from optuna.distributions import BaseDistribution, CategoricalDistribution, distribution_to_json

    if not isinstance(space, Mapping):
        wanted = "a dict of name -> Optuna distribution"
        raise TypeError(f"{owner}: space must be {wanted}, got {space!r}")
    if not space:
        raise ValueError(f"{owner}: the space is empty; leave it out if the objective asks itself")
    for key, distribution in space.items():
        if not isinstance(key, str) or not isinstance(distribution, BaseDistribution):
            raise TypeError(
                f"{owner}: space[{key!r}] must be an Optuna distribution, such as "
                f"optuna.distributions.FloatDistribution(0, 1), got {distribution!r}"
            )
    varied = [key for key, distribution in space.items() if not distribution.single()]
    numbers = [key for key in varied if not isinstance(space[key], CategoricalDistribution)]
    if method == "cma" and len(numbers) < 2:
        raise ValueError(
            f"{owner}: method 'cma' needs at least two numbers that vary, and the space has "
            f"{len(numbers)} ({', '.join(numbers) or 'none'}): use 'tpe' or 'gp'"
        )
    return {key: distribution_to_json(distribution) for key, distribution in space.items()}
