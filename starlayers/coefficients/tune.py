"""Gradient-free tuning of the products of a trained model on any metric."""

import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from starlayers.checks import positive_int
from starlayers.coefficients.optional import require
from starlayers.coefficients.scaling import ProductScaler, star_layers
from starlayers.coefficients.search import SearchResult, run_search
from starlayers.coefficients.space import search_settings

if TYPE_CHECKING:
    import optuna

__all__ = ["TuneResult", "tune_coefficients"]


@dataclass(frozen=True)
class TuneResult:
    """Result of tuning: metrics before and after, and the factors of the products.

    The metric was `start` and is `value` now. `scales` has a factor for every product of each tuned
    layer, (rank * channels,), in the order of the outputs of `f2`; `search` has all trials.

    Example:
        >>> from starlayers import StarOp
        >>> result = tune_coefficients(StarOp(4, 8), lambda m: 1.0, trials=3, progress=False)
        >>> result.gain, result.scales[""].shape
        (0.0, torch.Size([8]))
    """

    start: float
    value: float
    scales: dict[str, Tensor]
    search: SearchResult

    @property
    def gain(self) -> float:
        """Improvement of the metric, at least 0."""
        return abs(self.value - self.start)


def tune_coefficients(
    model: nn.Module,
    metric: Callable[[nn.Module], float],
    *,
    method: str = "cma",
    trials: int = 200,
    layers: str | Sequence[str] | None = None,
    groups: int | None = 8,
    width: float = 2.0,
    direction: str = "maximize",
    storage: "str | os.PathLike[str] | optuna.storages.BaseStorage | None" = None,
    name: str = "tune",
    seed: int = 0,
    progress: bool = True,
) -> TuneResult:
    """Tune a trained model's star products on `metric(model)`, without gradients.

    Every product of a star layer gets a factor, `s_k act(h1_k) (offset + h2_k)`, between
    `1 / width` and `width`. The best factors are written into the second branch `f2` (into `scale`
    if the layer has one), so that layers and speed of the model do not change. The metric may be
    anything that returns a number: accuracy, BLEU, the return of an agent.

    **The model never ends worse than it started on that metric**: the factors are kept only if the
    metric, called once more on the result, is at least as good as at the start. With a noisy
    metric this is not guaranteed: use the same episodes or samples in each call. A gain on the data
    of the metric need not hold on other data: keep a test set. If an exception is raised,
    `KeyboardInterrupt` included, the model gets its weights back. An exception of the metric in a
    trial fails only that trial.

    Args:
        model: a model with star layers, changed in place.
        metric: called with the model in its present mode; sets and restores any other mode.
        method: as in `search`; "cma" is made for this.
        trials: number of trials. The first is the start, without a further call of the metric; the
            metric of the result is computed once more.
        layers: names, or patterns as in `fnmatch`, of the star layers; all by default.
        groups: number of factors of a layer: products of similar size `|w1| |w2|` share one. `None`
            for a factor each, which needs many more trials.
        width: the greatest factor, above 1.
        direction: "maximize" or "minimize".
        storage, name: as in `search`. Tuning that was stopped goes on if it is called with the
            model as it was at the start.
        seed, progress: as in `search`.

    Raises:
        ImportError: Optuna, or what the method needs, is not installed.
        TypeError: as `search`.
        ValueError: no star layers, a layer whose second branch cannot be scaled, a metric that is
            NaN at the start, and as `search`.

    Source: the factors are those of Perez et al., "FiLM", AAAI 2018, without its conditioning;
    CMA-ES: Hansen, "The CMA Evolution Strategy: A Tutorial", arXiv 1604.00772.

    Example:
        >>> from starlayers import StarMLP
        >>> mlp, x, y = StarMLP(4, 8), torch.randn(64, 4), torch.randn(64, 4)
        >>> def metric(model):
        ...     return -(model(x) - y).square().mean().item()
        >>> result = tune_coefficients(mlp, metric, trials=40, progress=False)
        >>> result.value > result.start, metric(mlp) == result.value
        (True, True)
    """
    owner = "tune_coefficients"
    require(owner, "optuna")
    from optuna.distributions import FloatDistribution

    groups = None if groups is None else positive_int(owner, "groups", groups)
    if not 1 < width < math.inf:
        raise ValueError(f"{owner}: width must be above 1, the factor of no change, got {width}")
    scalers = star_layers(owner, model, layers)
    groups_by_key = {
        f"{layer or 'star'}:{i}": (layer, products)
        for layer, scaler in scalers.items()
        for i, products in enumerate(scaler.groups(groups))
    }
    # a logarithmic range, so that CMA-ES begins in its middle, a factor of 1
    space = {key: FloatDistribution(1 / width, width, log=True) for key in groups_by_key}
    settings = search_settings(owner, method, seed, [direction], space, trials)
    start = _checked(owner, metric(model))
    no_change = dict.fromkeys(space, 1.0)

    def write(values: Mapping[str, float]) -> dict[str, Tensor]:
        scales = {k: torch.ones(s.products, dtype=torch.float64) for k, s in scalers.items()}
        for key, (layer, products) in groups_by_key.items():
            scales[layer][products] = values[key]
        for layer, scaler in scalers.items():
            scaler.write(scales[layer])
        return scales

    def objective(trial: "optuna.Trial") -> float:
        if trial.number == 0:  # the start
            return start
        write(trial.params)
        return metric(model)

    try:
        settings["weights"] = _digest(scalers)
        own = (objective, space, trials, storage, name, no_change, progress)
        result = run_search(owner, settings, *own)
        scales = write(result.best)
        value = _checked(owner, metric(model))
        if value != start and (value > start) != (direction == "maximize"):
            scales, value = write(no_change), start
    except BaseException:
        for scaler in scalers.values():
            scaler.restore()
        raise
    return TuneResult(start, value, scales, result)


def _checked(owner: str, value: float) -> float:
    if math.isnan(number := float(value)):
        raise ValueError(f"{owner}: the metric of the model is {value}, which cannot be compared")
    return number


def _digest(scalers: Mapping[str, ProductScaler]) -> str:
    """Return a hash of the layers' weights, by which a study is of this model only."""
    digest = hashlib.sha256()
    for name, scaler in scalers.items():
        digest.update(name.encode())
        for parameter in scaler.op.parameters():
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
