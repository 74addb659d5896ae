"""Star against sum in DemoNets, with and without activation: the paper's study at small scale."""

from pathlib import Path
from typing import Any

from benchmarks.harness.comparison import Difference, difference, mean_interval, with_half
from benchmarks.harness.images import recipe, train_on_images
from benchmarks.harness.report import conditions, listed, markdown_table
from benchmarks.harness.runner import Job, Records
from benchmarks.harness.study import Study

CENTRE = {"width": 32, "depth": 4}
WIDTHS, DEPTHS = (16, 32, 64), (2, 4, 8)
SHAPES = [{**CENTRE, "width": w} for w in WIDTHS] + [
    {**CENTRE, "depth": d} for d in DEPTHS if d != CENTRE["depth"]
]
ARMS: dict[str, dict[str, Any]] = {
    "star gelu": {"combine": "mul", "act": "gelu"},
    "star no act": {"combine": "mul", "act": None},
    "sum gelu": {"combine": "sum", "act": "gelu"},
    "sum no act": {"combine": "sum", "act": None},
}
#: softmax regression on the pixels, above which every network should be
LINEAR = "linear"
MODEL = {"patch_size": 4, "layer_scale": 1e-6, "drop_path_rate": 0.0}
RECIPE = {
    "epochs": 2,
    "batch_size": 128,
    "lr": 2e-3,
    "weight_decay": 0.05,
    "label_smoothing": 0.0,
    "flip": 0.0,
}
#: differences -> the two arms; positive where the first is ahead
DIFFERENCES = {
    "star - sum, gelu": ("star gelu", "sum gelu"),
    "star - sum, no act": ("star no act", "sum no act"),
    "star loses without act": ("star gelu", "star no act"),
    "sum loses without act": ("sum gelu", "sum no act"),
}
MORE = "sum loses more than star by"
#: claims of the paper -> the difference that has to be positive
CLAIMS = {
    "star beats sum with GELU": "star - sum, gelu",
    "star beats sum without activation": "star - sum, no act",
    "removing the activation costs sum more than star": MORE,
}
#: differences that the paper reports on ImageNet, width 192 depth 12, in points of accuracy
PAPER = {"star - sum": 5.5, "sum loses without activation": 33.8, "star loses": 1.2}
TEXT = """\
## Study: star against sum

**The question.** The paper's, at small scale: is a product of two branches better than their
sum, and does it need an activation less?

**What was done.** DemoNets that differ in nothing but `*` or `+`, with GELU or without any
activation, on Fashion-MNIST ({patch}x{patch} patches, {epochs} epochs, AdamW, peak rate {lr:g},
no augmentation). The recipe is the same for all arms and tuned for none. Test accuracy in
percent, mean and 95 % Student-t interval over {seeds} seeds.

{accuracies}
![accuracy against width and depth](../figures/vision-demonet.png)

Differences in points, paired by seed; a star marks those whose interval leaves out 0.

{differences}
**What this shows, and what it does not.**

- *Star is ahead of sum in {ahead} of {comparisons} comparisons, and in {decided} of them the
  interval leaves out 0.* Not decided: {open}. The difference is {least:.1f} to {most:.1f} points
  here; the paper's at width 192, depth 12 on ImageNet is {paper_gap}.
- *Whether removing activations costs sum more than star is undecided here.* The interval of the
  difference of the two losses holds 0 at {undecided} of {shapes} shapes, and its mean has either
  sign ({low:+.2f} to {high:+.2f}). On ImageNet the paper finds a loss of {paper_sum} points
  against {paper_star}.
- *The regime is weak.* A softmax regression on the pixels reaches {linear} % by the same recipe,
  more than {below} of the {nets} means in the first table: {epochs} epochs are few steps for a
  layer scale that starts at {layer_scale:g}. A regime counts only where every arm is above a
  linear classifier, so that this one decides little about networks that have learned.

**Conditions**

{conditions}
"""


def train_one(job: Job) -> dict[str, Any]:
    """Train the job's network from its seed."""
    import torch

    from starlayers.vision import DemoNet

    torch.manual_seed(job["seed"])
    if job["arm"] == LINEAR:
        linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(28 * 28, 10))
        return train_on_images(linear, job)
    model = DemoNet(
        job["depth"],
        job["width"],
        combine=job["combine"],
        act=job["act"],
        num_classes=10,
        in_chans=1,
        **job["model"],
    )
    return train_on_images(model, job)


def jobs(seeds: int = 3, smoke: bool = False) -> dict[str, Job]:
    """Make a job for every shape, arm and seed, and for the linear classifier."""
    shapes = SHAPES[:1] if smoke else SHAPES
    size = {"train": 512, "test": 256} if smoke else {"train": None, "test": None}
    common = {"data": "fashion-mnist", "recipe": recipe(smoke, **RECIPE), **size}
    made = {}
    # seeds outermost: a study stopped early has whole seeds, not whole shapes
    for seed in range(seeds):
        for shape in shapes:
            for arm, variant in ARMS.items():
                name = "w{width}-d{depth}-{combine}-{act}-seed{seed}".format(
                    **shape, **variant, seed=seed
                )
                job = {"arm": arm, "seed": seed, **shape, **variant, "model": MODEL}
                made[name] = {**job, **common}
        made[f"{LINEAR}-seed{seed}"] = {"arm": LINEAR, "seed": seed, **common}
    return made


def accuracies(records: Records, shape: dict[str, int], arm: str) -> dict[int, float]:
    """Return the accuracy in percent by seed."""
    return {
        r.seed: 100 * r.metrics["test_accuracy"]
        for r in sorted(records.values(), key=lambda r: r.seed or 0)
        if r.seed is not None and r.arm == arm and shape.items() <= (r.definition or {}).items()
    }


def summarise(records: Records) -> list[dict[str, Any]]:
    """Return for each shape the interval of each arm, and of the differences paired by seed."""
    summary = []
    for shape in SHAPES:
        by_arm = {arm: accuracies(records, shape, arm) for arm in ARMS}
        if not by_arm["star gelu"]:
            continue
        line: dict[str, Any] = {**shape, "seeds": len(by_arm["star gelu"])}
        line["arms"] = {arm: mean_interval(values.values()) for arm, values in by_arm.items()}
        line["differences"] = {
            name: difference(by_arm[a], by_arm[b]) for name, (a, b) in DIFFERENCES.items()
        }
        losses = [
            {seed: by_arm[f"{kind} gelu"][seed] - value for seed, value in without.items()}
            for kind in ("sum", "star")
            for without in [by_arm[f"{kind} no act"]]
        ]
        line["differences"][MORE] = difference(*losses)
        summary.append(line)
    return summary


def tables(records: Records) -> str:
    """Return accuracies and differences as Markdown, and the verdicts."""
    summary = summarise(records)
    lines = [f"{claim}: {text}" for claim, text in verdicts(summary)]
    return "\n".join([accuracy_table(summary), difference_table(summary), *lines])


def accuracy_table(summary: list[dict[str, Any]]) -> str:
    """Return accuracies by shape and arm."""
    lines = [
        [str(row["width"]), str(row["depth"]), *(with_half(row["arms"][arm], 2) for arm in ARMS)]
        for row in summary
    ]
    return markdown_table(["width", "depth", *ARMS], lines)


def difference_table(summary: list[dict[str, Any]]) -> str:
    """Return differences by shape; a star marks an interval without 0."""

    def cell(d: Difference) -> str:
        mark = "" if d.verdict == "not decided" else " *"
        return with_half((d.mean, d.half), 2) + mark

    names = [*DIFFERENCES, MORE]
    lines = [
        [str(row["width"]), str(row["depth"]), *(cell(row["differences"][name]) for name in names)]
        for row in summary
    ]
    return markdown_table(["width", "depth", *names], lines)


def verdicts(summary: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return for each claim and shape whether the interval supports the claim."""
    words = {"better": "yes", "worse": "NO, the opposite"}
    lines = []
    for claim, name in CLAIMS.items():
        for row in summary:
            d: Difference = row["differences"][name]
            verdict = words.get(d.verdict, "not decided (the interval holds 0)")
            where = f"{claim}, width {row['width']} depth {row['depth']}"
            lines.append((where, f"{verdict}, {d.text(2)} points"))
    return lines


def plot(summary: list[dict[str, Any]], file: Path) -> None:
    """Draw accuracy against width and against depth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    looks = {
        "star gelu": ("C0", "-"),
        "star no act": ("C0", "--"),
        "sum gelu": ("C1", "-"),
        "sum no act": ("C1", "--"),
    }
    fixed = {"width": "depth", "depth": "width"}
    for axes, sweep in zip(figure.subplots(1, 2, sharey=True), fixed, strict=True):
        other = fixed[sweep]
        line = sorted((r for r in summary if r[other] == CENTRE[other]), key=lambda r: r[sweep])
        for name, (colour, style) in looks.items():
            axes.errorbar(
                [r[sweep] for r in line],
                [r["arms"][name][0] for r in line],
                yerr=[r["arms"][name][1] for r in line],
                color=colour,
                linestyle=style,
                marker="o",
                capsize=3,
                label=name,
            )
        axes.set_xscale("log", base=2)
        ticks = [r[sweep] for r in line]
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.set(xlabel=sweep, title=f"accuracy against {sweep} ({other} {CENTRE[other]})")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("Fashion-MNIST test accuracy, %")
    figure.axes[0].legend()
    figure.savefig(file, dpi=120)


def text(records: Records) -> str:
    """Make the page of the DemoNet study."""
    summary = summarise(records)
    names = ("star - sum, gelu", "star - sum, no act")
    gaps: list[tuple[dict[str, Any], str, Difference]] = [
        (row, name, row["differences"][name]) for row in summary for name in names
    ]
    undecided = [
        f"width {row['width']} depth {row['depth']} {'with GELU' if 'gelu' in name else 'without'}"
        for row, name, d in gaps
        if d.verdict == "not decided"
    ]
    means = [d.mean for _, _, d in gaps]
    losses = [row["differences"][MORE] for row in summary]
    nets = [mean for row in summary for mean, _ in row["arms"].values()]
    linear = mean_interval(
        100 * r.metrics["test_accuracy"] for r in records.values() if r.arm == LINEAR
    )
    first = next(iter(records.values()))
    assert first.definition is not None
    return TEXT.format(
        linear=with_half(linear, 2),
        below=sum(mean < linear[0] for mean in nets),
        nets=len(nets),
        patch=first.definition["model"]["patch_size"],
        layer_scale=first.definition["model"]["layer_scale"],
        epochs=first.definition["recipe"]["epochs"],
        lr=first.definition["recipe"]["lr"],
        seeds=summary[0]["seeds"],
        accuracies=accuracy_table(summary),
        differences=difference_table(summary),
        ahead=sum(mean > 0 for mean in means),
        comparisons=len(gaps),
        decided=sum(d.verdict == "better" for _, _, d in gaps),
        open=listed(undecided),
        least=min(means),
        most=max(means),
        undecided=sum(d.verdict == "not decided" for d in losses),
        shapes=len(losses),
        low=min(d.mean for d in losses),
        high=max(d.mean for d in losses),
        paper_gap=PAPER["star - sum"],
        paper_sum=PAPER["sum loses without activation"],
        paper_star=PAPER["star loses"],
        conditions=conditions(records.values()),
    )


STUDY = Study(
    "vision-demonet",
    "python -m benchmarks.vision demonet",
    jobs,
    train_one,
    tables,
    text,
    lambda records: {"vision-demonet.png": lambda file: plot(summarise(records), file)},
)
