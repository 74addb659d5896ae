"""Figures of the reinforcement-learning study."""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.comparison import mean_interval
from benchmarks.harness.runner import Records
from benchmarks.rl.quality import values
from benchmarks.rl.scores import FEWEST
from benchmarks.rl.tasks import ARMS, TASKS


def plot_curves(records: Records, file: Path) -> None:
    """Draw a panel a task: mean returns over the budget, with 95 % intervals as bands."""
    from matplotlib.figure import Figure

    tasks = [t for t in TASKS if any((r.definition or {})["task"] == t for r in records.values())]
    columns = min(3, len(tasks))
    lines = -(-len(tasks) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for ax in axes[len(tasks) :]:
        ax.axis("off")
    for ax, task in zip(axes, tasks):
        for i, arm in enumerate(ARMS):
            curves = values(records, arm, "curve").get(task, [])
            if not curves:
                continue
            points = [mean_interval(p) for p in zip(*(c["returns"] for c in curves))]
            mean, half = np.array(points).T
            steps = np.mean([c["timesteps"] for c in curves], 0) / 1000
            style = "-" if i < 10 else "--"  # there are ten colours
            ax.plot(steps, mean, style, color=f"C{i % 10}", label=arm, lw=1.2)
            if len(curves) >= FEWEST:
                ax.fill_between(
                    steps, mean - half, mean + half, color=f"C{i % 10}", alpha=0.08, lw=0
                )
        # the bands of few runs are wide: the axis is that of their means
        ends = [end for line in ax.lines for end in (min(line.get_ydata()), max(line.get_ydata()))]
        margin = 0.05 * (max(ends) - min(ends)) or 1
        ax.set_ylim(min(ends) - margin, max(ends) + margin)
        ax.set_title(task, fontsize=10)
        ax.set_xlabel("thousand steps", fontsize=8)
        ax.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    for ax in axes[1 : len(tasks)]:
        for handle, label in zip(*ax.get_legend_handles_labels()):
            if label not in labels:
                handles, labels = [*handles, handle], [*labels, label]
    spare = axes[len(tasks)] if len(tasks) < len(axes) else figure
    place = "center" if spare is not figure else "outside right center"
    spare.legend(handles, labels, loc=place, fontsize=8)
    figure.savefig(file, dpi=120)


def plot_intervals(rows: dict[str, dict[str, Any]], file: Path) -> None:
    """Draw what each arm gains over the MLP, on the tasks that it has."""
    from matplotlib.figure import Figure

    panels = {
        "final score, IQM over mlp's": ("score", "over mlp", 0.0),
        "area under curve, IQM over mlp's": ("auc", "over mlp", 0.0),
        "P(final score above mlp's)": ("score", "P(improvement)", 0.5),
    }
    arms = [arm for arm in rows if arm != "mlp"][::-1]
    figure = Figure(figsize=(10, 1.2 + 0.3 * len(arms)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True)
    for ax, (title, (what, measure, even)) in zip(axes, panels.items()):
        for y, arm in enumerate(arms):
            value, low, high = rows[arm][what][measure]
            colour = "C2" if low > even else "C3" if high < even else "C7"
            ax.errorbar(value, y, xerr=[[value - low], [high - value]], fmt="o", color=colour)
        ax.axvline(even, color="k", lw=0.8)
        ax.set_title(title, fontsize=9)
        ax.grid(axis="x", alpha=0.3)
    names = [f"{arm} ({len(rows[arm]['returns'])} tasks)" for arm in arms]
    axes[0].set_yticks(range(len(arms)), names, fontsize=8)
    figure.savefig(file, dpi=120)
