"""Figures of a training run: learning curves and the confusion matrix."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def plot_curves(history: list[dict[str, Any]], file: Path) -> None:
    """Draw loss and accuracy of training and test against the epoch into `file` (PNG).

    A metric that is `None`, as the accuracy on mixed images, is left out.
    """
    figure = _new_figure("curves.png", figsize=(9, 3.5))
    epochs = [line["epoch"] for line in history]
    for axes, metric in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for part in ("train", "test"):
            values = [line[f"{part}_{metric}"] for line in history]
            if None not in values:
                axes.plot(epochs, values, "o-", label=part)
        axes.set(xlabel="epoch", ylabel=metric)
        if len(epochs) <= 20:
            axes.set_xticks(epochs)
        axes.legend()
    _save_figure(figure, file)


def plot_confusion(confusion: Tensor, classes: Sequence[str], file: Path) -> None:
    """Draw the share of predictions in each true class into `file` (PNG).

    `confusion` counts (true class, predicted class).
    """
    n = len(classes)
    side = min(4 + 0.4 * n, 24)
    figure = _new_figure("confusion.png", figsize=(side + 1, side))
    axes = figure.subplots()
    share = confusion / confusion.sum(1, keepdim=True).clamp_min(1)
    image = axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true", title="share of each true class")
    axes.set_xticks(range(n), classes, rotation=45, ha="right")
    axes.set_yticks(range(n), classes)
    if n <= 20:
        for i, j in torch.nonzero(confusion).tolist():
            colour = "white" if share[i, j] > 0.5 else "black"
            text = f"{share[i, j]:.2f}".lstrip("0")
            axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, shrink=0.8)
    _save_figure(figure, file)


def _new_figure(name: str, *, figsize: tuple[float, float]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{name} needs matplotlib: pip install 'starlayers[plots]'") from error
    return Figure(figsize=figsize, layout="constrained")


def _save_figure(figure: Any, file: Path) -> None:
    partial = file.with_suffix(".partial.png")
    figure.savefig(partial, dpi=120)
    partial.rename(file)
