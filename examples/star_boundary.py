"""Where stars draw the line: decision boundaries beside sums and SVMs, and stars as kernels.

python examples/star_boundary.py                  # a minute on a CPU
python examples/star_boundary.py --seeds 1 --layers 1
"""

import statistics
from pathlib import Path
from typing import Annotated

import torch
import typer
from matplotlib.figure import Figure

from starlayers import StarOp
from starlayers.coefficients import decision_boundary, plot_boundaries, star_kernel

MODELS = ("star", "sum", "poly", "rbf", "star_kernel")
WIDTHS = [2**n for n in range(3, 16)]


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
        found = [
            decision_boundary(data, models=MODELS, layers=layers, samples=samples, seed=seed)
            for data in ("moons", "circles")
        ]
        for b in found:
            for name, value in b.accuracy.items():
                accuracy.setdefault(b.data, {}).setdefault(name, []).append(value)
        if seed == 0:
            plot_boundaries(found).savefig(out / "boundaries.png", dpi=110)
    print(f"accuracy on new points, mean of {seeds} seeds (lowest to highest)")
    for data, rows in accuracy.items():
        for name, values in rows.items():
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
