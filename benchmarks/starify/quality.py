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
    holm,
    mean_interval,
    plot_differences,
    with_half,
)
from benchmarks.harness.report import conditions, listed, markdown_table
from benchmarks.harness.runner import Job, Records, of_arms
from benchmarks.harness.study import Study
from benchmarks.starify.arms import ARMS, FROZEN, LORA, PAST
from benchmarks.starify.train import RECIPE, train_one

NAME = "starify-quality"
SEEDS = 5
TUNING_SEED = 100
TUNING_STEPS = 60
SMOKE = {"steps": 2, "batch": 8}
TEXT = """\
## Study: gates in a pretrained encoder

**The question.** Does a pretrained encoder gain from zero gates in its MLPs: in full
fine-tuning, or alone, its weights frozen, where LoRA and IA3 are the alternatives?

**What was done.** MiniLM (all-MiniLM-L6-v2, 6 layers, {parameters:.1f} million parameters,
really pretrained) fine-tuned for one short run on film-review sentences ({steps} steps of
{batch}, linear head on the mean of the last states), {seeds} seeds, the same batches for all
arms of a seed. Every arm had its learning rate chosen on the validation
split, after {tuning_steps} steps with another seed, from {fewest} to {most}
settings. `widened` has half as many hidden units again, whose output weights are zero at first:
the parameters of the full gate. In the last {frozen} arms the encoder is frozen. Intervals are
95 % (Student's t).

{arms}
Differences on the test split are paired by seed; better is positive.

{differences}
![differences, paired by seed](../figures/starify-quality.png)

**The answer, in plain words.**

- *Of {family} comparisons {survivors} {survive} Holm's correction, both paired by seed and
  without pairing (Welch).* The verdicts in the table are those of single comparisons.
- *In full fine-tuning this study cannot tell the gates from none.* Full, low-rank and
  per-channel gates end within {within:.2f} points of the plain model. The per-channel gates
  hardly moved at the rate that was picked, so that they say little.
- Whether widening the plain MLP to the same parameters is worse than leaving it is undecided:
  {widened} points, one of {family} comparisons and uncorrected. Against it the full gate is
  {against_widened}: {full_widened}.
- *The full gate alone, the encoder frozen, is not told apart from full fine-tuning*, with
  {share:.0f} % of the parameters trained: {alone} points, {alone_verdict}.
- *At equal parameters LoRA was better than the low-rank gate*: by {lora_loss:.3f} in log loss,
  and by {lora:.1f} points of accuracy, uncorrected; its {lora_more:.1f} % more parameters do not
  explain that. IA3 was better than the per-channel gate in log loss, uncorrected, with
  {ia3_more:.0f} % more parameters. The low-rank gate's picked rate was one step from where it
  diverged, and its seeds scatter more.
- So: starify is exact, and a way to train an MLP's interactions while the model stays; as a
  recipe for short fine-tuning of a small encoder it has no advantage here. Longer training,
  larger models and other tasks were not tried.

### History: without activations

An earlier version of starify could move star layers to the activation-free form, `inp(x) * (1 +
gate(x))`, while the model trained (annealed over the first part of the steps), or refit each
layer to it in stages by least squares. Both were run from the pretrained MiniLM with full gates,
at the rate of the full gate, which was not tuned for them. They are removed; their records are
kept.

{past}
{chance} of {past_runs} runs ended at {chance_level} % or less, which is chance; the frozen
encoder has {head} %, the full gate with its activation {full} %. A pretrained encoder without
activations was not reached; lower rates and longer training were not tried.

**Conditions**

{conditions}
The runs without activations:

{past_conditions}
"""
TUNING_TEXT = """\
## Settings tried for the arms of the starify study

Accuracy in percent and log loss on the validation split after {steps} steps, with a seed that
the study does not have; the best setting of each arm first. The arms had
{fewest} to {most} settings each: an equal number for all would have been fairer.

{table}
**Conditions**

{conditions}
"""


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


def text(records: Records) -> str:
    """Make the page of the starify study."""
    summary = summarise(records)
    arms = {row["arm"]: row for row in summary}
    differences = compare(records)
    names = {
        " ".join([arm, "against", other, f"({m})"]): (arm, other, m)
        for arm, other, m in differences
    }
    paired = holm({name: differences[key].paired for name, key in names.items()})
    welch = holm({name: differences[key].welch for name, key in names.items()})
    survivors = [name for name in names if paired[name] < 0.05 and welch[name] < 0.05]
    accuracy = {(arm, other): d for (arm, other, m), d in differences.items() if m == "accuracy"}
    gates = [accuracy[arm, "plain"].mean for arm in ("star full", "star low rank", "star scale")]
    first = next(iter(records.values())).definition
    assert first is not None
    past = of_arms(NAME, list(PAST))
    past_accuracies = [r.metrics["test"]["accuracy"] for r in past.values()]
    chance = 51.0
    head, low, scale = (
        arms[a]["trainable"] for a in ("head alone", "low-rank gate alone", "scale gate alone")
    )
    grids = [len(grid) for grid in GRIDS.values()]
    return TEXT.format(
        parameters=arms["plain"]["parameters"] / 1e6,
        steps=first["recipe"]["steps"],
        batch=first["recipe"]["batch"],
        seeds=arms["plain"]["seeds"],
        tuning_steps=TUNING_STEPS,
        fewest=min(grids),
        most=max(grids),
        frozen=len(FROZEN),
        arms=arms_table(summary),
        differences=differences_table(differences),
        family=len(differences),
        survivors="only " + listed(survivors) if survivors else "none",
        survive="survives" if len(survivors) == 1 else "survive",
        within=max(map(abs, gates)),
        widened=accuracy["widened", "plain"].text(2),
        against_widened=accuracy["star full", "widened"].verdict,
        full_widened=accuracy["star full", "widened"].text(2),
        share=100 * arms["full gate alone"]["trainable"] / arms["plain"]["parameters"],
        alone=accuracy["full gate alone", "plain"].text(2),
        alone_verdict=accuracy["full gate alone", "plain"].verdict,
        lora_loss=-differences["low-rank gate alone", "LoRA", "log_loss"].mean,
        lora=-accuracy["low-rank gate alone", "LoRA"].mean,
        lora_more=100 * (arms["LoRA"]["trainable"] / low - 1),
        ia3_more=100 * ((arms["IA3"]["trainable"] - head) / (scale - head) - 1),
        past=past_table(past),
        chance=sum(a <= chance for a in past_accuracies),
        past_runs=len(past),
        chance_level=f"{chance:g}",
        head=with_half(arms["head alone"]["test accuracy"], 1),
        full=with_half(arms["star full"]["test accuracy"], 1),
        conditions=conditions(records.values()),
        past_conditions=conditions(past.values()),
    )


def past_table(past: Records) -> str:
    """Return the single runs of the arms that can no longer be run."""
    lines = []
    for r in past.values():
        test = r.metrics["test"]
        lines.append(
            [r.arm or "", str(r.seed), f"{test['accuracy']:.1f}", f"{test['log_loss']:.3f}"]
        )
    return markdown_table(["arm", "seed", "test accuracy, %", "test log loss"], lines)


STUDY = Study(
    NAME,
    "python -m benchmarks.starify quality",
    jobs,
    train_one,
    tables,
    text,
    lambda records: {"starify-quality.png": lambda file: plot(compare(records), file)},
)


def tuning_text(records: Records) -> str:
    """Make the page of the settings that were tried."""
    grids = [len(grid) for grid in GRIDS.values()]
    return TUNING_TEXT.format(
        steps=TUNING_STEPS,
        fewest=min(grids),
        most=max(grids),
        table=tuning_table(records),
        conditions=conditions(records.values()),
    )


TUNING = Study(
    NAME,
    "python -m benchmarks.starify tune",
    tuning_jobs,
    train_one,
    tuning_table,
    tuning_text,
)
