"""What an activation-free star looks for: eigenvectors of its outputs, and logits term by term."""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor, nn

from starlayers.coefficients.compose import Products, compose, outline
from starlayers.modules import positive_int

__all__ = [
    "Attribution",
    "Eigenfeatures",
    "attribute",
    "eigenfeatures",
]

#: rows of the largest matrix whose eigenvectors are computed; twice as many take 8 times as long
MAX_ORDER = 4097
MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class Eigenfeatures:
    """The eigenvectors of one output's quadratic form: `sum_i values[i] (vectors[i] . x~)^2`.

    `values` (k,) are in order of falling size `|value|`, `vectors` (k, d + 1) of length one with
    the weight of the constant coordinate last, all float64 on the CPU. A vector and its negative
    are the same feature; they are turned so that their weights of the input sum to at least 0.
    `output` is the number of the output, `None` for a direction; `shape` that of one input;
    `complete` says whether all eigenvectors are there, as the formula asks.

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
        """The vectors without their constant coordinate, (k, *shape)."""
        return self.vectors[:, :-1].reshape(-1, *self.shape)

    @property
    def constants(self) -> Tensor:
        """The constant coordinate of each vector, (k,)."""
        return self.vectors[:, -1]

    def terms(self, x: Tensor) -> Tensor:
        """Return `values[i] (vectors[i] . x~)^2`: (..., *shape) -> (..., k), float64."""
        rows = flat("Eigenfeatures.terms", x, self.shape)
        return self.values * (rows @ self.vectors[:, :-1].T + self.constants) ** 2

    def explained(self, x: Tensor) -> Tensor:
        """Return each term's share of the logit's variance over the inputs `x`: (k,), sums to 1.

        The share is `Cov(term, logit) / Var(logit)`. It is negative where a term works against
        the others, and single shares may exceed 1 then.

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
    model: nn.Module,
    output: None = None,
    *,
    k: int | None = None,
    shape: Sequence[int] | None = None,
) -> list[Eigenfeatures]: ...
@overload
def eigenfeatures(
    model: nn.Module,
    output: int | Tensor,
    *,
    k: int | None = None,
    shape: Sequence[int] | None = None,
) -> Eigenfeatures: ...
def eigenfeatures(
    model: nn.Module,
    output: int | Tensor | None = None,
    *,
    k: int | None = None,
    shape: Sequence[int] | None = None,
) -> Eigenfeatures | list[Eigenfeatures]:
    """The eigenvectors of the quadratic forms behind an activation-free star's outputs.

    With `x~ = (x, 1)`, output `o` is `x~' Q x~`, `Q = sum_k g_ok (w1_k w2_k' + w2_k w1_k') / 2`,
    and with the eigenvectors `v_i` of `Q` it is `sum_i lambda_i (v_i . x~)^2`: patterns that
    speak for the output (`lambda > 0`) or against it. Where the products are few, `Q` is never
    formed: the eigenvectors are found in the span of the `w`.

    Args:
        model: a `StarOp` or `StarMLP` with `act=None`, or an `nn.Sequential` of one of them and
            layers that are affine as they stand (`Flatten`, `Linear`, batch norm in eval mode, a
            fixed normalisation, ...), which are folded in exactly.
        output: one output, or a direction (out,) such as the difference of two; `None` for a
            list of all outputs.
        k: how many eigenvectors to keep, the largest `|lambda|` first; `None` for all.
        shape: of one input, where the first layer does not tell; by default (in_features,).

    Raises:
        ValueError: the model is no quadratic form, there is no such output, or the matrices are
            larger than `MAX_ORDER` rows or the result than `MAX_BYTES`.

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
    found = outline("eigenfeatures", model, None if shape is None else tuple(shape))
    features = found.features + 1
    alone = found.is_star_op and not isinstance(output, Tensor)
    used = found.star.rank if alone else found.products
    order = min(features, 2 * used + 1)
    if order > MAX_ORDER:
        raise ValueError(
            f"eigenfeatures would need the eigenvectors of {order:,} x {order:,} matrices, the "
            f"most is {MAX_ORDER:,}: {features - 1:,} input features and {used:,} "
            "products; fewer of either make them smaller"
        )
    products = compose("eigenfeatures", found)
    outputs = products.outputs if output is None else 1
    kept = order if k is None else min(order, positive_int("eigenfeatures", "k", k))
    size = 8 * outputs * kept * features
    if size > MAX_BYTES:
        raise ValueError(
            f"eigenfeatures of {outputs:,} outputs with {kept:,} eigenvectors of "
            f"{features:,} coordinates each would take {size / 2**30:.1f} GiB; ask for single "
            "outputs (output=) or for fewer eigenvectors (k=)"
        )
    shared = None if alone or order == features else _basis(products.first, products.second)
    made = []
    for name, direction in _directions("eigenfeatures", products.outputs, output):
        values, vectors = _eigen(products, direction, alone, shared)
        largest = values.abs().argsort(descending=True, stable=True)[:kept]
        rows = vectors.T[largest]
        rows = torch.where(rows[:, :-1].sum(1, keepdim=True) < 0, -rows, rows)
        made.append(Eigenfeatures(name, values[largest], rows, found.shape, kept == order))
    return made if output is None else made[0]


def _directions(
    owner: str, outputs: int, output: int | Tensor | None
) -> Iterator[tuple[int | None, Tensor]]:
    """Number and direction of each output asked for."""
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


Basis = tuple[Tensor, Tensor]


def _basis(first: Tensor, second: Tensor) -> Basis:
    """An orthonormal basis (d + 1, n) of the span of all `w` and the constant, and these in it."""
    d = first.shape[1]
    basis, inside = torch.linalg.qr(torch.cat([first, second, _unit(d - 1, d)[None]]).T)
    return basis, inside.T


def _eigen(
    products: Products, direction: Tensor, alone: bool, shared: Basis | None
) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n,) and eigenvectors (d + 1, n) of one direction's quadratic form."""
    weights, constant = products.weights(direction)
    first, second = products.first, products.second
    if alone:  # an output of a StarOp has products of its own
        own = weights.nonzero()[:, 0]
        weights, first, second = weights[own], first[own], second[own]
    d = first.shape[1]
    basis = _basis(first, second) if alone and 2 * len(first) + 1 < d else shared
    one = _unit(d - 1, d)[None]
    if basis is not None:
        first, second, one = basis[1].split([len(weights), len(weights), 1])
    form = first.T @ (weights[:, None] * second) + constant * one.T @ one
    values, vectors = torch.linalg.eigh((form + form.T) / 2)
    return values, vectors if basis is None else basis[0] @ vectors


@dataclass(frozen=True)
class Attribution:
    """A logit as sums: over eigenfeatures (`terms`) and over coordinates of the input (`inputs`).

    `terms` (..., k) are `lambda_i (v_i . x~)^2`, `inputs` (..., *shape) with `constant` (...) are
    `x~_j (Q x~)_j`; both sum to `logit` (...). `features` are the eigenfeatures of the terms.

    Example:
        >>> from starlayers import StarOp
        >>> found = attribute(StarOp(3, 2, act=None), torch.ones(3), 1)
        >>> torch.allclose(found.terms.sum(), found.inputs.sum() + found.constant)
        True
    """

    features: Eigenfeatures
    terms: Tensor
    inputs: Tensor
    constant: Tensor

    @property
    def logit(self) -> Tensor:
        return self.terms.sum(-1)

    def top(self, n: int = 5) -> list[tuple[int, float]]:
        """Return the `n` largest terms of a single input: (number of the eigenfeature, term)."""
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
    shape: Sequence[int] | None = None,
) -> Attribution:
    """Take a logit apart: terms that sum to it exactly, over eigenfeatures and over inputs.

    `logit = sum_i lambda_i (v_i . x~)^2 = sum_j x~_j (Q x~)_j`, computed in float64.

    Args:
        model: as for `eigenfeatures`, or the eigenfeatures themselves, which saves computing them.
        x: (..., *shape) inputs.
        output: one output, or a direction (out,): `[1, -1, 0]` asks why the first and not the
            second. For eigenfeatures it is theirs.
        shape: as for `eigenfeatures`.

    Raises:
        ValueError: as `eigenfeatures`, eigenvectors were left out, or no output was named.

    Example:
        >>> from starlayers import StarMLP
        >>> model, x = StarMLP(4, 8, out_features=3, act=None).double(), torch.randn(4).double()
        >>> found = attribute(model, x, 2)
        >>> torch.allclose(found.terms.sum(), model(x)[2])
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
    """`x` (..., *shape) as float64 (..., d) on the CPU."""
    if tuple(x.shape[x.ndim - len(shape) :]) != shape or x.ndim < len(shape):
        raise ValueError(
            f"{owner}: the eigenfeatures are of inputs of shape {shape}, got {tuple(x.shape)}; "
            "reshape them, or make the eigenfeatures with shape= that of one input"
        )
    return x.detach().cpu().double().flatten(x.ndim - len(shape))


def need_all(owner: str, features: Sequence[Eigenfeatures]) -> None:
    for f in features:
        if not f.complete:
            raise ValueError(
                f"{owner} needs all eigenvectors, and {len(f.values)} were kept; call "
                "eigenfeatures without k="
            )
