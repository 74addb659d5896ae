"""Eigenfeatures as pictures."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from starlayers.coefficients.eigen import Eigenfeatures
from starlayers.coefficients.optional import needs
from starlayers.modules import positive_int

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_eigenfeatures"]

#: red speaks with the sign of the feature, blue against it, white is no weight
COLOURS = "RdBu_r"
SIGNS = {1: "C3", -1: "C0"}


def plot_eigenfeatures(
    features: Sequence[Eigenfeatures] | Eigenfeatures,
    *,
    top: int = 3,
    names: Sequence[str] | None = None,
    x: Tensor | None = None,
    shape: Sequence[int] | None = None,
) -> "Figure":
    """Draw the top positive and negative eigenvectors of each output, a row each.

    Every picture has its own diverging colour scale, white at zero; the square and the number on
    its right are the constant coordinate. On the left of a row are its eigenvalues, the 20 largest
    of each sign.

    Args:
        features: of one output or several.
        top: pictures on each side.
        names: of the outputs, for the rows; by default "output 0", ...
        x: inputs (n, *shape of the features); with them each picture says how much of the
            variance of its logit it explains.
        shape: (height, width), (1, height, width) or (3, height, width) of a picture, by default
            that of an input; what is no picture is drawn as bars.

    Raises:
        ImportError: matplotlib is not there.
        ValueError: `shape` has another size than the inputs, there are not as many names as
            outputs, or eigenvectors were left out and `x` was given.

    Example:
        >>> from starlayers import StarOp
        >>> from starlayers.coefficients import eigenfeatures
        >>> features = eigenfeatures(StarOp(16, 2, act=None))
        >>> figure = plot_eigenfeatures(features, shape=(4, 4), top=1)
        >>> len(figure.axes)  # two rows of eigenvalues, one picture for, a gap, one against
        8
    """
    needs("plot_eigenfeatures", "matplotlib.figure")
    from matplotlib.figure import Figure

    rows = [features] if isinstance(features, Eigenfeatures) else list(features)
    top = positive_int("plot_eigenfeatures", "top", top)
    if names is None:
        names = ["direction" if f.output is None else f"output {f.output}" for f in rows]
    if not rows or len(names) != len(rows):
        raise ValueError(f"plot_eigenfeatures: {len(names)} names for {len(rows)} outputs")
    size = tuple(rows[0].shape if shape is None else shape)
    if torch.Size(size).numel() != rows[0].vectors.shape[1] - 1:
        raise ValueError(
            f"plot_eigenfeatures: pictures of shape {size} have {torch.Size(size).numel()} "
            f"numbers, the inputs {rows[0].vectors.shape[1] - 1}"
        )
    figure = Figure(figsize=(1.9 + 2.7 * top, 0.5 + 1.4 * len(rows)), layout="constrained")
    widths = [1.3, *[1.0] * top, 0.05, *[1.0] * top]  # a gap between for and against
    axes = figure.subplots(len(rows), len(widths), squeeze=False, width_ratios=widths)
    for ax in axes[:, 1:].flat:
        ax.axis("off")
    for line, f, name in zip(axes, rows, names):
        shares = None if x is None else f.explained(x)
        _spectrum(line[0], f, name)
        for column, sign in ((1, 1), (2 + top, -1)):
            chosen = (sign * f.values > 0).nonzero()[:top, 0].tolist()
            for ax, i in zip(line[column:], chosen):
                _picture(ax, f, i, size)
                title = f"$\\lambda$ = {float(f.values[i]):+.2g}"
                if shares is not None:
                    title += f", {100 * float(shares[i]):z.0f} %"
                ax.set_title(title, fontsize=8, pad=3)
    for column, sign, words in ((1, 1, "for it"), (2 + top, -1, "against it")):
        ax = axes[0, column]
        ax.annotate(
            words,
            (0, 1),
            xytext=(0, 14),
            xycoords="axes fraction",
            textcoords="offset points",
            color=SIGNS[sign],
            weight="bold",
        )
    axes[0, 0].set_title("eigenvalues", fontsize=8)
    return figure


def _spectrum(ax: Any, features: Eigenfeatures, name: str) -> None:
    """The eigenvalues of each sign by rank."""
    for sign, colour in SIGNS.items():
        values = features.values[sign * features.values > 0][:20].numpy()
        ax.bar(range(len(values)), values, width=0.8, color=colour)
    ax.axhline(0, color="k", lw=0.5)
    ax.set_ylabel(name, fontsize=9)
    ax.set_xticks([])
    ax.tick_params(labelsize=6, length=2, pad=1)
    for side in ("top", "right", "bottom"):
        ax.spines[side].set_visible(False)


def _picture(ax: Any, features: Eigenfeatures, i: int, size: tuple[int, ...]) -> None:
    vector, constant = features.vectors[i, :-1].reshape(size), features.constants[i]
    # the few largest weights, often at the rim, would make all others pale
    most = max(float(vector.abs().flatten().quantile(0.995)), 1e-12)
    style: dict[str, Any] = {"cmap": COLOURS, "vmin": -most, "vmax": most}
    if len(size) == 3 and size[0] == 1:
        vector = vector[0]
    if vector.ndim == 2:
        ax.imshow(vector.numpy(), interpolation="nearest", **style)
    elif vector.ndim == 3 and size[0] == 3:
        ax.imshow((0.5 + vector / (2 * most)).clamp(0, 1).permute(1, 2, 0).numpy())
    else:
        ax.bar(range(vector.numel()), vector.flatten().numpy(), width=1, color="C7")
    beside = ax.inset_axes((1.02, 0, 0.09, 0.09))
    beside.imshow(constant.reshape(1, 1).numpy(), **style)
    ax.text(
        1.065,
        0.13,
        f"{float(constant):+.2f}",
        rotation=90,
        fontsize=6,
        ha="center",
        va="bottom",
        transform=ax.transAxes,
    )
    for a in (ax, beside):
        a.axis("on")
        a.set(xticks=[], yticks=[])
        for spine in a.spines.values():
            spine.set(linewidth=0.4, color="0.5")
