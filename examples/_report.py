"""Shared by the examples: command line, progress bar, table, figure.

Import it before torch: a thread of OpenMP that waits for another then sleeps. Threads that spin
make a small net ten times slower as soon as another program uses one of the cores.
"""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is imported

import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

T = TypeVar("T")


def run(main: Callable[..., Any], doc: str | None) -> None:
    """Run `main` as a command; its help is the docstring of the program up to the commands."""
    app = typer.Typer(add_completion=False)
    app.command(help=(doc or "").split("\n\npython ")[0])(main)
    app()


def bar(items: Iterable[T], label: str, unit: str = "step") -> "tqdm[T]":
    """Return a progress bar over the items; `set_postfix` adds numbers to it."""
    return tqdm(items, desc=label, unit=unit)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> None:
    """Print an empty line, a title if there is one, and a table with numbers flush right."""
    body = [[str(cell) for cell in row] for row in rows]
    lines = [""] * (len(body) + 1)
    for name, *cells in zip(columns, *body, strict=True):
        width = max(map(len, (name, *cells)))
        numbers = all(re.fullmatch(r"[-+]?[\d.,]+( ?%)?", cell) for cell in cells)
        for i, cell in enumerate((name, *cells)):
            lines[i] += (cell.rjust(width) if numbers else cell.ljust(width)) + "  "
    print("", *[title] * bool(title), *(line.rstrip() for line in lines), sep="\n")


def axes(
    columns: int = 1, width: float = 5.0, height: float = 3.2, rows: int = 1
) -> tuple[Figure, Any]:
    """Make a figure and its axes, each of this size in inches."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns)


def lines(ax: Axes, curves: dict[str, tuple[Any, Any]], x: str, y: str, style: str = "-") -> None:
    """Draw curves by name, each a pair of x and y values."""
    for label, (xs, ys) in curves.items():
        ax.plot(xs, ys, style, ms=3, label=label)
    ax.set(xlabel=x, ylabel=y)
    ax.grid(alpha=0.3)
    if len(ax.get_legend_handles_labels()[0]) > 1:
        ax.legend(fontsize=8)


def save(figure: Figure, file: Path, dpi: int = 120) -> None:
    """Save a figure and print where it is."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=dpi)
    print(f"figure: {file}")
