"""Scores of many runs over many tasks: interquartile means with bootstrap intervals.

Source: Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice",
NeurIPS 2021, arXiv 2108.13264 (the method of the library rliable).
"""

from typing import Any

import numpy as np

from benchmarks.harness.comparison import probability_of_improvement

Scores = dict[str, list[float]]
REPETITIONS = 2000
#: least runs of a task for a bootstrap: with fewer, intervals are NaN
FEWEST = 3


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """Return the mean of the last axis without its lowest and its highest quarter."""
    cut = scores.shape[-1] // 4
    return np.sort(scores, -1)[..., cut : scores.shape[-1] - cut].mean(-1)


def resampled(scores: Scores, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Draw each task's runs with replacement, within the task: (repetitions, runs)."""
    return {
        task: np.asarray(runs)[generator.integers(len(runs), size=(REPETITIONS, len(runs)))]
        for task, runs in scores.items()
    }


def pooled(scores: Scores | dict[str, np.ndarray]) -> np.ndarray:
    """Return the interquartile mean over the runs of all tasks, for each repetition."""
    return interquartile_mean(np.concatenate([np.asarray(s) for s in scores.values()], -1))


def task_mean(scores: Scores | dict[str, np.ndarray]) -> np.ndarray:
    """Return the mean over tasks of the mean over runs, for each repetition.

    Unlike the interquartile mean it sees a task that is lost in most runs.
    """
    means: np.ndarray = np.mean([np.asarray(s).mean(-1) for s in scores.values()], 0)
    return means


def wins(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> np.ndarray:
    """Return `probability_of_improvement` of each repetition, the mean over tasks."""
    shares = []
    for task, runs in ours.items():
        a, b = runs[:, :, None], theirs[task][:, None]
        shares.append(np.where(np.isnan(a), np.nan, (a > b) + 0.5 * (a == b)).mean((1, 2)))
    mean: np.ndarray = np.mean(shares, 0)
    return mean


def with_interval(value: Any, repetitions: np.ndarray) -> list[float]:
    """Return the value and its 95 % percentile interval."""
    return [float(value), *(float(q) for q in np.quantile(repetitions, (0.025, 0.975)))]


def compare(ours: Scores, theirs: Scores) -> dict[str, list[float]]:
    """Compare scores by task with those of a baseline.

    Returns:
        "iqm" of ours; "over mlp", its distance to the baseline's; "mean over mlp", the distance
        of the means over tasks; "P(improvement)". Each has a value and an interval.
    """
    generator = np.random.default_rng(0)
    theirs = {task: theirs[task] for task in ours}
    drawn, against = resampled(ours, generator), resampled(theirs, generator)
    if min(len(runs) for s in (ours, theirs) for runs in s.values()) < FEWEST:
        drawn = {task: np.full_like(runs, np.nan) for task, runs in drawn.items()}
    iqm = pooled(ours)
    improved = np.mean([probability_of_improvement(ours[t], theirs[t]) for t in ours])
    return {
        "iqm": with_interval(iqm, pooled(drawn)),
        "over mlp": with_interval(iqm - pooled(theirs), pooled(drawn) - pooled(against)),
        "mean over mlp": with_interval(
            task_mean(ours) - task_mean(theirs), task_mean(drawn) - task_mean(against)
        ),
        "P(improvement)": with_interval(improved, wins(drawn, against)),
    }
