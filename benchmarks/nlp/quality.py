"""Star MLPs, gated attention and hybrids against their plain forms, at matched parameters."""

from pathlib import Path
from typing import Any

from benchmarks.harness.comparison import (
    Difference,
    difference,
    mean_interval,
    plot_differences,
    with_half,
)
from benchmarks.harness.report import markdown_table
from benchmarks.harness.runner import Job, Records
from benchmarks.nlp.tasks import (
    BASELINE,
    LAYERS,
    METRICS,
    MODEL,
    RECIPES,
    VARIANTS,
    VOCABULARY,
)

SEEDS = {"sentiment": 5, "prose": 3, "translation": 3}
SMOKE: dict[str, dict[str, Any]] = {
    "sentiment": {"epochs": 1},
    "prose": {"steps": 2},
    "translation": {"epochs": 1},
}
DIGITS = {"bits_per_byte": 4}

Summary = dict[str, list[dict[str, Any]]]


def jobs(smoke: bool = False) -> dict[str, Job]:
    """Make all jobs by name, seeds outermost: a study stopped early has whole seeds."""
    made = {}
    for seed in range(1 if smoke else max(SEEDS.values())):
        for task, recipe in RECIPES.items():
            if seed >= SEEDS[task]:
                continue
            for variant, options in VARIANTS.items():
                made[f"{task}-{variant.replace(' ', '-')}-seed{seed}"] = {
                    "arm": variant,
                    "seed": seed,
                    "task": task,
                    "options": options,
                    "model": MODEL,
                    "layers": LAYERS[task],
                    "vocabulary": VOCABULARY[task],
                    "recipe": {**recipe, **(SMOKE[task] if smoke else {})},
                    "small": smoke,
                }
    return made


def values(records: Records, task: str, variant: str, metric: str) -> dict[int, float]:
    """Return a metric's value by seed."""
    return {
        r.seed: r.metrics[metric]
        for r in records.values()
        if r.seed is not None and r.arm == variant and (r.definition or {}).get("task") == task
    }


def summarise(records: Records) -> Summary:
    """Return for each task its variants: means, and the difference to the baseline."""
    summary = {task: _summarise_task(records, task) for task in RECIPES}
    return {task: rows for task, rows in summary.items() if rows}


def _summarise_task(records: Records, task: str) -> list[dict[str, Any]]:
    rows = []
    for variant in VARIANTS:
        by_metric = {m: values(records, task, variant, m) for m in METRICS[task]}
        decisive, more = next(iter(METRICS[task].items()))
        if not by_metric[decisive]:
            continue
        baseline = BASELINE[variant]
        row: dict[str, Any] = {"variant": variant, "baseline": baseline, "task": task}
        row["seeds"] = len(by_metric[decisive])
        row["parameters"] = next(iter(values(records, task, variant, "parameters").values()))
        row |= {metric: mean_interval(by_seed.values()) for metric, by_seed in by_metric.items()}
        if variant != baseline:
            theirs = values(records, task, baseline, decisive)
            row["difference"] = difference(by_metric[decisive], theirs, sign=1 if more else -1)
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]], task: str) -> str:
    """Return a task's variants as Markdown, with 95 % intervals."""
    decisive = next(iter(METRICS[task]))
    header = ["variant", "against", *METRICS[task], f"{decisive}, better by", "P(improvement)", ""]
    lines = []
    for row in rows:
        means = [with_half(row[m], DIGITS.get(m, 2)) for m in METRICS[task]]
        d: Difference | None = row.get("difference")
        if d is None:
            lines.append([row["variant"], "-", *means, "-", "-", "the baseline"])
            continue
        compared = [d.text(DIGITS.get(decisive, 2)), f"{d.improvement:.2f}", d.verdict]
        lines.append([row["variant"], row["baseline"], *means, *compared])
    return markdown_table(header, lines)


def tables(records: Records) -> str:
    """Return a table for each task."""
    return "\n".join(
        f"{task}, {rows[0]['parameters'] / 1e6:.2f} M parameters\n\n{table(rows, task)}"
        for task, rows in summarise(records).items()
    )


def comparisons(summary: Summary) -> dict[str, Difference]:
    """Return all differences of the study, a family of comparisons."""
    return {
        f"{row['variant']} on {task}": row["difference"]
        for task, rows in summary.items()
        for row in rows
        if row.get("difference") is not None
    }


def plot(summary: Summary, file: Path) -> None:
    """Draw the differences, a panel a task."""
    panels = {
        f"{task}: {next(iter(METRICS[task]))}, better by": {
            f"{row['variant']}\nagainst {row['baseline']}": row["difference"]
            for row in rows
            if row.get("difference") is not None
        }
        for task, rows in summary.items()
    }
    plot_differences(panels, file)
