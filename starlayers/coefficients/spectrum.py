"""Distribution of the coefficients of star layers, by channel, layer and model."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from starlayers.coefficients import norms
from starlayers.coefficients.form import find_stars, named_vectors

__all__ = ["Spectrum", "spectrum"]


@dataclass(frozen=True)
class Spectrum:
    """Distribution of the coefficients of one star layer, for each channel.

    The coefficients are the entries of the channel's matrix Q. Everything but `entropy` comes from
    the two vectors of a product, without the matrix. `Q_ij` and `Q_ji` are two of the
    `N = (d + 1)^2` entries.

    Args:
        features: number of inputs d of the layer.
        eigenvalues: eigenvalues that are not always zero, ascending (channels, 2 rank).
        norm: `|Q|_F`.
        absolute: `sum |Q_ij|`.
        participation: the effective number of entries, `(sum Q_ij^2)^2 / sum Q_ij^4`, as a share of
            N: 1 if all have one size.
        square, cross, linear, constant: the shares of `|Q|_F^2` in the coefficients of squares
            x_i^2, of products x_i x_j, of x_i, and in the constant; together 1.
        entropy: `-sum p log p` of the shares `p = Q_ij^2 / |Q|_F^2`, over `log N`: 1 if all have
            one size; `None` if it was not computed.

    Example:
        >>> from starlayers import StarOp
        >>> layer = spectrum(StarOp(8, 32))[""]
        >>> layer.norm.shape, layer.eigenvalues.shape
        (torch.Size([32]), torch.Size([32, 2]))
        >>> torch.allclose(layer.eigenvalues.norm(dim=1), layer.norm)
        True
    """

    features: int
    eigenvalues: Tensor
    norm: Tensor
    absolute: Tensor
    participation: Tensor
    square: Tensor
    cross: Tensor
    linear: Tensor
    constant: Tensor
    entropy: Tensor | None = None

    @property
    def sparsity(self) -> Tensor:
        """Hoyer's sparsity, (channels,): 0 for entries of one size, 1 for a single entry.

        It is `(sqrt N - |Q|_1 / |Q|_F) / (sqrt N - 1)`.

        Source: Hoyer, "Non-negative matrix factorization with sparseness constraints", JMLR 2004.
        """
        root = self.features + 1
        spread = self.absolute / norms.positive(self.norm)
        return ((root - spread) / (root - 1)).clamp(0, 1)

    def summary(self) -> dict[str, float]:
        """Return means over the channels, and the variation of their norms.

        `positive` and `negative` are the means of the largest and the smallest eigenvalue,
        `norm_variation` is the standard deviation of the norms over their mean.
        """
        means = {"norm": self.norm, "positive": self.eigenvalues[:, -1]}
        means["negative"] = self.eigenvalues[:, 0]
        others = ("sparsity", "participation", "square", "cross", "linear", "constant", "entropy")
        means |= {name: x for name in others if (x := getattr(self, name)) is not None}
        deviation = self.norm.std(correction=0) / norms.positive(self.norm.mean())
        numbers = {name: float(values.mean()) for name, values in means.items()}
        return {**numbers, "norm_variation": float(deviation)}


@torch.no_grad()
def spectrum(model: nn.Module, *, entropy: bool = True) -> dict[str, Spectrum]:
    """Measure the distribution of coefficients in every star layer of a model.

    For rank 1 the eigenvalues of a channel are `(w1 . w2 -+ |w1| |w2|) / 2` over its vectors (see
    `branch_vectors`): for all weights, one is at least 0 and the other at most 0. Layers with an
    activation count by their weights alone.

    Args:
        model: a star layer, whose name is "", or a model that has some; sums of branches
            are left out.
        entropy: compute the entropy too, which takes `(d + 1)^2` operations a channel; the other
            numbers of rank-1 layers take `d log d`.

    Returns:
        A `Spectrum` for each layer, by the layer's name.

    Raises:
        ValueError: the model has no star layers, or a single matrix, which the entropy and
            `rank > 1` need, takes more than 1 GiB.

    Example:
        >>> from starlayers import StarBlock
        >>> model = nn.Sequential(StarBlock(8), StarBlock(8))
        >>> list(spectrum(model))
        ['0.mlp', '1.mlp']
        >>> 0.5 < spectrum(model)["0.mlp"].summary()["entropy"] < 1
        True
    """
    pairs = named_vectors(find_stars("spectrum", model))
    return {name: _spectrum(*pair, entropy) for name, pair in pairs.items()}


def _spectrum(w1: Tensor, w2: Tensor, entropy: bool) -> Spectrum:
    # scale the weights so that squares and fourth powers of small ones do not vanish
    scales = [norms.positive(w.square().mean((1, 2)).sqrt()) for w in (w1, w2)]
    v1, v2 = (w / s[:, None, None] for w, s in zip((w1, w2), scales))
    scale = scales[0] * scales[1]
    squares = norms.squares(v1, v2)
    total, width = norms.positive(squares), w1.shape[2]
    fourth = norms.fourth_powers(v1, v2)
    diagonal, edge = norms.diagonals(v1, v2)
    square = diagonal[:, :-1].square().sum(1) / total
    linear = 2 * edge.square().sum(1) / total
    constant = diagonal[:, -1].square() / total
    return Spectrum(
        features=width - 1,
        eigenvalues=norms.eigenvalues(v1, v2) * scale[:, None],
        norm=squares.sqrt() * scale,
        absolute=norms.absolutes(v1, v2) * scale,
        participation=squares.square() / norms.positive(fourth) / width**2,
        square=square,
        cross=(squares / total - square - linear - constant).clamp(min=0),
        linear=linear,
        constant=constant,
        entropy=norms.entropies(v1, v2) / (2 * math.log(width)) if entropy else None,
    )
