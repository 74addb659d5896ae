"""Figures of spectra, eigenfeatures and searches, drawn by matplotlib."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from starlayers.checks import positive_int
from starlayers.coefficients.eigen import Eigenfeatures
from starlayers.coefficients.optional import require
from starlayers.coefficients.spectrum import Spectrum, spectrum

if TYPE_CHECKING:
    import optuna
    from matplotlib.figure import Figure

__all__ = ["plot_eigenfeatures", "plot_spectrum"]

KINDS = {"square": "C0", "cross": "C1", "linear": "C2", "constant": "C7"}
#: quantiles over the channels of a layer: bar and line
QUANTILES = (0.1, 0.5, 0.9)
#: red adds to the output, blue subtracts from it, white is a weight of zero
COLOURS = "RdBu_r"
SIGNS = {1: "C3", -1: "C0"}


def plot_spectrum(model: nn.Module | Mapping[str, Spectrum]) -> "Figure":
    """Draw the distribution of the coefficients of every star layer.

    Four panels: eigenvalues of the channels; norms of the channels from large to small; shares of
    squares, products, linear terms and constants; and measures of how evenly coefficients are
    spread, as medians over channels with bars from 10 % to 90 %. All but the second have the layers
    from left to right.

    Args:
        model: a model with star layers, or the result of `spectrum`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there are no star layers.

    Example:
        >>> from starlayers import StarOp
        >>> figure = plot_spectrum(nn.Sequential(StarOp(8, 16), StarOp(16, 4)))
        >>> [ax.get_title() for ax in figure.axes[:2]]
        ['eigenvalues of channels', 'norms of channels, sorted']
    """
    require("plot_spectrum", "matplotlib.figure", extra="plots")
    from matplotlib.figure import Figure

    spectra = spectrum(model) if isinstance(model, nn.Module) else dict(model)
    if not spectra:
        raise ValueError("plot_spectrum: there are no layers to draw")
    figure = Figure(figsize=(max(9.0, 4 + 0.5 * len(spectra)), 6.5), layout="constrained")
    eigen, norms, kinds, spread = figure.subplots(2, 2).flat
    layers, values = [name or "layer" for name in spectra], list(spectra.values())
    _draw_eigenvalues(eigen, values)
    _draw_norms(norms, values, layers)
    _draw_kinds(kinds, values)
    _draw_spread(spread, values)
    for ax in (eigen, kinds, spread):
        ax.set_xticks(range(len(layers)), layers, rotation=90 if len(layers) > 4 else 0, fontsize=7)
        ax.set_xlim(-0.6, len(layers) - 0.4)
    return figure


def _draw_eigenvalues(ax: Any, spectra: list[Spectrum]) -> None:
    values = [s.eigenvalues.flatten().double().cpu() for s in spectra]
    for (sign, colour), name in zip(SIGNS.items(), ("positive", "negative")):
        parts = ("boxprops", "whiskerprops", "capprops", "medianprops")
        style = {part: {"color": colour, "lw": 1} for part in parts}
        boxes = [v[sign * v >= 0].tolist() or [0.0] for v in values]
        options = {"positions": range(len(boxes)), "widths": 0.5, "manage_ticks": False}
        ax.boxplot(boxes, sym="", whis=(5, 95), **options, **style)
        ax.plot([], [], color=colour, label=name)
    ax.axhline(0, color="k", lw=0.5)
    _label(ax, "eigenvalues of channels", "eigenvalue (box: quartiles, line: 5 to 95 %)")


def _draw_norms(ax: Any, spectra: list[Spectrum], layers: list[str]) -> None:
    import matplotlib as mpl

    colours = mpl.colormaps["viridis"].resampled(len(spectra))
    for i, (s, name) in enumerate(zip(spectra, layers)):
        sorted_norms = s.norm.double().cpu().sort(descending=True).values
        position = [(k + 0.5) / len(sorted_norms) for k in range(len(sorted_norms))]
        ax.plot(position, sorted_norms.numpy(), color=colours(i), lw=1, label=name)
    ax.set_title("norms of channels, sorted", fontsize=9)
    ax.set_xlabel("share of channels with a larger norm", fontsize=7)
    ax.set_ylabel("|Q|", fontsize=7)
    ax.set_ylim(bottom=0)
    if len(spectra) <= 8:
        ax.legend(fontsize=6, frameon=False)
    else:
        ends = f"dark: {layers[0]}, light: {layers[-1]}"
        ax.text(0.98, 0.95, ends, fontsize=6, ha="right", transform=ax.transAxes)


def _draw_kinds(ax: Any, spectra: list[Spectrum]) -> None:
    bottom = [0.0] * len(spectra)
    for kind, colour in KINDS.items():
        heights = [float(getattr(s, kind).mean()) for s in spectra]
        ax.bar(range(len(spectra)), heights, bottom=bottom, color=colour, width=0.7, label=kind)
        bottom = [b + h for b, h in zip(bottom, heights)]
    ax.set_ylim(0, 1.25)
    _label(ax, "kinds of coefficients", "share of |Q|$^2$, mean", ncols=4, loc="upper center")


def _draw_spread(ax: Any, spectra: list[Spectrum]) -> None:
    layers, q = range(len(spectra)), torch.tensor(QUANTILES, dtype=torch.float64)
    measures = {"participation": "participation", "sparsity": "sparsity (Hoyer)"}
    if all(s.entropy is not None for s in spectra):
        measures["entropy"] = "entropy"
    for i, (measure, name) in enumerate(measures.items()):
        values = [getattr(s, measure) for s in spectra]
        quantiles = torch.stack([v.double().cpu().quantile(q) for v in values], 1)
        low, middle, high = quantiles.numpy()
        style = {"color": f"C{i}", "lw": 1}
        ax.plot(layers, middle, marker="o", ms=3, label=name, **style)
        ax.errorbar(layers, middle, (middle - low, high - middle), fmt="none", **style)
    ax.set_ylim(0, 1.25)
    _label(ax, "how evenly coefficients are spread", ncols=3, loc="upper center")


def _label(ax: Any, title: str, ylabel: str = "", **legend: Any) -> None:
    ax.set_title(title, fontsize=9)
    ax.set_ylabel(ylabel, fontsize=7)
    ax.legend(fontsize=7, frameon=False, **legend)


def plot_eigenfeatures(
    features: Sequence[Eigenfeatures] | Eigenfeatures,
    *,
    top: int = 3,
    names: Sequence[str] | None = None,
    x: Tensor | None = None,
    shape: Sequence[int] | None = None,
) -> "Figure":
    """Draw the top positive and negative eigenvectors of each output.

    Each output has a row, with its eigenvalues on the left, the 20 largest of each sign. Every
    image has its own diverging colour scale, white at zero; the square and the number on its right
    are the constant coordinate.

    Args:
        features: eigenfeatures of one output or several.
        top: number of images on each side.
        names: names of the outputs; by default "output 0", ...
        x: inputs (n, *shape of the features); with them the title of an image has the share of the
            variance of its logit that it explains.
        shape: (height, width), (1, height, width) or (3, height, width) of an image, by default
            the shape of an input; inputs of other shapes are drawn as bars.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: `shape` has another size than the inputs, the numbers of names and outputs
            differ, or `x` is passed and eigenvectors were left out.

    Example:
        >>> from starlayers import StarOp
        >>> from starlayers.coefficients import eigenfeatures
        >>> features = eigenfeatures(StarOp(16, 2, act=None))
        >>> figure = plot_eigenfeatures(features, shape=(4, 4), top=1)
        >>> len(figure.axes)  # 2 rows: eigenvalues, a positive image, a gap, a negative image
        8
    """
    require("plot_eigenfeatures", "matplotlib.figure", extra="plots")
    from matplotlib.figure import Figure

    outputs = [features] if isinstance(features, Eigenfeatures) else list(features)
    top = positive_int("plot_eigenfeatures", "top", top)
    if names is None:
        names = ["direction" if f.output is None else f"output {f.output}" for f in outputs]
    if not outputs or len(names) != len(outputs):
        raise ValueError(f"plot_eigenfeatures: {len(names)} names for {len(outputs)} outputs")
    size = tuple(outputs[0].shape if shape is None else shape)
    if torch.Size(size).numel() != outputs[0].vectors.shape[1] - 1:
        raise ValueError(
            f"plot_eigenfeatures: images of shape {size} have {torch.Size(size).numel()} "
            f"numbers, the inputs {outputs[0].vectors.shape[1] - 1}"
        )
    figure = Figure(figsize=(1.9 + 2.7 * top, 0.5 + 1.4 * len(outputs)), layout="constrained")
    widths = [1.3, *[1.0] * top, 0.05, *[1.0] * top]  # a gap between the signs
    axes = figure.subplots(len(outputs), len(widths), squeeze=False, width_ratios=widths)
    for ax in axes[:, 1:].flat:
        ax.axis("off")
    for row, f, name in zip(axes, outputs, names):
        shares = None if x is None else f.explained(x)
        _draw_signed_eigenvalues(row[0], f, name)
        for column, sign in ((1, 1), (2 + top, -1)):
            chosen = (sign * f.values > 0).nonzero()[:top, 0].tolist()
            for ax, i in zip(row[column:], chosen):
                _draw_vector(ax, f, i, size)
                title = f"$\\lambda$ = {float(f.values[i]):+.2g}"
                if shares is not None:
                    title += f", {100 * float(shares[i]):z.0f} %"
                ax.set_title(title, fontsize=8, pad=3)
    for column, sign, label in ((1, 1, "for it"), (2 + top, -1, "against it")):
        above = {"xytext": (0, 14), "xycoords": "axes fraction", "textcoords": "offset points"}
        axes[0, column].annotate(label, (0, 1), color=SIGNS[sign], weight="bold", **above)
    axes[0, 0].set_title("eigenvalues", fontsize=8)
    return figure


def _draw_signed_eigenvalues(ax: Any, features: Eigenfeatures, name: str) -> None:
    """Draw the largest eigenvalues of each sign as bars."""
    for sign, colour in SIGNS.items():
        values = features.values[sign * features.values > 0][:20].numpy()
        ax.bar(range(len(values)), values, width=0.8, color=colour)
    ax.axhline(0, color="k", lw=0.5)
    ax.set_ylabel(name, fontsize=9)
    ax.set_xticks([])
    ax.tick_params(labelsize=6, length=2, pad=1)
    for side in ("top", "right", "bottom"):
        ax.spines[side].set_visible(False)


def _draw_vector(ax: Any, features: Eigenfeatures, i: int, size: tuple[int, ...]) -> None:
    """Draw eigenvector `i` as an image or bars, its constant coordinate beside it."""
    vector, constant = features.vectors[i, :-1].reshape(size), features.constants[i]
    # not the maximum: a few large weights, often at the border, would make all others pale
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
    constant_ax = ax.inset_axes((1.02, 0, 0.09, 0.09))
    constant_ax.imshow(constant.reshape(1, 1).numpy(), **style)
    place = {"ha": "center", "va": "bottom", "transform": ax.transAxes}
    ax.text(1.065, 0.13, f"{float(constant):+.2f}", rotation=90, fontsize=6, **place)
    for a in (ax, constant_ax):
        a.axis("on")
        a.set(xticks=[], yticks=[])
        for spine in a.spines.values():
            spine.set(linewidth=0.4, color="0.5")


def plot_study(study: "optuna.Study", folder: Path) -> list[Path]:
    """Write Optuna's figures of a study to `folder` and return their files.

    The style that Optuna sets for the whole process is reset.
    """
    require("SearchResult.plot", "optuna")
    require("SearchResult.plot", "matplotlib.pyplot", extra="plots")
    import matplotlib.pyplot as plt
    import numpy as np
    import optuna
    from matplotlib.ticker import NullFormatter
    from optuna.visualization import matplotlib as draw

    complete = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    figures: dict[str, Any] = {}
    if len(study.directions) in (2, 3):
        figures = {"front": draw.plot_pareto_front}
    elif len(study.directions) == 1 and complete:
        figures = {"history": draw.plot_optimization_history, "slice": draw.plot_slice}
        figures["parallel"] = draw.plot_parallel_coordinate
        if len({t.value for t in complete}) > 1 and len(complete[0].params) > 1:
            figures["importances"] = draw.plot_param_importances
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, draw_figure in figures.items():
        with plt.rc_context(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            axes = draw_figure(study)
            figure = np.ravel(axes)[0].figure
            if name == "parallel":
                figure.set_size_inches(2 + 1.2 * len(figure.axes), 5)
            for ax in figure.axes:
                for axis in (ax.xaxis, ax.yaxis):
                    axis.set_minor_formatter(NullFormatter())  # these labels would overlap
            files.append(folder / f"{name}.png")
            figure.savefig(files[-1], dpi=120, bbox_inches="tight")
            plt.close(figure)
    return files
