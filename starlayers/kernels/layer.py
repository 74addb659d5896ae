"""Fused forward of a `StarMLP` module: its dtypes, and the op for its width."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from starlayers import backend
from starlayers.backend import backend_name, compute_dtype, needs_gradients
from starlayers.kernels.registration import INTERPRET, cast, no_autocast
from starlayers.kernels.star_mlp import star_mlp
from starlayers.kernels.star_mlp_wide import PROGRAMS, star_mlp_wide
from starlayers.kernels.tiles import MLP_BACKWARD, MLP_FORWARD, mlp_tile, split_columns
from starlayers.kernels.tuning import choose, tuning, winner

if TYPE_CHECKING:
    from starlayers.modules import StarMLP

__all__ = ["fused_star_mlp", "too_few", "too_wide"]


def fused_star_mlp(mlp: "StarMLP", x: Tensor, residual: Tensor | None) -> Tensor:
    """Compute `mlp(x)`, plus `residual` if there is one, by the fused ops.

    Call it only if `fused_mlp_blocker(mlp, x, residual)` is None.
    """
    dtype = compute_dtype(x)
    f1, f2, g = mlp.f1, mlp.f2, mlp.g
    own = (f1.weight, f1.bias, f2.weight, f2.bias, g.weight, g.bias)
    parameters = [cast(p, dtype) for p in own]
    with no_autocast(x):
        rows = cast(x.reshape(-1, mlp.in_features), dtype)
        shape = (*x.shape[:-1], mlp.out_features)
        training = needs_gradients(x, *parameters)
        on_cpu = x.device.type == "cpu" and not INTERPRET
        narrow = on_cpu or too_wide(x.device, dtype, mlp, training=training) is None
        if narrow:
            fused = None  # the residual, if the kernel can add it
            if residual is not None and residual.dtype == dtype and residual.shape == shape:
                fused, residual = residual.reshape(-1, mlp.out_features), None
            y, _, _ = star_mlp(rows, *parameters, fused, mlp.act, mlp.offset, False)
        else:
            gemm = _gemm(rows, parameters, mlp)
            drop = mlp.recompute or not training  # without a backward no branch need be kept
            y, _, _ = star_mlp_wide(rows, *parameters, mlp.act, mlp.offset, drop, gemm)
    out: Tensor = y.view(shape)
    return out if residual is None else residual + out


def too_wide(
    device: torch.device, dtype: torch.dtype, mlp: "StarMLP", *, training: bool
) -> str | None:
    """Return why no tile keeps the hidden activation of `mlp` on chip, or None.

    Input and output channels decide, since a program holds whole rows; training needs a tile of
    the backward too.
    """
    widths = (mlp.in_features, mlp.out_features)
    width = max(sum(split_columns(w)) for w in widths)
    needed = {"forward": MLP_FORWARD, **({"backward": MLP_BACKWARD["dx"]} if training else {})}
    for name, table in needed.items():
        if mlp_tile(table, device, width, dtype.itemsize) is None:
            return f"{widths[0]} -> {widths[1]} channels are too wide for a {name} tile in {dtype}"
    return None


def too_few(x: Tensor, mlp: "StarMLP") -> str | None:
    """Return why `x` has too few rows for a fused star MLP, or None.

    Any number of rows will do for the backend "triton", and for rows of at most
    MAX_BYTES_ANY_ROWS bytes.
    """
    rows, width = x.numel() // mlp.in_features, max(mlp.in_features, mlp.out_features)
    if backend_name() == "triton" or rows >= backend.MIN_ROWS:
        return None
    if width * compute_dtype(x).itemsize <= backend.MAX_BYTES_ANY_ROWS:
        return None
    return f"{rows} rows of {width} channels would leave most of a GPU idle"


def _gemm(x: Tensor, parameters: Sequence[Tensor | None], mlp: "StarMLP") -> str:
    """Choose cuBLAS or Triton for the matrix products of a wide MLP.

    Returns "triton" for the backend "triton" or where it was measured to be faster (`choose`), else
    "library".
    """
    if not _descriptors_serve(x, mlp):
        return "library"
    if backend_name() == "triton":
        return "triton"
    if not tuning() or torch.compiler.is_compiling():
        return "library"
    key = (x.device, x.dtype, len(x), *(tuple(p.shape) for p in parameters[::2] if p is not None))
    measured = winner(key)
    if measured is not None or torch.cuda.is_current_stream_capturing():
        return measured or "library"
    detached: list[Any] = [p if p is None else p.detach() for p in parameters]
    w1, b1, w2, b2, w3, _ = detached
    x = x.detach()
    dy = x.new_zeros(len(x), w3.shape[0])

    def forward_and_backward(product: Any, gate: Any) -> object:
        _, h1, h2 = product(x, w1, b1, w2, b2, mlp.act, mlp.offset, True)
        return gate(dy, w3, h1, h2, mlp.act, mlp.offset)

    candidates = {
        name: partial(forward_and_backward, *program) for name, program in PROGRAMS.items()
    }
    with torch.cuda.device(x.device):
        return choose(key, candidates)


def _descriptors_serve(x: Tensor, mlp: "StarMLP") -> bool:
    """Return True if K2 and K5 can run: 16-bit types, aligned rows, a Hopper GPU.

    Tensor descriptors want rows of a multiple of 16 bytes, and their tiles were made for Hopper.
    """
    if INTERPRET:
        return True
    sizes = (mlp.in_features, mlp.hidden_features, mlp.out_features)
    if x.element_size() != 2 or any(size % 8 for size in sizes):
        return False
    hopper = torch.version.hip is None and torch.cuda.get_device_capability(x.device)[0] == 9
    return hopper
