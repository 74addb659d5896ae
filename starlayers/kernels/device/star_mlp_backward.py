"""Star MLP backward in Triton by recomputation.

Narrow layers keep the hidden gradients on chip. `mlp_dx` goes over row tiles like the forward;
`mlp_dw` goes over hidden chunks and keeps the gradients of their weights in registers over all its
rows; where one chunk is the whole hidden axis it yields dx too. For wider layers, whose weight
gradients no program can hold, `mlp_upstream` and `mlp_hidden` write the gradients of the output and
of the hidden tensors out for matrix products. No atomics: programs write partial sums.
"""

import triton
import triton.language as tl

from starlayers.kernels.device.activation import act_backward, act_value
from starlayers.kernels.device.tile import (
    load_columns,
    load_rows,
    load_slab,
    load_vector,
    store_rows,
)

__all__ = ["mlp_dw", "mlp_dx", "mlp_hidden", "mlp_upstream"]


@triton.jit
def _upstream(
    dy, z, mean, p, q, rows, live, stride_dy, stride_z,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """Load dy; with AFFINE add q + p (z - mean), the gradient by the statistics of z."""
    g = load_rows(dy, rows, live, stride_dy, FIRST, WIDTH, N)
    if AFFINE:
        t = load_rows(z, rows, live, stride_z, FIRST, WIDTH, N).to(tl.float32)
        t -= load_vector(mean, FIRST, WIDTH, N)[None, :]
        full = g.to(tl.float32) + load_vector(q, FIRST, WIDTH, N)[None, :]
        full += load_vector(p, FIRST, WIDTH, N)[None, :] * t
        if g.dtype != tl.float32:
            half: tl.constexpr = 2.0**-8 if g.dtype == tl.bfloat16 else 2.0**-11
            full += _dither(full, rows, FIRST, WIDTH, half)
        g = tl.where(live[:, None], full, 0.0).to(g.dtype)
    return g


@triton.jit
def _dither(x, rows, FIRST: tl.constexpr, WIDTH: tl.constexpr, HALF_STEP: tl.constexpr):
    """Return up to half a rounding step of x either way, by a hash of the position.

    dy is rounded already, and q + p (z - mean) often less than half a step of it: rounded to the
    nearest, the sum would be dy again nearly everywhere, and the mean that a BatchNorm takes out
    of its gradient would stay in. With this the rounding is right on average.
    """
    cols = (FIRST + tl.arange(0, WIDTH)).to(tl.uint32)
    h = rows.to(tl.uint32)[:, None] * 0x9E3779B1 + cols[None, :] * 0x85EBCA77
    h = (h ^ (h >> 15)) * 0x2C1B3C6D
    h = (h ^ (h >> 12)) * 0x297A2D39
    unit = (h >> 8).to(tl.float32) * (2.0 / 16777216.0) - 1.0
    # x without its mantissa: the power of two below it
    power = (x.to(tl.uint32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return unit * (HALF_STEP * power)


@triton.jit
def _store_sums(base, tile, live, FIRST: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr):
    """Store sums over the live rows of a tile, at columns FIRST.. of N."""
    cols = FIRST + tl.arange(0, WIDTH)
    total = tl.sum(tl.where(live[:, None], tile.to(tl.float32), 0.0), axis=0)
    tl.store(base + cols, total, mask=cols < N)


@triton.jit
def _column_sums(tile, LATER: tl.constexpr):
    """Sum a tile over its rows to (1, columns); with LATER widen it to float32 only.

    The sum waits for all warps. A program with narrow tiles therefore adds them up whole, and sums
    the rows once in the end; wider tiles would take too many registers.
    """
    tile = tile.to(tl.float32)
    return tile if LATER else tl.sum(tile, axis=0)[None, :]


@triton.jit
def mlp_dx(
    dy, z, mean, p, q, x, w1, b1, w2, b2, w3, dx, g, M,
    stride_dy: tl.constexpr, stride_z: tl.constexpr, stride_x: tl.constexpr,
    stride_w1: tl.constexpr, stride_w2: tl.constexpr, stride_w3: tl.constexpr, C: tl.constexpr,
    H: tl.constexpr, OUT: tl.constexpr, ACT: tl.constexpr, OFFSET: tl.constexpr,
    BIAS1: tl.constexpr, BIAS2: tl.constexpr, AFFINE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BH: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr,
    O0: tl.constexpr, O1: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute dx of a row tile; with AFFINE also the upstream gradient g for `mlp_dw`."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    live = rows < M
    x0 = load_rows(x, rows, live, stride_x, 0, C0, C)
    g0 = _upstream(dy, z, mean, p, q, rows, live, stride_dy, stride_z, 0, O0, OUT, AFFINE)
    if AFFINE:
        store_rows(g, g0, rows, live, OUT, 0, O0, OUT)
    dx0 = tl.zeros([BM, C0], tl.float32)
    if C1 > 0:
        x1 = load_rows(x, rows, live, stride_x, C0, C1, C)
        dx1 = tl.zeros([BM, C1], tl.float32)
    if O1 > 0:
        g1 = _upstream(dy, z, mean, p, q, rows, live, stride_dy, stride_z, O0, O1, OUT, AFFINE)
        if AFFINE:
            store_rows(g, g1, rows, live, OUT, O0, O1, OUT)
    for h in tl.range(0, H, BH, num_stages=STAGES):
        hidden = h + tl.arange(0, BH)
        there = hidden < H
        u0 = load_rows(w1, hidden, there, stride_w1, 0, C0, C)
        v0 = load_rows(w2, hidden, there, stride_w2, 0, C0, C)
        h1 = tl.dot(x0, tl.trans(u0), input_precision=PRECISION)
        h2 = tl.dot(x0, tl.trans(v0), input_precision=PRECISION)
        if C1 > 0:
            u1 = load_rows(w1, hidden, there, stride_w1, C0, C1, C)
            v1 = load_rows(w2, hidden, there, stride_w2, C0, C1, C)
            h1 = tl.dot(x1, tl.trans(u1), h1, input_precision=PRECISION)
            h2 = tl.dot(x1, tl.trans(v1), h2, input_precision=PRECISION)
        ds = tl.dot(
            g0, load_columns(w3, hidden, there, stride_w3, 0, O0, OUT), input_precision=PRECISION
        )
        if O1 > 0:
            ds = tl.dot(
                g1,
                load_columns(w3, hidden, there, stride_w3, O0, O1, OUT),
                ds,
                input_precision=PRECISION,
            )
        if BIAS1:
            h1 += load_vector(b1, h, BH, H)[None, :]
        if BIAS2:
            h2 += load_vector(b2, h, BH, H)[None, :]
        a = act_value(h1, ACT)
        e1 = act_backward(ds * (OFFSET + h2), h1, ACT)
        e2 = ds * a
        e1 = e1.to(x.dtype.element_ty)
        e2 = e2.to(x.dtype.element_ty)
        dx0 = tl.dot(e1, u0, dx0, input_precision=PRECISION)
        dx0 = tl.dot(e2, v0, dx0, input_precision=PRECISION)
        if C1 > 0:
            dx1 = tl.dot(e1, u1, dx1, input_precision=PRECISION)
            dx1 = tl.dot(e2, v1, dx1, input_precision=PRECISION)
    store_rows(dx, dx0, rows, live, C, 0, C0, C)
    if C1 > 0:
        store_rows(dx, dx1, rows, live, C, C0, C1, C)


@triton.jit
def mlp_dw(
    dy, z, mean, p, q, x, w1, b1, w2, b2, w3, dx, parts, parts3, M, PROGRAMS,
    stride_dy: tl.constexpr, stride_z: tl.constexpr, stride_x: tl.constexpr,
    stride_w1: tl.constexpr, stride_w2: tl.constexpr, stride_w3: tl.constexpr, C: tl.constexpr,
    H: tl.constexpr, OUT: tl.constexpr, ACT: tl.constexpr, OFFSET: tl.constexpr,
    BIAS1: tl.constexpr, BIAS2: tl.constexpr, AFFINE: tl.constexpr, DX: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr,
    O0: tl.constexpr, O1: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute weight gradients of a hidden chunk over every PROGRAMS-th row tile.

    Everything is transposed, (BH, BM): d1 is then the left operand of d1' x as it lies in
    registers. With DX (one chunk holds the whole hidden axis) dx comes out of the same pass.
    `parts` is (PROGRAMS, H, 2 C + OUT + 2): dw1, dw2, dw3', db1, db2; `parts3`
    (PROGRAMS, OUT): db3.
    """
    chunk = tl.program_id(0)
    program = tl.program_id(1)
    hidden = chunk * BH + tl.arange(0, BH)
    there = hidden < H
    u0 = load_rows(w1, hidden, there, stride_w1, 0, C0, C)
    v0 = load_rows(w2, hidden, there, stride_w2, 0, C0, C)
    w0 = load_columns(w3, hidden, there, stride_w3, 0, O0, OUT)
    dw1_0 = tl.zeros([BH, C0], tl.float32)
    dw2_0 = tl.zeros([BH, C0], tl.float32)
    dw3_0 = tl.zeros([BH, O0], tl.float32)
    db1 = tl.zeros([BH], tl.float32)
    db2 = tl.zeros([BH], tl.float32)
    LANES: tl.constexpr = BM if DX else 1  # rows of db3 that are left to sum in the end
    db3_0 = tl.zeros([LANES, O0], tl.float32)
    if C1 > 0:
        u1 = load_rows(w1, hidden, there, stride_w1, C0, C1, C)
        v1 = load_rows(w2, hidden, there, stride_w2, C0, C1, C)
        dw1_1 = tl.zeros([BH, C1], tl.float32)
        dw2_1 = tl.zeros([BH, C1], tl.float32)
    if O1 > 0:
        t1 = load_columns(w3, hidden, there, stride_w3, O0, O1, OUT)
        dw3_1 = tl.zeros([BH, O1], tl.float32)
        db3_1 = tl.zeros([LANES, O1], tl.float32)
    for m in tl.range(program * BM, M, PROGRAMS * BM, num_stages=STAGES):
        rows = m + tl.arange(0, BM)
        live = rows < M
        x0 = load_rows(x, rows, live, stride_x, 0, C0, C)
        g0 = _upstream(dy, z, mean, p, q, rows, live, stride_dy, stride_z, 0, O0, OUT, AFFINE)
        db3_0 += _column_sums(g0, DX)
        if O1 > 0:
            g1 = _upstream(dy, z, mean, p, q, rows, live, stride_dy, stride_z, O0, O1, OUT, AFFINE)
            db3_1 += _column_sums(g1, DX)
        h1 = tl.dot(u0, tl.trans(x0), input_precision=PRECISION)
        h2 = tl.dot(v0, tl.trans(x0), input_precision=PRECISION)
        if C1 > 0:
            x1 = load_rows(x, rows, live, stride_x, C0, C1, C)
            h1 = tl.dot(u1, tl.trans(x1), h1, input_precision=PRECISION)
            h2 = tl.dot(v1, tl.trans(x1), h2, input_precision=PRECISION)
        if BIAS1:
            h1 += load_vector(b1, chunk * BH, BH, H)[:, None]
        if BIAS2:
            h2 += load_vector(b2, chunk * BH, BH, H)[:, None]
        a = act_value(h1, ACT)
        h2 += OFFSET
        s = (a * h2).to(x.dtype.element_ty)
        # only now, and all gradients before the next products: few float32 tiles live at once
        ds = tl.dot(tl.trans(w0), tl.trans(g0), input_precision=PRECISION)
        if O1 > 0:
            ds = tl.dot(tl.trans(t1), tl.trans(g1), ds, input_precision=PRECISION)
        e2 = ds * a
        e1 = act_backward(ds * h2, h1, ACT)
        db1 += tl.sum(e1, axis=1)
        db2 += tl.sum(e2, axis=1)
        e1 = e1.to(x.dtype.element_ty)
        e2 = e2.to(x.dtype.element_ty)
        dw2_0 = tl.dot(e2, x0, dw2_0, input_precision=PRECISION)
        dw1_0 = tl.dot(e1, x0, dw1_0, input_precision=PRECISION)
        dw3_0 = tl.dot(s, g0, dw3_0, input_precision=PRECISION)
        if C1 > 0:
            dw2_1 = tl.dot(e2, x1, dw2_1, input_precision=PRECISION)
            dw1_1 = tl.dot(e1, x1, dw1_1, input_precision=PRECISION)
        if O1 > 0:
            dw3_1 = tl.dot(s, g1, dw3_1, input_precision=PRECISION)
        if DX:
            dx0 = tl.dot(tl.trans(e1), u0, input_precision=PRECISION)
            dx0 = tl.dot(tl.trans(e2), v0, dx0, input_precision=PRECISION)
            store_rows(dx, dx0, rows, live, C, 0, C0, C)
            if C1 > 0:
                dx1 = tl.dot(tl.trans(e1), u1, input_precision=PRECISION)
                dx1 = tl.dot(tl.trans(e2), v1, dx1, input_precision=PRECISION)
                store_rows(dx, dx1, rows, live, C, C0, C1, C)
    WIDTH: tl.constexpr = 2 * C + OUT + 2
    base = parts + program.to(tl.int64) * (H * WIDTH)
    store_rows(base, dw1_0, hidden, there, WIDTH, 0, C0, C)
    store_rows(base + C, dw2_0, hidden, there, WIDTH, 0, C0, C)
    store_rows(base + 2 * C, dw3_0, hidden, there, WIDTH, 0, O0, OUT)
    if C1 > 0:
        store_rows(base, dw1_1, hidden, there, WIDTH, C0, C1, C)
        store_rows(base + C, dw2_1, hidden, there, WIDTH, C0, C1, C)
    if O1 > 0:
        store_rows(base + 2 * C, dw3_1, hidden, there, WIDTH, O0, O1, OUT)
    tl.store(base + hidden.to(tl.int64) * WIDTH + 2 * C + OUT, db1, mask=there)
    tl.store(base + hidden.to(tl.int64) * WIDTH + 2 * C + OUT + 1, db2, mask=there)
    if chunk == 0:
        cols = tl.arange(0, O0)
        tl.store(parts3 + program * OUT + cols, tl.sum(db3_0, axis=0), mask=cols < OUT)
        if O1 > 0:
            cols = O0 + tl.arange(0, O1)
            tl.store(parts3 + program * OUT + cols, tl.sum(db3_1, axis=0), mask=cols < OUT)


@triton.jit
def mlp_upstream(
    dy, z, mean, p, q, g, sums, M, stride_dy: tl.constexpr, stride_z: tl.constexpr, H: tl.constexpr,
    OUT: tl.constexpr, AFFINE: tl.constexpr, BM: tl.constexpr, O0: tl.constexpr, O1: tl.constexpr,
):  # fmt: skip
    """Sum the upstream gradient g over a row tile; with AFFINE store g too.

    `sums` is (tiles, 2 H + OUT); its last OUT columns are written here, the others by `mlp_hidden`.
    """
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    live = rows < M
    sums += tl.program_id(0).to(tl.int64) * (2 * H + OUT) + 2 * H
    g0 = _upstream(dy, z, mean, p, q, rows, live, stride_dy, stride_z, 0, O0, OUT, AFFINE)
    _store_sums(sums, g0, live, 0, O0, OUT)
    if AFFINE:
        store_rows(g, g0, rows, live, OUT, 0, O0, OUT)
    if O1 > 0:
        g1 = _upstream(dy, z, mean, p, q, rows, live, stride_dy, stride_z, O0, O1, OUT, AFFINE)
        _store_sums(sums, g1, live, O0, O1, OUT)
        if AFFINE:
            store_rows(g, g1, rows, live, OUT, O0, O1, OUT)


@triton.jit
def mlp_hidden(
    g, x, w1, b1, w2, b2, w3, d, sums, M,
    stride_g: tl.constexpr, stride_x: tl.constexpr, stride_w1: tl.constexpr,
    stride_w2: tl.constexpr, stride_w3: tl.constexpr, C: tl.constexpr, H: tl.constexpr,
    OUT: tl.constexpr, ACT: tl.constexpr, OFFSET: tl.constexpr, BIAS1: tl.constexpr,
    BIAS2: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr,
    BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute a tile of d1, d2 and the product s from x and the upstream gradient g.

    `d` is (M, 3 H): d1, d2 and s side by side, so that two matrix products take both gradients at
    once. `sums` is (tiles, 2 H + OUT): sums over the tile of d1 and d2, the bias gradients.
    """
    ACROSS: tl.constexpr = (H + BH - 1) // BH
    tile = tl.program_id(0) // ACROSS  # neighbours share their rows in cache
    h = (tl.program_id(0) % ACROSS) * BH
    rows = tile * BM + tl.arange(0, BM)
    live = rows < M
    hidden = h + tl.arange(0, BH)
    there = hidden < H
    h1 = tl.zeros([BM, BH], tl.float32)
    h2 = tl.zeros([BM, BH], tl.float32)
    ds = tl.zeros([BM, BH], tl.float32)
    for k in tl.range(0, C, BK, num_stages=STAGES):
        t = load_slab(x, rows, live, stride_x, k, BK, C)
        u = load_slab(w1, hidden, there, stride_w1, k, BK, C)
        v = load_slab(w2, hidden, there, stride_w2, k, BK, C)
        h1 = tl.dot(t, tl.trans(u), h1, input_precision=PRECISION)
        h2 = tl.dot(t, tl.trans(v), h2, input_precision=PRECISION)
    for k in tl.range(0, OUT, BK, num_stages=STAGES):
        t = load_slab(g, rows, live, stride_g, k, BK, OUT)
        w = load_columns(w3, hidden, there, stride_w3, k, BK, OUT)
        ds = tl.dot(t, w, ds, input_precision=PRECISION)
    if BIAS1:
        h1 += load_vector(b1, h, BH, H)[None, :]
    if BIAS2:
        h2 += load_vector(b2, h, BH, H)[None, :]
    a = act_value(h1, ACT)
    h2 += OFFSET
    kind = d.dtype.element_ty
    at = d + rows.to(tl.int64)[:, None] * (3 * H) + hidden[None, :]
    inside = live[:, None] & there[None, :]
    tl.store(at + 2 * H, (a * h2).to(kind), mask=inside)
    sums += tile.to(tl.int64) * (2 * H + OUT) + hidden
    e2 = ds * a
    tl.store(at + H, e2.to(kind), mask=inside)
    tl.store(sums + H, tl.sum(tl.where(live[:, None], e2, 0.0), axis=0), mask=there)
    e1 = act_backward(ds * h2, h1, ACT)
    tl.store(at, e1.to(kind), mask=inside)
    tl.store(sums, tl.sum(tl.where(live[:, None], e1, 0.0), axis=0), mask=there)
