"""Decision boundaries of stars beside those of sums and SVMs, and stars as kernels.

`star` and `sum` are the same network without activations: Linear, blocks `x + g(f1(x) * f2(x))` or
`x + g(f1(x) + f2(x))`, Linear. So a star is a polynomial of degree 2^layers and a sum is affine.
`poly` is scikit-learn's SVM with `(gamma x.y + 1)^(2^layers)`, `rbf` its default, and `star_kernel`
an SVM on `star_kernel(op, analytic=True)` of one random layer, of degree 2. After figure 2 of Ma et
al., "Rewrite the Stars", CVPR 2024, arXiv 2403.19967.

python examples/star_boundary.py                  # a minute on a CPU
python examples/star_boundary.py --seeds 1 --layers 1
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from matplotlib.figure import Figure
from sklearn.datasets import make_circles, make_moons
from sklearn.svm import SVC
from torch import Tensor, nn

from starlayers import StarBlock, StarMLP, StarOp
from starlayers.coefficients import star_kernel
from starlayers.coefficients.modules import SumMLP

#: name -> title in the figure
MODELS = {
    "star": "star",
    "sum": "sum",
    "poly": "SVM, polynomial",
    "rbf": "SVM, RBF",
    "star_kernel": "SVM, star kernel",
}
#: name -> class of the MLP in the blocks of a network
NETWORKS: dict[str, type[StarMLP]] = {"star": StarMLP, "sum": SumMLP}
#: name -> generator of scikit-learn and its options
DATA: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "moons": (make_moons, {"noise": 0.2}),
    "circles": (make_circles, {"noise": 0.15, "factor": 0.5}),
}
WIDTHS = [2**n for n in range(3, 16)]
Score = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Boundary:
    """Classifiers of points in the plane, by name.

    `scores` are (height, width) over the rectangle `extent` (left, right, bottom, top), row 0 at
    the bottom, and positive for class 1. `accuracy` is that on new points of the same kind.
    """

    data: str
    points: Tensor
    labels: Tensor
    extent: tuple[float, float, float, float]
    scores: dict[str, Tensor]
    accuracy: dict[str, float]


def train_network(
    x: Tensor, labels: Tensor, name: str, layers: int, width: int, steps: int, seed: int
) -> Score:
    """Train the network with a product ("star") or a "sum" of branches; return its score."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mlps = [NETWORKS[name](width, 2 * width, act=None) for _ in range(layers)]
        blocks = [StarBlock(width, mlp) for mlp in mlps]
        net = nn.Sequential(nn.Linear(2, width), *blocks, nn.Linear(width, 1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = F.binary_cross_entropy_with_logits(net(x)[:, 0], labels.to(x.dtype))
        optimizer.zero_grad()
        loss.backward()
        # gradients of a polynomial of degree 4 are large far from the origin
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return lambda points: net(points)[:, 0].detach()


def train_svm(x: Tensor, labels: Tensor, name: str, layers: int, width: int, seed: int) -> Score:
    """Train a support vector machine; return its decision function."""
    if name == "star_kernel":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            op = StarOp(2, width, act=None)
        machine = SVC(kernel=lambda a, b: star_kernel(op, a, b, analytic=True).numpy())
    elif name == "poly":
        machine = SVC(kernel="poly", degree=2**layers, coef0=1.0)
    else:
        machine = SVC(kernel="rbf")
    machine.fit(x.numpy(), labels.numpy())
    return lambda points: torch.from_numpy(machine.decision_function(points.numpy()))


def decision_boundary(
    data: str,
    models: Sequence[str] = tuple(MODELS),
    *,
    layers: int = 2,
    width: int = 16,
    steps: int = 400,
    samples: int = 200,
    grid: int = 200,
    seed: int = 0,
) -> Boundary:
    """Train models on standardised points, test on ten times as many, and score a grid."""
    make, options = DATA[data]
    sets = []
    for i, n in enumerate((samples, 10 * samples)):
        points, labels = make(n, random_state=2 * seed + i, **options)
        sets.append((torch.from_numpy(points).float(), torch.from_numpy(labels).long()))
    (x, labels), (x_new, labels_new) = sets
    std, mean = torch.std_mean(x, 0)
    x, x_new = (x - mean) / std, (x_new - mean) / std
    low, high = x.min(0).values - 0.5, x.max(0).values + 0.5
    sides = [torch.linspace(float(a), float(b), grid) for a, b in zip(low, high)]
    plane = torch.cartesian_prod(*sides)
    scores, accuracy = {}, {}
    for name in models:
        if name in NETWORKS:
            score = train_network(x, labels, name, layers, width, steps, seed)
        else:
            score = train_svm(x, labels, name, layers, width, seed)
        accuracy[name] = float(((score(x_new) > 0) == labels_new).float().mean())
        scores[name] = score(plane).reshape(grid, grid).T
    extent = (float(low[0]), float(high[0]), float(low[1]), float(high[1]))
    return Boundary(data, x, labels, extent, scores, accuracy)


def plot_boundaries(boundaries: Sequence[Boundary]) -> Figure:
    """Draw a data set a row and a model a column; the number is the accuracy on new points.

    The line is the boundary, the colour the score, saturated beyond its 33 % quantile.
    """
    names = list(boundaries[0].scores)
    figure = Figure(figsize=(2.6 * len(names), 2.5 * len(boundaries) + 0.2), layout="constrained")
    axes = figure.subplots(len(boundaries), len(names), squeeze=False)
    for row, b in zip(axes, boundaries):
        for ax, name in zip(row, names):
            score = b.scores[name]
            most = float(score.abs().quantile(0.33)) or 1.0
            ax.imshow(
                (score / most).clamp(-1, 1).numpy(), origin="lower", extent=b.extent, aspect="auto",
                cmap="RdBu_r", vmin=-1.6, vmax=1.6, interpolation="bilinear",
            )  # fmt: skip
            if float(score.min()) < 0 < float(score.max()):
                ax.contour(score.numpy(), levels=[0], extent=b.extent, colors="k", linewidths=1.2)
            for label, colour in enumerate(("C0", "C3")):
                p = b.points[b.labels == label].numpy()
                ax.scatter(p[:, 0], p[:, 1], s=9, color=colour, edgecolor="white", linewidth=0.4)
            ax.set(xticks=[], yticks=[], xlim=b.extent[:2], ylim=b.extent[2:])
            ax.text(
                0.97, 0.04, f"{100 * b.accuracy[name]:.1f} %", transform=ax.transAxes, ha="right",
                fontsize=9, bbox={"facecolor": "white", "alpha": 0.8, "lw": 0, "pad": 1.5},
            )  # fmt: skip
        row[0].set_ylabel(b.data)
    for ax, name in zip(axes[0], names):
        ax.set_title(MODELS[name], fontsize=10)
    return figure


def kernel_errors(widths: list[int], seed: int) -> list[float]:
    """Relative distance of the Gram matrix of a random star to its expectation, by width."""
    torch.manual_seed(seed)
    x = torch.randn(50, 5)
    errors = []
    for width in widths:
        op = StarOp(5, width, act=None)
        expected = star_kernel(op, x, analytic=True)
        errors.append(float((star_kernel(op, x) - expected).norm() / expected.norm()))
    return errors


def plot_kernel(errors: list[list[float]], file: Path) -> None:
    """Draw the distances by width beside their rate."""
    figure = Figure(figsize=(4.5, 3.2), layout="constrained")
    ax = figure.subplots()
    for n, run in enumerate(errors):
        ax.plot(WIDTHS, run, "o", ms=3, color="C0", label=None if n else "random stars")
    first = statistics.fmean(run[0] for run in errors)
    rate = [first * (width / WIDTHS[0]) ** -0.5 for width in WIDTHS]
    ax.plot(WIDTHS, rate, "k--", lw=1, label="$1 / \\sqrt{channels}$")
    ax.set(xscale="log", yscale="log", xlabel="channels of the star")
    ax.set_ylabel("distance to the polynomial kernel", fontsize=9)
    ax.legend(fontsize=8)
    figure.savefig(file, dpi=120)


def main(
    seeds: int = 5,
    layers: Annotated[int, typer.Option(help="star blocks: degree 2^layers")] = 2,
    samples: int = 200,
    out: Annotated[Path, typer.Option(help="folder")] = Path("runs/star_boundary"),
) -> dict[str, dict[str, list[float]]]:
    """Train every model on moons and circles, draw the first seed, and test the kernel's limit."""
    out.mkdir(parents=True, exist_ok=True)
    accuracy: dict[str, dict[str, list[float]]] = {}
    for seed in range(seeds):
        boundaries = [
            decision_boundary(data, layers=layers, samples=samples, seed=seed) for data in DATA
        ]
        for b in boundaries:
            for name, value in b.accuracy.items():
                accuracy.setdefault(b.data, {}).setdefault(name, []).append(value)
        if seed == 0:
            plot_boundaries(boundaries).savefig(out / "boundaries.png", dpi=110)
    print(f"accuracy on new points, mean of {seeds} seeds (lowest to highest)")
    for data, by_model in accuracy.items():
        for name, values in by_model.items():
            spread = f"({min(values):.1%} to {max(values):.1%})"
            print(f"{data:8} {name:12} {statistics.fmean(values):6.1%} {spread}")

    errors = [kernel_errors(WIDTHS, seed) for seed in range(5)]
    plot_kernel(errors, out / "kernel.png")
    print(
        f"random stars of {WIDTHS[0]} and {WIDTHS[-1]:,} channels are {errors[0][0]:.0%} and "
        f"{errors[0][-1]:.1%} from the polynomial kernel; boundaries.png and kernel.png in {out}"
    )
    return accuracy


if __name__ == "__main__":
    typer.run(main)
