"""BatchNorms of a StarBlock2d in training, folded and unfolded by one launch each.

A norm between two kernels is an affine map per channel, `scale (y - mean) + bias` with
`scale = weight / sqrt(var + eps)`. What folds it into the weights behind it, and what takes the
gradients of these weights apart again, is small; launched as single operations of PyTorch it costs
more time than the large kernels.
"""

import triton
import triton.language as tl

from starlayers.kernels.device.tile import load_vector, merged_statistics

__all__ = [
    "affine_norm",
    "finish_depthwise",
    "finish_norm",
    "fold_branches",
    "prepare_weights",
    "unfold_branches",
]


@triton.jit
def _update_running(running_mean, running_var, cols, inside, mean, var, count, MOMENTUM):
    """Move running statistics towards those of a batch, the variance unbiased."""
    old = tl.load(running_mean + cols, mask=inside, other=0.0)
    new = old.to(tl.float32) + (mean - old) * MOMENTUM
    tl.store(running_mean + cols, new.to(old.dtype), mask=inside)
    old = tl.load(running_var + cols, mask=inside, other=0.0)
    new = old.to(tl.float32) + (var * (count / (count - 1.0)) - old) * MOMENTUM
    tl.store(running_var + cols, new.to(old.dtype), mask=inside)


@triton.jit
def _fold_branch(
    w, b, folded, constant, hidden, cols, scale, mean, bias, H, stride,
    C: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Store the weight and bias of a branch that takes the input of the norm in front of it."""
    there = hidden < H
    inside = there[:, None] & (cols < C)[None, :]
    full = tl.load(w + hidden[:, None] * stride + cols[None, :], mask=inside, other=0.0)
    full = full.to(tl.float32)
    rounded = (full * scale[None, :]).to(folded.dtype.element_ty)
    tl.store(folded + hidden[:, None] * C + cols[None, :], rounded, mask=inside)
    # the mean times the weight as it was rounded, so that the rounding errors cancel
    value = tl.sum(full * bias[None, :] - rounded.to(tl.float32) * mean[None, :], axis=1)
    if BIAS:
        value += tl.load(b + hidden, mask=there, other=0.0).to(tl.float32)
    tl.store(constant + hidden, value, mask=there)


@triton.jit
def fold_branches(
    parts, w1, b1, w2, b2, weight, bias, running_mean, running_var, tracked,
    v1, c1, v2, c2, mean, rstd, TILES, H, stride_w1: tl.constexpr, stride_w2: tl.constexpr,
    C: tl.constexpr, EPS: tl.constexpr, MOMENTUM: tl.constexpr, BIAS1: tl.constexpr,
    BIAS2: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Merge the statistics of a norm and fold it into both branches behind it, BH rows a program.

    Program 0 also stores mean and 1 / sqrt(var + eps), and updates the running statistics.
    """
    cols = tl.arange(0, BC)
    inside = cols < C
    count, center, var = merged_statistics(parts, TILES, cols, inside, C, BT, BC)
    center = tl.where(inside, center, 0.0)
    inverse = tl.where(inside, tl.rsqrt(var + EPS), 0.0)
    scale = inverse * load_vector(weight, 0, BC, C)
    shift = load_vector(bias, 0, BC, C)
    hidden = tl.program_id(0) * BH + tl.arange(0, BH)
    _fold_branch(w1, b1, v1, c1, hidden, cols, scale, center, shift, H, stride_w1, C, BIAS1)
    _fold_branch(w2, b2, v2, c2, hidden, cols, scale, center, shift, H, stride_w2, C, BIAS2)
    if tl.program_id(0) == 0:
        tl.store(mean + cols, center, mask=inside)
        tl.store(rstd + cols, inverse, mask=inside)
        _update_running(running_mean, running_var, cols, inside, center, var, count, MOMENTUM)
        tl.store(tracked, tl.load(tracked) + 1)


@triton.jit
def affine_norm(
    parts, weight, bias, running_mean, running_var, tracked, scale, shift, mean, rstd, TILES,
    C: tl.constexpr, EPS: tl.constexpr, MOMENTUM: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Merge the statistics of a norm and store it as `scale y + shift`, BC channels a program.

    It also stores mean and 1 / sqrt(var + eps), and updates the running statistics.
    """
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = cols < C
    count, center, var = merged_statistics(parts, TILES, cols, inside, C, BT, BC)
    inverse = tl.rsqrt(var + EPS)
    factor = inverse * tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    constant = tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32) - factor * center
    tl.store(scale + cols, factor, mask=inside)
    tl.store(shift + cols, constant, mask=inside)
    tl.store(mean + cols, center, mask=inside)
    tl.store(rstd + cols, inverse, mask=inside)
    _update_running(running_mean, running_var, cols, inside, center, var, count, MOMENTUM)
    if tl.program_id(0) == 0:
        tl.store(tracked, tl.load(tracked) + 1)


@triton.jit
def _column_sums(parts, ROWS, stride, cols, inside, BT: tl.constexpr, BC: tl.constexpr):
    """Return the sums over ROWS rows of the columns `cols` of a matrix."""
    sums = tl.zeros([BT, BC], tl.float32)
    for first in tl.range(0, ROWS, BT):
        rows = first + tl.arange(0, BT)
        live = (rows < ROWS)[:, None] & inside[None, :]
        at = parts + rows.to(tl.int64)[:, None] * stride + cols[None, :]
        sums += tl.load(at, mask=live, other=0.0).to(tl.float32)
    return tl.sum(sums, axis=0)


@triton.jit
def _norm_gradients(
    by_scale, by_bias, by_mean, weight, rstd, dweight, dbias, p, q, cols, inside, COUNT,
):  # fmt: skip
    """Store the gradients of a norm's parameters, and what its statistics send back.

    That is `q + p (y - mean)` for each y of the COUNT that the statistics are of.
    """
    inverse = tl.load(rstd + cols, mask=inside, other=0.0)
    factor = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(dweight + cols, by_scale * inverse, mask=inside)
    tl.store(dbias + cols, by_bias, mask=inside)
    by_variance = -0.5 * by_scale * factor * inverse * inverse * inverse
    tl.store(p + cols, 2.0 * by_variance / COUNT, mask=inside)
    tl.store(q + cols, by_mean / COUNT, mask=inside)


@triton.jit
def finish_depthwise(
    sums, dots, weight, mean, rstd, dk, db, dweight, dbias, p, q, PROGRAMS, TILES, COUNT,
    C: tl.constexpr, TAPS: tl.constexpr, NORM: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Sum the gradients of a depthwise convolution over its programs, and those of its norm.

    `sums` is (PROGRAMS, TAPS + 1, C), the bias last; `dots` is (TILES, 2, C): the gradients of the
    shift and of the scale of the norm that the convolution applied, with NORM. The second axis of
    the grid is the tap; the bias and the norm come after all taps.
    """
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = cols < C
    tap = tl.program_id(1)
    if tap <= TAPS:
        total = _column_sums(sums + tap * C, PROGRAMS, (TAPS + 1) * C, cols, inside, BT, BC)
        if tap < TAPS:
            tl.store(dk + cols * TAPS + tap, total, mask=inside)
        else:
            tl.store(db + cols, total, mask=inside)
    elif NORM:
        by_shift = _column_sums(dots, TILES, 2 * C, cols, inside, BT, BC)
        by_scale = _column_sums(dots + C, TILES, 2 * C, cols, inside, BT, BC)
        center = tl.load(mean + cols, mask=inside, other=0.0)
        scale = tl.load(rstd + cols, mask=inside, other=0.0)
        scale *= tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
        # shift = bias - scale mean
        _norm_gradients(
            by_scale - center * by_shift, by_shift, -scale * by_shift, weight, rstd,
            dweight, dbias, p, q, cols, inside, COUNT,
        )  # fmt: skip


@triton.jit
def _unfold_branch(
    dv, dc, w, folded, dw, db, row, cols, inside, scale, mean, bias, PROGRAMS, stride_program,
    stride_dv, stride_dc, stride_w: tl.constexpr, C: tl.constexpr, BIAS: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Store a row of a branch's own gradients; return its parts of those of the norm."""
    one = tl.arange(0, 1)
    constant = _column_sums(dc + row * stride_dc, PROGRAMS, stride_program, one, one < 1, BT, 1)
    constant = tl.sum(constant, axis=0)
    total = _column_sums(dv + row * stride_dv, PROGRAMS, stride_program, cols, inside, BT, BC)
    total -= constant * mean
    full = tl.load(w + row * stride_w + cols, mask=inside, other=0.0).to(tl.float32)
    rounded = tl.load(folded + row * C + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(dw + row * C + cols, total * scale + constant * bias, mask=inside)
    if BIAS:
        tl.store(db + row, constant)
    return total * full, constant * full, -constant * rounded


@triton.jit
def unfold_branches(
    dv1, dc1, dv2, dc2, dv3, w1, v1, w2, v2, weight, bias, mean, rstd,
    dw1, db1, dw2, db2, dw3, parts, PROGRAMS, stride_program, stride_dv, stride_dc,
    stride_w1: tl.constexpr, stride_w2: tl.constexpr, H: tl.constexpr, C: tl.constexpr,
    OUT: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr, LAST: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Take the gradients of folded branches apart, a hidden channel a program.

    dv1 and dv2 are rows of C, dv3 of OUT columns, dc1 and dc2 one number for each hidden channel;
    each is summed over PROGRAMS, which lie `stride_program` apart. `parts` (H, 3, C) are the
    gradients of the norm's scale, bias and mean, to be summed. LAST stores dw3 (OUT, H) too.
    """
    row = tl.program_id(0)
    cols = tl.arange(0, BC)
    inside = cols < C
    center = tl.load(mean + cols, mask=inside, other=0.0)
    scale = tl.load(rstd + cols, mask=inside, other=0.0) * load_vector(weight, 0, BC, C)
    shift = load_vector(bias, 0, BC, C)
    a_scale, a_bias, a_mean = _unfold_branch(
        dv1, dc1, w1, v1, dw1, db1, row, cols, inside, scale, center, shift, PROGRAMS,
        stride_program, stride_dv, stride_dc, stride_w1, C, BIAS1, BT, BC,
    )  # fmt: skip
    b_scale, b_bias, b_mean = _unfold_branch(
        dv2, dc2, w2, v2, dw2, db2, row, cols, inside, scale, center, shift, PROGRAMS,
        stride_program, stride_dv, stride_dc, stride_w2, C, BIAS2, BT, BC,
    )  # fmt: skip
    at = parts + row * (3 * C) + cols
    tl.store(at, a_scale + b_scale, mask=inside)
    tl.store(at + C, a_bias + b_bias, mask=inside)
    tl.store(at + 2 * C, a_mean + b_mean, mask=inside)
    if LAST:
        out = tl.arange(0, BO)
        real = out < OUT
        last = _column_sums(dv3 + row * stride_dv, PROGRAMS, stride_program, out, real, BT, BO)
        tl.store(dw3 + out * H + row, last, mask=real)


@triton.jit
def finish_norm(
    parts, weight, rstd, dweight, dbias, p, q, parts3, db3, COUNT, PROGRAMS,
    H: tl.constexpr, C: tl.constexpr, OUT: tl.constexpr, BIAS3: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Sum the parts of `unfold_branches`, BC channels a program; and db3 over its programs."""
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = cols < C
    by_scale = _column_sums(parts, H, 3 * C, cols, inside, BT, BC)
    by_bias = _column_sums(parts + C, H, 3 * C, cols, inside, BT, BC)
    by_mean = _column_sums(parts + 2 * C, H, 3 * C, cols, inside, BT, BC)
    _norm_gradients(
        by_scale, by_bias, by_mean, weight, rstd, dweight, dbias, p, q, cols, inside, COUNT
    )
    if BIAS3:
        real = cols < OUT
        last = _column_sums(parts3, PROGRAMS, OUT, cols, real, BT, BC)
        tl.store(db3 + cols, last, mask=real)


@triton.jit
def prepare_weights(
    k1, k2, w3, taps1, taps2, cast3, N3, C: tl.constexpr, TAPS: tl.constexpr, CAST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Lay out the taps of both convolutions as (TAPS, C) in float32, and cast w3 with CAST."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = i < TAPS * C
    at = (i % C) * TAPS + i // C
    tl.store(taps1 + i, tl.load(k1 + at, mask=real, other=0.0).to(tl.float32), mask=real)
    tl.store(taps2 + i, tl.load(k2 + at, mask=real, other=0.0).to(tl.float32), mask=real)
    if CAST:
        w = tl.load(w3 + i, mask=i < N3, other=0.0)
        tl.store(cast3 + i, w.to(cast3.dtype.element_ty), mask=i < N3)
