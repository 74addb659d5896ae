"""Samplers of Optuna by the name of the search method, seeded for each trial."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna

__all__ = ["METHODS", "make_sampler"]

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


def make_sampler(settings: Mapping[str, Any], trial: "optuna.Trial") -> Any:
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
