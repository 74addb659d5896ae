"""Quadratic forms of star layers: their factors and their dense matrices."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from starlayers.checks import positive_int
from starlayers.coefficients.modules import (
    DynamicStarOp,
    RankStarMLP,
    RankStarOp,
    ScaledStarOp,
    SumOp,
)
from starlayers.modules import StarMLP, StarOp

__all__ = ["branch_vectors", "iter_quadratic_forms", "quadratic_form"]

#: larger results are refused: pass `outputs=` or use `iter_quadratic_forms` for these
MAX_BYTES = 2**30
CHUNK_BYTES = 2**26


#: layers with products: one or several for each channel
Star = StarOp | RankStarOp


def branch_vectors(op: Star) -> tuple[Tensor, Tensor]:
    """Return the two factors of every product of a star layer, as vectors over (x, 1).

    Channel k is `sum_r act(w1[k, r] . (x, 1)) (w2[k, r] . (x, 1))`: biases, the offset and a
    learned scale are included. The activation is not: for layers with one these are the vectors of
    the bilinear part alone. The factor of a `DynamicStarOp`, which depends on the input, is left
    out.

    Args:
        op: a star layer. Of an MLP these are the hidden channels.

    Returns:
        w1 and w2, each (channels, rank, in_features + 1), in float32 at least, with gradients.

    Raises:
        TypeError: `op` is not a star layer.
        ValueError: `op` adds its branches, or one is not a linear layer of floating numbers.

    Example:
        >>> from starlayers.coefficients.modules import RankStarOp
        >>> w1, w2 = branch_vectors(RankStarOp(4, 3, rank=2))
        >>> w1.shape
        torch.Size([3, 2, 5])
    """
    check_products("branch_vectors", op)
    if isinstance(op, RankStarOp):
        first, second = (w.view(-1, op.rank, w.shape[-1]) for w in branch_vectors(op.star))
        return first, second
    w1, w2 = _branches(op)
    if isinstance(op, ScaledStarOp):
        shift, scale = op.shift.to(w2.dtype), op.scale.to(w2.dtype)
        w2 = scale[:, None] * torch.cat([w2[:, :-1], (w2[:, -1] + shift)[:, None]], 1)
    elif op.offset:
        w2 = torch.cat([w2[:, :-1], (w2[:, -1] + op.offset)[:, None]], 1)
    return w1[:, None], w2[:, None]


def _branches(op: StarOp) -> tuple[Tensor, Tensor]:
    if op.packed:
        w1, w2 = _augmented("f12", op.f12).chunk(2)
        return w1, w2
    return _augmented("f1", op.f1), _augmented("f2", op.f2)


def check_products(owner: str, op: object) -> None:
    """Raise an error if `op` is not a star layer with products."""
    if not isinstance(op, Star):
        raise TypeError(f"{owner} needs a StarOp or StarMLP, got a {type(op).__name__}")
    if isinstance(op, SumOp):
        raise ValueError(f"{owner} needs products, which a {type(op).__name__} has none of")


def find_stars(owner: str, model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of a model that have products, by name.

    These are `StarOp`, `StarMLP` and their variants with products, and layers of other classes that
    have a method `star_vectors()`, which returns a list of pairs as `branch_vectors` does. The name
    of the model itself is "".
    """
    parts = {id(layer.star) for layer in model.modules() if isinstance(layer, RankStarOp)}
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if hasattr(layer, "star_vectors")
        or (isinstance(layer, Star) and not isinstance(layer, SumOp) and id(layer) not in parts)
    }
    if not layers:
        raise ValueError(
            f"{owner}: {type(model).__name__} has no star layers (StarOp or StarMLP with products)"
        )
    return layers


def named_vectors(layers: dict[str, nn.Module]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the branch vectors of layers by name; several of one layer are numbered."""
    vectors = {}
    for name, layer in layers.items():
        if isinstance(layer, Star):
            vectors[name] = branch_vectors(layer)
            continue
        pairs = layer.star_vectors()  # type: ignore[operator]
        for i, pair in enumerate(pairs):
            vectors[name if len(pairs) == 1 else f"{name}.{i}".lstrip(".")] = pair
    return vectors


def _augmented(name: str, branch: nn.Module) -> Tensor:
    # adapters such as LoRA's have the weight of their base layer, not the one they apply
    if not isinstance(branch, nn.Linear) or not branch.weight.is_floating_point():
        raise ValueError(
            f"branch {name!r} is a {type(branch).__name__}, whose weights are not those of a "
            "floating linear layer; merge adapters and dequantise first"
        )
    w = branch.weight
    b = w.new_zeros(len(w)) if branch.bias is None else branch.bias
    dtype = torch.promote_types(w.dtype, torch.float32)
    return torch.cat([w.to(dtype), b.to(dtype)[:, None]], 1)


def quadratic_form(
    op: Star, outputs: int | Sequence[int] | None = None, *, chunk: int | None = None
) -> Tensor:
    """Return the symmetric matrices Q of a star layer: `y[k] = (x, 1)' Q[k] (x, 1)`.

    `Q[k] = sum_r (w1 w2' + w2 w1') / 2` over the vectors of `branch_vectors`; for a `StarMLP` the
    sum of these over hidden channels with the weights of `g`, whose bias is in the last corner.
    `Q[k, i, i]` is the coefficient of x_i squared, `2 Q[k, i, j]` that of x_i x_j, `2 Q[k, i, d]`
    that of x_i, and `Q[k, d, d]` the constant.

    Args:
        op: a `StarOp`, a `StarMLP` or a variant of them with `act=None`, whose products do not have
            factors that depend on the input.
        outputs: number of an output, or several; `None` for all.
        chunk: number of outputs computed at a time; by default as many as fit in 64 MiB.

    Returns:
        (outputs, in_features + 1, in_features + 1), the constant coordinate last, in float32 at
        least, with gradients.

    Raises:
        TypeError: `op` is not a star layer.
        ValueError: `op` is not a quadratic form, an output does not exist, or the result would take
            more than `MAX_BYTES` (1 GiB).

    Example:
        >>> op, x = StarOp(4, 3, act=None), torch.randn(4)
        >>> x1 = torch.cat([x, torch.ones(1)])
        >>> torch.allclose(quadratic_form(op) @ x1 @ x1, op(x), atol=1e-6)
        True
    """
    check_form("quadratic_form", op)
    outputs = range(op.out_features) if outputs is None else outputs
    chosen = [int(i) for i in ([outputs] if isinstance(outputs, int) else outputs)]
    for i in chosen:
        if not -op.out_features <= i < op.out_features:
            raise ValueError(f"quadratic_form: there is no output {i} among {op.out_features}")
    side = op.in_features + 1
    check_bytes(
        len(chosen) * side * side * _itemsize(op),
        f"quadratic_form: {len(chosen)} matrices of {side} x {side} take",
        f"choose some of the {op.out_features} outputs by outputs=, go through them in chunks by "
        "iter_quadratic_forms, or work with the factors from branch_vectors",
    )
    size = _chunk(op, CHUNK_BYTES)
    size = size if chunk is None else positive_int("quadratic_form", "chunk", chunk)
    parts = [q for _, q in _matrices(op, chosen, size)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def iter_quadratic_forms(
    op: Star, *, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[tuple[slice, Tensor]]:
    """Iterate over the matrices of `quadratic_form`, a few outputs at a time.

    Args:
        op: as for `quadratic_form`.
        chunk_bytes: size of the matrices made at a time, at least one of them.

    Returns:
        Pairs: a slice of the outputs, and their matrices (n, in_features + 1, in_features + 1).

    Raises:
        TypeError, ValueError: as `quadratic_form`, or a single matrix is too large.

    Example:
        >>> op = StarOp(63, 8, act=None)
        >>> for outputs, q in iter_quadratic_forms(op, chunk_bytes=3 * 64 * 64 * 4):
        ...     print(outputs, tuple(q.shape))
        slice(0, 3, None) (3, 64, 64)
        slice(3, 6, None) (3, 64, 64)
        slice(6, 8, None) (2, 64, 64)
    """
    check_form("iter_quadratic_forms", op)
    side = op.in_features + 1
    what = f"iter_quadratic_forms: a single matrix of {side} x {side} takes"
    check_bytes(side * side * _itemsize(op), what, "work with the factors from branch_vectors")
    size = _chunk(op, positive_int("iter_quadratic_forms", "chunk_bytes", chunk_bytes))
    forms = _matrices(op, range(op.out_features), size)
    return ((slice(outputs[0], outputs[-1] + 1), q) for outputs, q in forms)


def _matrices(
    op: Star, outputs: Sequence[int], size: int
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """Yield outputs and their matrices, `size` at a time."""
    w1, w2 = branch_vectors(op)
    if isinstance(op, StarMLP | RankStarMLP):
        w1, w2 = w1.flatten(0, 1), w2.flatten(0, 1)
        g = _augmented("g", op.g)
        weights, bias = g[:, :-1].repeat_interleave(rank_of(op), 1), g[:, -1]
    for start in range(0, max(1, len(outputs)), size):
        part = list(outputs[start : start + size])
        if isinstance(op, StarMLP | RankStarMLP):
            constant = nn.functional.pad(bias[part][:, None, None], (op.in_features, 0) * 2)
            yield part, dense(weights[part][:, :, None] * w1, w2) + constant
        else:
            yield part, dense(w1[part], w2[part])


def check_bytes(needed: int, what: str, remedy: str) -> None:
    """Raise an error if a tensor takes more than `MAX_BYTES`."""
    if needed > MAX_BYTES:
        limit = f"{needed / 2**30:.1f} GiB, more than {MAX_BYTES / 2**30:g} GiB"
        raise ValueError(f"{what} {limit}; {remedy}")


def check_form(owner: str, op: object) -> None:
    """Raise an error if `op` is not a star layer whose outputs are quadratic forms."""
    check_products(owner, op)
    assert isinstance(op, Star)
    if op.act != "identity":
        raise ValueError(
            f"{owner} needs act=None, got {op.act!r}, which makes the layer no quadratic form"
        )
    if isinstance(op, DynamicStarOp):
        raise ValueError(
            f"{owner} needs factors that do not depend on the input, got a {type(op).__name__}"
        )


def rank_of(op: Star) -> int:
    """Return the number of products of each channel."""
    return op.rank if isinstance(op, RankStarOp) else 1


def products_of(op: Star) -> int:
    """Return the number of products in all channels."""
    if isinstance(op, RankStarOp):
        return products_of(op.star)
    return op.f12.out_features // 2 if op.packed else op.f1.out_features


def _itemsize(op: Star) -> int:
    return torch.promote_types(next(op.parameters()).dtype, torch.float32).itemsize


def _chunk(op: Star, size: int) -> int:
    """Return the number of outputs whose matrices fit in `size` bytes."""
    side = op.in_features + 1
    # an MLP also needs the factors of all its products, weighted for each output
    products = products_of(op) if isinstance(op, StarMLP | RankStarMLP) else rank_of(op)
    return max(1, size // (_itemsize(op) * side * max(side, products)))


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Disable autocast for matrix products on the device of `x`."""
    if x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def dense(w1: Tensor, w2: Tensor) -> Tensor:
    """Return the matrices (n, D, D) of products of vectors (n, products, D)."""
    with no_autocast(w1):
        half = w1.mT @ w2
    return (half + half.mT) / 2
