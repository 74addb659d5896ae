"""Depthwise convolution of 16-bit images by small matrix products, with gradients.

Along a row of an image, a convolution is a product with a banded (Toeplitz) matrix: of BI input
columns with the (BI, BW) matrix t[c, w] = k[c - w], for BW output columns and BI >= BW + K - 1.
A channel has a matrix for each of its K rows of taps, and tensor cores multiply it by the same
rows of BS strips at a time. A strip is TH rows of one image.

Arguments and results are those of the kernels in `dwconv`, which have other tiles. Blocks of
pixels are [BC, BS, columns]. The next row is read while one is multiplied.
"""

import triton
import triton.language as tl

from starlayers.kernels.device.dwconv import channel_vector, mapped, store_pixels

__all__ = ["dw_convolve_toeplitz", "dw_weights_toeplitz"]


@triton.jit
def _strips(group, STRIPS, HEIGHT: tl.constexpr, TH: tl.constexpr, BS: tl.constexpr):
    """Return image and first row of the BS strips of a group, and a mask of real ones: [1, BS, 1].

    Images are int64, so that offsets made of them are.
    """
    across: tl.constexpr = (HEIGHT + TH - 1) // TH
    strip = (group * BS + tl.arange(0, BS))[None, :, None]
    return (strip // across).to(tl.int64), (strip % across) * TH, strip < STRIPS


@triton.jit
def _block(
    image, top, there, column, channel, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr
):
    """Return offsets of the first rows of strips at these columns, and a mask of real elements."""
    column = column[None, None, :]
    channel = channel[:, None, None]
    at = ((image * HEIGHT + top) * WIDTH + column) * C + channel
    return at, there & (column >= 0) & (column < WIDTH) & (channel < C)


@triton.jit
def _rows(inside, row, last, HEIGHT: tl.constexpr):
    """Return the mask `inside` at a row of the images, False outside and after row `last`."""
    return inside & (row >= 0) & (row < HEIGHT) & (row <= last)


@triton.jit
def _load(x, z, at, inside, Z: tl.constexpr):
    """Load x and, with Z, z: elements at these offsets, 0 outside."""
    v = tl.load(x + at, mask=inside, other=0.0)
    t = v
    if Z:
        t = tl.load(z + at, mask=inside, other=0.0)
    return v, t


@triton.jit
def _pieces(v, KIND: tl.constexpr, TWO: tl.constexpr):
    """Return v rounded to KIND; with TWO also what the rounding left over, rounded.

    A gradient that statistics send back is often less than half a rounding step of the one that
    it is added to, and would be lost in one piece.
    """
    high = v.to(KIND)
    if TWO:
        pieces = (high, (v - high.to(tl.float32)).to(KIND))
    else:
        pieces = (high,)
    return pieces


@triton.jit
def _band(
    k, i, channel, C: tl.constexpr, K: tl.constexpr, FLIP: tl.constexpr, KIND: tl.constexpr,
    BW: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """Load the banded matrices of row i of taps: [BC, BI, BW]."""
    j = tl.arange(0, BI)[None, :, None] - tl.arange(0, BW)[None, None, :]
    channel = channel[:, None, None]
    tap = i * K + j
    if FLIP:
        tap = K * K - 1 - tap
    inside = (j >= 0) & (j < K) & (channel < C)
    return tl.load(k + tap * C + channel, mask=inside, other=0.0).to(KIND)


@triton.jit
def _reduced(first, second, value, undone, live, done, other, at, REDUCE: tl.constexpr):
    """Add row `done` of a tile to its sums; without REDUCE only whether it is finite."""
    if REDUCE == "statistics":
        # mean and squared deviations of each column of a strip, by Welford's formula
        apart = tl.where(live, value - first, 0.0)
        first += apart * (1.0 / tl.maximum(done + 1, 1))
        second += apart * (value - first)
    else:
        undone = tl.where(live, undone, 0.0)
        if REDUCE == "dot":
            first += undone
            second += undone * tl.load(other + at, mask=live, other=0.0).to(tl.float32)
        else:
            first += undone * 0.0
    return first, second


@triton.jit
def dw_convolve_toeplitz(
    x, z, k, b, scale, shift, zmean, zscale, residual, other, factor, y, parts, STRIPS,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr, K: tl.constexpr, FLIP: tl.constexpr,
    SCALE: tl.constexpr, SHIFT: tl.constexpr, Z: tl.constexpr, BIAS: tl.constexpr,
    FACTOR: tl.constexpr, RESIDUAL: tl.constexpr, REDUCE: tl.constexpr, TH: tl.constexpr,
    BS: tl.constexpr, BW: tl.constexpr, BI: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Compute y = factor (k * v + b) + residual and sums over tiles, as `dw_convolve`.

    A tile is BS strips, BW columns and BC channels. k is rounded to the type of x, and so is v;
    with Z, v is the sum of two such numbers.
    """
    PAD: tl.constexpr = K // 2
    KIND: tl.constexpr = x.dtype.element_ty
    line = tl.full([1, 1, 1], WIDTH * C, tl.int64)  # elements from a row to the next
    blocks: tl.constexpr = (C + BC - 1) // BC
    across: tl.constexpr = (WIDTH + BW - 1) // BW
    tile = tl.program_id(0) // blocks
    channel = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)
    real = channel < C
    image, top, there = _strips(tile // across, STRIPS, HEIGHT, TH, BS)
    left = (tile % across) * BW
    columns = left + tl.arange(0, BW)
    start, inside = _block(
        image, top, there, left - PAD + tl.arange(0, BI), channel, HEIGHT, WIDTH, C
    )
    start_out, inside_out = _block(image, top, there, columns, channel, HEIGHT, WIDTH, C)
    a = channel_vector(scale, channel, real, SCALE)[:, None, None]
    b_shift = channel_vector(shift, channel, real, SHIFT)[:, None, None]
    center = channel_vector(zmean, channel, real, Z)[:, None, None]
    c_scale = channel_vector(zscale, channel, real, Z)[:, None, None]
    bias = channel_vector(b, channel, real, BIAS)[:, None, None]
    by = channel_vector(factor, channel, real, FACTOR)[:, None, None]
    bands = ()
    for i in tl.static_range(K):
        bands = bands + (_band(k, i, channel, C, K, FLIP, KIND, BW, BI),)
    sums = ()
    for _ in tl.static_range(K):
        sums = sums + (tl.zeros([BC, BS, BW], tl.float32),)
    first = tl.zeros([BC, BS, BW], tl.float32)
    second = tl.zeros([BC, BS, BW], tl.float32)
    above = top - PAD  # the first input row
    below = top + TH - 1 + PAD  # the last
    start = start - PAD * line
    v, t = _load(x, z, start, _rows(inside, above, below, HEIGHT), Z)
    for begin in tl.range(0, TH + K - 1, K):
        for j in tl.static_range(K):
            r = begin + j
            here = _rows(inside, above + r, below, HEIGHT)
            row = mapped(v, t, a, b_shift, center, c_scale, here, SCALE, SHIFT, Z)
            following = _rows(inside, above + r + 1, below, HEIGHT)
            v, t = _load(x, z, start + (r + 1) * line, following, Z)
            pieces = _pieces(row, KIND, Z)
            added = ()
            for slot in tl.static_range(K):  # output row r - i is summed in slot (r - i) % K
                if slot == j:
                    total = tl.dot(pieces[0], bands[0])
                else:
                    total = tl.dot(pieces[0], bands[(j - slot + K) % K], sums[slot])
                if Z:
                    total = tl.dot(pieces[1], bands[(j - slot + K) % K], total)
                added = added + (total,)
            sums = added
            done = r - (K - 1)  # this output row now has all its K rows of taps
            live = inside_out & (done >= 0) & (done < TH) & (top + done < HEIGHT)
            at = start_out + done * line
            value, undone = store_pixels(
                sums[(j + 1) % K], bias, by, residual, y, at, live, BIAS, FACTOR, RESIDUAL
            )
            first, second = _reduced(first, second, value, undone, live, done, other, at, REDUCE)
    # a product with a band multiplies NaN and infinity by its zeros, too: then tap by tap
    spoilt = tl.where(first * 0.0 == 0.0, 0, 1)
    if tl.max(tl.max(tl.max(spoilt, axis=2), axis=1), axis=0) > 0:
        first = tl.zeros([BC, BS, BW], tl.float32)
        second = tl.zeros([BC, BS, BW], tl.float32)
        for done in tl.range(0, TH):
            total = tl.zeros([BC, BS, BW], tl.float32)
            for tap in tl.range(0, K * K):
                down = tap // K - PAD
                right = tap % K - PAD
                column = (columns + right)[None, None, :]
                within = _rows(inside_out, top + done + down, HEIGHT, HEIGHT)
                within = within & (column >= 0) & (column < WIDTH)
                at = start_out + (done + down) * line + right * C
                pixel, of_z = _load(x, z, at, within, Z)
                pixel = mapped(pixel, of_z, a, b_shift, center, c_scale, within, SCALE, SHIFT, Z)
                if FLIP:
                    tap_at = K * K - 1 - tap
                else:
                    tap_at = tap
                weight = tl.load(k + tap_at * C + channel, mask=real, other=0.0).to(KIND)
                total += pixel * weight.to(tl.float32)[:, None, None]
            live = inside_out & (top + done < HEIGHT)
            at = start_out + done * line
            value, undone = store_pixels(
                total, bias, by, residual, y, at, live, BIAS, FACTOR, RESIDUAL
            )
            first, second = _reduced(first, second, value, undone, live, done, other, at, REDUCE)
    if REDUCE == "dot":
        base = parts + tile.to(tl.int64) * (2 * C) + channel
        tl.store(base, tl.sum(tl.sum(first, axis=2), axis=1), mask=real)
        tl.store(base + C, tl.sum(tl.sum(second, axis=2), axis=1), mask=real)
    if REDUCE == "statistics":
        rows = tl.where(there, tl.minimum(HEIGHT - top, TH), 0) * (columns < WIDTH)[None, None, :]
        rows = rows.to(tl.float32)
        count = tl.sum(tl.sum(rows, axis=2), axis=1)
        mean = tl.sum(tl.sum(first * rows, axis=2), axis=1) / count
        apart = first - mean[:, None, None]
        second += rows * apart * apart
        base = parts + tile.to(tl.int64) * (3 * C) + channel
        tl.store(base, tl.zeros([BC], tl.float32) + count, mask=real)
        tl.store(base + C, mean, mask=real)
        tl.store(base + 2 * C, tl.sum(tl.sum(second, axis=2), axis=1), mask=real)


@triton.jit
def _replaced(ring, SLOT: tl.constexpr, element, K: tl.constexpr):
    """Return the tuple `ring` of K with another element in SLOT."""
    replaced = ()
    for slot in tl.static_range(K):
        if slot == SLOT:
            replaced = replaced + (element,)
        else:
            replaced = replaced + (ring[slot],)
    return replaced


@triton.jit
def dw_weights_toeplitz(
    dy, z, x, shift, zmean, zscale, x_scale, x_shift, parts, STRIPS, TILES, PROGRAMS,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr, K: tl.constexpr, Z: tl.constexpr,
    AFFINE: tl.constexpr, TH: tl.constexpr, BS: tl.constexpr, BW: tl.constexpr, BI: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Sum v dy over every PROGRAMS-th tile, as `dw_weights`, but for all taps.

    Products sum over strips. Each is a (BI, BW) matrix for a channel and a row of taps: entry
    (c, w) is a part of the gradient of tap c - w.
    """
    PAD: tl.constexpr = K // 2
    KIND: tl.constexpr = x.dtype.element_ty
    line = tl.full([1, 1, 1], WIDTH * C, tl.int64)  # elements from a row to the next
    blocks: tl.constexpr = (C + BC - 1) // BC
    across: tl.constexpr = (WIDTH + BW - 1) // BW
    program = tl.program_id(0) // blocks
    channel = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)
    real = channel < C
    b_shift = channel_vector(shift, channel, real, Z)[:, None, None]
    center = channel_vector(zmean, channel, real, Z)[:, None, None]
    c_scale = channel_vector(zscale, channel, real, Z)[:, None, None]
    xa = channel_vector(x_scale, channel, real, AFFINE)[:, None, None]
    xb = channel_vector(x_shift, channel, real, AFFINE)[:, None, None]
    bias = tl.zeros([BC, BS, BW], tl.float32)
    sums = ()
    for _ in tl.static_range(K):
        sums = sums + (tl.zeros([BC, BI, BW], tl.float32),)
    for tile in tl.range(program, TILES, PROGRAMS):
        image, top, there = _strips(tile // across, STRIPS, HEIGHT, TH, BS)
        left = (tile % across) * BW
        start, inside = _block(
            image, top, there, left - PAD + tl.arange(0, BI), channel, HEIGHT, WIDTH, C
        )
        start_out, inside_out = _block(
            image, top, there, left + tl.arange(0, BW), channel, HEIGHT, WIDTH, C
        )
        # row o of dy, counted from the top of the strip, is in slot (o + PAD) % K
        ring = ()
        ring_low = ()
        for slot in tl.static_range(K - 1):
            here_out = _rows(inside_out, top + slot - PAD, HEIGHT, HEIGHT)
            g, t = _load(dy, z, start_out + (slot - PAD) * line, here_out, Z)
            upstream = mapped(g, t, xa, b_shift, center, c_scale, here_out, False, Z, Z)
            if slot >= PAD:
                bias += upstream
            pieces = _pieces(upstream, KIND, Z)
            ring = ring + (pieces[0],)
            if Z:
                ring_low = ring_low + (pieces[1],)
        ring = ring + (tl.zeros([BC, BS, BW], KIND),)
        if Z:
            ring_low = ring_low + (tl.zeros([BC, BS, BW], KIND),)
        last = top + TH - 1
        here_out = _rows(inside_out, top + PAD, HEIGHT, HEIGHT)
        g, t = _load(dy, z, start_out + PAD * line, here_out, Z)
        v = tl.load(x + start, mask=_rows(inside, top, last, HEIGHT), other=0.0)
        for begin in tl.range(0, TH, K):
            for j in tl.static_range(K):
                r = begin + j
                here_out = _rows(inside_out, top + r + PAD, HEIGHT, HEIGHT)
                upstream = mapped(g, t, xa, b_shift, center, c_scale, here_out, False, Z, Z)
                here = _rows(inside, top + r, last, HEIGHT)
                row = mapped(v, v, xa, xb, xb, xb, here, AFFINE, AFFINE, False)
                here_out = _rows(inside_out, top + r + 1 + PAD, HEIGHT, HEIGHT)
                g, t = _load(dy, z, start_out + (r + 1 + PAD) * line, here_out, Z)
                here = _rows(inside, top + r + 1, last, HEIGHT)
                v = tl.load(x + start + (r + 1) * line, mask=here, other=0.0)
                bias += tl.where(r + PAD < TH, upstream, 0.0)
                pieces = _pieces(upstream, KIND, Z)
                ring = _replaced(ring, (j + K - 1) % K, pieces[0], K)
                if Z:
                    ring_low = _replaced(ring_low, (j + K - 1) % K, pieces[1], K)
                row = tl.permute(row.to(KIND), (0, 2, 1))
                added = ()
                for i in tl.static_range(K):  # row i of taps joins x at r and dy at r + PAD - i
                    total = tl.dot(row, ring[(j - 1 - i + 2 * K) % K], sums[i])
                    if Z:
                        total = tl.dot(row, ring_low[(j - 1 - i + 2 * K) % K], total)
                    added = added + (total,)
                sums = added
    base = parts + program.to(tl.int64) * ((K * K + 1) * C) + channel
    apart = tl.arange(0, BI)[None, :, None] - tl.arange(0, BW)[None, None, :]
    for j in tl.range(K):
        for i in tl.static_range(K):
            tap = tl.where(apart == j, sums[i], 0.0)
            tl.store(base + (i * K + j) * C, tl.sum(tl.sum(tap, axis=2), axis=1), mask=real)
    tl.store(base + K * K * C, tl.sum(tl.sum(bias, axis=2), axis=1), mask=real)
