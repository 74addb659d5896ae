"""Search for coefficients and other choices of star layers, on Optuna."""

import math
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlayers.coefficients.plots import plot_study
from starlayers.coefficients.space import METHODS, Space, search_settings

if TYPE_CHECKING:
    import optuna

__all__ = ["SearchResult", "search"]

#: seconds between two heartbeats of a trial, and without one until the trial is run again
HEARTBEAT_S, GRACE_S = 10, 60


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
        ended = [t for t in self.study.get_trials(deepcopy=False) if t.state.is_finished()]
        # a failed trial without an error lost its process
        return [t for t in ended if t.state.name != "FAIL" or "error" in t.user_attrs]

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
        return float(self._best.values[0])

    @property
    def best_so_far(self) -> list[float]:
        """Best value after each of `trials`; NaN until one is complete."""
        import numpy as np

        # unlike maximum and minimum, these two ignore NaN
        best = np.fmax if self.study.direction.name == "MAXIMIZE" else np.fmin
        values = [t.value if t.state.name == "COMPLETE" else None for t in self.trials]
        return [float(v) for v in best.accumulate(np.array(values, dtype=float))]

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

    With `storage`, a stopped search goes on when it is called again, until `trials` have ended.
    Processes that make the same call share the trials, and may each run one more. A trial whose
    process was killed runs again with its values, once. A trial that raises or returns NaN is
    recorded as failed, and the search goes on.

    Args:
        objective: `objective(trial) -> float`, or a tuple with a number for each direction. Seed
            its random numbers, for example with `trial.number`.
        space: name -> Optuna distribution; `coefficient_space()` makes one.
        method: "tpe", "gp" (Gaussian process; few, costly trials), "cma" (CMA-ES; many numbers),
            "nsga2" (several directions; populations of 20) or "random", all of Optuna. "cma" leaves
            categorical values to TPE; its covariance is diagonal for more than 64 values.
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
            seed, no trials, or a study begun with other settings.

    Source: Akiba et al., "Optuna", KDD 2019, arXiv 1907.10902.

    Example:
        >>> from optuna.distributions import FloatDistribution
        >>> space = {"x": FloatDistribution(-2, 2), "y": FloatDistribution(-2, 2)}
        >>> def objective(trial):
        ...     return -((trial.params["x"] - 1) ** 2) - trial.params["y"] ** 2
        >>> result = search(objective, space, method="cma", trials=60, progress=False)
        >>> result.value > -0.1
        True
    """
    settings = search_settings("search", method, seed, directions, space, trials)
    if timeout is not None and not timeout > 0:
        raise ValueError(f"search: timeout must be above 0 seconds, got {timeout}")
    own = (objective, space, trials, storage, name, first, progress, sampler, timeout, callbacks)
    return run_search("search", settings, *own)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Optuna's line for each trial and its notes on experimental features."""
    import optuna

    level = optuna.logging.get_verbosity()
    with ExitStack() as undo, warnings.catch_warnings():
        undo.callback(optuna.logging.set_verbosity, level)
        optuna.logging.set_verbosity(max(level, optuna.logging.WARNING))
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


@quiet()
def run_search(
    owner: str,
    settings: dict[str, Any],
    objective: "Callable[[optuna.Trial], Any]",
    space: Space | None,
    trials: int,
    storage: Any,
    name: str,
    first: Mapping[str, Any] | None,
    progress: bool,
    sampler: Any = None,
    timeout: float | None = None,
    callbacks: Sequence[Any] = (),
) -> SearchResult:
    """Create a study, or go on with one of the same settings, until `trials` have ended."""
    import optuna

    directions, opened = settings["directions"], open_storage(owner, storage)
    options = {"study_name": name, "directions": directions, "load_if_exists": True}
    study = optuna.create_study(storage=opened, sampler=sampler, **options)
    begun = {"directions": [d.name.lower() for d in study.directions]}
    begun = study.user_attrs.get("settings", begun)
    for key, value in settings.items():
        if begun.get(key, value) != value:
            raise ValueError(
                f"{owner}: the study {name!r} in {storage} was begun with {key}={begun[key]!r}, "
                f"and now {key}={value!r}: repeat the former, or give another name= or storage="
            )
    study.set_user_attr("settings", settings)
    if unknown := [key for key in first or {} if space is not None and key not in space]:
        raise ValueError(
            f"{owner}: first names {unknown}, which are not in the space: {sorted(space or ())}"
        )
    if first is not None and not study.trials:
        study.enqueue_trial(dict(first))
    result = SearchResult(study)

    def run(trial: optuna.Trial) -> list[float]:
        study.sampler = sampler or _sampler(trial)
        try:
            for key, distribution in (space or {}).items():
                trial._suggest(key, distribution)  # as `study.ask(space)`, but with a heartbeat
            return _numbers(objective(trial), len(directions))
        except KeyboardInterrupt:  # no fault of the trial: queue it again
            optuna.storages.RetryHeartbeatStaleTrialCallback()(study, study.trials[trial.number])
            raise
        except Exception as error:
            if not isinstance(error, optuna.TrialPruned):
                trial.set_user_attr("error", f"{type(error).__name__}: {error}")
                trial.set_user_attr("traceback", traceback.format_exc())
            raise

    def stop_if_enough(_: Any, trial: Any) -> None:
        unused = (first or {}).keys() - trial.params.keys() if trial.number == 0 else ()
        if unused and trial.values:
            raise ValueError(f"{owner}: first names {sorted(unused)}, which no trial asks for")
        if len(result.trials) >= trials:  # other processes ran some of them
            study.stop()

    missing, callbacks = max(0, trials - len(result.trials)), [*callbacks, stop_if_enough]
    bar = progress and sys.stderr.isatty()
    study.optimize(
        run, missing, timeout, catch=(Exception,), callbacks=callbacks, show_progress_bar=bar
    )
    return result


def open_storage(owner: str, storage: Any) -> Any:
    """Open a path or URL with heartbeats; return a storage of Optuna unchanged."""
    from optuna.storages import BaseStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
    from sqlalchemy.exc import DBAPIError

    if storage is None or isinstance(storage, BaseStorage):
        return storage
    url = os.fspath(storage)
    if "://" not in url:
        path = Path(url).absolute()
        if path.is_dir():
            raise ValueError(f"{owner}: storage must be an SQLite file, {url!r} is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        url = f"sqlite:///{path}"
    create = partial(
        RDBStorage,
        url,
        # SQLite has one writer at a time: wait for the other processes
        {"connect_args": {"timeout": GRACE_S}} if url.startswith("sqlite") else {},
        heartbeat_interval=HEARTBEAT_S,
        grace_period=GRACE_S,
        heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=1),
    )
    for _ in range(2):
        with suppress(DBAPIError):  # Optuna fails if another process creates the tables now
            return create()
        time.sleep(1)
    return create()


def _sampler(trial: "optuna.Trial") -> Any:
    """Return a sampler seeded by the number of the trial without repeats before it."""
    # so processes draw different values, and a search goes on as if it had never stopped
    import numpy as np
    from optuna import samplers

    settings = trial.study.user_attrs["settings"]
    trials = trial.study.get_trials(deepcopy=False)
    original = trials[trial.number].system_attrs.get("failed_trial", trial.number)
    index = sum("failed_trial" not in t.system_attrs for t in trials[:original])
    seed = int(np.random.SeedSequence((settings["seed"], index)).generate_state(1)[0])
    name, _, options = METHODS[settings["method"]]
    if settings["method"] == "cma":
        # a full covariance of more values is slow to draw from and to store
        options = {**options, "use_separable_cma": len(settings.get("space", ())) > 64}
        options["independent_sampler"] = samplers.TPESampler(seed=seed)  # for categorical values
    return getattr(samplers, name)(seed=seed, **options)


def _numbers(returned: Any, directions: int) -> list[float]:
    values = [float(v) for v in (returned if isinstance(returned, list | tuple) else [returned])]
    if len(values) != directions or any(map(math.isnan, values)):
        wanted = "a number" if directions == 1 else f"{directions} numbers"
        raise ValueError(f"the objective returned {returned!r}, not {wanted}")
    return values
