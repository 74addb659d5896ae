"""Do gates help a pretrained encoder? `python -m benchmarks.starify quality | tune | speed`.

MiniLM (6 layers) is fine-tuned on sentences of film reviews: as it is, starified, or widened to as
many parameters; and with a frozen body, where gates stand against LoRA and IA3. All arms of a
seed see the same batches and begin with the same head. `tune` chose each arm's learning rate, and
how many times as large that of its new weights is, by accuracy on the validation split after 60
steps, with a seed that the study does not have: GRIDS is what was tried, PICKED what won.

The runs are one JSON each, and a stopped study goes on where it was; `--smoke` takes seconds and
shows that it works, not a result.
"""

from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import starify_speed
from benchmarks.common import RESULTS, markdown_table, mean_interval, run_study, write_json
from benchmarks.comparison import plot_differences, probability_of_improvement, shown, verdict
from benchmarks.starify_arms import ARMS, BARE, FROZEN, FULL, LORA
from benchmarks.starify_train import RECIPE, train_one

SEEDS, BARE_SEEDS = 5, 3
TUNING_SEED = 100
TUNING_STEPS = 60
SMOKE = {"steps": 2, "batch": 8}


def grid(**choices: list[Any]) -> list[dict[str, Any]]:
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
    # not tuned: as the full gate that they have
    "annealed": {"lr": 2e-4, "times": 1},
    "refitted": {"lr": 2e-4, "times": 1},
    "full gate alone": {"lr": 1e-3},
    "low-rank gate alone": {"lr": 1e-2},
    "LoRA": {"lr": 3e-3, "place": "mlp"},
    "scale gate alone": {"lr": 1e-1},
    "IA3": {"lr": 3e-2},
    "head alone": {"lr": 3e-2},
}
#: an arm, and what it is measured against
COMPARED = [
    ("star full", "plain"),
    ("star low rank", "plain"),
    ("star scale", "plain"),
    ("widened", "plain"),
    ("star full", "widened"),
    ("annealed", "star full"),
    ("refitted", "star full"),
    ("low-rank gate alone", "LoRA"),
    ("scale gate alone", "IA3"),
    ("full gate alone", "plain"),
    ("low-rank gate alone", "plain"),
]
#: metric -> digits, and whether more is better; the first decides
METRICS = {"accuracy": (2, 1), "log_loss": (4, -1)}

Records = dict[str, dict[str, Any]]
app = typer.Typer(help=__doc__, pretty_exceptions_enable=False)
Processes = Annotated[int, typer.Option(help="runs at a time, one thread each; 0 only tabulates")]
Smoke = Annotated[bool, typer.Option("--smoke", help="seconds instead of an hour")]
Out = Annotated[Path, typer.Option(help="folder for results")]


def jobs(smoke: bool) -> dict[str, dict[str, Any]]:
    """All runs by name, seeds outermost: a study stopped early has whole seeds."""
    common = {
        "recipe": RECIPE | (SMOKE if smoke else {}),
        "splits": ["validation", "test"],
        "small": smoke,
    }
    return {
        f"{arm.replace(' ', '-')}-seed{seed}": {
            "arm": arm,
            "seed": seed,
            "settings": PICKED[arm],
            **common,
        }
        for arms, seeds in ((FULL | FROZEN, SEEDS), (BARE, BARE_SEEDS))
        for seed in range(2 if smoke else seeds)
        for arm in arms
    }


def tuning_jobs(smoke: bool) -> dict[str, dict[str, Any]]:
    recipe = RECIPE | (SMOKE if smoke else {"steps": TUNING_STEPS})
    common = {"seed": TUNING_SEED, "recipe": recipe, "splits": ["validation"], "small": smoke}
    return {
        "-".join([arm.replace(" ", "-"), *(f"{k}{v}" for k, v in settings.items())]): {
            "arm": arm,
            "settings": settings,
            **common,
        }
        for arm, choices in GRIDS.items()
        for settings in choices
    }


def values(records: Records, arm: str, split: str, metric: str) -> dict[int, float]:
    """A metric's value by seed."""
    matching = [r for r in records.values() if r["job"]["arm"] == arm]
    return {r["job"]["seed"]: r[split][metric] for r in matching}


def summarise(records: Records) -> list[dict[str, Any]]:
    """A row for each arm: sizes, speed, and means with intervals."""
    rows = []
    for arm in ARMS:
        found = [r for r in records.values() if r["job"]["arm"] == arm]
        if found:
            measured = {
                f"{split} {metric}": mean_interval(values(records, arm, split, metric).values())
                for split in ("validation", "test")
                for metric in METRICS
            }
            seconds = mean_interval(r["seconds_per_step"] for r in found)
            same = {name: found[0][name] for name in ("trainable", "parameters")}
            rows.append(
                {"arm": arm, "seeds": len(found), **same, **measured, "seconds_per_step": seconds}
            )
    return rows


def compare(records: Records) -> list[dict[str, Any]]:
    """Differences on the test split, paired by seed; better is positive."""
    rows = []
    for arm, against in COMPARED:
        for metric, (_, sign) in METRICS.items():
            both = [values(records, name, "test", metric) for name in (arm, against)]
            shared = sorted(both[0].keys() & both[1].keys())
            if shared:
                ours, theirs = ([sign * found[seed] for seed in shared] for found in both)
                rows.append(
                    {
                        "arm": arm,
                        "against": against,
                        "metric": metric,
                        "better by": mean_interval(a - b for a, b in zip(ours, theirs)),
                        "P(improvement)": probability_of_improvement(ours, theirs),
                    }
                )
    return rows


def tables(rows: list[dict[str, Any]], differences: list[dict[str, Any]]) -> str:
    """Arms, and differences between them, as Markdown with 95 % intervals."""
    columns = [f"{s} {m}" for s, m in product(("validation", "test"), METRICS)]
    digits = {name: METRICS[name.split()[1]][0] for name in columns}
    arms = markdown_table(
        ["arm", "trained", "parameters", *columns, "s/step"],
        [
            [row["arm"], f"{row['trainable']:,}", f"{row['parameters']:,}"]
            + [shown(row[name], digits[name]) for name in columns]
            + [f"{row['seconds_per_step'][0]:.3f}"]
            for row in rows
        ],
    )
    compared = markdown_table(
        ["arm", "against", "metric", "better by", "P(improvement)", ""],
        [
            [
                *(row[name] for name in ("arm", "against", "metric")),
                shown(row["better by"], METRICS[row["metric"]][0], "+"),
                f"{row['P(improvement)']:.2f}",
                verdict(row),
            ]
            for row in differences
        ],
    )
    return f"{arms}\n{compared}"


def plot(differences: list[dict[str, Any]], file: Path) -> None:
    panels: dict[str, dict[str, dict[str, Any]]] = {}
    for row in differences:
        # theirs are fifty times the others', and stay in the table
        if row["arm"] in BARE:
            continue
        title = f"test {row['metric'].replace('_', ' ')}, better by"
        panels.setdefault(title, {})[f"{row['arm']}\nagainst {row['against']}"] = row
    plot_differences(panels, file, shared_names=True)


@app.command()
def quality(processes: Processes = 2, smoke: Smoke = False, out: Out = RESULTS) -> None:
    """Fine-tune every arm with the learning rates that `tune` chose, and compare them."""
    folder = out / ("starify-smoke" if smoke else "starify")
    records = run_study(folder, jobs(smoke), train_one, processes=processes)
    rows, differences = summarise(records), compare(records)
    print(tables(rows, differences))
    first = next(iter(records.values()))
    content = {
        "arms": rows,
        "differences": differences,
        "recipe": first["job"]["recipe"],
        "picked": PICKED,
        "grids": GRIDS,
        "sources": first["sources"],
        "environment": first["environment"],
    }
    write_json(folder.with_suffix(".json"), content)
    plot(differences, folder.with_suffix(".png"))


@app.command()
def tune(processes: Processes = 2, smoke: Smoke = False, out: Out = RESULTS) -> None:
    """Try every arm's grid, and print what is best on the validation split."""
    folder = out / ("starify-tuning-smoke" if smoke else "starify-tuning")
    records = run_study(folder, tuning_jobs(smoke), train_one, processes=processes)
    tried: dict[str, list[dict[str, Any]]] = {}
    for record in records.values():
        job = record["job"]
        tried.setdefault(job["arm"], []).append({**job["settings"], **record["validation"]})
    body = []
    for arm, found in tried.items():
        # equal accuracies are told apart by log loss
        ordered = sorted(found, key=lambda row: (-row["accuracy"], row["log_loss"]))
        for row in ordered:
            setting = ", ".join(f"{k} {v}" for k, v in row.items() if k not in METRICS)
            body.append([arm, setting, f"{row['accuracy']:.2f}", f"{row['log_loss']:.4f}"])
    print(markdown_table(["arm", "settings", *METRICS], body))
    write_json(folder.with_suffix(".json"), tried)


@app.command()
def speed(smoke: Smoke = False, out: Out = RESULTS) -> None:
    """What gates cost and what fusing saves, in time and in memory kept for the backward."""
    starify_speed.run(smoke, out)


if __name__ == "__main__":
    app()
