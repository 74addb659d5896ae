"""Draw decision boundaries of stars beside those of sums and SVMs, and stars as kernels.

`star` and `sum` are the same network without activations: Linear, blocks `x + g(f1(x) * f2(x))` or
`x + g(f1(x) + f2(x))`, Linear. So a star is a polynomial of degree 2^layers and a sum is affine:
expect a star near the polynomial and RBF machines, and a sum at chance on the circles. `poly` is
scikit-learn's SVM with `(gamma x.y + 1)^(2^layers)`, `rbf` its default, and `star_kernel` an SVM on
`star_kernel(op, analytic=True)` of one random layer, of degree 2. After figure 2 of Ma et al.,
"Rewrite the Stars", CVPR 2024, arXiv 2403.19967. A minute on a CPU.

python examples/star_boundary.py
python examples/star_boundary.py --seeds 1 --layers 1
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import _report
import torch
import typer
from _boundary import DATA, MODELS, Boundary, decision_boundary, draw
from matplotlib.figure import Figure

from starlayers import StarOp
from starlayers.coefficients import star_kernel

WIDTHS = [2**n for n in range(3, 16)]


def plot_boundaries(boundaries: Sequence[Boundary]) -> Figure:
    """Draw a data set a row and a model a column; the number is the accuracy on new points.

    The line is the boundary, the colour the score, saturated beyond its 33 % quantile.
    """
    names = list(boundaries[0].scores)
    figure = Figure(figsize=(2.6 * len(names), 2.5 * len(boundaries) + 0.2), layout="constrained")
    axes = figure.subplots(len(boundaries), len(names), squeeze=False)
    for row, b in zip(axes, boundaries):
        for ax, name in zip(row, names):
            draw(ax, b.scores[name], b.extent, b.points, b.labels)
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
    ops = [StarOp(5, width, act=None) for width in widths]
    kernels = [(star_kernel(op, x), star_kernel(op, x, analytic=True)) for op in ops]
    return [float((kernel - limit).norm() / limit.norm()) for kernel, limit in kernels]


def plot_kernel(errors: list[list[float]], file: Path) -> None:
    """Draw the distances by width beside their rate."""
    figure, ax = _report.axes(1, 4.5)
    ax.plot(WIDTHS, list(zip(*errors)), "o", ms=3, color="C0", label=["random stars", *[""] * 4])
    first = statistics.fmean(run[0] for run in errors)
    rate = [first * (width / WIDTHS[0]) ** -0.5 for width in WIDTHS]
    ax.set(xscale="log", yscale="log")
    curve = {"$1 / \\sqrt{channels}$": (WIDTHS, rate)}
    _report.lines(ax, curve, "channels of the star", "distance to the polynomial kernel", "k--")
    _report.save(figure, file)


def main(
    seeds: int = 5,
    layers: Annotated[int, typer.Option(help="star blocks: degree 2^layers")] = 2,
    samples: int = 200,
    out: Annotated[Path, typer.Option(help="folder")] = Path("runs/star_boundary"),
) -> dict[str, dict[str, list[float]]]:
    accuracy: dict[str, dict[str, list[float]]] = {}
    for seed in _report.bar(range(seeds), "boundaries", "seed"):
        options = {"layers": layers, "samples": samples, "seed": seed}
        boundaries = [decision_boundary(data, **options) for data in DATA]
        for b in boundaries:
            for name, value in b.accuracy.items():
                accuracy.setdefault(b.data, {}).setdefault(name, []).append(value)
        if seed == 0:
            drawn = plot_boundaries(boundaries)
    title = f"accuracy on new points, mean of {seeds} seeds:"
    rows = [
        (data, name, f"{statistics.fmean(v):.1%}", f"{min(v):.1%} to {max(v):.1%}")
        for data, by_model in accuracy.items()
        for name, v in by_model.items()
    ]
    _report.table(("data", "model", "accuracy", "lowest to highest"), rows, title)

    errors = [kernel_errors(WIDTHS, seed) for seed in _report.bar(range(5), "kernels", "seed")]
    print(
        f"\nrandom stars of {WIDTHS[0]} and {WIDTHS[-1]:,} channels are {errors[0][0]:.0%} and "
        f"{errors[0][-1]:.1%} from the polynomial kernel"
    )
    _report.save(drawn, out / "boundaries.png", dpi=110)
    plot_kernel(errors, out / "kernel.png")
    return accuracy


if __name__ == "__main__":
    _report.run(main, __doc__)
