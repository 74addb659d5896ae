"""Star MLP forward in Triton; the hidden activation never leaves the chip.

A program owns BM rows: their x tile stays resident while it loops over BH hidden channels at a
time, so memory sees x, y and the weights only.
"""

import triton
import triton.language as tl

from starlayers.kernels.device.activation import act_value
from starlayers.kernels.device.tile import (
    halves,
    load_columns,
    load_rows,
    load_vector,
    store_rows,
    store_statistics,
)

__all__ = ["mlp_forward"]


@triton.jit
def _finish(
    tile, b3, residual, y, parts, rows, live, count, part, stride_r: tl.constexpr,
    OUT: tl.constexpr, BIAS3: tl.constexpr, RESIDUAL: tl.constexpr, STATS: tl.constexpr,
    FIRST: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Add bias and residual to columns FIRST.. of the output; store them and their statistics."""
    if BIAS3:
        tile += load_vector(b3, FIRST, WIDTH, OUT)[None, :]
    if RESIDUAL:
        tile += load_rows(residual, rows, live, stride_r, FIRST, WIDTH, OUT).to(tl.float32)
    if STATS:
        # of the rounded values, which are what the next op reads
        tile = tile.to(y.dtype.element_ty).to(tl.float32)
        store_statistics(parts, tile, live, count, part, FIRST, WIDTH, OUT)
    store_rows(y, tile, rows, live, OUT, FIRST, WIDTH, OUT)


@triton.jit
def mlp_forward(
    x, w1, b1, w2, b2, w3, b3, residual, y, parts, M,
    stride_x: tl.constexpr, stride_w1: tl.constexpr, stride_w2: tl.constexpr,
    stride_w3: tl.constexpr, stride_r: tl.constexpr, C: tl.constexpr, H: tl.constexpr,
    OUT: tl.constexpr, ACT: tl.constexpr, OFFSET: tl.constexpr, BIAS1: tl.constexpr,
    BIAS2: tl.constexpr, BIAS3: tl.constexpr, RESIDUAL: tl.constexpr, STATS: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr,
    O0: tl.constexpr, O1: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    rows = part * BM + tl.arange(0, BM)
    live = rows < M
    x0 = load_rows(x, rows, live, stride_x, 0, C0, C)
    if C1 > 0:
        x1 = load_rows(x, rows, live, stride_x, C0, C1, C)
    y0 = tl.zeros([BM, O0], tl.float32)
    if O1 > 0:
        y1 = tl.zeros([BM, O1], tl.float32)
    for h in tl.range(0, H, BH, num_stages=STAGES):
        hidden = h + tl.arange(0, BH)
        there = hidden < H
        u = load_rows(w1, hidden, there, stride_w1, 0, C0, C)
        v = load_rows(w2, hidden, there, stride_w2, 0, C0, C)
        h1 = tl.dot(x0, tl.trans(u), input_precision=PRECISION)
        h2 = tl.dot(x0, tl.trans(v), input_precision=PRECISION)
        if C1 > 0:
            u = load_rows(w1, hidden, there, stride_w1, C0, C1, C)
            v = load_rows(w2, hidden, there, stride_w2, C0, C1, C)
            h1 = tl.dot(x1, tl.trans(u), h1, input_precision=PRECISION)
            h2 = tl.dot(x1, tl.trans(v), h2, input_precision=PRECISION)
        if BIAS1:
            h1 += load_vector(b1, h, BH, H)[None, :]
        if BIAS2:
            h2 += load_vector(b2, h, BH, H)[None, :]
        s = (act_value(h1, ACT) * (OFFSET + h2)).to(x.dtype.element_ty)
        w = load_columns(w3, hidden, there, stride_w3, 0, O0, OUT)
        y0 = tl.dot(s, tl.trans(w), y0, input_precision=PRECISION)
        if O1 > 0:
            w = load_columns(w3, hidden, there, stride_w3, O0, O1, OUT)
            y1 = tl.dot(s, tl.trans(w), y1, input_precision=PRECISION)
    count = tl.minimum(M - part * BM, BM).to(tl.float32)
    if O0 > 128:
        # what is added and summed takes as many registers as the columns it is for
        left, right = halves(y0)
        _finish(
            left, b3, residual, y, parts, rows, live, count, part, stride_r, OUT, BIAS3, RESIDUAL,
            STATS, 0, O0 // 2,
        )  # fmt: skip
        _finish(
            right, b3, residual, y, parts, rows, live, count, part, stride_r, OUT, BIAS3, RESIDUAL,
            STATS, O0 // 2, O0 // 2,
        )  # fmt: skip
    else:
        _finish(
            y0, b3, residual, y, parts, rows, live, count, part, stride_r, OUT, BIAS3, RESIDUAL,
            STATS, 0, O0,
        )  # fmt: skip
    if O1 > 0:
        _finish(
            y1, b3, residual, y, parts, rows, live, count, part, stride_r, OUT, BIAS3, RESIDUAL,
            STATS, O0, O1,
        )  # fmt: skip
