"""What studies say of a variant against another: wins, verdicts, intervals as text and figure."""

from pathlib import Path
from typing import Any


def probability_of_improvement(ours: list[float], theirs: list[float]) -> float:
    """Share of pairs of runs, ours and theirs, that ours wins; a tie is half a win."""
    wins = sum((a > b) + 0.5 * (a == b) for a in ours for b in theirs)
    return wins / (len(ours) * len(theirs))


def verdict(row: dict[str, Any]) -> str:
    """Whether the interval of the difference leaves 0 out, and on which side."""
    if "better by" not in row:
        return "the baseline"
    mean, half = row["better by"]
    if mean - half > 0:
        return "better"
    return "worse" if mean + half < 0 else "not decided"


def shown(pair: tuple[float, float], digits: int, sign: str = "") -> str:
    """Mean and half width of an interval."""
    return f"{pair[0]:{sign}.{digits}f} ± {pair[1]:.{digits}f}"


def measured(row: dict[str, Any], measures: dict[str, tuple[str, float, int]]) -> list[str]:
    """The cells of a row; `measures` are name -> (heading, factor, digits)."""
    return [
        shown((scale * row[name][0], scale * row[name][1]), digits) if name in row else ""
        for name, (_, scale, digits) in measures.items()
    ]


def plot_differences(
    panels: dict[str, dict[str, dict[str, Any]]], file: Path, *, shared_names: bool = False
) -> None:
    """Title -> name -> row with its difference: a panel each, green better, red worse."""
    from matplotlib.figure import Figure

    width = 9 if shared_names else 4.2 * len(panels)
    figure = Figure(figsize=(width, 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=shared_names)[0]
    colours = {"better": "C2", "worse": "C3", "not decided": "C7"}
    for ax, (title, rows) in zip(axes, panels.items(), strict=True):
        names = list(rows)[::-1]
        for y, name in enumerate(names):
            mean, half = rows[name]["better by"]
            colour = colours[verdict(rows[name])]
            ax.errorbar(mean, y, xerr=half, fmt="o", capsize=3, color=colour)
        ax.set_yticks(range(len(names)), names, fontsize=7)
        ax.axvline(0, color="k", lw=0.8)
        ax.set_title(title, fontsize=9)
        ax.grid(axis="x", alpha=0.3)
    figure.savefig(file, dpi=120)
