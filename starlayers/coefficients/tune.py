"""Gradient-free tuning of the coefficients of a trained model, on the metric that counts."""

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from starlayers.coefficients.optional import needs
from starlayers.coefficients.scaling import Products, star_layers
from starlayers.coefficients.search import SearchResult, check_method, run_search, storage_path
from starlayers.modules import positive_int

if TYPE_CHECKING:
    import optuna

__all__ = ["TuneResult", "tune_coefficients"]


@dataclass(frozen=True)
class TuneResult:
    """What tuning did: the metric at the `start`, its `value` now, and the factors in `scales`.

    `scales` has a factor for every product of each tuned layer, (rank * channels,), as `f2` lays
    them out; `search` has all trials.

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
        """How much better the metric is than it was; never below 0."""
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
    storage: str | os.PathLike[str] | None = None,
    name: str = "tune",
    seed: int = 0,
    progress: bool = True,
) -> TuneResult:
    """Tune the scales of a trained model's star products on `metric(model)`, without gradients.

    Every product of a star layer has a factor, `s_k act(h1_k) (offset + h2_k)`, searched between
    `1 / width` and `width`; the best factors are written into the second branch `f2` (into `scale`
    where the layer has one), so that the model stays what it is: same layers, same speed.
    The metric may be anything that returns a number: accuracy, BLEU, the return of an agent.

    **The model never ends worse than it started on that metric**: the factors are kept only if the
    metric, called once more on the result, is at least as good as at the start. For a noisy metric
    that promise is as weak as the metric: give it the same episodes or the same draws each time.
    What is gained on the data of the metric need not hold on others: keep a test set. If anything
    is raised, Ctrl-C included, the model has its weights back; a metric that fails in a trial
    fails that trial only.

    Args:
        metric: called with the model, in the mode that it is in; sets and restores what it needs.
        method: as in `search`; "cma" is made for this.
        trials: calls of the metric, about: the start is the first of them, and is asked again.
        layers: names, or patterns as in `fnmatch`, of the star layers; default all.
        groups: factors per layer: products of about the same size `|w1| |w2|` share one. `None`
            for a factor each, which needs many more trials.
        width: the greatest factor.
        direction: "maximize" or "minimize".
        storage, name: as in `search`. Tuning that was stopped goes on if it is called with the
            model as it was at the start.
        seed, progress: as in `search`.

    Raises:
        ImportError: without Optuna.
        ValueError: no star layers, a layer whose second branch cannot be scaled, a metric that is
            no number at the start, and as `search`.

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
    needs(owner, "optuna")
    from optuna.distributions import FloatDistribution

    trials = positive_int(owner, "trials", trials)
    groups = None if groups is None else positive_int(owner, "groups", groups)
    if not 1 < width < math.inf:
        raise ValueError(f"{owner}: width must be above 1, the factor of no change, got {width}")
    found = star_layers(owner, model, layers)
    rows = {
        f"{layer or 'star'}:{i}": (layer, group)
        for layer, products in found.items()
        for i, group in enumerate(products.groups(groups))
    }
    # the middle of the range, where CMA-ES begins, is a factor of 1: its logarithm is searched
    space = {key: FloatDistribution(1 / width, width, log=True) for key in rows}
    check_method(owner, method, space, [direction])
    path = storage_path(owner, storage)
    start = _number(owner, metric(model))

    def factors(values: dict[str, float]) -> dict[str, Tensor]:
        made = {layer: torch.ones(p.rows, dtype=torch.float64) for layer, p in found.items()}
        for key, (layer, group) in rows.items():
            made[layer][group] = values[key]
        return made

    def write(scales: dict[str, Tensor]) -> None:
        for layer, products in found.items():
            products.write(scales[layer])

    def objective(trial: "optuna.Trial") -> float:
        if trial.number == 0:
            return start
        write(factors(trial.params))
        return metric(model)

    settings = {"method": method, "seed": seed, "directions": [direction]}
    try:
        result = run_search(
            owner,
            objective,
            space,
            settings={**settings, "weights": _digest(found)},
            trials=trials,
            path=path,
            name=name,
            first=dict.fromkeys(space, 1.0),
            progress=progress,
        )
        scales = factors(result.best)
        write(scales)
        value = _number(owner, metric(model))
        if value != start and (value > start) != (direction == "maximize"):
            scales, value = factors(dict.fromkeys(space, 1.0)), start
            write(scales)
    except BaseException:
        for products in found.values():
            products.restore()
        raise
    return TuneResult(start, value, scales, result)


def _number(owner: str, value: float) -> float:
    if math.isnan(number := float(value)):
        raise ValueError(
            f"{owner}: the metric of the model is {value}, which nothing is better than"
        )
    return number


def _digest(found: dict[str, Products]) -> str:
    """Tells whether a stored tuning is of this model: its trials count for no other."""
    told = hashlib.sha256()
    for name, products in found.items():
        told.update(name.encode())
        for parameter in products.op.parameters():
            told.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return told.hexdigest()[:16]
