"""Stars as kernels: Gram matrices, what random weights amount to, and decision boundaries."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starlayers.coefficients.form import branch_vectors, check_form
from starlayers.coefficients.optional import needs
from starlayers.modules import StarBlock, StarOp, positive_int

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DecisionBoundary", "decision_boundary", "plot_boundaries", "star_kernel"]


def star_kernel(op: StarOp, x: Any, y: Any = None, *, analytic: bool = False) -> Tensor:
    """The Gram matrix of a star's channels: `K(x, y) = mean_k star_k(x) star_k(y)`.

    With `analytic=True` its expectation over random weights in place of the op's own. Where the
    weights of branch `i` are independent with mean 0 and variance `v_i`, and its biases (`offset`
    included) have mean square `c_i`, each branch has `E[f_i(x) f_i(y)] = v_i x.y + c_i`. The
    branches are independent of each other, and so are the `rank` products of a channel, so that

        E[K(x, y)] = rank (v_1 x.y + c_1) (v_2 x.y + c_2)

    a polynomial kernel of degree 2, `v^2 (x.y + c / v)^2` for branches alike. `v_i` and `c_i` are
    the mean squares of the op's weights, exact for its initialisation up to sampling. A sum of the
    same branches would have the linear kernel `(v_1 + v_2) x.y + c_1 + c_2`.

    Args:
        op: a `StarOp`; of a `StarMLP` the product, without `g`.
        x, y: (n, in_features) and (m, in_features), tensors or arrays; `y` defaults to `x`.
            `functools.partial(star_kernel, op)` is a kernel that scikit-learn takes.
        analytic: the expectation; for a star without activation only.

    Returns:
        (n, m) in float64 on the CPU, symmetric and positive semidefinite for `y=None`.

    Raises:
        ValueError: inputs of another size, or `analytic` for a star with an activation, a sum or
            coefficients that depend on the input.

    Example:
        >>> x, op = torch.randn(5, 3), StarOp(3, 100_000, act=None)
        >>> expected = star_kernel(op, x, analytic=True)
        >>> torch.allclose(star_kernel(op, x), expected, rtol=0.05, atol=0.05)
        True
    """
    first = _inputs(op, "x", x)
    second = first if y is None else _inputs(op, "y", y)
    if analytic:
        return _expected(op, first, second)
    exact = copy.deepcopy(op).cpu().double()
    features = exact._combined  # of a StarMLP too: its forward goes on to g
    with torch.no_grad():
        a = features(first)
        b = a if y is None else features(second)
    return a @ b.T / a.shape[1]


def _inputs(op: StarOp, name: str, given: Any) -> Tensor:
    x = torch.as_tensor(given).detach().cpu().double()
    if x.ndim != 2 or x.shape[1] != op.in_features:
        raise ValueError(
            f"star_kernel: {name} must be (n, {op.in_features}) for this op, got {tuple(x.shape)}"
        )
    return x


def _expected(op: StarOp, x: Tensor, y: Tensor) -> Tensor:
    check_form("star_kernel(analytic=True)", op)
    products = x @ y.T
    expected = torch.full_like(products, op.rank)
    with torch.no_grad():
        for vectors in branch_vectors(op):
            squares = vectors.double().cpu().square().flatten(0, 1).mean(0)
            expected *= squares[:-1].mean() * products + squares[-1]
    return expected


@dataclass(frozen=True)
class DecisionBoundary:
    """Classifiers of points in the plane, over a grid.

    `points` (n, 2) and `labels` (n,) are what they were trained on. `scores` are by name, (height,
    width) over the rectangle `extent` (left, right, bottom, top), row 0 at the bottom: positive
    where a classifier says class 1. `accuracy` by name is that on new points of the same kind.

    Example:
        >>> found = decision_boundary("circles", models=["poly"], grid=20)
        >>> found.scores["poly"].shape, found.accuracy["poly"] > 0.9
        (torch.Size([20, 20]), True)
    """

    data: str
    points: Tensor
    labels: Tensor
    extent: tuple[float, float, float, float]
    scores: dict[str, Tensor]
    accuracy: dict[str, float]


def decision_boundary(
    data: str = "moons",
    *,
    models: Sequence[str] = ("star", "sum", "poly", "rbf"),
    layers: int = 2,
    width: int = 16,
    steps: int = 400,
    samples: int = 200,
    noise: float | None = None,
    grid: int = 200,
    seed: int = 0,
) -> DecisionBoundary:
    """Train stars, sums and SVMs on two moons or circles, and look at what they separate.

    `star` and `sum` are the same network without activations, `Linear`, `layers` blocks
    `x + g(f1(x) * f2(x))` or `x + g(f1(x) + f2(x))`, `Linear`: a polynomial of degree `2^layers`,
    and an affine function. `poly` is scikit-learn's SVM with `(gamma x.y + 1)^(2^layers)`, `rbf`
    its default. `star_kernel` is an SVM on `star_kernel(op, analytic=True)` of one random layer,
    which is of degree 2. Inputs are standardised.

    Args:
        data: "moons" or "circles".
        models: names from the above.
        layers, width, steps: star blocks, their channels, and steps of AdamW on all points.
        samples: points to train on; accuracy is on ten times as many new ones.
        noise: standard deviation of the points, default 0.2 for moons and 0.15 for circles.
        grid: points on a side of the grid.
        seed: of data and networks.

    Raises:
        ImportError: scikit-learn is not there.
        ValueError: unknown data or models.

    Source: figure 2 of Ma et al., "Rewrite the Stars", CVPR 2024, arXiv 2403.19967.

    Example:
        >>> found = decision_boundary("moons", models=["rbf"], samples=50, grid=10)
        >>> sorted(found.scores), found.points.shape
        (['rbf'], torch.Size([50, 2]))
    """
    if data not in DATA:
        raise ValueError(
            f"decision_boundary: unknown data {data!r}, choose one of {', '.join(DATA)}"
        )
    if unknown := [m for m in models if m not in CLASSIFIERS]:
        raise ValueError(
            f"decision_boundary: unknown models {unknown}, choose from {', '.join(CLASSIFIERS)}"
        )
    for name, value in {
        "layers": layers, "width": width, "steps": steps, "samples": samples, "grid": grid
    }.items():  # fmt: skip
        positive_int("decision_boundary", name, value)
    needs("decision_boundary", "sklearn", "scikit-learn")
    from sklearn import datasets

    maker, options = DATA[data]
    if noise is not None:
        options = {**options, "noise": noise}
    drawn = [
        getattr(datasets, maker)(n, random_state=2 * seed + i, **options)
        for i, n in enumerate((samples, 10 * samples))
    ]
    (x, labels), (x_new, labels_new) = [
        (torch.from_numpy(p).float(), torch.from_numpy(c).long()) for p, c in drawn
    ]
    std, mean = torch.std_mean(x, 0)
    x, x_new = (x - mean) / std, (x_new - mean) / std
    least, most = x.min(0).values - 0.5, x.max(0).values + 0.5
    sides = [torch.linspace(float(a), float(b), grid) for a, b in zip(least, most)]
    plane = torch.cartesian_prod(*sides)
    shapes = {"layers": layers, "width": width, "steps": steps, "seed": seed}
    scores, accuracy = {}, {}
    for name in models:
        score = CLASSIFIERS[name](x, labels, **shapes)
        accuracy[name] = float(((score(x_new) > 0) == labels_new).float().mean())
        scores[name] = score(plane).reshape(grid, grid).T
    extent = (float(least[0]), float(most[0]), float(least[1]), float(most[1]))
    return DecisionBoundary(data, x, labels, extent, scores, accuracy)


Score = Callable[[Tensor], Tensor]


def _network(combine: str) -> Callable[..., Score]:
    def train(
        x: Tensor, labels: Tensor, *, layers: int, width: int, steps: int, seed: int
    ) -> Score:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            blocks = [
                StarBlock(width, expansion=2, act=None, combine=combine) for _ in range(layers)
            ]
            net = nn.Sequential(nn.Linear(2, width), *blocks, nn.Linear(width, 1))
        optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            loss = F.binary_cross_entropy_with_logits(net(x)[:, 0], labels.to(x.dtype))
            optimizer.zero_grad()
            loss.backward()
            # a polynomial of degree 4 is steep in places
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        return lambda points: net(points)[:, 0].detach()

    return train


def _svm(kernel: str) -> Callable[..., Score]:
    def train(x: Tensor, labels: Tensor, *, layers: int, width: int, seed: int, **_: Any) -> Score:
        from sklearn.svm import SVC

        if kernel == "star":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                op = StarOp(2, width, act=None)

            def gram(a: Any, b: Any) -> Any:
                return star_kernel(op, a, b, analytic=True).numpy()

            machine = SVC(kernel=gram)
        elif kernel == "poly":
            machine = SVC(kernel="poly", degree=2**layers, coef0=1.0)
        else:
            machine = SVC(kernel=kernel)
        machine.fit(x.numpy(), labels.numpy())
        return lambda points: torch.from_numpy(machine.decision_function(points.numpy()))

    return train


#: name -> scikit-learn's maker and its options
DATA: dict[str, tuple[str, dict[str, Any]]] = {
    "moons": ("make_moons", {"noise": 0.2}),
    "circles": ("make_circles", {"noise": 0.15, "factor": 0.5}),
}
#: name -> what trains on points and labels and returns scores of points
CLASSIFIERS: dict[str, Callable[..., Score]] = {
    "star": _network("mul"),
    "sum": _network("sum"),
    "poly": _svm("poly"),
    "rbf": _svm("rbf"),
    "star_kernel": _svm("star"),
}
#: the same in words
TITLES = {
    "star": "star",
    "sum": "sum",
    "poly": "SVM, polynomial",
    "rbf": "SVM, RBF",
    "star_kernel": "SVM, star kernel",
}


def plot_boundaries(boundaries: Sequence[DecisionBoundary]) -> "Figure":
    """Draw decision boundaries, a row for each data set and a column for each classifier.

    The line is the boundary, the colour the score, full beyond the third of the plane where it is
    smallest; points are the training data, the number is the accuracy on new ones.

    Raises:
        ImportError: matplotlib is not there.
        ValueError: there is nothing to draw, or the rows have different classifiers.

    Example:
        >>> found = decision_boundary("circles", models=["poly", "rbf"], samples=50, grid=10)
        >>> len(plot_boundaries([found]).axes)
        2
    """
    if not boundaries or any(b.scores.keys() != boundaries[0].scores.keys() for b in boundaries):
        raise ValueError("plot_boundaries needs boundaries of the same models, and at least one")
    needs("plot_boundaries", "matplotlib.figure")
    from matplotlib.figure import Figure

    names = list(boundaries[0].scores)
    figure = Figure(figsize=(2.6 * len(names), 2.5 * len(boundaries) + 0.2), layout="constrained")
    axes = figure.subplots(len(boundaries), len(names), squeeze=False)
    for line, b in zip(axes, boundaries):
        for ax, name in zip(line, names):
            score = b.scores[name]
            most = float(score.abs().quantile(0.33)) or 1.0
            ax.imshow(
                (score / most).clamp(-1, 1).numpy(), origin="lower", extent=b.extent, aspect="auto",
                cmap="RdBu_r", vmin=-1.6, vmax=1.6, interpolation="bilinear",
            )  # fmt: skip
            if float(score.min()) < 0 < float(score.max()):
                ax.contour(score.numpy(), levels=[0], extent=b.extent, colors="k", linewidths=1.2)
            for label, colour in enumerate(("C0", "C3")):
                p = b.points[b.labels == label].numpy()
                ax.scatter(p[:, 0], p[:, 1], s=9, color=colour, edgecolor="white", linewidth=0.4)
            ax.set(xticks=[], yticks=[], xlim=b.extent[:2], ylim=b.extent[2:])
            ax.text(
                0.97, 0.04, f"{100 * b.accuracy[name]:.1f} %", transform=ax.transAxes, ha="right",
                fontsize=9, bbox={"facecolor": "white", "alpha": 0.8, "lw": 0, "pad": 1.5},
            )  # fmt: skip
        line[0].set_ylabel(b.data)
    for ax, name in zip(axes[0], names):
        ax.set_title(TITLES[name], fontsize=10)
    return figure
