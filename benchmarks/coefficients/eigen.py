"""Eigenfeatures of star classifiers: `python -m benchmarks.coefficients_eigen [--smoke]`.

Stars without activation learn Fashion-MNIST, plainly or with noise on the pixels, weight decay or
a penalty on their coefficients. Measured is what is left when only the largest eigenvectors of
each class are kept, beside the largest products of two branches as they were learned, and how
clean the eigenvectors are as pictures.

The study keeps one JSON per run and goes on where it was stopped; `--processes 0` only tabulates.
`--smoke` takes seconds and shows that it works, not a result.
"""

import time
from functools import cache
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torchvision.datasets import FashionMNIST

from benchmarks.coefficients_train import fit
from benchmarks.common import RESULTS, markdown_table, mean_interval, run_study, write_json
from benchmarks.comparison import measured, shown
from benchmarks.data import benchmark_images
from starlayers import StarMLP
from starlayers.coefficients import (
    CoefficientPenalty,
    Eigenfeatures,
    eigenfeatures,
    truncation_curve,
)

KEPT = [1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 100]
RECIPE: dict[str, Any] = {"hidden": 256, "epochs": 15, "batch": 256, "lr": 2e-3}
SMOKE = {"hidden": 16, "epochs": 2}
SMOKE_SIZES = {"train": 1024, "test": 200}
#: what differs from plain AdamW without decay; penalties are (strength, options)
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "noise": {"noise": 0.4},
    "decay": {"weight_decay": 1.0},
    "noise and decay": {"noise": 0.4, "weight_decay": 1.0},
    "L2 penalty": {"penalty": [1.0, {"p": 2}]},
    "noise and L2 penalty": {"noise": 0.4, "penalty": [1.0, {"p": 2}]},
}
#: strengths tried with `--tune`, on training images set aside and a seed the study does not have;
#: taken are the largest that cost at most 1.5 points of accuracy
STRENGTHS = [0.01, 0.1, 1.0]
TUNING_SEED, TUNING_SIZES = 100, {"train": 50_000, "set_aside": 10_000}
#: classes lose at most this much accuracy
LOSS = 0.01

Records = dict[str, dict[str, Any]]


def jobs(seeds: int, arms: list[str], smoke: bool) -> Records:
    """All runs by name, seeds outermost: a study stopped early has whole seeds."""
    return {
        f"{arm.replace(' ', '_')}-seed{seed}": {
            "arm": arm,
            "seed": seed,
            "settings": ARMS[arm],
            "recipe": RECIPE | SMOKE if smoke else RECIPE,
            "sizes": SMOKE_SIZES if smoke else {},
            "kept": KEPT[:4] if smoke else KEPT,
        }
        for seed in range(seeds)
        for arm in arms
    }


def tuning_jobs(smoke: bool) -> Records:
    """Every penalty at every strength."""
    runs = {}
    for arm, settings in ARMS.items():
        for strength in STRENGTHS if "penalty" in settings else []:
            _, options = settings["penalty"]
            job = jobs(1, [arm], smoke).popitem()[1]
            job |= {"seed": TUNING_SEED, "settings": settings | {"penalty": [strength, options]}}
            if not smoke:
                job["sizes"] = TUNING_SIZES
            runs[f"{arm.replace(' ', '_')}-{strength}"] = job
    return runs


@cache
def data(**sizes: int) -> tuple[Tensor, ...]:
    """Train pixels in 0..1, flat, and labels; the same of test, or of what is set aside for it."""
    images = benchmark_images()
    (x, labels), (x_test, labels_test) = (
        (part.tensors[0].flatten(1).float() / 255, part.tensors[1])
        for part in (cast(Any, images.train), cast(Any, images.test))
    )
    if n := sizes.get("set_aside"):
        x_test, labels_test = x[-n:], labels[-n:]
    train, test = sizes.get("train", len(x)), sizes.get("test", len(x_test))
    return x[:train], labels[:train], x_test[:test], labels_test[:test]


def trained(job: dict[str, Any], x: Tensor, labels: Tensor) -> StarMLP:
    recipe, settings = job["recipe"], job["settings"]
    torch.manual_seed(job["seed"])
    model = StarMLP(x.shape[1], recipe["hidden"], out_features=10, act=None)
    strength, options = settings.get("penalty", (0.0, {}))
    penalty = CoefficientPenalty(model, **options) if strength else None
    fit(
        model, x, labels, recipe, penalty=penalty, strength=strength,
        weight_decay=settings.get("weight_decay", 0.0), noise=settings.get("noise", 0.0),
    )  # fmt: skip
    return model


@torch.inference_mode()
def accuracy(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    return float((model(x).argmax(1) == labels).double().mean())


@torch.inference_mode()
def products_kept(model: StarMLP, x: Tensor, labels: Tensor, kept: list[int]) -> list[float]:
    """Accuracy when each class keeps the products that count most: `|g_ok| |Q_k|`, as learned.

    `|Q_k|` is the Frobenius norm of `(w1 w2' + w2 w1') / 2`. A product is two vectors, so that
    `n` of them are to be compared with `2 n` eigenvectors.
    """
    assert model.g.bias is not None
    w1, w2 = (torch.cat([f.weight, f.bias[:, None]], 1).double() for f in (model.f1, model.f2))
    squares = (w1**2).sum(1) * (w2**2).sum(1) + (w1 * w2).sum(1) ** 2
    norm = (squares / 2).sqrt()
    order = (model.g.weight.double().abs() * norm).argsort(1, descending=True)
    products = model.f1(x) * model.f2(x)
    found = []
    for n in kept:
        mask = torch.zeros_like(model.g.weight).scatter_(1, order[:, :n], 1.0)
        logits = F.linear(products, model.g.weight * mask, model.g.bias)
        found.append(float((logits.argmax(1) == labels).double().mean()))
    return found


def effective_rank(values: Tensor) -> float:
    """How many eigenvalues there would be if all were of one size: `(sum |l|)^2 / sum l^2`."""
    return float(values.abs().sum() ** 2 / (values**2).sum())


def roughness(features: Eigenfeatures, n: int = 5, side: int = 28) -> float:
    """Mean squared difference of neighbouring pixels over twice the mean square, of `n` vectors.

    About 1 for white noise, near 0 for a smooth picture.
    """
    pictures = features.vectors[:n, :-1].reshape(-1, side, side)
    steps = [pictures.diff(dim=d).square().flatten(1).mean(1) for d in (1, 2)]
    return float(((steps[0] + steps[1]) / 4 / pictures.square().flatten(1).mean(1)).mean())


def train_one(job: dict[str, Any]) -> dict[str, Any]:
    """Train the job's arm from its seed and take it apart."""
    x, labels, x_test, labels_test = data(**job["sizes"])
    began = time.perf_counter()
    model = trained(job, x, labels)
    seconds = time.perf_counter() - began
    features = eigenfeatures(model)
    kept = job["kept"]
    curve = truncation_curve(features, x_test, labels_test, k=[*kept, len(features[0].values)])
    shares = [f.explained(x_test) for f in features]
    n = len(features)
    found = {
        "test_accuracy": accuracy(model, x_test, labels_test),
        "train_accuracy": accuracy(model, x, labels),
        "curve": {"k": list(curve.k), "accuracy": list(curve.accuracy)}
        | {"agreement": list(curve.agreement), "explained": list(curve.explained)},
        "products": products_kept(model, x_test, labels_test, kept),
        "enough": curve.smallest(LOSS),
        "effective_rank": sum(effective_rank(f.values) for f in features) / n,
        "roughness": sum(map(roughness, features)) / n,
        "largest_share": sum(float(s.max()) for s in shares) / n,
        "seconds": seconds,
    }
    if job["seed"] == 0:
        found["pictures"] = [_picture(f) for f in features]
    return found


def _picture(features: Eigenfeatures) -> list[int]:
    """The largest positive eigenvector in hundredths of its largest weight."""
    first = int((features.values > 0).nonzero()[0])
    vector = features.images[first]
    return [round(v) for v in (100 * vector / vector.abs().max()).tolist()]


MEASURES = {
    "test_accuracy": ("test accuracy, %", 100.0, 2),
    "train_accuracy": ("train accuracy, %", 100.0, 2),
    "effective_rank": ("effective rank", 1.0, 1),
    "enough": ("eigenvectors for all but 1 %", 1.0, 1),
    "largest_share": ("share of the largest term, %", 100.0, 0),
    "roughness": ("roughness", 1.0, 2),
}


def summarise(records: Records) -> dict[str, dict[str, Any]]:
    """Of each arm: means with 95 % intervals of every measure, and the curves."""
    rows = {}
    for arm in ARMS:
        runs = [r for r in records.values() if r["job"]["arm"] == arm]
        if not runs:
            continue
        curves: dict[str, Any] = {"k": runs[0]["curve"]["k"]}
        for what in ("accuracy", "agreement", "explained"):
            curves[what] = [mean_interval(v) for v in zip(*(r["curve"][what] for r in runs))]
        curves["products"] = [mean_interval(v) for v in zip(*(r["products"] for r in runs))]
        rows[arm] = {
            "seeds": len(runs),
            **{m: mean_interval(float(r[m]) for r in runs) for m in MEASURES},
            "curves": curves,
        }
    return rows


def tables(rows: dict[str, dict[str, Any]]) -> str:
    """Measures by arm; accuracy by eigenvectors, and by products, kept."""
    by_arm = [[arm, *measured(row, MEASURES)] for arm, row in rows.items()]
    text = markdown_table(["arm", *(name for name, _, _ in MEASURES.values())], by_arm)
    kept = next(iter(rows.values()))["curves"]["k"][:-1]
    for what, title in (("accuracy", "eigenvectors kept"), ("products", "products kept")):
        lines = [
            [arm, *(shown((100 * m, 100 * h), 1) for m, h in row["curves"][what][: len(kept)])]
            for arm, row in rows.items()
        ]
        text += "\n" + markdown_table([title, *map(str, kept)], lines)
    return text


def tune(runs: Records, folder: Path, processes: int) -> None:
    """Run and tabulate what the strengths of the penalties were chosen by."""
    records = run_study(folder, runs, train_one, processes=processes)
    lines = []
    for record in records.values():
        measures = [f"{s * record[m]:.{d}f}" for m, (_, s, d) in MEASURES.items()]
        lines.append(
            [record["job"]["arm"], str(record["job"]["settings"]["penalty"][0]), *measures]
        )
    names = [name.replace("test", "validation") for name, _, _ in MEASURES.values()]
    text = markdown_table(["arm", "strength", *names], lines)
    print(text)
    folder.with_suffix(".md").write_text(text)


def plot_curves(rows: dict[str, dict[str, Any]], file: Path) -> None:
    """Accuracy and variance explained against the vectors kept, with 95 % intervals as bands."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    panels = {
        "accuracy": ("accuracy, eigenvectors kept", 1),
        "products": ("accuracy, products kept", 2),
        "explained": ("variance of logits explained, eigenvectors", 1),
    }
    axes = figure.subplots(1, len(panels))
    for ax, (what, (title, vectors)) in zip(axes, panels.items()):
        for i, (arm, row) in enumerate(rows.items()):
            points = row["curves"][what]
            k = [vectors * n for n in row["curves"]["k"][: len(points)]]
            mean = [m for m, _ in points]
            ax.plot(k, mean, "o-", ms=2.5, lw=1.2, color=f"C{i}", label=arm)
            if row["seeds"] > 1:
                low, high = ([m + s * h for m, h in points] for s in (-1, 1))
                ax.fill_between(k, low, high, color=f"C{i}", alpha=0.15, lw=0)
        ax.set_xscale("log")
        ax.set_xlabel("vectors per class", fontsize=8)
        ax.set_ylim(0, 1.02)
        ax.set_title(title, fontsize=9)
        ax.grid(alpha=0.3)
    axes[1].legend(fontsize=7)
    figure.savefig(file, dpi=120)


def plot_pictures(records: Records, file: Path) -> None:
    """The largest positive eigenvector of every class, a row for each arm."""
    from matplotlib.figure import Figure

    rows = {r["job"]["arm"]: r["pictures"] for r in records.values() if "pictures" in r}
    columns = len(next(iter(rows.values())))
    figure = Figure(figsize=(1.1 * columns + 1, 1.15 * len(rows) + 0.2), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (arm, pictures) in zip(axes, rows.items()):
        for ax, numbers in zip(line, pictures):
            picture = torch.tensor(numbers).reshape(28, 28)
            most = float(picture.abs().float().quantile(0.995))
            ax.imshow(picture.numpy(), cmap="RdBu_r", vmin=-most, vmax=most)
            ax.set(xticks=[], yticks=[])
        line[0].set_ylabel(arm.replace(" and ", "\nand "), fontsize=8)
    for ax, name in zip(axes[0], FashionMNIST.classes):
        ax.set_title(name, fontsize=8)
    figure.savefig(file, dpi=120)


def run(runs: Records, folder: Path, report: Path, processes: int) -> None:
    """Run what is missing, and write table, figures and summary beside each other."""
    records = run_study(folder, runs, train_one, processes=processes)
    rows = summarise(records)
    text = tables(rows)
    print(text)
    first = next(iter(records.values()))
    summary = {"arms": rows, "recipe": first["job"]["recipe"], "settings": ARMS}
    write_json(report.with_suffix(".json"), summary | {"environment": first["environment"]})
    report.with_suffix(".md").write_text(text)
    plot_curves(rows, report.with_suffix(".png"))
    plot_pictures(records, report.with_name(f"{report.name}-pictures.png"))


def main(
    arms: Annotated[str, typer.Option(help="names, commas between [all]")] = "",
    seeds: int = 5,
    processes: Annotated[int, typer.Option(help="runs at a time, one thread each")] = 2,
    tuning: Annotated[bool, typer.Option("--tune", help="strengths of penalties instead")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="seconds instead of minutes")] = False,
    out: Annotated[Path, typer.Option(help="folder for results")] = RESULTS,
) -> None:
    """Train every arm, keep its largest eigenvectors, and compare what is left."""
    names = [name.strip() for name in arms.split(",")] if arms else list(ARMS)
    if unknown := [name for name in names if name not in ARMS]:
        raise typer.BadParameter(f"unknown arms {unknown}, choose from {', '.join(ARMS)}")
    folder = out / ("coefficients-smoke" if smoke else "coefficients")
    if tuning:
        tune(tuning_jobs(smoke), folder / "eigen-tuning", processes)
        return
    run(jobs(1 if smoke else seeds, names, smoke), folder / "eigen", folder / "eigen", processes)


if __name__ == "__main__":
    typer.run(main)
