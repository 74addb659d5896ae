"""Zero gates in a pretrained encoder: full fine-tuning, and gates alone beside LoRA and IA3.

MiniLM (6 layers) is fine-tuned on sentences of film reviews: as it is, starified, or widened to as
many parameters; and with a frozen body, where gates stand against LoRA and IA3. All arms of a
seed see the same batches and begin with the same head. `tune` chose each arm's learning rate, and
how many times as large that of its new weights is, by accuracy on the validation split after 60
steps, with a seed that the study does not have: GRIDS is what was tried, PICKED what won.
"""

from itertools import product
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
from benchmarks.starify.arms import ARMS, FROZEN, LORA
from benchmarks.starify.train import RECIPE

SEEDS = 5
TUNING_SEED = 100
TUNING_STEPS = 60
SMOKE = {"steps": 2, "batch": 8}


def grid(**choices: list[Any]) -> list[dict[str, Any]]:
    """Return all combinations of the choices."""
    return [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]


BESIDE = grid(lr=[1e-4, 2e-4], times=[1, 10])
VECTORS = grid(lr=[3e-3, 1e-2, 3e-2, 1e-1])
GRIDS: dict[str, list[dict[str, Any]]] = {
    "plain": grid(lr=[1e-4, 2e-4, 4e-4]),
    **dict.fromkeys(["star full", "star low rank", "widened"], BESIDE),
    "star scale": [*BESIDE, {"lr": 2e-4, "times": 100}],
    "full gate alone": grid(lr=[3e-4, 1e-3, 3e-3]),
    "low-rank gate alone": grid(lr=[1e-3, 3e-3, 1e-2, 3e-2]),
    "LoRA": grid(lr=[1e-3, 3e-3, 1e-2], place=list(LORA)),
    **dict.fromkeys(["scale gate alone", "IA3", "head alone"], VECTORS),
}
PICKED: dict[str, dict[str, Any]] = {
    "plain": {"lr": 2e-4},
    "star full": {"lr": 2e-4, "times": 1},
    "star low rank": {"lr": 2e-4, "times": 1},
    "star scale": {"lr": 2e-4, "times": 1},
    "widened": {"lr": 1e-4, "times": 1},
    "full gate alone": {"lr": 1e-3},
    "low-rank gate alone": {"lr": 1e-2},
    "LoRA": {"lr": 3e-3, "place": "mlp"},
    "scale gate alone": {"lr": 1e-1},
    "IA3": {"lr": 3e-2},
    "head alone": {"lr": 3e-2},
}
#: an arm, and the arm that it is compared with
COMPARED = [
    ("star full", "plain"),
    ("star low rank", "plain"),
    ("star scale", "plain"),
    ("widened", "plain"),
    ("star full", "widened"),
    ("low-rank gate alone", "LoRA"),
    ("scale gate alone", "IA3"),
    ("full gate alone", "plain"),
    ("low-rank gate alone", "plain"),
]
#: metric -> digits, and whether more is better; the first decides
METRICS = {"accuracy": (2, 1), "log_loss": (4, -1)}

Comparisons = dict[tuple[str, str, str], Difference]


def jobs(smoke: bool = False) -> dict[str, Job]:
    """Make all jobs by name, seeds outermost: a study stopped early has whole seeds."""
    recipe = RECIPE | (SMOKE if smoke else {})
    return {
        f"{arm.replace(' ', '-')}-seed{seed}": _job(
            arm, seed, PICKED[arm], recipe, ["validation", "test"], smoke
        )
        for seed in range(2 if smoke else SEEDS)
        for arm in ARMS
    }


def tuning_jobs(smoke: bool = False) -> dict[str, Job]:
    """Make a job for each setting of each arm's grid."""
    recipe = RECIPE | (SMOKE if smoke else {"steps": TUNING_STEPS})
    return {
        "-".join([arm.replace(" ", "-"), *(f"{k}{v}" for k, v in settings.items())]): _job(
            arm, TUNING_SEED, settings, recipe, ["validation"], smoke
        )
        for arm, choices in GRIDS.items()
        for settings in choices
    }


def _job(
    arm: str,
    seed: int,
    settings: dict[str, Any],
    recipe: dict[str, Any],
    splits: list[str],
    smoke: bool,
) -> Job:
    trained = "the new parameters and the head" if arm in FROZEN else "all parameters"
    kind = {**ARMS[arm], "trained": trained}
    if "place" in settings:
        kind["lora"] = LORA[settings["place"]]
    return {
        "arm": arm,
        "seed": seed,
        "kind": kind,
        "settings": settings,
        "recipe": recipe,
        "splits": splits,
        "small": smoke,
    }


def values(records: Records, arm: str, split: str, metric: str) -> dict[int, float]:
    """Return a metric's value by seed."""
    return {
        r.seed: r.metrics[split][metric]
        for r in records.values()
        if r.arm == arm and r.seed is not None
    }


def summarise(records: Records, arms: tuple[str, ...] = tuple(ARMS)) -> list[dict[str, Any]]:
    """Return for each arm its sizes and speed, and means with intervals."""
    summary = []
    for arm in arms:
        runs = [r.metrics for r in records.values() if r.arm == arm]
        if runs:
            measured = {
                f"{split} {metric}": mean_interval(values(records, arm, split, metric).values())
                for split in ("validation", "test")
                for metric in METRICS
            }
            seconds = mean_interval(run["seconds_per_step"] for run in runs)
            sizes = {name: runs[0][name] for name in ("trainable", "parameters")}
            line = {"arm": arm, "seeds": len(runs), **sizes, **measured}
            summary.append({**line, "seconds_per_step": seconds})
    return summary


def compare(records: Records) -> Comparisons:
    """Return the differences on the test split, paired by seed; better is positive."""
    differences: Comparisons = {}
    for arm, against in COMPARED:
        for metric, (_, sign) in METRICS.items():
            ours, theirs = (values(records, name, "test", metric) for name in (arm, against))
            if (d := difference(ours, theirs, sign=sign)) is not None:
                differences[arm, against, metric] = d
    return differences


def arms_table(summary: list[dict[str, Any]]) -> str:
    """Return sizes and measures of the arms, with 95 % intervals."""
    columns = [f"{s} {m}" for s, m in product(("validation", "test"), METRICS)]
    digits = {name: METRICS[name.split()[1]][0] for name in columns}
    lines = [
        [row["arm"], str(row["seeds"]), f"{row['trainable']:,}", f"{row['parameters']:,}"]
        + [with_half(row[name], digits[name]) for name in columns]
        + [f"{row['seconds_per_step'][0]:.3f}"]
        for row in summary
    ]
    return markdown_table(["arm", "seeds", "trained", "parameters", *columns, "s/step"], lines)


def differences_table(differences: Comparisons) -> str:
    """Return the differences between arms, with 95 % intervals."""
    lines = [
        [arm, against, metric, d.text(METRICS[metric][0]), f"{d.improvement:.2f}", d.verdict]
        for (arm, against, metric), d in differences.items()
    ]
    header = ["arm", "against", "metric", "better by", "P(improvement)", ""]
    return markdown_table(header, lines)


def tables(records: Records) -> str:
    """Return the table of the arms and that of their differences."""
    return f"{arms_table(summarise(records))}\n{differences_table(compare(records))}"


def tuning_table(records: Records) -> str:
    """Return what was tried for each arm, the best setting first."""
    lines = []
    for arm in GRIDS:
        runs = [r for r in records.values() if r.arm == arm]
        # equal accuracies are told apart by log loss
        order = [
            (-r.metrics["validation"]["accuracy"], r.metrics["validation"]["log_loss"])
            for r in runs
        ]
        for _, run in sorted(zip(order, runs, strict=True), key=lambda pair: pair[0]):
            assert run.definition is not None
            setting = ", ".join(
                f"{k} {v:g}" if k != "place" else f"{k} {v}"
                for k, v in run.definition["settings"].items()
            )
            validation = run.metrics["validation"]
            lines.append(
                [arm, setting, f"{validation['accuracy']:.2f}", f"{validation['log_loss']:.4f}"]
            )
    return markdown_table(["arm", "settings", *METRICS], lines)


def plot(differences: Comparisons, file: Path) -> None:
    """Draw the differences, a panel a metric."""
    panels: dict[str, dict[str, Difference]] = {}
    for (arm, against, metric), d in differences.items():
        title = f"test {metric.replace('_', ' ')}, better by"
        panels.setdefault(title, {})[f"{arm}\nagainst {against}"] = d
    plot_differences(panels, file, shared_names=True)
