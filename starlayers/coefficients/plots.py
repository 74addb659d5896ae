"""The spectra of a model's star layers as one figure."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from starlayers.coefficients.optional import needs
from starlayers.coefficients.spectrum import Spectrum, spectrum

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_spectrum"]

KINDS = {"square": "C0", "cross": "C1", "linear": "C2", "constant": "C7"}
#: quantiles over the channels of a layer: line and band
MIDDLE, BAND = 0.5, (0.1, 0.9)


def plot_spectrum(model: nn.Module | Mapping[str, Spectrum]) -> "Figure":
    """Draw how the coefficients of every star layer are distributed.

    Four panels, each with the layers from left to right: the eigenvalues of the channels; the
    norms of the channels from large to small; the shares of squares, products, linear terms and
    constants; and how evenly coefficients are spread. Lines are medians over channels, bands 10 %
    to 90 %.

    Args:
        model: a model with star layers, or what `spectrum` returned for one.

    Raises:
        ImportError: matplotlib is not there.
        ValueError: there are no star layers.

    Example:
        >>> from starlayers import StarOp
        >>> figure = plot_spectrum(nn.Sequential(StarOp(8, 16), StarOp(16, 4)))
        >>> [ax.get_title() for ax in figure.axes[:2]]
        ['eigenvalues of channels', 'norms of channels, sorted']
    """
    needs("plot_spectrum", "matplotlib.figure")
    from matplotlib.figure import Figure

    found = spectrum(model) if isinstance(model, nn.Module) else dict(model)
    if not found:
        raise ValueError("plot_spectrum: there are no layers to draw")
    figure = Figure(figsize=(max(9.0, 4 + 0.5 * len(found)), 6.5), layout="constrained")
    eigen, norms, kinds, spread = figure.subplots(2, 2).flat
    layers = [name or "layer" for name in found]
    _eigenvalues(eigen, list(found.values()))
    _norms(norms, list(found.values()), layers)
    _kinds(kinds, list(found.values()))
    _spread(spread, list(found.values()))
    for ax in (eigen, kinds, spread):
        ax.set_xticks(range(len(layers)), layers, rotation=90 if len(layers) > 4 else 0, fontsize=7)
        ax.set_xlim(-0.6, len(layers) - 0.4)
    return figure


def _eigenvalues(ax: Any, found: list[Spectrum]) -> None:
    for sign, colour, name in ((1, "C3", "positive"), (-1, "C0", "negative")):
        values = []
        for s in found:
            flat = s.eigenvalues.flatten().double().cpu()
            values.append(flat[sign * flat >= 0].numpy())
        look = {"color": colour, "lw": 1}
        ax.boxplot(
            [v if len(v) else [0.0] for v in values],
            positions=range(len(found)),
            widths=0.5,
            sym="",
            whis=(5, 95),
            boxprops=look,
            whiskerprops=look,
            capprops=look,
            medianprops=look,
            manage_ticks=False,
        )
        ax.plot([], [], color=colour, label=name)
    ax.axhline(0, color="k", lw=0.5)
    ax.set_title("eigenvalues of channels", fontsize=9)
    ax.set_ylabel("eigenvalue (box: quartiles, line: 5 to 95 %)", fontsize=7)
    ax.legend(fontsize=7, frameon=False)


def _norms(ax: Any, found: list[Spectrum], layers: list[str]) -> None:
    import matplotlib as mpl

    colours = mpl.colormaps["viridis"].resampled(len(found))
    for i, (s, name) in enumerate(zip(found, layers)):
        sorted_norms = s.norm.double().cpu().sort(descending=True).values
        place = [(k + 0.5) / len(sorted_norms) for k in range(len(sorted_norms))]
        ax.plot(place, sorted_norms.numpy(), color=colours(i), lw=1, label=name)
    ax.set_title("norms of channels, sorted", fontsize=9)
    ax.set_xlabel("share of channels with a larger norm", fontsize=7)
    ax.set_ylabel("|Q|", fontsize=7)
    ax.set_ylim(bottom=0)
    if len(found) <= 8:
        ax.legend(fontsize=6, frameon=False)
    else:
        ax.text(0.98, 0.95, f"dark: {layers[0]}, light: {layers[-1]}", fontsize=6, ha="right",
                transform=ax.transAxes)  # fmt: skip


def _kinds(ax: Any, found: list[Spectrum]) -> None:
    bottom = [0.0] * len(found)
    for kind, colour in KINDS.items():
        heights = [float(getattr(s, kind).mean()) for s in found]
        ax.bar(range(len(found)), heights, bottom=bottom, color=colour, width=0.7, label=kind)
        bottom = [b + h for b, h in zip(bottom, heights)]
    ax.set_title("kinds of coefficients", fontsize=9)
    ax.set_ylabel("share of |Q|$^2$, mean", fontsize=7)
    ax.set_ylim(0, 1.25)
    ax.legend(fontsize=7, frameon=False, ncols=4, loc="upper center")


def _spread(ax: Any, found: list[Spectrum]) -> None:
    measures: dict[str, list[Tensor]] = {
        "participation": [s.participation for s in found],
        "sparsity (Hoyer)": [s.sparsity for s in found],
    }
    entropies = [s.entropy for s in found if s.entropy is not None]
    if len(entropies) == len(found):
        measures["entropy"] = entropies
    for i, (name, values) in enumerate(measures.items()):
        quantiles = [
            [float(v.double().quantile(q)) for v in values] for q in (BAND[0], MIDDLE, BAND[1])
        ]
        ax.plot(range(len(found)), quantiles[1], color=f"C{i}", marker="o", ms=3, lw=1, label=name)
        below = [m - low for m, low in zip(quantiles[1], quantiles[0])]
        above = [high - m for m, high in zip(quantiles[1], quantiles[2])]
        ax.errorbar(
            range(len(found)), quantiles[1], (below, above), color=f"C{i}", fmt="none", lw=1
        )
    ax.set_title("how evenly coefficients are spread", fontsize=9)
    ax.set_ylim(0, 1.25)
    ax.legend(fontsize=7, frameon=False, ncols=3, loc="upper center")
