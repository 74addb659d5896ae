"""Film how the boundaries of a star and of a sum move while they train.

Both are the same network without activations: Linear, blocks `x + g(f1(x) * f2(x))` or
`x + g(f1(x) + f2(x))`, Linear. The sum is affine at any depth, so its boundary stays a line; the
star is a polynomial of degree 2^blocks, whose boundary bends around the moons within a hundred
steps. Some seconds on a CPU.

python examples/star_film.py
python examples/star_film.py --blocks 3
"""

import io
from pathlib import Path
from typing import Annotated

import _report
import torch
import typer
from _boundary import Score, draw, train_network
from PIL import Image
from sklearn.datasets import make_moons
from torch import Tensor

GREY = "#808080"  # legible on light and dark pages
FRAMES = 24


def scored(
    name: str, x: Tensor, labels: Tensor, plane: Tensor, shown: list[int], blocks: int, seed: int
) -> tuple[list[Tensor], list[float]]:
    """Train a network; return its scores on the plane and its accuracy at the steps `shown`."""
    scores: list[Tensor] = []
    accuracy: list[float] = []
    bar = _report.bar(range(shown[-1] + 1), name)

    def watch(step: int, score: Score) -> None:
        bar.update()
        if step in shown:
            scores.append(score(plane))
            accuracy.append(float(((score(x) > 0) == labels).float().mean()))

    train_network(x, labels, name, blocks, 16, shown[-1] + 1, seed, watch)
    bar.close()
    return scores, accuracy


def frame(
    x: Tensor, labels: Tensor, fields: dict[str, tuple[Tensor, float]], step: int, side: float
) -> Image.Image:
    """Draw what each network computes, its boundary and the points."""
    figure, axes = _report.axes(len(fields), 2.6, 2.8)
    for ax, (name, (field, accuracy)) in zip(axes, fields.items()):
        extent = (-side, side, -side, side)
        # few colours make a small file
        draw(ax, field, extent, x, labels, colours=("navy", "darkred"), shades=4)
        ax.set_title(f"{name}: step {step}, {accuracy:.0%}", fontsize=9, color=GREY)
    memory = io.BytesIO()
    figure.savefig(memory, dpi=80)
    return Image.open(memory).convert("RGB").quantize(32, dither=Image.Dither.NONE)


def main(
    blocks: Annotated[int, typer.Option(help="star blocks: degree 2^blocks")] = 2,
    steps: int = 240,
    samples: int = 150,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="folder")] = Path("runs/star_film"),
) -> dict[str, float]:
    points, labels = map(torch.from_numpy, make_moons(samples, noise=0.15, random_state=seed))
    x = (points - points.mean(0)).div(points.std(0)).float()
    side, grid = float(x.abs().max()) + 0.3, 80
    line = torch.linspace(-side, side, grid)
    plane = torch.cartesian_prod(line, line)
    # more of the first steps, in which most happens
    shown = sorted({round(steps * (i / (FRAMES - 1)) ** 2) for i in range(FRAMES)})
    films = {name: scored(name, x, labels, plane, shown, blocks, seed) for name in ("star", "sum")}
    frames = []
    for i, step in enumerate(_report.bar(shown, "frames", "frame")):
        fields = {
            name: (scores[i].view(grid, grid).T, accuracy[i])
            for name, (scores, accuracy) in films.items()
        }
        frames.append(frame(x, labels, fields, step, side))
    final = {name: accuracy[-1] for name, (_, accuracy) in films.items()}
    rows = [(name, f"{value:.1%}") for name, value in final.items()]
    _report.table(("network", "accuracy"), rows, f"on the {samples} points, after {steps} steps:")
    out.mkdir(parents=True, exist_ok=True)
    times = [100] * (len(frames) - 1) + [2000]
    frames[0].save(
        out / "film.gif", save_all=True, append_images=frames[1:], duration=times, loop=0
    )
    print(f"film: {out / 'film.gif'}")
    return final


if __name__ == "__main__":
    _report.run(main, __doc__)
