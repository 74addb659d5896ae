"""Decompose a star classifier: eigenvectors as images, and its logits term by term.

A star without activation is a quadratic form of the pixels for each class. Its eigenvectors are
images that say what a class looks for; some twenty of 785 per class keep all but a point of the
accuracy, and the terms of an image add up to its logit. `--noise 0 --weight-decay 0` is more
accurate and has noisier images. A minute on a CPU. Three figures go to the folder.

python examples/star_eigenfeatures.py                    # Fashion-MNIST
python examples/star_eigenfeatures.py --data digits --epochs 60
python examples/star_eigenfeatures.py --noise 0 --weight-decay 0   # noisier images
"""

import time
from pathlib import Path
from typing import Annotated

import _report
import torch
import torch.nn.functional as F
import typer
from _pixels import pixels, plot_attributions
from torch import Tensor

from starlayers import StarMLP
from starlayers.coefficients import (
    TruncationCurve,
    attribute,
    eigenfeatures,
    plot_eigenfeatures,
    truncation_curve,
)
from starlayers.datasets.images import load_images

BATCH = 256


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
    bar = _report.bar(range(epochs), "training", "epoch")
    for _ in bar:
        for rows in torch.randperm(len(x)).split(BATCH):
            # with noise, pixels that are always black carry no information
            noisy = x[rows] + noise * torch.randn(len(rows), x.shape[1])
            loss = F.cross_entropy(model(noisy), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


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
    torch.manual_seed(seed)
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
    columns = ("eigenvectors per class", "accuracy", "logits explained")
    shares = [[f"{share:.1%}" for share in part] for part in (curve.accuracy, curve.explained)]
    _report.table(columns, zip(curve.k, *shares))
    print(f"{curve.smallest(0.01)} of {curve.k[-1]} are enough for all but a point of accuracy")
    print(f"terms sum to the logits to {float((sums - exact).abs().max()):.0e}")

    size = list(images.shape[1:])
    figure = plot_eigenfeatures(features, names=images.classes, x=x_test, shape=size)
    _report.save(figure, out / "eigenfeatures.png", dpi=110)
    plot_attributions(features, images.classes, x_test[:5], size, out / "attribution.png")
    figure, ax = _report.axes()
    curves = {"accuracy": curve.accuracy, "agreement with the whole model": curve.agreement}
    curves["variance of logits explained"] = curve.explained
    ax.set(xscale="log", ylim=(0, 1.02))
    xy = {name: (curve.k, ys) for name, ys in curves.items()}
    _report.lines(ax, xy, "eigenvectors kept per class", "", "o-")
    _report.save(figure, out / "truncation.png")
    return curve


if __name__ == "__main__":
    _report.run(main, __doc__)
