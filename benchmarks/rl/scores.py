"""What is said of many runs over many tasks: interquartile means with bootstrap intervals.

Source: Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice",
NeurIPS 2021, arXiv 2108.13264 (the method of the library rliable).
"""

from typing import Any

import numpy as np

from benchmarks.comparison import probability_of_improvement

Scores = dict[str, list[float]]
REPETITIONS = 2000
#: runs of a task below which a bootstrap knows nothing of their spread: its intervals are NaN
FEWEST = 3


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """Mean of the last axis without its lowest and its highest quarter."""
    cut = scores.shape[-1] // 4
    return np.sort(scores, -1)[..., cut : scores.shape[-1] - cut].mean(-1)


def resampled(scores: Scores, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Bootstrap repetitions of each task's runs, drawn within the task: (repetitions, runs)."""
    return {
        task: np.asarray(runs)[generator.integers(len(runs), size=(REPETITIONS, len(runs)))]
        for task, runs in scores.items()
    }


def pooled(scores: Scores | dict[str, np.ndarray]) -> np.ndarray:
    """The interquartile mean over the runs of all tasks, for each repetition."""
    return interquartile_mean(np.concatenate([np.asarray(s) for s in scores.values()], -1))


def wins(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> np.ndarray:
    """`probability_of_improvement` of each repetition, the mean over tasks."""
    found = []
    for task, runs in ours.items():
        a, b = runs[:, :, None], theirs[task][:, None]
        found.append(np.where(np.isnan(a), np.nan, (a > b) + 0.5 * (a == b)).mean((1, 2)))
    return np.mean(found, 0)


def with_interval(value: Any, repetitions: np.ndarray) -> list[float]:
    """The value and its 95 % percentile interval."""
    return [float(value), *(float(q) for q in np.quantile(repetitions, (0.025, 0.975)))]


def compare(ours: Scores, theirs: Scores) -> dict[str, list[float]]:
    """IQM of ours, how far it is above theirs, and the probability of improvement; intervals."""
    generator = np.random.default_rng(0)
    theirs = {task: theirs[task] for task in ours}
    drawn, against = resampled(ours, generator), resampled(theirs, generator)
    if min(len(runs) for s in (ours, theirs) for runs in s.values()) < FEWEST:
        drawn = {task: np.full_like(runs, np.nan) for task, runs in drawn.items()}
    found = pooled(ours)
    improved = np.mean([probability_of_improvement(ours[t], theirs[t]) for t in ours])
    return {
        "iqm": with_interval(found, pooled(drawn)),
        "over mlp": with_interval(found - pooled(theirs), pooled(drawn) - pooled(against)),
        "P(improvement)": with_interval(improved, wins(drawn, against)),
    }
