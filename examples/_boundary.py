"""Classifiers of points in the plane: networks of stars or sums, and support vector machines."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
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


def draw(
    ax: Axes,
    score: Tensor,
    extent: tuple[float, float, float, float],
    points: Tensor,
    labels: Tensor,
    *,
    colours: tuple[str, str] = ("C0", "C3"),
    shades: int = 0,
) -> None:
    """Draw a score over the plane, saturated beyond its 33 % quantile, its zero line and points.

    With `shades` the score is rounded to as many steps on either side of zero.
    """
    most = float(score.abs().quantile(0.33)) or 1.0
    shown = (score / most).clamp(-1, 1)
    if shades:
        shown = (shades * shown).round() / shades
    ax.imshow(
        shown.numpy(), origin="lower", extent=extent, aspect="auto", cmap="RdBu_r", vmin=-1.6,
        vmax=1.6, interpolation="bilinear",
    )  # fmt: skip
    if float(score.min()) < 0 < float(score.max()):
        ax.contour(score.numpy(), levels=[0], extent=extent, colors="k", linewidths=1.2)
    for label, colour in enumerate(colours):
        p = points[labels == label].numpy()
        ax.scatter(p[:, 0], p[:, 1], s=9, color=colour, edgecolor="white", linewidth=0.4)
    ax.set(xticks=[], yticks=[], xlim=extent[:2], ylim=extent[2:])


def train_network(
    x: Tensor,
    labels: Tensor,
    name: str,
    layers: int,
    width: int,
    steps: int,
    seed: int,
    watch: Callable[[int, Score], None] = lambda step, score: None,
) -> Score:
    """Train the network with a product ("star") or a "sum" of branches; return its score.

    `watch` is called before every step with the score that the network has then.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mlps = [NETWORKS[name](width, 2 * width, act=None) for _ in range(layers)]
        blocks = [StarBlock(width, mlp) for mlp in mlps]
        net = nn.Sequential(nn.Linear(2, width), *blocks, nn.Linear(width, 1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def score(points: Tensor) -> Tensor:
        return net(points)[:, 0].detach()  # type: ignore[no-any-return]

    for step in range(steps):
        watch(step, score)
        loss = F.binary_cross_entropy_with_logits(net(x)[:, 0], labels.to(x.dtype))
        optimizer.zero_grad()
        loss.backward()
        # gradients of a polynomial of degree 4 are large far from the origin
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return score


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
