"""Loads, stores and statistics of tiles, shared by the matrix kernels.

Triton's tiles are powers of two wide and StarNet-S1's channels (24, 48, 96, 192) are not, so every
kernel holds a channel axis in two parts of C0 and C1 columns (96 = 64 + 32; C1 = 0 for none).
"""

import triton
import triton.language as tl

__all__ = [
    "halves",
    "load_columns",
    "load_rows",
    "load_slab",
    "load_vector",
    "merge_statistics",
    "merged_statistics",
    "store_rows",
    "store_statistics",
]


@triton.jit
def halves(tile):
    """Return the left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2]), 0, 2, 1))


@triton.jit
def load_rows(base, rows, live, stride, FIRST: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr):
    """Load [rows, WIDTH]: columns FIRST.. of a matrix with N columns, zero outside."""
    cols = FIRST + tl.arange(0, WIDTH)
    at = base + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    if FIRST + WIDTH <= N:
        return tl.load(at, mask=live[:, None], other=0.0)
    return tl.load(at, mask=live[:, None] & (cols < N)[None, :], other=0.0)


@triton.jit
def load_slab(base, rows, live, stride, first, WIDTH: tl.constexpr, N: tl.constexpr):
    """Load [rows, WIDTH] as `load_rows` does, for a multiple `first` of WIDTH in a loop."""
    cols = first + tl.arange(0, WIDTH)
    at = base + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    if N % WIDTH == 0:
        return tl.load(at, mask=live[:, None], other=0.0)
    return tl.load(at, mask=live[:, None] & (cols < N)[None, :], other=0.0)


@triton.jit
def load_columns(w, hidden, there, stride, first, WIDTH: tl.constexpr, N: tl.constexpr):
    """Load [WIDTH, BH]: rows first.. of w (N, hidden), at the columns `hidden`."""
    out = first + tl.arange(0, WIDTH)
    at = w + out[:, None] * stride + hidden[None, :]
    return tl.load(at, mask=(out < N)[:, None] & there[None, :], other=0.0)


@triton.jit
def store_rows(
    base, tile, rows, live, stride, FIRST: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Store a tile where `load_rows` would read it; rounds to the type of the memory."""
    cols = FIRST + tl.arange(0, WIDTH)
    at = base + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    tl.store(at, tile.to(base.dtype.element_ty), mask=live[:, None] & (cols < N)[None, :])


@triton.jit
def load_vector(base, FIRST, WIDTH: tl.constexpr, N: tl.constexpr):
    """Load [WIDTH] float32 elements FIRST.. of a vector of N, zero outside."""
    i = FIRST + tl.arange(0, WIDTH)
    return tl.load(base + i, mask=i < N, other=0.0).to(tl.float32)


@triton.jit
def store_statistics(
    base, tile, live, count, part, FIRST: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Store count, mean and squared deviations of the live rows of a tile, per column.

    `base` is (parts, 3, N). Deviations from the tile's own mean do not cancel as a sum of
    squares would.
    """
    cols = FIRST + tl.arange(0, WIDTH)
    mean = tl.sum(tl.where(live[:, None], tile, 0.0), axis=0) / count
    off = tl.where(live[:, None], tile - mean[None, :], 0.0)
    at = base + part.to(tl.int64) * (3 * N) + cols
    inside = cols < N
    tl.store(at, tl.zeros([WIDTH], tl.float32) + count, mask=inside)
    tl.store(at + N, mean, mask=inside)
    tl.store(at + 2 * N, tl.sum(off * off, axis=0), mask=inside)


@triton.jit
def merged_statistics(
    parts, TILES, cols, inside, C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """Return count, mean and biased variance of channels from the tiles of `store_statistics`.

    Each lane merges its tiles by Chan's formula, then the lanes are merged; nothing cancels.
    """
    n = tl.zeros([BT, BC], tl.float32)
    m = tl.zeros([BT, BC], tl.float32)
    squares = tl.zeros([BT, BC], tl.float32)
    for first in tl.range(0, TILES, BT):
        tiles = first + tl.arange(0, BT)
        live = (tiles < TILES)[:, None] & inside[None, :]
        at = parts + tiles[:, None] * (3 * C) + cols[None, :]
        more = tl.load(at, mask=live, other=0.0)
        apart = tl.load(at + C, mask=live, other=0.0) - m
        share = tl.where(more > 0.0, more / tl.maximum(n + more, 1.0), 0.0)
        squares += tl.load(at + 2 * C, mask=live, other=0.0) + apart * apart * n * share
        m += apart * share
        n += more
    total = tl.sum(n, axis=0)
    # around the first lane's mean, which a first tile always fills
    near = tl.sum(tl.where((tl.arange(0, BT) == 0)[:, None], m, 0.0), axis=0)
    center = near + tl.sum(n * (m - near[None, :]), axis=0) / total
    off = m - center[None, :]
    return total, center, tl.sum(squares + n * off * off, axis=0) / total


@triton.jit
def merge_statistics(parts, mean, var, TILES, C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """Store mean and biased variance of channels, BC a program, as `merged_statistics` has them."""
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = cols < C
    _, center, variance = merged_statistics(parts, TILES, cols, inside, C, BT, BC)
    tl.store(mean + cols, center, mask=inside)
    tl.store(var + cols, variance, mask=inside)
