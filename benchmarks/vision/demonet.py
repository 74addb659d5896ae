"""The paper's study at small scale: star against sum, with and without activation."""

from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, markdown_table, mean_interval, run_study, write_json
from benchmarks.data import benchmark_images

CENTRE = {"width": 32, "depth": 4}
WIDTHS, DEPTHS = (16, 32, 64), (2, 4, 8)
SHAPES = [{**CENTRE, "width": w} for w in WIDTHS] + [
    {**CENTRE, "depth": d} for d in DEPTHS if d != CENTRE["depth"]
]
VARIANTS = [
    {"combine": combine, "act": act} for combine in ("mul", "sum") for act in ("gelu", None)
]
RECIPE = {
    "epochs": 2,
    "batch_size": 128,
    "lr": 2e-3,
    "weight_decay": 0.05,
    "label_smoothing": 0.0,
    "flip": 0.0,
}
# Differences the paper reports at ImageNet scale, width 192 depth 12, in points of accuracy.
PAPER = {"star - sum": 5.5, "sum loses without activation": 33.8, "star loses": 1.2}


def train_one(job: dict[str, Any]) -> dict[str, Any]:
    import torch

    from starlayers.vision import DemoNet
    from starlayers.vision.training import TrainConfig, train

    data = benchmark_images(train=job["train"], test=job["test"])
    torch.manual_seed(job["seed"])
    model = DemoNet(
        job["depth"],
        job["width"],
        combine=job["combine"],
        act=job["act"],
        num_classes=10,
        in_chans=1,
        patch_size=4,
    )
    config = TrainConfig(**job["recipe"], seed=job["seed"])
    result = train(model, data, config, progress=False)
    return {
        "test_accuracy": result.test_accuracy,
        "history": result.history,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def jobs(seeds: int, smoke: bool) -> dict[str, dict[str, Any]]:
    shapes = SHAPES[:1] if smoke else SHAPES
    recipe = {**RECIPE, "epochs": 1, "batch_size": 64} if smoke else RECIPE
    size = {"train": 512, "test": 256} if smoke else {"train": None, "test": None}
    found = {}
    # seeds outermost: a study stopped early has whole seeds, not whole shapes
    for seed in range(seeds):
        for shape in shapes:
            for variant in VARIANTS:
                name = "w{width}-d{depth}-{combine}-{act}-seed{seed}".format(
                    **shape, **variant, seed=seed
                )
                found[name] = {**shape, **variant, "seed": seed, "recipe": recipe, **size}
    return found


def accuracies(
    records: dict[str, dict[str, Any]], shape: dict[str, int], variant: dict[str, Any]
) -> list[float]:
    """Accuracy in percent of each seed, in order of seeds."""
    wanted = {**shape, **variant}
    matching = [r for r in records.values() if wanted.items() <= r["job"].items()]
    return [100 * r["test_accuracy"] for r in sorted(matching, key=lambda r: r["job"]["seed"])]


def summarise(records: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Per shape: mean and interval of each variant, and of the differences paired by seed."""
    rows = []
    present = [s for s in SHAPES if accuracies(records, s, VARIANTS[0])]
    for shape in present:
        star, star_free, plain, plain_free = (accuracies(records, shape, v) for v in VARIANTS)
        differences = {
            "star - sum, gelu": (star, plain),
            "star - sum, no act": (star_free, plain_free),
            "star loses without act": (star, star_free),
            "sum loses without act": (plain, plain_free),
        }
        row: dict[str, Any] = {**shape, "seeds": len(star)}
        names = ("star gelu", "star no act", "sum gelu", "sum no act")
        for name, values in zip(names, (star, star_free, plain, plain_free), strict=True):
            row[name] = mean_interval(values)
        for name, (a, b) in differences.items():
            row[name] = mean_interval(x - y for x, y in zip(a, b, strict=True))
        more = [(p - q) - (s - t) for p, q, s, t in zip(plain, plain_free, star, star_free)]
        row["sum loses more than star by"] = mean_interval(more)
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    columns = [key for key in rows[0] if key not in ("width", "depth", "seeds")]
    body = [
        [str(row["width"]), str(row["depth"])]
        + ["{:.2f} ± {:.2f}".format(*row[column]) for column in columns]
        for row in rows
    ]
    return markdown_table(["width", "depth", *columns], body)


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """For each claim of the paper, where the interval supports it, and where it does not."""
    claims = {
        "star beats sum with GELU": "star - sum, gelu",
        "star beats sum without activation": "star - sum, no act",
        "removing the activation costs sum more than star": "sum loses more than star by",
    }
    lines = []
    for claim, column in claims.items():
        for row in rows:
            mean, half = row[column]
            if mean - half > 0:
                verdict = "yes"
            elif mean + half < 0:
                verdict = "NO, the opposite"
            else:
                verdict = "not decided (the interval holds 0)"
            lines.append(
                f"{claim}, width {row['width']} depth {row['depth']}: {verdict}, "
                f"{mean:+.2f} ± {half:.2f} points"
            )
    return lines


def plot(rows: list[dict[str, Any]], file: Path) -> None:
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
        line = sorted((r for r in rows if r[other] == CENTRE[other]), key=lambda r: r[sweep])
        for name, (colour, style) in looks.items():
            axes.errorbar(
                [r[sweep] for r in line],
                [r[name][0] for r in line],
                yerr=[r[name][1] for r in line],
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


def run(seeds: int, processes: int, smoke: bool, out: Path = RESULTS) -> None:
    folder = out / ("demonet-smoke" if smoke else "demonet")
    records = run_study(folder, jobs(seeds, smoke), train_one, processes=processes)
    rows = summarise(records)
    print(table(rows), *verdicts(rows), sep="\n")
    summary = {"rows": rows, "verdicts": verdicts(rows), "paper": PAPER}
    environment = next(iter(records.values()))["environment"]
    write_json(folder.with_suffix(".json"), {**summary, "environment": environment})
    plot(rows, folder.with_suffix(".png"))
