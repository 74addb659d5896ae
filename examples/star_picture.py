"""Draw what a star layer computes: two linear branches, their product, and a learned boundary.

The first three panels are one `StarOp(2, 1, act=None)`, trained on four clusters of two classes
(exclusive or), which no linear layer separates. Each branch is linear and zero on a line; their
product is zero on both lines. The last panel is the boundary of two star blocks on scikit-learn's
moons, as in `star_boundary.py`. The background is transparent and the text grey, for pages that are
light or dark.

python examples/star_picture.py                   # some seconds on a CPU
python examples/star_picture.py --out star.png --seed 1
"""

from pathlib import Path
from typing import Annotated

import _report
import torch
import torch.nn.functional as F
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from star_boundary import decision_boundary
from torch import Tensor
from tqdm import trange

from starlayers import StarOp

GREY = "#808080"
SIDE = 2.2
GRID = 120


def clusters(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Sample points around the corners of a square; opposite corners have the same class."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]]) @ torch.tensor(
        [[0.97, 0.26], [-0.26, 0.97]]  # turned, so that no branch is a coordinate
    )
    which = torch.arange(count) % 4
    return corners[which] + 0.25 * torch.randn(count, 2, generator=generator), (which < 2).float()


def train(x: Tensor, labels: Tensor, steps: int, seed: int) -> StarOp:
    """Train one star channel as a classifier."""
    torch.manual_seed(seed)
    op = StarOp(2, 1, act=None)
    optimizer = torch.optim.Adam(op.parameters(), lr=0.03)
    for _ in trange(steps, desc="star layer"):
        loss = F.binary_cross_entropy_with_logits(op(x)[:, 0], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return op


def panel(ax: Axes, values: Tensor, side: tuple[float, float, float, float], title: str) -> None:
    """Draw one function of the plane, blue below zero and red above, with its zero line."""
    most = float(values.abs().quantile(0.8))
    ax.contourf(
        (values / most).clamp(-0.999, 0.999).numpy(), levels=torch.linspace(-1, 1, 17).tolist(),
        extent=side, cmap="RdBu_r", vmin=-1.5, vmax=1.5,
    )  # fmt: skip
    ax.contour(values.numpy(), levels=[0], extent=side, colors="k", linewidths=1.4)
    ax.set(xticks=[], yticks=[], xlim=side[:2], ylim=side[2:])
    ax.set_title(title, fontsize=11, color=GREY)
    for spine in ax.spines.values():
        spine.set_color(GREY)


def points(ax: Axes, x: Tensor, labels: Tensor) -> None:
    """Draw the points of both classes."""
    for label, colour in enumerate(("#1f5fa8", "#b2182b")):
        p = x[labels == label].numpy()
        ax.scatter(p[:, 0], p[:, 1], s=11, color=colour, edgecolor="white", linewidth=0.5)


def main(
    steps: Annotated[int, typer.Option(help="steps of the star layer")] = 400,
    samples: Annotated[int, typer.Option(help="points of each data set")] = 160,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="file")] = Path("docs/figures/star.png"),
) -> float:
    x, labels = clusters(samples, seed)
    op = train(x, labels, steps, seed)
    line = torch.linspace(-SIDE, SIDE, GRID)
    plane = torch.cartesian_prod(line, line)
    with torch.no_grad():
        accuracy = float(((op(x)[:, 0] > 0) == labels.bool()).float().mean())
        maps = [f(plane).reshape(GRID, GRID).T for f in (op.f1, op.f2, op)]
    moons = decision_boundary("moons", ["star"], layers=2, samples=samples, grid=GRID, seed=seed)

    figure = Figure(figsize=(8.4, 2.15), layout="constrained")
    widths = [1, 0.08, 1, 0.08, 1, 0.16, 1.2]
    axes = figure.subplots(1, 7, gridspec_kw={"width_ratios": widths})
    square = (-SIDE, SIDE, -SIDE, SIDE)
    titles = ("$x W_1 + b_1$", "$x W_2 + b_2$", "their product: a star")
    for ax, values, title in zip(axes[:6:2], maps, titles):
        panel(ax, values, square, title)
    points(axes[4], x, labels)
    for ax, sign in zip(axes[1::2], ("$\\times$", "$=$", "")):
        ax.axis("off")
        ax.text(0.5, 0.5, sign, ha="center", va="center", fontsize=18, color=GREY)
    panel(axes[6], moons.scores["star"], moons.extent, "two star blocks, trained")
    points(axes[6], moons.points, moons.labels)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=140, transparent=True)
    print(f"the star layer classifies {accuracy:.1%} of {samples} points; {out}")
    return accuracy


if __name__ == "__main__":
    _report.run(main, __doc__)
