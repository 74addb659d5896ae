"""Star MLPs, gated attention and hybrids against their plain forms, at matched parameters."""

from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, markdown_table, mean_interval, run_study, write_json
from benchmarks.comparison import plot_differences, probability_of_improvement, shown, verdict
from benchmarks.nlp_tasks import BASELINE, METRICS, RECIPES, VARIANTS, train_one

SEEDS = {"sentiment": 5, "prose": 3, "translation": 3}
SMOKE: dict[str, dict[str, Any]] = {
    "sentiment": {"epochs": 1},
    "prose": {"steps": 2},
    "translation": {"epochs": 1},
}

Records = dict[str, dict[str, Any]]


def jobs(smoke: bool) -> dict[str, dict[str, Any]]:
    """All runs by name, seeds outermost: a study stopped early has whole seeds."""
    found = {}
    for seed in range(1 if smoke else max(SEEDS.values())):
        for task, recipe in RECIPES.items():
            if seed >= SEEDS[task]:
                continue
            for variant, options in VARIANTS.items():
                found[f"{task}-{variant.replace(' ', '-')}-seed{seed}"] = {
                    "task": task,
                    "variant": variant,
                    "options": options,
                    "seed": seed,
                    "recipe": {**recipe, **(SMOKE[task] if smoke else {})},
                    "small": smoke,
                }
    return found


def values(records: Records, task: str, variant: str, metric: str) -> dict[int, float]:
    """A metric's value by seed."""
    wanted = {"task": task, "variant": variant}
    matching = [r for r in records.values() if wanted.items() <= r["job"].items()]
    return {r["job"]["seed"]: r[metric] for r in matching}


def summarise(records: Records, task: str) -> list[dict[str, Any]]:
    """A row for each variant: means, and the difference to its baseline, better is positive."""
    rows = []
    for variant in VARIANTS:
        found = {m: values(records, task, variant, m) for m in METRICS[task]}
        if not next(iter(found.values())):
            continue
        row: dict[str, Any] = {"variant": variant, "baseline": BASELINE[variant]}
        row["seeds"] = len(next(iter(found.values())))
        row["parameters"] = next(iter(values(records, task, variant, "parameters").values()))
        for metric, ours in found.items():
            row[metric] = mean_interval(ours.values())
        metric, more = next(iter(METRICS[task].items()))
        sign = 1 if more else -1
        baseline = values(records, task, BASELINE[variant], metric)
        shared = sorted(found[metric].keys() & baseline.keys())
        ours = [sign * found[metric][seed] for seed in shared]
        theirs = [sign * baseline[seed] for seed in shared]
        if shared and variant != BASELINE[variant]:
            row["better by"] = mean_interval(a - b for a, b in zip(ours, theirs, strict=True))
            row["P(improvement)"] = probability_of_improvement(ours, theirs)
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]], task: str) -> str:
    """The rows as Markdown, with 95 % intervals."""
    digits = {"bits_per_byte": 4}
    decides = next(iter(METRICS[task]))

    header = ["variant", "against", *METRICS[task], f"{decides}, better by", "P(improvement)", ""]
    body = []
    for row in rows:
        compared = "better by" in row
        body.append(
            [row["variant"], row["baseline"] if compared else "-"]
            + [shown(row[m], digits.get(m, 2)) for m in METRICS[task]]
            + [shown(row["better by"], digits.get(decides, 2), "+") if compared else "-"]
            + [f"{row['P(improvement)']:.2f}" if compared else "-"]
            + [verdict(row)]
        )
    return markdown_table(header, body)


def plot(summary: dict[str, list[dict[str, Any]]], file: Path) -> None:
    panels = {}
    for task, rows in summary.items():
        named = {f"{r['variant']}\nagainst {r['baseline']}": r for r in rows if "better by" in r}
        panels[f"{task}: {next(iter(METRICS[task]))}, better by"] = named
    plot_differences(panels, file)


def run(processes: int, smoke: bool, out: Path = RESULTS) -> None:
    folder = out / ("nlp-smoke" if smoke else "nlp")
    records = run_study(folder, jobs(smoke), train_one, processes=processes)
    summary = {task: rows for task in RECIPES if (rows := summarise(records, task))}
    for task, rows in summary.items():
        print(f"\n{task}, {rows[0]['parameters'] / 1e6:.2f} M parameters\n{table(rows, task)}")
    environment = next(iter(records.values()))["environment"]
    recipes = {r["job"]["task"]: r["job"]["recipe"] for r in records.values()}
    content = {"tasks": summary, "recipes": recipes, "environment": environment}
    write_json(folder.with_suffix(".json"), content)
    plot(summary, folder.with_suffix(".png"))
