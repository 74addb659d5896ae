"""Star MLP of any shape by the fused ops: its dtypes, and the op for its width."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from starlayers.activations import ACTIVATIONS
from starlayers.backend import backend_name
from starlayers.kernels.registration import (
    INTERPRET,
    MLPWeights,
    cast,
    compute_dtype,
    needs_gradients,
    no_autocast,
)
from starlayers.kernels.star_mlp import star_mlp
from starlayers.kernels.star_mlp_wide import PROGRAMS, star_mlp_wide
from starlayers.kernels.tuning import choose, tuning, winner

__all__ = ["run_mlp"]


def run_mlp(
    path: str,
    x: Tensor,
    weights: MLPWeights,
    act: str | None,
    offset: float,
    residual: Tensor | None = None,
    *,
    recompute: bool = False,
) -> Tensor:
    """Compute a star MLP on `x` by a fused path: "cpu", "star_mlp" or "star_mlp_wide".

    Shapes: x (..., in) -> (..., out), the shape of `residual` too.
    """
    name = ACTIVATIONS[act].name
    if path == "cpu":  # of one dtype and without autocast: its plan allows no other call
        return _narrow(x, weights, name, offset, residual)
    dtype = compute_dtype(x)
    x, weights = cast(x, dtype), weights.cast(dtype)
    with no_autocast(x):
        if path == "star_mlp":
            return _narrow(x, weights, name, offset, residual)
        rows = x[None].flatten(0, -2)  # reshape(-1, 0) would be ambiguous
        gemm = _gemm(rows, weights, name, offset)
        drop = recompute or not needs_gradients(x, *weights)
        y, _, _ = star_mlp_wide(rows, *weights, name, offset, drop, gemm)
    result: Tensor = y.view(*x.shape[:-1], y.shape[1])
    return result if residual is None else residual + result


def _narrow(
    x: Tensor, weights: MLPWeights, act: str, offset: float, residual: Tensor | None
) -> Tensor:
    """Compute a star MLP and its residual by the op `star_mlp`."""
    shape = (*x.shape[:-1], weights.w3.shape[0])
    fused = None  # the residual, if the kernel can add it
    if residual is not None and residual.dtype == x.dtype and residual.shape == shape:
        fused, residual = residual[None].flatten(0, -2), None
    y, _, _ = star_mlp(x[None].flatten(0, -2), *weights, fused, act, offset, False)
    result: Tensor = y.view(shape)
    return result if residual is None else residual + result


def _gemm(x: Tensor, weights: MLPWeights, act: str, offset: float) -> str:
    """Choose cuBLAS or Triton for the matrix products of a wide MLP.

    Returns "triton" for the backend "triton" or where it was measured to be faster (`choose`), else
    "library".
    """
    if not _descriptors_serve(x, weights):
        return "library"
    if backend_name() == "triton":
        return "triton"
    if not tuning() or torch.compiler.is_compiling():
        return "library"
    key = (x.device, x.dtype, len(x), *weights.sizes)
    measured = winner(key)
    if measured is not None or torch.cuda.is_current_stream_capturing():
        return measured or "library"
    x = x.detach()
    w1, b1, w2, b2, w3, _ = (None if w is None else w.detach() for w in weights)
    dy = x.new_zeros(len(x), weights.sizes[2])

    def forward_and_backward(product: Any, gate: Any) -> object:
        _, h1, h2 = product(x, w1, b1, w2, b2, act, offset, True)
        return gate(dy, w3, h1, h2, act, offset)

    candidates = {
        name: partial(forward_and_backward, *program) for name, program in PROGRAMS.items()
    }
    with torch.cuda.device(x.device):
        return choose(key, candidates)


def _descriptors_serve(x: Tensor, weights: MLPWeights) -> bool:
    """Return True if `star_linear` and `dgated` run: 16-bit types, aligned rows, a Hopper GPU.

    Tensor descriptors want rows of a multiple of 16 bytes, and their tiles were made for Hopper.
    """
    if INTERPRET:  # which computes in float32
        return not any(size % 4 for size in weights.sizes)
    if x.element_size() != 2 or any(size % 8 for size in weights.sizes):
        return False
    hopper = torch.version.hip is None and torch.cuda.get_device_capability(x.device)[0] == 9
    return hopper
