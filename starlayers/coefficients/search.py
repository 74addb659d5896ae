"""Search over strengths, initial distributions and shapes of coefficients, on Optuna."""

import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlayers.coefficients._plots import plot_study
from starlayers.coefficients._study import Runner, only_one
from starlayers.coefficients._trials import METHODS, Objective, Space
from starlayers.coefficients.optional import needs
from starlayers.modules import positive_int

if TYPE_CHECKING:
    import optuna

__all__ = ["SearchResult", "search"]

DIRECTIONS = ("maximize", "minimize")


@dataclass(frozen=True)
class SearchResult:
    """What a search found: `best` values, their `value`, every trial, and figures.

    `study` is the Optuna study itself, for everything that Optuna offers. A trial has `params`,
    `values`, a `state` and, where it failed, `user_attrs["error"]`.

    Example:
        >>> result = search(lambda t: -t.suggest_float("x", -1, 1) ** 2, trials=5, progress=False)
        >>> len(result.trials), sorted(result.best), result.value <= 0
        (5, ['x'], True)
    """

    study: "optuna.Study"

    @property
    def trials(self) -> "list[optuna.trial.FrozenTrial]":
        """All trials in the order of their numbers."""
        return self.study.get_trials(deepcopy=False)

    @property
    def failed(self) -> "list[optuna.trial.FrozenTrial]":
        """The trials that raised, returned no number or lost their process."""
        return [t for t in self.trials if t.state.name == "FAIL"]

    @property
    def front(self) -> "list[optuna.trial.FrozenTrial]":
        """The trials that no other beats in every direction; with one direction, the best ones."""
        return self.study.best_trials

    @property
    def best(self) -> dict[str, Any]:
        """The values of the best trial."""
        return dict(self._best.params)

    @property
    def value(self) -> float:
        """What the objective returned for the best trial."""
        (value,) = self._best.values
        return float(value)

    @property
    def best_so_far(self) -> list[float]:
        """The best value after each trial; NaN until one is complete."""
        better = max if self.study.direction.name == "MAXIMIZE" else min
        found, best = [], float("nan")
        for trial in self.trials:
            if trial.state.name == "COMPLETE" and trial.value is not None:
                best = trial.value if best != best else better(best, trial.value)
            found.append(best)
        return found

    @property
    def _best(self) -> "optuna.trial.FrozenTrial":
        if len(self.study.directions) > 1:
            raise ValueError(
                f"a search in {len(self.study.directions)} directions has no single best trial: "
                "choose one of .front"
            )
        if not any(t.state.name == "COMPLETE" for t in self.trials):
            errors = [str(t.user_attrs.get("error")) for t in self.failed]
            first = f", the first of {len(errors)} that failed with {errors[0]}" if errors else ""
            raise ValueError(f"none of the {len(self.trials)} trials is complete{first}")
        return self.study.best_trial

    def plot(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write Optuna's figures of the search to `folder` and return their files.

        One direction: the values over the trials, each parameter against the value, parallel
        coordinates, and importances (where two complete trials differ). Several: the front.

        Raises:
            ImportError: without matplotlib and scikit-learn.
        """
        return plot_study(self.study, Path(folder))


def search(
    objective: Objective,
    space: Space | None = None,
    *,
    method: str = "tpe",
    trials: int = 100,
    directions: str | Sequence[str] = "maximize",
    storage: str | os.PathLike[str] | None = None,
    name: str = "search",
    jobs: int = 1,
    seed: int = 0,
    first: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> SearchResult:
    """Search for the values with which `objective(trial)` is best, with Optuna.

    The objective takes an Optuna trial and returns a number. What it is to choose is said in
    advance, as a `space` of Optuna distributions, and then is in `trial.params`; or it asks by
    itself, `trial.suggest_float("l2", 1e-6, 1, log=True)`; or both.

    **A stopped search goes on.** With `storage`, calling it again after Ctrl-C, `kill -9` or a
    power cut runs what is missing: there are `trials` trials in the end, and with `jobs=1` they
    have the values of a search that was never stopped. The trial that was cut off runs again with
    its values; one under which the process ends twice counts as failed. A trial that raises or
    returns NaN is recorded as failed, `trial.user_attrs["error"]` has the words, and the search
    goes on.

    Args:
        objective: `objective(trial) -> float`, or a tuple of as many as there are directions.
            Seed what is random inside it; `trial.number` is there to be used.
        space: name -> Optuna distribution; `coefficient_space()` makes one.
        method: "tpe" (default), "gp" (Gaussian process; few, costly trials), "cma" (CMA-ES; many
            numbers), "nsga2" (several directions) or "random", each with Optuna's settings, but
            populations of 20 for "nsga2". "cma" leaves choices (categorical values) to TPE, and
            keeps to a diagonal covariance for a `space` of more than 64 values.
        trials: how many there are in the end, failed ones and those of earlier calls included.
        directions: "maximize", "minimize", or a sequence of them.
        storage: SQLite file that keeps the trials, made with its folder where it is missing.
            One search at a time runs on a file (`FILE.lock` sees to that).
        name: of the study; a file has room for many.
        jobs: trials side by side, in processes of their own, with torch's threads shared among
            them. Needs `storage` and, as everything sent to processes, an objective of a module,
            and `if __name__ == "__main__":` in scripts.
        seed: of the sampler.
        first: values that are tried before any others, such as those in use today.
        progress: whether a bar shows the best value and how many failed (on a terminal).

    Raises:
        ImportError: without Optuna.
        ValueError, TypeError: an unknown method or direction, a space of something else than
            distributions, "cma" with several directions or fewer than two numbers, `jobs`
            without `storage` or with an objective that cannot be sent to a process, or a study
            that was begun with other settings.
        RuntimeError: another search is running on the file.

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
    needs("search", "optuna")
    if isinstance(directions, str):
        directions = [directions]
    trials = positive_int("search", "trials", trials)
    jobs = positive_int("search", "jobs", jobs)
    path = storage_path("search", storage)
    check_method("search", method, space, directions)
    if jobs > 1 and path is None:
        raise ValueError(f"search: jobs={jobs} needs storage=, a file that the processes share")
    settings = {"method": method, "seed": seed, "directions": list(directions)}
    return run_search(
        "search",
        objective,
        space,
        settings=settings,
        trials=trials,
        path=path,
        name=name,
        jobs=jobs,
        first=first,
        progress=progress,
    )


def run_search(
    owner: str,
    objective: Objective,
    space: Space | None,
    *,
    settings: dict[str, Any],
    trials: int,
    path: Path | None,
    name: str,
    jobs: int = 1,
    first: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> SearchResult:
    """`search` after its checks; `settings` are what a study that goes on must agree with."""
    from optuna.distributions import distribution_to_json
    from tqdm import tqdm

    if space is not None:
        settings["space"] = {key: distribution_to_json(d) for key, d in space.items()}
    with only_one(owner, path):
        runner = Runner(owner, path, name, settings, objective, space)
        result = SearchResult(runner.study)
        if first is not None and not result.trials:
            runner.study.enqueue_trial(dict(first))
        missing = len(runner.missing(trials))
        total = max(trials, len(result.trials))
        running = runner.in_processes(trials, jobs) if jobs > 1 else runner.here(trials)
        failed = len(result.failed)
        # `disable=None`: no bar where nobody sees it
        hidden = None if progress else True
        bar = tqdm(total=total, initial=total - missing, unit="trial", desc=name, disable=hidden)
        with bar, closing(running):
            for trial in running:
                failed += trial.state.name == "FAIL"
                bar.update()
                if not bar.disable:
                    bar.set_postfix(_said(runner.study, failed))
    return result


def _said(study: "optuna.Study", failed: int) -> dict[str, Any]:
    said: dict[str, Any] = {"failed": failed} if failed else {}
    best = study.best_trials
    if len(study.directions) > 1:
        said["front"] = len(best)
    elif best:
        said["best"] = f"{best[0].value:.4g}"
    return said


def check_method(
    owner: str, method: str, space: Space | None, directions: Sequence[str] = ("maximize",)
) -> None:
    """Raise where the method is unknown, or not made for that space or those directions."""
    from optuna.distributions import BaseDistribution, CategoricalDistribution

    if method not in METHODS:
        raise ValueError(f"{owner}: unknown method {method!r}, choose one of {', '.join(METHODS)}")
    for direction in directions:
        if direction not in DIRECTIONS:
            raise ValueError(
                f"{owner}: unknown direction {direction!r}, choose one of {', '.join(DIRECTIONS)}"
            )
    if not directions:
        raise ValueError(f"{owner}: directions is empty; give one for each number to optimise")
    if method == "cma" and len(directions) > 1:
        raise ValueError(
            f"{owner}: method 'cma' knows one direction, got {len(directions)}: use 'nsga2'"
        )
    if space is None:
        return
    if not isinstance(space, Mapping):
        raise TypeError(
            f"{owner}: space must be a dict of name -> Optuna distribution, got {space!r}"
        )
    if not space:
        raise ValueError(f"{owner}: the space is empty; leave it out if the objective asks itself")
    for key, distribution in space.items():
        if not isinstance(key, str) or not isinstance(distribution, BaseDistribution):
            raise TypeError(
                f"{owner}: space[{key!r}] must be an Optuna distribution, such as "
                f"optuna.distributions.FloatDistribution(0, 1), got {distribution!r}"
            )
    numbers = [
        key
        for key, d in space.items()
        if not isinstance(d, CategoricalDistribution) and not d.single()
    ]
    if method == "cma" and len(numbers) < 2:
        raise ValueError(
            f"{owner}: method 'cma' needs at least two numbers that vary, and the space has "
            f"{len(numbers)} ({', '.join(numbers) or 'none'}): use 'tpe' or 'gp'"
        )


def storage_path(owner: str, storage: str | os.PathLike[str] | None) -> Path | None:
    """The absolute path of an SQLite file; Optuna's own way to write it is understood."""
    if storage is None:
        return None
    given = os.fspath(storage).removeprefix("sqlite:///")
    if "://" in given:
        raise ValueError(f"{owner}: storage is the path of an SQLite file, got {given!r}")
    path = Path(given).absolute()
    if path.is_dir():
        raise ValueError(f"{owner}: storage is the path of an SQLite file, {given!r} is a folder")
    return path
