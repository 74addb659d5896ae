"""Objectives for searches in other processes, and a command that runs such a search."""

import os
import sys
import time
from pathlib import Path

from optuna.distributions import FloatDistribution

from starlayers.coefficients.search import search

SPACE = {f"x{i}": FloatDistribution(-2, 2) for i in range(3)}


def hill(trial):
    """0 at (0.5, 0.5, 0.5), below everywhere else."""
    return -sum((x - 0.5) ** 2 for x in trial.params.values())


def slow_hill(trial):
    time.sleep(0.05)
    return hill(trial)


def asks_itself(trial):
    for name in SPACE:
        trial.suggest_float(name, -2, 2)
    return hill(trial)


def fails_at_times(trial):
    if trial.number % 5 == 2:
        raise ArithmeticError(f"no luck with {trial.number}")
    return hill(trial)


def process_id(trial):
    trial.set_user_attr("pid", os.getpid())
    return slow_hill(trial)


OBJECTIVES = {f.__name__: f for f in (slow_hill, process_id)}


def run(storage: Path, objective: str, method: str, trials: int):
    return search(
        OBJECTIVES[objective],
        SPACE,
        method=method,
        trials=trials,
        storage=storage,
        seed=3,
        progress=False,
    )


if __name__ == "__main__":
    path, objective, method, trials = sys.argv[1:]
    run(Path(path), objective, method, int(trials))
