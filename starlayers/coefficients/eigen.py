"""Eigenvectors of the outputs of activation-free stars, and logits term by term."""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor, nn

from starlayers.checks import positive_int
from starlayers.coefficients.compose import Products, compose, outline
from starlayers.coefficients.form import check_bytes, products_of, rank_of

__all__ = ["Attribution", "Eigenfeatures", "attribute", "eigenfeatures"]

Shape = Sequence[int]
Basis = tuple[Tensor, Tensor]

#: rows of the largest matrix whose eigenvectors are computed; twice as many take 8 times as long
MAX_ORDER = 4097


@dataclass(frozen=True)
class Eigenfeatures:
    """Eigenvectors of the quadratic form of one output.

    With `x~ = (x, 1)` the output is `sum_i values[i] (vectors[i] . x~)^2`. `values` (k,) are the
    eigenvalues, the largest `|value|` first; `vectors` (k, d + 1) have length one, the constant
    coordinate last. Both are float64 on the CPU. A vector and its negative are the same feature;
    the sign is such that the weights of the input sum to at least 0. `output` is the number of the
    output, `None` for a direction; `shape` is that of one input; `complete` is True if all
    eigenvectors are kept, which the formula needs.

    Example:
        >>> from starlayers import StarOp
        >>> features = eigenfeatures(StarOp(6, 2, act=None), 0)
        >>> features.images.shape, features.constants.shape
        (torch.Size([3, 6]), torch.Size([3]))
    """

    output: int | None
    values: Tensor
    vectors: Tensor
    shape: tuple[int, ...]
    complete: bool

    @property
    def images(self) -> Tensor:
        """Vectors without their constant coordinate, (k, *shape)."""
        return self.vectors[:, :-1].reshape(-1, *self.shape)

    @property
    def constants(self) -> Tensor:
        """Constant coordinates of the vectors, (k,)."""
        return self.vectors[:, -1]

    def terms(self, x: Tensor) -> Tensor:
        """Return `values[i] (vectors[i] . x~)^2`: (..., *shape) -> (..., k), float64."""
        rows = flat("Eigenfeatures.terms", x, self.shape)
        return self.values * (rows @ self.vectors[:, :-1].T + self.constants) ** 2

    def explained(self, x: Tensor) -> Tensor:
        """Return the share of each term in the variance of the logit over inputs, (k,).

        The share is `Cov(term, logit) / Var(logit)`; shares sum to 1. It is negative for a term
        that counteracts the others, and then another may exceed 1.

        Raises:
            ValueError: eigenvectors were left out, or the logit is the same for all inputs.
        """
        need_all("explained", [self])
        terms = self.terms(x).reshape(-1, len(self.values))
        terms -= terms.mean(0)
        logit = terms.sum(1)
        variance = logit @ logit
        if not variance > 0:
            raise ValueError(
                f"explained needs inputs on which the logit varies, got {len(terms)} of one logit"
            )
        return logit @ terms / variance


@overload
def eigenfeatures(
    model: nn.Module, output: None = None, *, k: int | None = None, shape: Shape | None = None
) -> list[Eigenfeatures]: ...
@overload
def eigenfeatures(
    model: nn.Module, output: int | Tensor, *, k: int | None = None, shape: Shape | None = None
) -> Eigenfeatures: ...
def eigenfeatures(
    model: nn.Module,
    output: int | Tensor | None = None,
    *,
    k: int | None = None,
    shape: Shape | None = None,
) -> Eigenfeatures | list[Eigenfeatures]:
    """Compute the eigenvectors of the outputs of an activation-free star.

    With `x~ = (x, 1)`, output `o` is `x~' Q x~`, `Q = sum_k g_ok (w1_k w2_k' + w2_k w1_k') / 2`,
    and with the eigenvectors `v_i` of `Q` it is `sum_i lambda_i (v_i . x~)^2`: patterns that
    increase the output (`lambda > 0`) or decrease it. If there are few products, `Q` is not formed,
    and the eigenvectors are computed in the span of the `w`.

    Args:
        model: a `StarOp`, `StarMLP` or variant with `act=None`, or an `nn.Sequential` of one and
            affine layers (`Flatten`, `Linear`, batch norm in eval mode, a fixed normalisation,
            ...), which are folded in exactly.
        output: one output, or a direction (out,) such as the difference of two; `None` for a
            list of all outputs.
        k: number of eigenvectors to keep, those of the largest `|lambda|`; `None` for all.
        shape: shape of one input; by default that of the first layer, (in_features,).

    Raises:
        ValueError: the model is not a quadratic form, there is no such output, the matrices have
            more than `MAX_ORDER` (4,097) rows, or the result takes more than `MAX_BYTES` (1 GiB).

    Source: Pearce et al., "Bilinear MLPs enable weight-based mechanistic interpretability", ICLR
        2025, arXiv 2410.08417.

    Example:
        >>> from starlayers import StarMLP
        >>> model = StarMLP(4, 8, out_features=3, act=None).double()
        >>> x = torch.randn(5, 4, dtype=torch.float64)
        >>> terms = eigenfeatures(model, 2).terms(x)
        >>> terms.shape, torch.allclose(terms.sum(1), model(x)[:, 2])
        (torch.Size([5, 5]), True)
    """
    parts = outline("eigenfeatures", model, None if shape is None else tuple(shape))
    features = torch.Size(parts.shape).numel() + 1
    # an output of a StarOp has products of its own
    separate = not (parts.after or hasattr(parts.star, "g") or isinstance(output, Tensor))
    used = rank_of(parts.star) if separate else products_of(parts.star)
    order = min(features, 2 * used + 1)
    if order > MAX_ORDER:
        raise ValueError(
            f"eigenfeatures would need the eigenvectors of {order:,} x {order:,} matrices, the "
            f"most is {MAX_ORDER:,}: {features - 1:,} input features and {used:,} "
            "products; fewer of either make them smaller"
        )
    products = compose("eigenfeatures", parts)
    outputs = products.outputs if output is None else 1
    kept = order if k is None else min(order, positive_int("eigenfeatures", "k", k))
    content = f"{outputs:,} outputs with {kept:,} eigenvectors of {features:,} coordinates each"
    remedy = "ask for single outputs (output=) or for fewer eigenvectors (k=)"
    check_bytes(8 * outputs * kept * features, f"eigenfeatures of {content} would take", remedy)
    shared = None if separate or order == features else _basis(products.first, products.second)
    results = []
    for number, direction in _directions("eigenfeatures", products.outputs, output):
        values, vectors = _eigen(products, direction, separate, shared)
        largest = values.abs().argsort(descending=True, stable=True)[:kept]
        rows = vectors.T[largest]
        rows = torch.where(rows[:, :-1].sum(1, keepdim=True) < 0, -rows, rows)
        results.append(Eigenfeatures(number, values[largest], rows, parts.shape, kept == order))
    return results if output is None else results[0]


def _directions(
    owner: str, outputs: int, output: int | Tensor | None
) -> Iterator[tuple[int | None, Tensor]]:
    """Yield number and direction of the chosen outputs."""
    if isinstance(output, Tensor) and output.ndim == 1:
        if len(output) != outputs:
            raise ValueError(
                f"{owner}: a direction needs one number for each of {outputs} outputs, "
                f"got {len(output)}"
            )
        yield None, output.detach().cpu().double()
        return
    chosen = range(outputs) if output is None else [operator.index(output)]
    if not 0 <= chosen[0] < outputs:
        raise ValueError(f"{owner}: there is no output {chosen[0]}, they are 0 to {outputs - 1}")
    for o in chosen:
        yield o, _unit(o, outputs)


def _unit(i: int, n: int) -> Tensor:
    vector = torch.zeros(n, dtype=torch.float64, device="cpu")
    vector[i] = 1
    return vector


def _basis(first: Tensor, second: Tensor) -> Basis:
    """Return an orthonormal basis of all `w` and the constant, and these in it.

    The basis is (d + 1, n), the vectors in it (2 products + 1, n).
    """
    d = first.shape[1]
    basis, inside = torch.linalg.qr(torch.cat([first, second, _unit(d - 1, d)[None]]).T)
    return basis, inside.T


def _eigen(
    products: Products, direction: Tensor, separate: bool, shared: Basis | None
) -> tuple[Tensor, Tensor]:
    """Return eigenvalues (n,) and eigenvectors (d + 1, n) of one direction."""
    weights, constant = products.weights(direction)
    first, second = products.first, products.second
    if separate:
        own = weights.nonzero()[:, 0]
        weights, first, second = weights[own], first[own], second[own]
    d = first.shape[1]
    basis = _basis(first, second) if separate and 2 * len(first) + 1 < d else shared
    one = _unit(d - 1, d)[None]
    if basis is not None:
        first, second, one = basis[1].split([len(weights), len(weights), 1])
    form = first.T @ (weights[:, None] * second) + constant * one.T @ one
    values, vectors = torch.linalg.eigh((form + form.T) / 2)
    return values, vectors if basis is None else basis[0] @ vectors


@dataclass(frozen=True)
class Attribution:
    """Logit as a sum over eigenfeatures, and as a sum over coordinates of the input.

    `terms` (..., k) are `lambda_i (v_i . x~)^2`, `inputs` (..., *shape) with `constant` (...) are
    `x~_j (Q x~)_j`; both sum to `logit` (...). `features` are the eigenfeatures of the terms.

    Example:
        >>> from starlayers import StarOp
        >>> parts = attribute(StarOp(3, 2, act=None), torch.ones(3), 1)
        >>> torch.allclose(parts.terms.sum(), parts.inputs.sum() + parts.constant)
        True
    """

    features: Eigenfeatures
    terms: Tensor
    inputs: Tensor
    constant: Tensor

    @property
    def logit(self) -> Tensor:
        """Logits of the inputs, (...)."""
        return self.terms.sum(-1)

    def top(self, n: int = 5) -> list[tuple[int, float]]:
        """Return the `n` largest terms of one input: (number of the eigenfeature, term)."""
        if self.terms.ndim != 1:
            raise ValueError(
                f"Attribution.top is of one input, these are {tuple(self.terms.shape[:-1])}"
            )
        order = self.terms.abs().argsort(descending=True, stable=True)[:n]
        return [(int(i), float(self.terms[i])) for i in order]


def attribute(
    model: nn.Module | Eigenfeatures,
    x: Tensor,
    output: int | Tensor | None = None,
    *,
    shape: Shape | None = None,
) -> Attribution:
    """Decompose a logit into terms of eigenfeatures and of inputs that sum to it.

    `logit = sum_i lambda_i (v_i . x~)^2 = sum_j x~_j (Q x~)_j`, computed in float64.

    Args:
        model: as for `eigenfeatures`, or the eigenfeatures themselves, which saves computing them.
        x: (..., *shape) inputs.
        output: one output, or a direction (out,), such as `[1, -1, 0]` for the difference of the
            first and the second logit. Ignored for eigenfeatures, which have an output.
        shape: as for `eigenfeatures`.

    Raises:
        ValueError: as `eigenfeatures`; eigenvectors were left out, or `output` is missing.

    Example:
        >>> from starlayers import StarMLP
        >>> model, x = StarMLP(4, 8, out_features=3, act=None).double(), torch.randn(4).double()
        >>> parts = attribute(model, x, 2)
        >>> torch.allclose(parts.terms.sum(), model(x)[2])
        True
    """
    if isinstance(model, Eigenfeatures):
        features = model
    elif output is None:
        raise ValueError("attribute: output= is needed, the number of a logit or a direction")
    else:
        features = eigenfeatures(model, output, shape=shape)
    need_all("attribute", [features])
    rows = flat("attribute", x, features.shape)
    projections = rows @ features.vectors[:, :-1].T + features.constants
    pulled = (features.values * projections) @ features.vectors
    return Attribution(
        features,
        terms=features.values * projections**2,
        inputs=(rows * pulled[..., :-1]).unflatten(-1, features.shape),
        constant=pulled[..., -1],
    )


def flat(owner: str, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Flatten `x` (..., *shape) to float64 (..., d) on the CPU."""
    if tuple(x.shape[x.ndim - len(shape) :]) != shape or x.ndim < len(shape):
        raise ValueError(
            f"{owner}: the eigenfeatures are of inputs of shape {shape}, got {tuple(x.shape)}; "
            "reshape them, or make the eigenfeatures with shape= that of one input"
        )
    return x.detach().cpu().double().flatten(x.ndim - len(shape))


def need_all(owner: str, features: Sequence[Eigenfeatures]) -> None:
    """Raise an error if eigenvectors were left out."""
    for f in features:
        if not f.complete:
            raise ValueError(
                f"{owner} needs all eigenvectors, and {len(f.values)} were kept; call "
                "eigenfeatures without k="
            )
