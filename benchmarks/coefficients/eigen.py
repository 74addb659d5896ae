"""Eigenfeatures of star classifiers: truncation, smoothness, and pictures.

Stars without activation learn Fashion-MNIST, plainly or with noise on the pixels, weight decay or
a penalty on their coefficients. Measured is the accuracy that is left when only the largest
eigenvectors of each class are kept, beside the largest products of two branches as they were
learned, and how smooth the eigenvectors are as pictures.
"""

import time
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.datasets import FashionMNIST

from benchmarks.coefficients.train import fit
from benchmarks.harness.comparison import cells, mean_interval, with_half
from benchmarks.harness.images import benchmark_images
from benchmarks.harness.report import conditions, first_definition, markdown_table
from benchmarks.harness.runner import Job, Records
from benchmarks.harness.study import Study
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
#: differences to plain AdamW without decay; penalties are (strength, options)
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "noise": {"noise": 0.4},
    "decay": {"weight_decay": 1.0},
    "noise and decay": {"noise": 0.4, "weight_decay": 1.0},
    "L2 penalty": {"penalty": [1.0, {"p": 2}]},
    "noise and L2 penalty": {"noise": 0.4, "penalty": [1.0, {"p": 2}]},
}
#: strengths tried with `--tune`, on training images set aside and a seed the study does not have;
#: taken are the largest that cost at most `TOLERATED` points of accuracy
STRENGTHS = [0.01, 0.1, 1.0]
TOLERATED = 1.5
TUNING_SEED, TUNING_SIZES = 100, {"train": 50_000, "set_aside": 10_000}
#: classes lose at most this much accuracy
LOSS = 0.01
TEXT = """\
## Study: what is in an output's quadratic form?

**The question.** A star classifier without activation computes each class's logit as `x~' Q x~`.
How many of Q's eigenvectors does it take, are they better than the products as they were
learned, and can one read them?

**What was done.** `StarMLP(784, {hidden}, out_features=10, act=None)` on Fashion-MNIST, {epochs}
epochs; plain, with noise of {noise:g} on the pixels, weight decay {decay:g}, or an L2 penalty on
the coefficients (strength {strength:g}, the largest tried that cost at most {tolerated:g} points
of validation accuracy). A class has up to {vectors} eigenvectors that are not zero; of each the
largest by `|lambda|` are kept. For comparison each class keeps the products that count most,
`|g_ok| |Q_k|`, which are two vectors each. {seeds} seeds, means with 95 % intervals. Roughness
is 1 for white noise.

{measures}
Test accuracy, %, by the number of eigenvectors kept per class:

{eigenvectors}
Test accuracy, %, by the number of products kept per class, two vectors each:

{products}
![Accuracy and variance explained against vectors kept](../figures/coefficients-eigen.png)

The largest positive eigenvector of every class, first seed:

![Pictures](../figures/coefficients-eigen-pictures.png)

**The answer, in plain words.**

- *A class is {enough_low:.0f} to {enough_high:.0f} vectors.* Of {vectors}, so many keep all but
  {loss:g} % of the accuracy.
- *Eigenvectors are the right parts, products are not.* Ten eigenvectors of the plain net
  classify {ten:.0f} %, five learned products (as many vectors) {five:.0f} %.
- *Weight decay or the penalty makes the pictures clean and the rank low, not noise.* Noise
  raises the effective rank from {rank_plain:.0f} to {rank_noise:.0f} and changes the roughness
  from {rough_plain:.2f} to {rough_noise:.2f}; arms with decay or penalty have {rank_low:.0f} to
  {rank_high:.0f} and {rough_low:.2f} to {rough_high:.2f}.
- *It costs accuracy*: {cost_low:.1f} to {cost_high:.1f} points against the plain net. A net one
  can read is not free.
- The L2 penalty on the coefficients has the lowest rank at the accuracy of weight decay
  ({l2:.1f} and {only_decay:.1f} %).

Weak points: one data set of centred images, one width, and the first positive vector of one seed
is what the picture shows; signs of eigenvectors are arbitrary, so that red and blue may change
places between lines.

**Conditions**

{conditions}
"""
TUNING_TEXT = """\
## Strengths tried in the study of eigenfeatures

Measures on the last {aside:,} training images, set aside, with a seed that the
study does not have.

{table}
**Conditions**

{conditions}
"""


def jobs(seeds: int = 5, arms: list[str] | None = None, smoke: bool = False) -> dict[str, Job]:
    """Make all jobs by name, seeds outermost: a study stopped early has whole seeds."""
    return {
        f"{arm.replace(' ', '_')}-seed{seed}": {
            "arm": arm,
            "seed": seed,
            "settings": ARMS[arm],
            "recipe": RECIPE | SMOKE if smoke else RECIPE,
            "sizes": SMOKE_SIZES if smoke else {},
            "kept": KEPT[:4] if smoke else KEPT,
            "loss": LOSS,
        }
        for seed in range(seeds)
        for arm in arms or ARMS
    }


def tuning_jobs(smoke: bool = False) -> dict[str, Job]:
    """Make a job for every penalty at every strength."""
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
    """Load flat pixels in 0..1 and labels of the training and the test or set-aside images."""
    images = benchmark_images()
    (x, labels), (x_test, labels_test) = (
        (part.tensors[0].flatten(1).float() / 255, part.tensors[1])
        for part in (cast(Any, images.train), cast(Any, images.test))
    )
    if n := sizes.get("set_aside"):
        x_test, labels_test = x[-n:], labels[-n:]
    train, test = sizes.get("train", len(x)), sizes.get("test", len(x_test))
    return x[:train], labels[:train], x_test[:test], labels_test[:test]


def trained(job: Job, x: Tensor, labels: Tensor) -> StarMLP:
    """Train the job's classifier."""
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
    """Return the share of right answers."""
    return float((model(x).argmax(1) == labels).double().mean())


@torch.inference_mode()
def products_kept(model: StarMLP, x: Tensor, labels: Tensor, kept: list[int]) -> list[float]:
    """Return the accuracy when each class keeps the products with the largest `|g_ok| |Q_k|`.

    `|Q_k|` is the Frobenius norm of `(w1 w2' + w2 w1') / 2`. A product is two vectors, so that
    `n` of them are to be compared with `2 n` eigenvectors.
    """
    assert model.g.bias is not None
    w1, w2 = (torch.cat([f.weight, f.bias[:, None]], 1).double() for f in (model.f1, model.f2))
    squares = (w1**2).sum(1) * (w2**2).sum(1) + (w1 * w2).sum(1) ** 2
    norm = (squares / 2).sqrt()
    order = (model.g.weight.double().abs() * norm).argsort(1, descending=True)
    products = model.f1(x) * model.f2(x)
    accuracies = []
    for n in kept:
        mask = torch.zeros_like(model.g.weight).scatter_(1, order[:, :n], 1.0)
        logits = F.linear(products, model.g.weight * mask, model.g.bias)
        accuracies.append(float((logits.argmax(1) == labels).double().mean()))
    return accuracies


def effective_rank(values: Tensor) -> float:
    """Return the number of eigenvalues if all were of one size: `(sum |l|)^2 / sum l^2`."""
    return float(values.abs().sum() ** 2 / (values**2).sum())


def roughness(features: Eigenfeatures, n: int = 5, side: int = 28) -> float:
    """Return the mean squared step between neighbours over twice the mean square, of `n` vectors.

    About 1 for white noise, near 0 for a smooth picture.
    """
    pictures = features.vectors[:n, :-1].reshape(-1, side, side)
    steps = [pictures.diff(dim=d).square().flatten(1).mean(1) for d in (1, 2)]
    return float(((steps[0] + steps[1]) / 4 / pictures.square().flatten(1).mean(1)).mean())


def train_one(job: Job) -> dict[str, Any]:
    """Train the job's arm from its seed, and measure its eigenfeatures."""
    x, labels, x_test, labels_test = data(**job["sizes"])
    began = time.perf_counter()
    model = trained(job, x, labels)
    seconds = time.perf_counter() - began
    features = eigenfeatures(model)
    kept = job["kept"]
    curve = truncation_curve(features, x_test, labels_test, k=[*kept, len(features[0].values)])
    shares = [f.explained(x_test) for f in features]
    n = len(features)
    metrics = {
        "test_accuracy": accuracy(model, x_test, labels_test),
        "train_accuracy": accuracy(model, x, labels),
        "curve": {"k": list(curve.k), "accuracy": list(curve.accuracy)}
        | {"agreement": list(curve.agreement), "explained": list(curve.explained)},
        "products": products_kept(model, x_test, labels_test, kept),
        "enough": curve.smallest(job["loss"]),
        "effective_rank": sum(effective_rank(f.values) for f in features) / n,
        "roughness": sum(map(roughness, features)) / n,
        "largest_share": sum(float(s.max()) for s in shares) / n,
        "seconds": seconds,
    }
    if job["seed"] == 0:
        metrics["pictures"] = [_picture(f) for f in features]
    return metrics


def _picture(features: Eigenfeatures) -> list[int]:
    """Return the largest positive eigenvector in hundredths of its largest weight."""
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
    """Return for each arm the intervals of all measures, and the curves."""
    summary = {}
    for arm in ARMS:
        runs = [r.metrics for r in records.values() if r.arm == arm]
        if not runs:
            continue
        curves: dict[str, Any] = {"k": runs[0]["curve"]["k"]}
        for measure in ("accuracy", "agreement", "explained"):
            curves[measure] = [mean_interval(v) for v in zip(*(r["curve"][measure] for r in runs))]
        curves["products"] = [mean_interval(v) for v in zip(*(r["products"] for r in runs))]
        summary[arm] = {
            "seeds": len(runs),
            **{m: mean_interval(float(r[m]) for r in runs) for m in MEASURES},
            "curves": curves,
        }
    return summary


def measures_table(summary: dict[str, dict[str, Any]]) -> str:
    """Return the measures of each arm."""
    lines = [[arm, *cells(row, MEASURES)] for arm, row in summary.items()]
    return markdown_table(["arm", *(name for name, _, _ in MEASURES.values())], lines)


def curve_table(summary: dict[str, dict[str, Any]], measure: str, title: str) -> str:
    """Return the accuracy by the number of eigenvectors or products kept."""
    kept = next(iter(summary.values()))["curves"]["k"][:-1]
    lines = [
        [arm, *(with_half((100 * m, 100 * h), 1) for m, h in row["curves"][measure][: len(kept)])]
        for arm, row in summary.items()
    ]
    return markdown_table([title, *map(str, kept)], lines)


def tables(records: Records) -> str:
    """Return the measures by arm; accuracy by eigenvectors, and by products, kept."""
    summary = summarise(records)
    return "\n".join(
        [
            measures_table(summary),
            curve_table(summary, "accuracy", "eigenvectors kept"),
            curve_table(summary, "products", "products kept"),
        ]
    )


def tuning_table(records: Records) -> str:
    """Return the measures of every strength that was tried."""
    lines = []
    for r in records.values():
        assert r.definition is not None
        measures = [f"{s * r.metrics[m]:.{d}f}" for m, (_, s, d) in MEASURES.items()]
        lines.append([r.arm or "", str(r.definition["settings"]["penalty"][0]), *measures])
    names = [name.replace("test", "validation") for name, _, _ in MEASURES.values()]
    return markdown_table(["arm", "strength", *names], lines)


def plot_curves(records: Records, file: Path) -> None:
    """Draw accuracy and explained variance against the vectors kept, with 95 % bands."""
    from matplotlib.figure import Figure

    summary = summarise(records)
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    panels = {
        "accuracy": ("accuracy, eigenvectors kept", 1),
        "products": ("accuracy, products kept", 2),
        "explained": ("variance of logits explained, eigenvectors", 1),
    }
    axes = figure.subplots(1, len(panels))
    for ax, (measure, (title, vectors)) in zip(axes, panels.items()):
        for i, (arm, row) in enumerate(summary.items()):
            points = row["curves"][measure]
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
    """Draw the largest positive eigenvector of every class, a line for each arm."""
    from matplotlib.figure import Figure

    by_arm = {
        r.arm or "": r.metrics["pictures"] for r in records.values() if "pictures" in r.metrics
    }
    columns = len(next(iter(by_arm.values())))
    figure = Figure(figsize=(1.1 * columns + 1, 1.15 * len(by_arm) + 0.2), layout="constrained")
    axes = figure.subplots(len(by_arm), columns, squeeze=False)
    for line, (arm, pictures) in zip(axes, by_arm.items()):
        for ax, numbers in zip(line, pictures):
            picture = torch.tensor(numbers).reshape(28, 28)
            most = float(picture.abs().float().quantile(0.995))
            ax.imshow(picture.numpy(), cmap="RdBu_r", vmin=-most, vmax=most)
            ax.set(xticks=[], yticks=[])
        line[0].set_ylabel(arm.replace(" and ", "\nand "), fontsize=8)
    for ax, name in zip(axes[0], FashionMNIST.classes):
        ax.set_title(name, fontsize=8)
    figure.savefig(file, dpi=120)


def text(records: Records) -> str:
    """Make the page of the study of eigenfeatures."""
    summary = summarise(records)
    plain = summary["plain"]
    others = {arm: row for arm, row in summary.items() if arm != "plain"}
    clean = [row for arm, row in summary.items() if "decay" in arm or "penalty" in arm]
    definition = first_definition(records)
    at = {k: i for i, k in enumerate(plain["curves"]["k"])}
    enough = [row["enough"][0] for row in summary.values()]
    ranks = [row["effective_rank"][0] for row in clean]
    rough = [row["roughness"][0] for row in clean]
    costs = [100 * (plain["test_accuracy"][0] - r["test_accuracy"][0]) for r in others.values()]
    return TEXT.format(
        hidden=definition["recipe"]["hidden"],
        epochs=definition["recipe"]["epochs"],
        noise=ARMS["noise"]["noise"],
        decay=ARMS["decay"]["weight_decay"],
        strength=ARMS["L2 penalty"]["penalty"][0],
        tolerated=TOLERATED,
        vectors=plain["curves"]["k"][-1],
        seeds=plain["seeds"],
        measures=measures_table(summary),
        eigenvectors=curve_table(summary, "accuracy", "eigenvectors"),
        products=curve_table(summary, "products", "products"),
        enough_low=min(enough),
        enough_high=max(enough),
        loss=100 * LOSS,
        ten=100 * plain["curves"]["accuracy"][at[10]][0],
        five=100 * plain["curves"]["products"][at[5]][0],
        rank_plain=plain["effective_rank"][0],
        rank_noise=summary["noise"]["effective_rank"][0],
        rough_plain=plain["roughness"][0],
        rough_noise=summary["noise"]["roughness"][0],
        rank_low=min(ranks),
        rank_high=max(ranks),
        rough_low=min(rough),
        rough_high=max(rough),
        cost_low=min(costs),
        cost_high=max(costs),
        l2=100 * summary["L2 penalty"]["test_accuracy"][0],
        only_decay=100 * summary["decay"]["test_accuracy"][0],
        conditions=conditions(records.values()),
    )


STUDY = Study(
    "coefficients-eigen",
    "python -m benchmarks.coefficients eigen",
    jobs,
    train_one,
    tables,
    text,
    lambda records: {
        "coefficients-eigen.png": lambda file: plot_curves(records, file),
        "coefficients-eigen-pictures.png": lambda file: plot_pictures(records, file),
    },
)


TUNING = Study(
    "coefficients-eigen",
    "python -m benchmarks.coefficients eigen --tune",
    tuning_jobs,
    train_one,
    tuning_table,
    lambda records: TUNING_TEXT.format(
        aside=TUNING_SIZES["set_aside"],
        table=tuning_table(records),
        conditions=conditions(records.values()),
    ),
)
