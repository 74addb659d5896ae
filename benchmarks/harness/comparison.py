"""Comparison of variants over seeds: intervals, tests, verdicts, and their figure."""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

CONFIDENCE = 0.95


def mean_interval(values: Iterable[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the mean and half width of its Student-t confidence interval.

    The half width of a single value is infinite.
    """
    from scipy import stats  # a development package, which not every benchmark needs

    data = list(values)
    mean = statistics.fmean(data)
    if len(data) < 2:
        return mean, float("inf")
    t = float(stats.t.ppf(0.5 + confidence / 2, len(data) - 1))
    return mean, t * statistics.stdev(data) / len(data) ** 0.5


def probability_of_improvement(ours: list[float], theirs: list[float]) -> float:
    """Return the share of pairs of runs, ours and theirs, that ours wins; a tie is half a win."""
    wins = sum((a > b) + 0.5 * (a == b) for a in ours for b in theirs)
    return wins / (len(ours) * len(theirs))


@dataclass(frozen=True)
class Difference:
    """Difference of a variant to another, better is positive.

    Args:
        mean, half: mean over seeds and half width of its 95 % interval, paired by seed.
        improvement: probability of improvement over all pairs of runs.
        paired, welch: two-sided p-values, paired by seed and without pairing.
    """

    mean: float
    half: float
    improvement: float
    paired: float
    welch: float

    @property
    def verdict(self) -> str:
        """Side of 0 on which the interval lies, if it lies on one."""
        if self.mean - self.half > 0:
            return "better"
        return "worse" if self.mean + self.half < 0 else "not decided"

    def text(self, digits: int) -> str:
        """Return the mean with its sign and the half width."""
        return with_half((self.mean, self.half), digits, "+")


def difference(
    ours: Mapping[int, float], theirs: Mapping[int, float], *, sign: int = 1, scale: float = 1.0
) -> Difference | None:
    """Compare values by seed on the seeds that both have; None without such a seed.

    `sign` is -1 where less is better; the mean and the half width are in units of `1 / scale`.
    """
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        return None
    a, b = ([sign * values[seed] for seed in shared] for values in (ours, theirs))
    apart = [x - y for x, y in zip(a, b, strict=True)]
    mean, half = mean_interval(scale * d for d in apart)
    improvement = probability_of_improvement(a, b)
    return Difference(mean, half, improvement, *_p_values(a, b, apart))


def _p_values(a: list[float], b: list[float], apart: list[float]) -> tuple[float, float]:
    from scipy import stats

    if len(apart) < 2:
        return 1.0, 1.0
    # without scatter beyond rounding, a test statistic is 0 / 0 or infinite
    certain = 1.0 if _equal([*apart, 0.0]) else 0.0
    paired = certain if _equal(apart) else float(stats.ttest_1samp(apart, 0.0).pvalue)
    if _equal(a) and _equal(b):
        return paired, certain
    return paired, float(stats.ttest_ind(a, b, equal_var=False).pvalue)


def _equal(values: list[float]) -> bool:
    """Return True if the values are equal but for rounding."""
    return max(values) - min(values) <= 1e-9 * max(map(abs, values))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return p-values adjusted for a family of comparisons by Holm's method.

    Source: S. Holm, "A simple sequentially rejective multiple test procedure", Scandinavian
    Journal of Statistics 6, 1979.
    """
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def with_half(pair: tuple[float, float], digits: int, sign: str = "") -> str:
    """Return mean and half width of an interval as text."""
    return f"{pair[0]:{sign}.{digits}f} ± {pair[1]:.{digits}f}"


def cells(
    summary: Mapping[str, tuple[float, float]], measures: Mapping[str, tuple[str, float, int]]
) -> list[str]:
    """Return the cells of a table's line; `measures` are name -> (heading, factor, digits)."""
    return [
        with_half((scale * summary[name][0], scale * summary[name][1]), digits)
        if name in summary
        else ""
        for name, (_, scale, digits) in measures.items()
    ]


def plot_differences(
    panels: dict[str, dict[str, Difference]], file: Path, *, shared_names: bool = False
) -> None:
    """Draw a panel for each title: a difference a line, green better, red worse, grey neither."""
    from matplotlib.figure import Figure

    width = 9 if shared_names else 4.2 * len(panels)
    figure = Figure(figsize=(width, 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=shared_names)[0]
    colours = {"better": "C2", "worse": "C3", "not decided": "C7"}
    for ax, (title, differences) in zip(axes, panels.items(), strict=True):
        names = list(differences)[::-1]
        for y, name in enumerate(names):
            d = differences[name]
            ax.errorbar(d.mean, y, xerr=d.half, fmt="o", capsize=3, color=colours[d.verdict])
        ax.set_yticks(range(len(names)), names, fontsize=7)
        ax.axvline(0, color="k", lw=0.8)
        ax.set_title(title, fontsize=9)
        ax.grid(axis="x", alpha=0.3)
    figure.savefig(file, dpi=120)
