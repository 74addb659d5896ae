"""Penalties on the coefficients of star layers, from the weights alone."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from starlayers.coefficients import norms
from starlayers.coefficients.form import find_stars, named_vectors

__all__ = ["CoefficientPenalty"]


class CoefficientPenalty:
    """Penalty on the size of the coefficients of a model's star layers.

    Call it in every step and add the result to the loss. Over the matrices Q of a layer's channels
    (see `branch_vectors`), in time and memory of the order of the parameters, it is the sum of:

    - `p=2`: `sum |Q|_F^2`, for rank 1 `(|w1|^2 |w2|^2 + (w1 . w2)^2) / 2` a channel;
    - `p=1`: `sum |Q_ij|`, which makes coefficients zero. A rank-1 channel takes `d log d`
      operations, by sorting its entries by angle; of others the matrices are made, a few at a time.
    - `balance` times `1 - log(P) / log(N)`, where `P = (sum Q_ij^2)^2 / sum Q_ij^4` is the
      effective number of coefficients among all N of a layer: 0 if all have one size, 1 if only
      one is not zero. `log P` is an entropy (Renyi's, of order 2).

    Layers with an activation count by their weights alone, as the coefficients of the bilinear
    part. The weights are read at every call.

    Args:
        model: a star layer or a model that has some; sums of branches are left out.
        p: 2, 1, or `None` for the balance alone.
        normalise: take the mean over a layer's channels and over layers, for `p=1` divided by
            d + 1, so that one strength suits models of all sizes; otherwise the plain sum.
        balance: weight of the balance in the result; it is a mean over layers in any case.
        bound: for `p=1`, take the upper bound `sum_r |w1|_1 |w2|_1` instead of `sum |Q_ij|`.

    Raises:
        ValueError: the model has no star layers, `p` is another number, `bound` is passed for
            another `p`, `balance` is negative, or is 0 for `p=None`; when called, for `p=1` and
            `rank > 1`, if a single matrix takes more than 1 GiB.

    Example:
        >>> from starlayers import StarOp
        >>> model = nn.Sequential(StarOp(8, 16), nn.Linear(16, 2))
        >>> penalty = CoefficientPenalty(model, p=2, balance=0.1)
        >>> loss = model(torch.randn(4, 8)).square().mean() + 1e-2 * penalty()
        >>> loss.backward()
    """

    def __init__(
        self,
        model: nn.Module,
        p: int | None = 2,
        *,
        normalise: bool = True,
        balance: float = 0.0,
        bound: bool = False,
    ) -> None:
        if p not in (1, 2, None):
            raise ValueError(f"CoefficientPenalty: p must be 1, 2 or None, got {p!r}")
        if not 0.0 <= balance < float("inf"):
            raise ValueError(f"CoefficientPenalty: balance must be at least 0, got {balance}")
        if p is None and not balance:
            raise ValueError("CoefficientPenalty: p=None needs a balance above 0, got 0")
        if bound and p != 1:
            raise ValueError(f"CoefficientPenalty: bound=True is for p=1, got p={p}")
        self.layers = find_stars("CoefficientPenalty", model)
        self.p, self.normalise, self.balance, self.bound = p, normalise, float(balance), bound

    def __call__(self) -> Tensor:
        """Compute the penalty, a scalar with gradients to weights and biases."""
        pairs = named_vectors(self.layers).values()
        terms = [self._layer(*pair, 1 / len(pairs)) for pair in pairs]
        return torch.stack([t.to(terms[0]) for t in terms]).sum()

    def _layer(self, w1: Tensor, w2: Tensor, share: float) -> Tensor:
        term = w1.new_zeros(())
        if self.p is not None:
            absolutes = norms.absolutes_bound if self.bound else norms.absolutes
            sizes = (norms.squares if self.p == 2 else absolutes)(w1, w2)
            weight = share / (1 if self.p == 2 else w1.shape[2])
            term = sizes.mean() * weight if self.normalise else sizes.sum()
        if self.balance:
            term = term + self.balance * share * imbalance(w1, w2)
        return term

    def __repr__(self) -> str:
        options: dict[str, Any] = {"normalise": True, "balance": 0.0, "bound": False}
        changed = {k: getattr(self, k) for k, v in options.items() if getattr(self, k) != v}
        suffix = "".join(f", {k}={v}" for k, v in changed.items())
        return f"CoefficientPenalty({len(self.layers)} layers, p={self.p}{suffix})"


def imbalance(w1: Tensor, w2: Tensor) -> Tensor:
    """Return `1 - log(P) / log(N)` of N coefficients, P of them effective; a scalar."""
    # scale the weights, which does not change P, so that fourth powers of small ones do not vanish
    w1, w2 = (w / norms.positive(w.detach().square().mean().sqrt()) for w in (w1, w2))
    fourth = norms.fourth_powers(w1, w2).sum()
    second = norms.squares(w1, w2).sum()
    effective = 2 * norms.positive(second).log() - norms.positive(fourth).log()
    return 1 - effective.clamp(min=0) / math.log(len(w1) * w1.shape[2] ** 2)
