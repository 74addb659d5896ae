"""Images as rows of numbers, figures of their attributions and of searches."""

from pathlib import Path
from typing import Any

import _report
import torch
from torch import Tensor

from starlayers.coefficients import Eigenfeatures, SearchResult, attribute
from starlayers.datasets.images import Images

Split = tuple[Tensor, Tensor]


def pixels(images: Images) -> tuple[Tensor, Tensor]:
    """Flatten all images to numbers in 0..1; return them with their classes."""
    x, labels = zip(*images)
    return torch.stack(x).flatten(1) / 255, torch.tensor([int(label) for label in labels])


def splits(data: Any, seed: int, limit: int = 2000) -> dict[str, Split]:
    """Draw few images for training and as many for validation; take all test images."""
    n = min(limit, len(data.train) // 2)
    drawn = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))
    halves = {"train": drawn[:n], "validation": drawn[n : 2 * n]}
    parts = {name: data.train[i] for name, i in halves.items()} | {"test": data.test[:]}
    return {
        name: ((pixels.float().flatten(1) / 255 - data.mean[0]) / data.std[0], labels)
        for name, (pixels, labels) in parts.items()
    }


def plot_attributions(
    features: list[Eigenfeatures], names: tuple[str, ...], x: Tensor, size: list[int], file: Path
) -> None:
    """Draw images beside the pixels that make up their logit and its largest terms."""
    figure, axes = _report.axes(7, 1.5, 1.75, rows=len(x))
    for row, image in zip(axes, x):
        logits = [float(f.terms(image).sum()) for f in features]
        predicted = max(range(len(logits)), key=logits.__getitem__)
        attribution = attribute(features[predicted], image)
        row[0].imshow(image.reshape(size).numpy(), cmap="gray_r")
        row[0].set_title(f"{names[predicted]} {logits[predicted]:+.1f}", fontsize=9)
        constant = float(attribution.constant)
        parts = [(f"pixels, constant {constant:+.1f}", attribution.inputs)]
        for i, term in attribution.top(5):
            parts.append((f"term {term:+.1f}", attribution.features.images[i]))
        for ax, (title, weights) in zip(row[1:], parts):
            most = float(weights.abs().quantile(0.995))
            ax.imshow(weights.reshape(size).numpy(), cmap="RdBu_r", vmin=-most, vmax=most)
            ax.set_title(title, fontsize=9)
        for ax in row:
            ax.set(xticks=[], yticks=[])
    _report.save(figure, file)


def plot_search(
    results: dict[str, SearchResult], scores: dict[str, Any], scales: Any, file: Path
) -> None:
    """Draw accuracy over trials, accuracy of the nets, and factors of the products."""
    figure, (progress, final, factors) = _report.axes(3, 4.3, 4)
    curves = {name: [100 * value for value in r.best_so_far] for name, r in results.items()}
    progress.axhline(100 * scores["defaults"][0], color="k", ls=":", label="defaults")
    steps = {name: (range(1, len(curve) + 1), curve) for name, curve in curves.items()}
    _report.lines(progress, steps, "trials", "best validation accuracy so far, %")
    columns = zip(("validation", "test"), zip(*scores.values()))
    dots = {name: (range(len(scores)), [100 * v for v in values]) for name, values in columns}
    _report.lines(final, dots, "", "accuracy, %", "o")
    final.set_xticks(range(len(scores)), scores, rotation=30, ha="right")
    ranked = {f"layer {name}": scale.sort(descending=True).values for name, scale in scales.items()}
    curves = {name: (range(len(scale)), scale) for name, scale in ranked.items()}
    _report.lines(factors, curves, "products of a layer, sorted", "factor after tuning")
    _report.save(figure, file)
