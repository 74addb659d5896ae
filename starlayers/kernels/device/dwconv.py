"""Depthwise convolution over (N, height, width, C) in Triton, with gradients.

A program owns TH output rows of BP columns (columns of all images in one line, so that no width
wastes a lane) and BC channels. Each input row is loaded once per horizontal tap and used for up to
K output rows from registers: (TH + K - 1) K loads and conversions for TH K K multiply-adds.

The input may be changed on its way in, to v = scale x + shift + zscale (z - zmean) inside the
image and 0 outside: by a BatchNorm before the convolution, or, going back, by what the statistics
behind it send.
"""

import triton
import triton.language as tl

__all__ = ["channel_vector", "dw_convolve", "dw_weights", "mapped", "store_pixels"]


@triton.jit
def _position(cols_total, pid, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, TH, BP: tl.constexpr):
    """Return image, column and first row of tile `pid`, and a mask of real columns."""
    across = tl.cdiv(HEIGHT, TH)
    column = (pid // across) * BP + tl.arange(0, BP)
    return column // WIDTH, column % WIDTH, (pid % across) * TH, column < cols_total


@triton.jit
def channel_vector(base, channel, real, PRESENT: tl.constexpr):
    """Load the channels' elements in float32; zeros unless PRESENT."""
    if PRESENT:
        return tl.load(base + channel, mask=real, other=0.0).to(tl.float32)
    return tl.zeros(channel.shape, tl.float32)


@triton.jit
def _row(
    x, z, scale, shift, zmean, zscale, image, i, j, there, channel, real,
    SCALE: tl.constexpr, SHIFT: tl.constexpr, Z: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Load v at row i and columns j of the images: [BP, BC] in float32, 0 outside."""
    inside = (there & (i >= 0) & (i < HEIGHT) & (j >= 0) & (j < WIDTH))[:, None] & real[None, :]
    at = ((image.to(tl.int64) * HEIGHT + i) * WIDTH + j)[:, None] * C + channel[None, :]
    v = tl.load(x + at, mask=inside, other=0.0)
    t = v
    if Z:
        t = tl.load(z + at, mask=inside, other=0.0)
    return mapped(
        v, t, scale[None, :], shift[None, :], zmean[None, :], zscale[None, :], inside,
        SCALE, SHIFT, Z,
    )  # fmt: skip


@triton.jit
def mapped(
    v, t, scale, shift, zmean, zscale, inside,
    SCALE: tl.constexpr, SHIFT: tl.constexpr, Z: tl.constexpr,
):  # fmt: skip
    """Return scale v + shift + zscale (t - zmean) in float32, and 0 unless `inside`."""
    v = v.to(tl.float32)
    if SCALE:
        v = v * scale
    if SHIFT:
        v = v + shift
    if Z:
        v = v + zscale * (t.to(tl.float32) - zmean)
    if SHIFT or Z:
        v = tl.where(inside, v, 0.0)
    return v


@triton.jit
def store_pixels(
    value, bias, by, residual, y, at, live,
    BIAS: tl.constexpr, FACTOR: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Store by (value + bias) + residual; return it as stored, and value + bias as it follows.

    A BatchNorm whose sums are of what was stored takes the rounding errors out of its mean, too.
    """
    if BIAS:
        value = value + bias
    undone = value
    if FACTOR:
        value = value * by
    if RESIDUAL:
        value += tl.load(residual + at, mask=live, other=0.0).to(tl.float32)
    rounded = value.to(y.dtype.element_ty)
    tl.store(y + at, rounded, mask=live)
    stored = rounded.to(tl.float32)
    if FACTOR:
        undone = tl.where(by == 0.0, undone, stored / tl.where(by == 0.0, 1.0, by))
    return stored, undone


@triton.jit
def dw_convolve(
    x, z, k, b, scale, shift, zmean, zscale, residual, other, factor, y, parts, COLUMNS,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr, K: tl.constexpr, FLIP: tl.constexpr,
    SCALE: tl.constexpr, SHIFT: tl.constexpr, Z: tl.constexpr, BIAS: tl.constexpr,
    FACTOR: tl.constexpr, RESIDUAL: tl.constexpr, REDUCE: tl.constexpr, TH: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Compute y = factor (k * v + b) + residual, and sums over tiles named by REDUCE.

    k is (K K, C): channels side by side, so that a warp reads a tap in one go.
    FLIP turns the kernel by half a turn, which makes this the input gradient. "statistics" of y
    are (tiles, 3, C) as in `store_statistics`; "dot" is (tiles, 2, C): sums of k * v + b as
    stored, and of its product with `other`.
    """
    PAD: tl.constexpr = K // 2
    blocks: tl.constexpr = (C + BC - 1) // BC
    tile = tl.program_id(0) // blocks
    channel = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)
    real = channel < C
    image, column, top, there = _position(COLUMNS, tile, HEIGHT, WIDTH, TH, BP)
    a = channel_vector(scale, channel, real, SCALE)
    b_shift = channel_vector(shift, channel, real, SHIFT)
    center = channel_vector(zmean, channel, real, Z)
    c_scale = channel_vector(zscale, channel, real, Z)
    sums = ()
    for _ in tl.static_range(TH):
        sums = sums + (tl.zeros([BP, BC], tl.float32),)
    for j in tl.range(K):  # a loop, not unrolled: 7 times the code gains nothing but registers
        taps = ()
        for i in tl.static_range(K):
            if FLIP:
                at = K * K - 1 - i * K - j
            else:
                at = i * K + j
            tap = tl.load(k + at * C + channel, mask=real, other=0.0)
            taps = taps + (tap.to(tl.float32)[None, :],)
        for r in tl.static_range(TH + K - 1):
            v = _row(
                x, z, a, b_shift, center, c_scale, image, top + r - PAD, column + j - PAD, there,
                channel, real, SCALE, SHIFT, Z, HEIGHT, WIDTH, C,
            )  # fmt: skip
            added = ()
            for t in tl.static_range(TH):
                if r - t >= 0 and r - t < K:
                    added = added + (sums[t] + v * taps[r - t],)
                else:
                    added = added + (sums[t],)
            sums = added
    bias = channel_vector(b, channel, real, BIAS)[None, :]
    by = channel_vector(factor, channel, real, FACTOR)[None, :]
    # summed over the tile once, at the end: a sum across warps costs two barriers
    total = tl.zeros([BP, BC], tl.float32)
    second = tl.zeros([BP, BC], tl.float32)
    done = ()
    for t in tl.static_range(TH):
        live = (there & (top + t < HEIGHT))[:, None] & real[None, :]
        at = ((image.to(tl.int64) * HEIGHT + top + t) * WIDTH + column)[:, None] * C
        at = at + channel[None, :]
        value, undone = store_pixels(
            sums[t], bias, by, residual, y, at, live, BIAS, FACTOR, RESIDUAL
        )
        if REDUCE == "dot":
            undone = tl.where(live, undone, 0.0)
            total += undone
            second += undone * tl.load(other + at, mask=live, other=0.0).to(tl.float32)
        if REDUCE == "statistics":
            value = tl.where(live, value, 0.0)
            total += value
        done = done + (value,)
    if REDUCE == "dot":
        base = parts + tile.to(tl.int64) * (2 * C) + channel
        tl.store(base, tl.sum(total, axis=0), mask=real)
        tl.store(base + C, tl.sum(second, axis=0), mask=real)
    if REDUCE == "statistics":
        rows = tl.minimum(HEIGHT - top, TH)
        count = (tl.sum(there.to(tl.int32), axis=0) * rows).to(tl.float32)
        mean = tl.sum(total, axis=0) / count
        for t in tl.static_range(TH):
            live = (there & (top + t < HEIGHT))[:, None]
            off = tl.where(live, done[t] - mean[None, :], 0.0)
            second += off * off
        base = parts + tile.to(tl.int64) * (3 * C) + channel
        tl.store(base, tl.zeros([BC], tl.float32) + count, mask=real)
        tl.store(base + C, mean, mask=real)
        tl.store(base + 2 * C, tl.sum(second, axis=0), mask=real)


@triton.jit
def dw_weights(
    dy, z, x, shift, zmean, zscale, x_scale, x_shift, parts, COLUMNS, TILES, PROGRAMS,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr, K: tl.constexpr, Z: tl.constexpr,
    AFFINE: tl.constexpr, TH: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Sum v dy for one column of taps over every PROGRAMS-th tile.

    `parts` is (PROGRAMS, K K + 1, C); its last row is the bias gradient. The upstream gradient is
    dy, with Z plus shift + zscale (z - zmean); v is x, with AFFINE x_scale x + x_shift.
    """
    PAD: tl.constexpr = K // 2
    blocks: tl.constexpr = (C + BC - 1) // BC
    program = tl.program_id(0) // (blocks * K)
    j = (tl.program_id(0) // blocks) % K
    channel = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)
    real = channel < C
    b_shift = channel_vector(shift, channel, real, Z)
    center = channel_vector(zmean, channel, real, Z)
    c_scale = channel_vector(zscale, channel, real, Z)
    xa = channel_vector(x_scale, channel, real, AFFINE)
    xb = channel_vector(x_shift, channel, real, AFFINE)
    bias = tl.zeros([BP, BC], tl.float32)
    sums = ()
    for _ in tl.static_range(K):
        sums = sums + (tl.zeros([BP, BC], tl.float32),)
    for tile in tl.range(program, TILES, PROGRAMS):
        image, column, top, there = _position(COLUMNS, tile, HEIGHT, WIDTH, TH, BP)
        upstream = ()
        for t in tl.static_range(TH):
            g = _row(
                dy, z, xa, b_shift, center, c_scale, image, top + t, column, there, channel, real,
                False, Z, Z, HEIGHT, WIDTH, C,
            )  # fmt: skip
            bias += g
            upstream = upstream + (g,)
        for r in tl.static_range(TH + K - 1):
            v = _row(
                x, x, xa, xb, xb, xb, image, top + r - PAD, column + j - PAD, there, channel, real,
                AFFINE, AFFINE, False, HEIGHT, WIDTH, C,
            )  # fmt: skip
            added = ()
            for i in tl.static_range(K):
                if r - i >= 0 and r - i < TH:
                    added = added + (sums[i] + v * upstream[r - i],)
                else:
                    added = added + (sums[i],)
            sums = added
    base = parts + program.to(tl.int64) * ((K * K + 1) * C) + channel
    for i in tl.static_range(K):
        tl.store(base + (i * K + j) * C, tl.sum(sums[i], axis=0), mask=real)
    if j == PAD:
        tl.store(base + K * K * C, tl.sum(bias, axis=0), mask=real)
