"""Studies of Optuna: their settings, storage, samplers and trials."""

import math
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlayers.coefficients.optional import require
from starlayers.coefficients.space import Space, check_space
from starlayers.modules import positive_int

if TYPE_CHECKING:
    import optuna

#: choices of `method`: a sampler of Optuna and the package that it needs
METHODS = {
    "tpe": ("TPESampler", "optuna"),
    "gp": ("GPSampler", "scipy"),
    "cma": ("CmaEsSampler", "cmaes"),
    "nsga2": ("NSGAIISampler", "optuna"),
    "random": ("RandomSampler", "optuna"),
}
#: trials of a generation of NSGA-II; Optuna's 50 would be half of a usual search
POPULATION = 20
#: values above which CMA-ES has a diagonal covariance: a full one is slow to draw from and to store
MAX_COVARIANCE = 64
#: seconds between two heartbeats of a trial, and without one until the trial is run again
HEARTBEAT_S, GRACE_S = 10, 60


def check_settings(owner: str, settings: Mapping[str, Any], space: Any, trials: int) -> None:
    """Raise an error that names an invalid setting or a missing package."""
    method, seed, directions = (settings[key] for key in ("method", "seed", "directions"))
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
    check_space(owner, method, space)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Optuna's line for each trial and its notes on experimental features."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(level, optuna.logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)


@quiet()
def open_study(
    owner: str, settings: dict[str, Any], space: Space | None, storage: Any, name: str, first: Any
) -> "optuna.Study":
    """Return the study of that name, new or begun with the same settings."""
    import optuna

    study = optuna.create_study(
        storage=open_storage(owner, storage),
        study_name=name,
        directions=settings["directions"],
        load_if_exists=True,
    )
    if space is not None:
        to_json = optuna.distributions.distribution_to_json
        settings = {**settings, "space": {key: to_json(d) for key, d in space.items()}}
    begun = {"directions": [d.name.lower() for d in study.directions]}
    begun = study.user_attrs.get("settings", begun)
    for key, value in settings.items():
        if begun.get(key, value) != value:
            raise ValueError(
                f"{owner}: the study {name!r} in {storage} was begun with {key}={begun[key]!r}, "
                f"and now {key}={value!r}: repeat the former, or give another name= or storage="
            )
    study.set_user_attr("settings", settings)
    if first is not None and not study.trials:
        study.enqueue_trial(dict(first))
    return study


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
    for is_last in (False, False, True):
        try:
            return RDBStorage(
                url,
                # SQLite has one writer at a time: wait for the other processes
                {"connect_args": {"timeout": GRACE_S}} if url.startswith("sqlite") else {},
                heartbeat_interval=HEARTBEAT_S,
                grace_period=GRACE_S,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=1),
            )
        except DBAPIError:  # Optuna fails if another process creates the tables at this moment
            if is_last:
                raise
            time.sleep(1)


@quiet()
def run_trials(
    study: "optuna.Study",
    objective: "Callable[[optuna.Trial], Any]",
    space: Space | None,
    trials: int,
    sampler: Any = None,
    timeout: float | None = None,
    callbacks: Sequence[Any] = (),
    progress: bool = True,
) -> None:
    """Run trials until as many have ended, each with a sampler seeded by its number."""
    import optuna

    def run(trial: optuna.Trial) -> list[float]:
        if sampler is None:
            study.sampler = _sampler(study.user_attrs["settings"], trial)
        try:
            for key, distribution in (space or {}).items():
                trial._suggest(key, distribution)  # as `study.ask(space)`, but with a heartbeat
            return _numbers(objective(trial), len(study.directions))
        except optuna.TrialPruned:
            raise
        except KeyboardInterrupt:  # no fault of the trial: queue it again
            retry = optuna.storages.RetryHeartbeatStaleTrialCallback()
            retry(study, study.trials[trial.number])
            raise
        except Exception as error:
            trial.set_user_attr("error", f"{type(error).__name__}: {error}")
            trial.set_user_attr("traceback", traceback.format_exc())
            raise

    def missing() -> int:
        return max(0, trials - len(ended_trials(study)))

    def stop_if_enough(*_: Any) -> None:
        if not missing():  # other processes ran some of them
            study.stop()

    study.sampler = sampler or study.sampler
    study.optimize(
        run,
        n_trials=missing(),
        timeout=timeout,
        catch=(Exception,),
        callbacks=[*callbacks, stop_if_enough],
        show_progress_bar=progress and sys.stderr.isatty(),
    )


def ended_trials(study: "optuna.Study") -> "list[optuna.trial.FrozenTrial]":
    """Return the trials that are neither running nor queued, and did not lose their process."""
    ended = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished()]
    return [t for t in ended if t.state.name != "FAIL" or "error" in t.user_attrs]


def _sampler(settings: Mapping[str, Any], trial: "optuna.Trial") -> Any:
    """Return a sampler seeded by the number of the trial without repeats before it.

    So processes draw different values, and a search that goes on draws what it would have drawn.
    """
    import numpy as np
    from optuna import samplers

    trials = trial.study.get_trials(deepcopy=False)
    original = trials[trial.number].system_attrs.get("failed_trial", trial.number)
    index = sum("failed_trial" not in t.system_attrs for t in trials[:original])
    seed = int(np.random.SeedSequence((settings["seed"], index)).generate_state(1)[0])
    options: dict[str, Any] = {}
    if settings["method"] == "nsga2":
        options = {"population_size": POPULATION}
    elif settings["method"] == "cma":
        options = {
            "use_separable_cma": len(settings.get("space", ())) > MAX_COVARIANCE,
            "independent_sampler": samplers.TPESampler(seed=seed),  # for categorical values
            "warn_independent_sampling": False,
        }
    return getattr(samplers, METHODS[settings["method"]][0])(seed=seed, **options)


def _numbers(returned: Any, directions: int) -> list[float]:
    values = [float(v) for v in (returned if isinstance(returned, list | tuple) else [returned])]
    if len(values) != directions or any(map(math.isnan, values)):
        wanted = "a number" if directions == 1 else f"{directions} numbers"
        raise ValueError(f"the objective returned {returned!r}, not {wanted}")
    return values
