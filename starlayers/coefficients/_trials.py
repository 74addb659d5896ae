"""One trial: the sampler that draws its values, the objective, and what came of it."""

import logging
import math
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna

#: names of `method`, each an Optuna sampler
METHODS = ("tpe", "gp", "cma", "nsga2", "random")
#: Optuna's 50 would be half of a usual search
POPULATION = 20
#: a full covariance of more numbers is slow, and stored with every generation
MAX_COVARIANCE = 64

Objective = Callable[["optuna.Trial"], Any]
Space = Mapping[str, "optuna.distributions.BaseDistribution"]


def make_sampler(method: str, seed: int, index: int, space: Space | None) -> Any:
    """The sampler of trial `index`: made anew for each, so that a resumed search draws the same."""
    import numpy as np
    import optuna

    own = int(np.random.SeedSequence((seed, index)).generate_state(1)[0])
    made = optuna.samplers
    with quiet():
        if method == "tpe":
            return made.TPESampler(seed=own)
        if method == "gp":
            return made.GPSampler(seed=own)
        if method == "nsga2":
            return made.NSGAIISampler(seed=own, population_size=POPULATION)
        if method == "random":
            return made.RandomSampler(seed=own)
        return made.CmaEsSampler(
            seed=own,
            use_separable_cma=space is not None and len(space) > MAX_COVARIANCE,
            # CMA-ES knows numbers only; choices are TPE's
            independent_sampler=made.TPESampler(seed=own),
            warn_independent_sampling=False,
        )


def catch_up(sampler: Any, study: "optuna.Study") -> None:
    """Bring a new sampler to where it was in a trial that was cut off while it drew its values.

    Those that are there are drawn again, and dropped: without that the first of the others would
    be made of the same random numbers as they were.
    """
    from optuna.trial import TrialState

    waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    if not waiting or not waiting[0].distributions:
        return
    again = dict(waiting[0].distributions)
    relative, independent = sampler.sample_relative, sampler.sample_independent

    def sample_relative(*args: Any) -> dict[str, Any]:
        found: dict[str, Any] = relative(*args)
        for name in found:
            again.pop(name, None)
        return found

    def sample_independent(study: Any, trial: Any, name: str, distribution: Any) -> Any:
        for before in list(again):
            independent(study, trial, before, again.pop(before))
        return independent(study, trial, name, distribution)

    sampler.sample_relative, sampler.sample_independent = sample_relative, sample_independent


def run_trial(
    study: "optuna.Study", objective: Objective, space: Space | None, sampler: Any
) -> "optuna.trial.FrozenTrial":
    """Draw values, call the objective and record what came of it, an exception among others."""
    import optuna

    catch_up(sampler, study)
    study.sampler = sampler
    trial = study.ask(None if space is None else dict(space))
    finished = optuna.trial.TrialState
    try:
        values = _numbers(objective(trial), len(study.directions))
    except optuna.TrialPruned:
        return study.tell(trial, state=finished.PRUNED, skip_if_finished=True)
    except Exception as error:
        trial.set_user_attr("error", f"{type(error).__name__}: {error}")
        trial.set_user_attr("traceback", traceback.format_exc())
        return study.tell(trial, state=finished.FAIL, skip_if_finished=True)
    except BaseException:  # Ctrl-C says nothing of the trial
        study._storage.set_trial_state_values(trial._trial_id, finished.WAITING)
        raise
    return study.tell(trial, values, skip_if_finished=True)


def _numbers(returned: Any, directions: int) -> list[float]:
    values = [float(v) for v in (returned if isinstance(returned, list | tuple) else [returned])]
    if len(values) != directions or any(map(math.isnan, values)):
        wanted = "a number" if directions == 1 else f"{directions} numbers"
        raise ValueError(f"the objective returned {returned!r}, not {wanted}")
    return values


@contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's line for every study, and its notes on what of it is new."""
    import optuna

    logger = logging.getLogger("optuna")
    before = logger.level
    logger.setLevel(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        logger.setLevel(before)
