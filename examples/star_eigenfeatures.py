"""Eigenvectors of a star classifier as images, and its logits term by term.

python examples/star_eigenfeatures.py                    # Fashion-MNIST, a minute on a CPU
python examples/star_eigenfeatures.py --data digits --epochs 60
python examples/star_eigenfeatures.py --noise 0 --weight-decay 0   # noisier images
"""

import time
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from matplotlib.figure import Figure
from torch import Tensor

from starlayers import StarMLP
from starlayers.coefficients import (
    Eigenfeatures,
    TruncationCurve,
    attribute,
    eigenfeatures,
    plot_eigenfeatures,
    truncation_curve,
)
from starlayers.datasets.images import Images, load_images

BATCH = 256


def pixels(images: Images) -> tuple[Tensor, Tensor]:
    """Flatten all images to numbers in 0..1; return them with their classes."""
    x, labels = zip(*images)
    return torch.stack(x).flatten(1) / 255, torch.tensor([int(label) for label in labels])


def train(
    x: Tensor,
    labels: Tensor,
    hidden: int,
    epochs: int,
    noise: float,
    weight_decay: float,
    lr: float,
) -> StarMLP:
    """Train a star without activation on noisy pixels."""
    model = StarMLP(x.shape[1], hidden, out_features=int(labels.max()) + 1, act=None)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay)
    steps = epochs * -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    for epoch in range(epochs):
        for rows in torch.randperm(len(x)).split(BATCH):
            # with noise, pixels that are always black carry no information
            noisy = x[rows] + noise * torch.randn(len(rows), x.shape[1])
            loss = F.cross_entropy(model(noisy), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss of the last batch {loss.item():.3f}")
    return model.eval()


def plot_curve(curve: TruncationCurve, file: Path) -> None:
    """Draw the accuracy by the number of eigenvectors."""
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    ax = figure.subplots()
    ax.plot(curve.k, curve.accuracy, "o-", ms=3, label="accuracy")
    ax.plot(curve.k, curve.agreement, "o-", ms=3, label="agreement with the whole model")
    ax.plot(curve.k, curve.explained, "o-", ms=3, label="variance of logits explained")
    ax.axhline(curve.accuracy[-1], color="k", lw=0.5)
    ax.set(xscale="log", xlabel="eigenvectors kept per class", ylim=(0, 1.02))
    ax.legend(fontsize=8)
    figure.savefig(file, dpi=120)


def plot_attributions(
    features: list[Eigenfeatures], names: tuple[str, ...], x: Tensor, size: list[int], file: Path
) -> None:
    """Draw images beside the pixels that make up their logit and its largest terms."""
    figure = Figure(figsize=(10.5, 1.75 * len(x)), layout="constrained")
    axes = figure.subplots(len(x), 7, squeeze=False)
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
    figure.savefig(file, dpi=120)


def main(
    data: Annotated[str, typer.Option(help="fashion-mnist or digits")] = "fashion-mnist",
    hidden: int = 256,
    epochs: int = 15,
    noise: Annotated[float, typer.Option(help="standard deviation, pixels are 0..1")] = 0.4,
    weight_decay: float = 1.0,
    lr: float = 2e-3,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="folder")] = Path("runs/star_eigenfeatures"),
) -> TruncationCurve:
    """Train a star without activation, and decompose it into eigenfeatures."""
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    images = load_images(data)
    (x, labels), (x_test, labels_test) = pixels(images.train), pixels(images.test)
    start = time.perf_counter()
    model = train(x, labels, hidden, epochs, noise, weight_decay, lr)
    print(f"{images.source}: {time.perf_counter() - start:.0f} s of training")

    features = eigenfeatures(model)
    curve = truncation_curve(features, x_test, labels_test)
    with torch.inference_mode():
        exact = model.double()(x_test[:1000].double())
    sums = torch.stack([attribute(f, x_test[:1000]).terms.sum(1) for f in features], 1)
    print("eigenvectors per class  accuracy  logits explained")
    for k, accuracy, explained in zip(curve.k, curve.accuracy, curve.explained):
        print(f"{k:22d}  {accuracy:8.1%}  {explained:16.1%}")
    print(f"{curve.smallest(0.01)} of {curve.k[-1]} are enough for all but a point of accuracy")
    print(f"terms sum to the logits to {float((sums - exact).abs().max()):.0e}")

    size = list(images.shape[1:])
    figure = plot_eigenfeatures(features, names=images.classes, x=x_test, shape=size)
    figure.savefig(out / "eigenfeatures.png", dpi=110)
    plot_curve(curve, out / "truncation.png")
    plot_attributions(features, images.classes, x_test[:5], size, out / "attribution.png")
    print(f"eigenfeatures.png, truncation.png and attribution.png in {out}")
    return curve


if __name__ == "__main__":
    typer.run(main)
