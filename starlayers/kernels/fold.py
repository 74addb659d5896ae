"""Launches that fold the BatchNorms of a StarBlock2d in training, and take gradients apart."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from starlayers.kernels.registration import MLPWeights, ceil_div, launch, pointer
from starlayers.kernels.tiles import next_power_of_2

__all__ = [
    "BranchGradients",
    "Folded",
    "Norm",
    "NormGradients",
    "Scaled",
    "affine_norm",
    "finish_depthwise",
    "finish_norm",
    "fold_branches",
    "prepare_weights",
    "unfold_branches",
]

#: elements of a tile that is summed over its rows
ELEMENTS = 8192
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Norm(NamedTuple):
    """BatchNorm in training: its parameters and running statistics."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    tracked: Tensor
    eps: float
    momentum: float

    @classmethod
    def of(cls, norm: nn.BatchNorm2d) -> "Norm | None":
        """Return the tensors of `norm`, `None` if it lacks some or normalises in another way."""
        tensors = (norm.weight, norm.bias, *(norm._buffers.get(name) for name in STATISTICS))
        usual = norm.training and norm.track_running_stats and norm.momentum is not None
        if not usual or any(t is None or not t.is_contiguous() for t in tensors):
            return None
        return cls(*tensors, norm.eps, norm.momentum)  # type: ignore[arg-type, call-arg]


class Folded(NamedTuple):
    """Branches that take the input of the norm in front of them, and that norm's statistics."""

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    mean: Tensor
    rstd: Tensor


class Scaled(NamedTuple):
    """Norm as `scale y + shift`, and its statistics; all (channels) in float32."""

    scale: Tensor
    shift: Tensor
    mean: Tensor
    rstd: Tensor


class NormGradients(NamedTuple):
    """Gradients of a norm's weight and bias; its statistics send back `q + p (y - mean)`."""

    weight: Tensor
    bias: Tensor
    p: Tensor
    q: Tensor

    @classmethod
    def empty(cls, norm: Norm) -> "NormGradients":
        """Return memory for the gradients of `norm`."""
        w = norm.weight
        wide = [w.new_empty(w.shape, dtype=torch.float32) for _ in range(2)]
        return cls(torch.empty_like(w), torch.empty_like(norm.bias), *wide)


class BranchGradients(NamedTuple):
    """Gradients of folded branches as kernels leave them, summed over programs or not.

    Every tensor begins at the first program's sum of the first hidden channel.
    """

    dw1: Tensor
    db1: Tensor
    dw2: Tensor
    db2: Tensor
    #: rows of hidden channels, or `None` where dw3 is finished
    dw3: Tensor | None
    programs: int
    #: elements between programs, and between hidden channels of weights and of biases
    strides: tuple[int, int, int]


def prepare_weights(
    k1: Tensor, k2: Tensor, w3: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return both depthwise kernels as (taps, C) in float32, and `w3` in `dtype`."""
    from starlayers.kernels.device.fold import prepare_weights

    channels, taps = len(k1), k1[0].numel()
    k1, k2, w3 = k1.contiguous(), k2.contiguous(), w3.contiguous()
    taps1, taps2 = (k1.new_empty(taps, channels, dtype=torch.float32) for _ in range(2))
    cast = w3.dtype != dtype
    last = w3.new_empty(w3.shape, dtype=dtype) if cast else w3
    block = 1024
    grid = ceil_div(max(taps1.numel(), w3.numel() if cast else 0), block)
    launch(
        prepare_weights, (grid,), k1, k2, w3, taps1, taps2, last, w3.numel(), C=channels,
        TAPS=taps, CAST=cast, BLOCK=block,
    )  # fmt: skip
    return taps1, taps2, last


def fold_branches(parts: Tensor, weights: MLPWeights, norm: Norm, dtype: torch.dtype) -> Folded:
    """Fold a norm in training into the branches behind it; update its running statistics.

    `parts` are the statistics of the tiles of its input; the folded weights have `dtype`.
    """
    from starlayers.kernels.device.fold import fold_branches

    w1, b1, w2, b2 = weights[:4]
    hidden, channels = w1.shape
    v1, v2 = (w.new_empty(hidden, channels, dtype=dtype) for w in (w1, w2))
    c1, c2 = (w.new_empty(hidden, dtype=torch.float32) for w in (w1, w2))
    mean, rstd = (w1.new_empty(channels, dtype=torch.float32) for _ in range(2))
    columns, rows = max(16, next_power_of_2(channels)), 16
    launch(
        fold_branches, (ceil_div(hidden, rows),), parts, w1, pointer(b1, w1), w2, pointer(b2, w1),
        norm.weight, norm.bias, *norm[2:5], v1, c1, v2, c2, mean, rstd, len(parts),
        hidden, stride_w1=w1.stride(0), stride_w2=w2.stride(0), C=channels, EPS=norm.eps,
        MOMENTUM=norm.momentum, BIAS1=b1 is not None, BIAS2=b2 is not None,
        BT=max(1, ELEMENTS // columns), BH=rows, BC=columns, num_warps=8,
    )  # fmt: skip
    return Folded(v1, c1, v2, c2, mean, rstd)


def affine_norm(parts: Tensor, norm: Norm) -> Scaled:
    """Return a norm in training as an affine map, and update its running statistics."""
    from starlayers.kernels.device.fold import affine_norm

    channels, block = parts.shape[2], 8
    scaled = Scaled(*(parts.new_empty(channels) for _ in range(4)))
    launch(
        affine_norm, (ceil_div(channels, block),), parts, norm.weight, norm.bias,
        *norm[2:5], *scaled, len(parts), C=channels, EPS=norm.eps,
        MOMENTUM=norm.momentum, BT=ELEMENTS // block, BC=block, num_warps=8,
    )  # fmt: skip
    return scaled


def finish_depthwise(
    sums: Tensor, k: Tensor, bias: Tensor | None,
    dots: Tensor | None = None, norm: Norm | None = None, scaled: Scaled | None = None,
    count: int = 1,
) -> tuple[Tensor, Tensor, NormGradients | None]:  # fmt: skip
    """Return the gradients of a depthwise kernel and its bias, and of the norm in front of it.

    Args:
        sums: (programs, taps + 1, channels), as the kernel gradient leaves them.
        k, bias: the kernel and its bias.
        dots: (tiles, 2, channels): gradients of the norm's shift and scale.
        norm, scaled: that norm and its statistics.
        count: values of a channel that the statistics are of.
    """
    from starlayers.kernels.device.fold import finish_depthwise

    programs, rows, channels = sums.shape
    dk = torch.empty_like(k, memory_format=torch.contiguous_format)
    db = k.new_empty(channels) if bias is None else torch.empty_like(bias)
    grads, block = None, 32
    memory = (sums, sums, sums, sums, sums, sums, sums)
    tiles = 0
    if dots is not None and norm is not None and scaled is not None:
        grads, tiles = NormGradients.empty(norm), len(dots)
        memory = (norm.weight, scaled.mean, scaled.rstd, *grads)  # type: ignore[assignment]
    launch(
        finish_depthwise, (ceil_div(channels, block), rows + (grads is not None)),
        sums, sums if dots is None else dots, *memory[:3], dk, db, *memory[3:], programs, tiles,
        count, C=channels, TAPS=rows - 1, NORM=grads is not None, BT=ELEMENTS // block, BC=block,
        num_warps=8,
    )  # fmt: skip
    return dk, db, grads


def unfold_branches(
    found: BranchGradients, weights: MLPWeights, folded: Folded, norm: Norm
) -> tuple[MLPWeights, Tensor]:
    """Return the gradients of the branches in front of the fold, and parts of the norm's.

    In the first, that of the last layer is `None` where it is finished already, and its bias's too.
    """
    from starlayers.kernels.device.fold import unfold_branches

    w1, b1, w2, b2, w3, _ = weights
    (hidden, channels), out = w1.shape, w3.shape[0]
    dw1, dw2 = (torch.empty_like(w, memory_format=torch.contiguous_format) for w in (w1, w2))
    db1, db2 = (None if b is None else torch.empty_like(b) for b in (b1, b2))
    last = found.dw3 is not None
    dw3 = torch.empty_like(w3, memory_format=torch.contiguous_format) if last else None
    parts = w1.new_empty(hidden, 3, channels, dtype=torch.float32)
    columns, out_columns = (max(16, next_power_of_2(n)) for n in (channels, out))
    launch(
        unfold_branches, (hidden,), found.dw1, found.db1, found.dw2, found.db2,
        found.dw1 if found.dw3 is None else found.dw3, w1, folded.w1, w2, folded.w2,
        norm.weight, norm.bias, folded.mean, folded.rstd, dw1, pointer(db1, dw1), dw2,
        pointer(db2, dw1), pointer(dw3, dw1), parts, found.programs, *found.strides,
        stride_w1=w1.stride(0), stride_w2=w2.stride(0), H=hidden, C=channels, OUT=out,
        BIAS1=b1 is not None, BIAS2=b2 is not None, LAST=last,
        BT=min(64, next_power_of_2(found.programs)), BC=columns, BO=out_columns, num_warps=4,
    )  # fmt: skip
    return MLPWeights(dw1, db1, dw2, db2, dw3, None), parts  # type: ignore[arg-type]


def finish_norm(
    parts: Tensor, norm: Norm, rstd: Tensor, count: int,
    b3: Tensor | None = None, parts3: Tensor | None = None,
) -> tuple[NormGradients, Tensor | None]:  # fmt: skip
    """Return the gradients of a norm that was folded, and the bias's of the last layer.

    Args:
        parts: (hidden, 3, channels) of `unfold_branches`.
        norm, rstd: the norm and its `1 / sqrt(var + eps)`.
        count: values of a channel that its statistics are of.
        b3, parts3: that bias, and its gradient (programs, out); `None` where it is finished.
    """
    from starlayers.kernels.device.fold import finish_norm

    hidden, _, channels = parts.shape
    grads, block = NormGradients.empty(norm), 8
    db3 = None if b3 is None or parts3 is None else torch.empty_like(b3)
    programs, out = (0, 0) if parts3 is None else parts3.shape
    launch(
        finish_norm, (ceil_div(max(channels, out), block),), parts, norm.weight, rstd, *grads,
        parts if parts3 is None else parts3, parts if db3 is None else db3, count, programs,
        H=hidden, C=channels, OUT=out, BIAS3=db3 is not None, BT=ELEMENTS // block, BC=block,
        num_warps=8,
    )  # fmt: skip
    return grads, db3
