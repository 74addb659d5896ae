"""Star MLP on CPUs, a block of rows at a time: the hidden block stays in cache."""

import torch
import torch.nn.functional as F
from torch import Tensor

from starlayers.activations import get_activation
from starlayers.kernels.registration import MLPGradients, MLPWeights
from starlayers.kernels.statistics import Outputs, Upstream, with_statistics

__all__ = ["blocked_backward", "blocked_forward", "star_mlp_plain", "star_mlp_plain_backward"]

# Bytes of one hidden branch of a block. On two cores with 512 KiB of L2 each and 32 MiB of L3 the
# time is the same from 1 to 4 MiB; smaller blocks make thin matrix products, larger ones miss the
# cache.
BLOCK_BYTES = 2 * 2**20


def star_mlp_plain(
    x: Tensor, weights: MLPWeights, residual: Tensor | None, act: str, offset: float, stats: bool
) -> Outputs:
    """Compute the op `star_mlp`: the MLP plus the residual, and statistics of the sum."""
    y = blocked_forward(x, _of_one_dtype(weights, x.dtype), act, offset)
    return with_statistics(y if residual is None else y + residual, stats)


def star_mlp_plain_backward(
    upstream: Upstream, x: Tensor, weights: MLPWeights, act: str, offset: float
) -> MLPGradients:
    """Compute the op `star_mlp_backward`: the gradients of x and of all weights."""
    weights = _of_one_dtype(weights, x.dtype)
    return blocked_backward(upstream.total(), x, weights, act, offset)


def _of_one_dtype(weights: MLPWeights, dtype: torch.dtype) -> MLPWeights:
    # biases may be float32
    same = all(w is None or w.dtype == dtype for w in weights)
    return weights if same else weights.cast(dtype)


def _block_rows(hidden: int, element_size: int) -> int:
    """Return the rows of a block, at least 64."""
    return max(64, BLOCK_BYTES // max(1, hidden * element_size))


def blocked_forward(x: Tensor, weights: MLPWeights, act: str, offset: float) -> Tensor:
    """Compute `star_mlp_reference` of `x` (rows, in); returns (rows, out)."""
    w1, b1, w2, b2, w3, b3 = weights
    y = x.new_empty(x.shape[0], w3.shape[0])
    fn = get_activation(act).fn
    rows = min(_block_rows(w3.shape[1], x.element_size()), x.shape[0])
    # every block uses the same two buffers: a new one costs its page faults again
    h1, h2 = x.new_empty(2, rows, w3.shape[1])
    for xi, yi in zip(x.split(rows), y.split(rows), strict=True):
        a, s = h1[: len(xi)], h2[: len(xi)]
        _linear(xi, w1, b1, out=a)
        _linear(xi, w2, b2, out=s)
        if offset:
            s += offset
        s *= fn(a)
        _linear(s, w3, b3, out=yi)
    return y


def blocked_backward(
    dy: Tensor, x: Tensor, weights: MLPWeights, act: str, offset: float
) -> MLPGradients:
    """Recompute the hidden blocks; return the gradients of x and of all weights."""
    w1, b1, w2, b2, w3, _ = weights
    activation = get_activation(act)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dw1, dw2, dw3 = (
        torch.zeros_like(w, memory_format=torch.contiguous_format) for w in (w1, w2, w3)
    )
    db1, db2 = x.new_zeros(w1.shape[0]), x.new_zeros(w2.shape[0])
    rows = _block_rows(w3.shape[1], x.element_size())
    for xi, dyi, dxi in zip(x.split(rows), dy.split(rows), dx.split(rows), strict=True):
        h1, h2 = F.linear(xi, w1, b1), F.linear(xi, w2, b2)
        if offset:
            h2 += offset
        a = activation.fn(h1)
        ds = dyi @ w3
        dw3.addmm_(dyi.t(), a * h2)
        d1 = activation.backward(h2.mul_(ds), h1)
        d2 = ds.mul_(a)
        torch.mm(d1, w1, out=dxi).addmm_(d2, w2)
        dw1.addmm_(d1.t(), xi)
        dw2.addmm_(d2.t(), xi)
        db1 += d1.sum(0)
        db2 += d2.sum(0)
    return dx, dw1, db1, dw2, db2, dw3, dy.sum(0)


def _linear(x: Tensor, w: Tensor, b: Tensor | None, *, out: Tensor) -> None:
    if b is None:
        torch.mm(x, w.t(), out=out)
    else:
        torch.addmm(b, x, w.t(), out=out)
