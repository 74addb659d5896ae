"""Search for coefficients and other choices of star layers, on Optuna."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlayers.coefficients.plots import plot_study
from starlayers.coefficients.space import Space
from starlayers.coefficients.study import check_settings, ended_trials, open_study, run_trials

if TYPE_CHECKING:
    import optuna

__all__ = ["SearchResult", "search"]


@dataclass(frozen=True)
class SearchResult:
    """Trials of a search, its `best` values with their `value`, and figures.

    `study` is the Optuna study, for everything that Optuna offers. A trial has `params`, `values`,
    a `state` and, if it failed, `user_attrs["error"]`.

    Example:
        >>> result = search(lambda t: -t.suggest_float("x", -1, 1) ** 2, trials=5, progress=False)
        >>> len(result.trials), sorted(result.best), result.value <= 0
        (5, ['x'], True)
    """

    study: "optuna.Study"

    @property
    def trials(self) -> "list[optuna.trial.FrozenTrial]":
        """Trials that ended by themselves, in the order of their numbers."""
        return ended_trials(self.study)

    @property
    def failed(self) -> "list[optuna.trial.FrozenTrial]":
        """Trials that raised an exception or returned no number."""
        return [t for t in self.trials if t.state.name == "FAIL"]

    @property
    def front(self) -> "list[optuna.trial.FrozenTrial]":
        """Pareto front of several directions; with one direction, the best trials."""
        return self.study.best_trials

    @property
    def best(self) -> dict[str, Any]:
        """Values (`params`) of the best trial."""
        return dict(self._best.params)

    @property
    def value(self) -> float:
        """Number that the objective returned for the best trial."""
        (value,) = self._best.values
        return float(value)

    @property
    def best_so_far(self) -> list[float]:
        """Best value after each of `trials`; NaN until one is complete."""
        import numpy as np

        # unlike maximum and minimum, these two ignore NaN
        best = np.fmax if self.study.direction.name == "MAXIMIZE" else np.fmin
        values = [t.value if t.state.name == "COMPLETE" else None for t in self.trials]
        curve: list[float] = best.accumulate(np.array(values, dtype=float)).tolist()
        return curve

    @property
    def _best(self) -> "optuna.trial.FrozenTrial":
        if (n := len(self.study.directions)) > 1:
            raise ValueError(f"{n} directions have no single best trial: choose one of .front")
        if not any(t.state.name == "COMPLETE" for t in self.trials):
            errors = [t.user_attrs["error"] for t in self.failed]
            first = f", the first of {len(errors)} that failed with {errors[0]}" if errors else ""
            raise ValueError(f"none of the {len(self.trials)} trials is complete{first}")
        return self.study.best_trial

    def plot(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write Optuna's figures of the search to `folder` and return their files.

        One direction: the values over the trials, each parameter against the value, parallel
        coordinates, and importances (if two complete trials differ). Several: the Pareto front.

        Raises:
            ImportError: matplotlib is not installed.
        """
        return plot_study(self.study, Path(folder))


def search(
    objective: "Callable[[optuna.Trial], Any]",
    space: Space | None = None,
    *,
    method: str = "tpe",
    trials: int = 100,
    directions: str | Sequence[str] = "maximize",
    storage: "str | os.PathLike[str] | optuna.storages.BaseStorage | None" = None,
    name: str = "search",
    seed: int = 0,
    first: Mapping[str, Any] | None = None,
    sampler: "optuna.samplers.BaseSampler | None" = None,
    timeout: float | None = None,
    callbacks: "Sequence[Callable[[optuna.Study, optuna.trial.FrozenTrial], None]]" = (),
    progress: bool = True,
) -> SearchResult:
    """Search for the values with which `objective(trial)` is best, with Optuna.

    The objective takes an Optuna trial and returns a number. Its choices are declared in advance,
    as a `space` of Optuna distributions, and are then in `trial.params`; or it asks for them,
    `trial.suggest_float("l2", 1e-6, 1, log=True)`; or both.

    With `storage`, a search that was stopped goes on when it is called again, until `trials` have
    ended. Processes that make the same call share the trials; each finishes the trial it is in, so
    that there may be one more for each further process. A trial whose process was killed runs again
    with its values, once. A trial that raises or returns NaN is recorded as failed, and the search
    goes on.

    Args:
        objective: `objective(trial) -> float`, or a tuple with a number for each direction. Seed
            its random numbers, for example with `trial.number`.
        space: name -> Optuna distribution; `coefficient_space()` makes one.
        method: "tpe" (default), "gp" (Gaussian process; few, costly trials), "cma" (CMA-ES; many
            numbers), "nsga2" (several directions) or "random", each with Optuna's settings, but
            populations of 20 for "nsga2". "cma" leaves categorical values to TPE, and uses a
            diagonal covariance for a `space` of more than 64 values.
        trials: number of trials in the end, failed ones and those of earlier calls included.
        directions: "maximize", "minimize", or a sequence of them.
        storage: SQLite file (made with its folder if missing), database URL or Optuna storage.
        name: name of the study; a storage holds many.
        seed: seed of the sampler; each trial draws from the seed and its own number.
        first: values that are tried before any others, such as those in use today.
        sampler: Optuna sampler that replaces `method`.
        timeout: seconds after which no further trial starts.
        callbacks: functions of study and trial, called after each; `study.stop()` ends the search.
        progress: show a bar with the best value (on a terminal).

    Raises:
        ImportError: Optuna, or what the method needs, is not installed.
        ValueError, TypeError: an unknown method or direction, a space of anything but
            distributions, "cma" with several directions or fewer than two numbers, a negative
            seed, no trials, or a study that was begun with other settings.

    Source: Akiba et al., "Optuna: A Next-generation Hyperparameter Optimization Framework", KDD
    2019, arXiv 1907.10902.

    Example:
        >>> from optuna.distributions import FloatDistribution
        >>> space = {"x": FloatDistribution(-2, 2), "y": FloatDistribution(-2, 2)}
        >>> def objective(trial):
        ...     return -((trial.params["x"] - 1) ** 2) - trial.params["y"] ** 2
        >>> result = search(objective, space, method="cma", trials=60, progress=False)
        >>> result.value > -0.1
        True
    """
    directions = [directions] if isinstance(directions, str) else list(directions)
    settings = {"method": method, "seed": seed, "directions": directions}
    check_settings("search", settings, space, trials)
    if timeout is not None and not timeout > 0:
        raise ValueError(f"search: timeout must be above 0 seconds, got {timeout}")
    study = open_study("search", settings, space, storage, name, first)
    run_trials(study, objective, space, trials, sampler, timeout, callbacks, progress)
    return SearchResult(study)
