"""Strided convolution in Triton: a matrix product whose rows are read from images by strides.

A row of the product is an output pixel, a column an output channel; both contract over taps times
input channels. Nothing is gathered in memory: each program computes where its rows lie.
"""

import triton
import triton.language as tl

from starlayers.kernels.device.activation import act_value
from starlayers.kernels.device.tile import load_vector

__all__ = ["convolve"]


@triton.jit
def convolve(
    x, w, scale, shift, y, M,
    STRIDE_N: tl.constexpr, STRIDE_C: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    C: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, OUT: tl.constexpr,
    K: tl.constexpr, STRIDE: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr,
    PATCH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute act(scale (w * x) + shift) of images x (N, C, HEIGHT, WIDTH) at any strides.

    y is (M, OUT), a row for each of M output pixels; the images are surrounded by K // 2 zeros. w
    is (rows, columns), columns a multiple of BN. With PATCH its rows are channels times taps, one
    after the other, and zeros up to a multiple of BK; without, each tap has the channels and zeros
    up to a multiple of BK.
    """
    PAD: tl.constexpr = K // 2
    TAPS: tl.constexpr = K * K
    DOWN: tl.constexpr = (HEIGHT - 1) // STRIDE + 1
    ACROSS: tl.constexpr = (WIDTH - 1) // STRIDE + 1
    BLOCKS: tl.constexpr = (OUT + BN - 1) // BN
    CHUNKS: tl.constexpr = (C + BK - 1) // BK
    STEPS: tl.constexpr = (C * TAPS + BK - 1) // BK if PATCH else TAPS * CHUNKS
    first = (tl.program_id(0) % BLOCKS) * BN
    rows = (tl.program_id(0) // BLOCKS) * BM + tl.arange(0, BM)
    live = rows < M
    top = (rows // ACROSS) % DOWN * STRIDE - PAD
    left = rows % ACROSS * STRIDE - PAD
    image = x + (rows // (DOWN * ACROSS)).to(tl.int64) * STRIDE_N
    corner = image + top.to(tl.int64) * STRIDE_H + left.to(tl.int64) * STRIDE_W
    k = tl.arange(0, BK)
    weights = w + k[:, None] * (BLOCKS * BN) + (first + tl.arange(0, BN))[None, :]
    total = tl.zeros([BM, BN], tl.float32)
    for step in tl.range(0, STEPS):
        if PATCH:
            # taps and channels by columns of threads, so that a warp reads neighbouring pixels
            at = step * BK + k
            tap = at % TAPS
            i, j, channel = tap // K, tap % K, at // TAPS
            row, column = top[None, :] + i[:, None], left[None, :] + j[:, None]
            inside = (row >= 0) & (row < HEIGHT) & (column >= 0) & (column < WIDTH)
            inside = inside & live[None, :] & (channel < C)[:, None]
            offset = channel.to(tl.int64) * STRIDE_C + i * STRIDE_H + j * STRIDE_W
            t = tl.trans(tl.load(corner[None, :] + offset[:, None], mask=inside, other=0.0))
        else:
            tap = step // CHUNKS
            i, j, channel = tap // K, tap % K, step % CHUNKS * BK + k
            row, column = top + i, left + j
            there = live & (row >= 0) & (row < HEIGHT) & (column >= 0) & (column < WIDTH)
            offset = channel.to(tl.int64) * STRIDE_C
            at = (corner + i.to(tl.int64) * STRIDE_H + j * STRIDE_W)[:, None] + offset[None, :]
            if C % BK == 0:
                t = tl.load(at, mask=there[:, None], other=0.0)
            else:
                t = tl.load(at, mask=there[:, None] & (channel < C)[None, :], other=0.0)
        total = tl.dot(t, tl.load(weights), total, input_precision=PRECISION)
        weights += BK * BLOCKS * BN
    # not folded into the weights, which would be rounded once more
    scaled = total * load_vector(scale, first, BN, OUT)[None, :]
    value = act_value(scaled + load_vector(shift, first, BN, OUT)[None, :], ACT)
    cols = first + tl.arange(0, BN)
    at = y + rows.to(tl.int64)[:, None] * OUT + cols[None, :]
    tl.store(at, value.to(y.dtype.element_ty), mask=live[:, None] & (cols < OUT)[None, :])
