"""K4: star MLP backward in Triton by recomputation; hidden gradients stay on chip.

`mlp_dx` goes over row tiles like the forward. `mlp_dw` goes over hidden chunks and keeps the
gradients of their weights in registers over all its rows; where one chunk is the whole hidden
axis it yields dx too. Wider than that, `mlp_dx` writes d1, d2 and s out (SPILL) and the weight
gradients are plain matrix products. No atomics: programs write partial sums.
"""

import triton
import triton.language as tl

from starlayers.kernels.device.activation import act_backward, act_value
from starlayers.kernels.device.tile import load_columns, load_rows, load_vector, store_rows

__all__ = ["mlp_dw", "mlp_dx"]


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
def mlp_dx(
    dy, z, mean, p, q, x, w1, b1, w2, b2, w3, dx, g, d1, d2, s, sums, M,
    stride_dy: tl.constexpr, stride_z: tl.constexpr, stride_x: tl.constexpr,
    stride_w1: tl.constexpr, stride_w2: tl.constexpr, stride_w3: tl.constexpr, C: tl.constexpr,
    H: tl.constexpr, OUT: tl.constexpr, ACT: tl.constexpr, OFFSET: tl.constexpr,
    BIAS1: tl.constexpr, BIAS2: tl.constexpr, AFFINE: tl.constexpr, SPILL: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr,
    O0: tl.constexpr, O1: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute dx of a row tile; with AFFINE also the upstream gradient g for `mlp_dw`.

    With SPILL also d1, d2 and the product s, for dW by matrix products, and sums over the tile of
    d1, d2 and g, the bias gradients: (tiles, 2 H + OUT).
    """
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    sums += tl.program_id(0).to(tl.int64) * (2 * H + OUT)
    live = rows < M
    x0 = load_rows(x, rows, live, stride_x, 0, C0, C)
    g0 = _upstream(dy, z, mean, p, q, rows, live, stride_dy, stride_z, 0, O0, OUT, AFFINE)
    if AFFINE:
        store_rows(g, g0, rows, live, OUT, 0, O0, OUT)
    else:
        # through registers: loaded straight into shared memory, 256 channels spill 272 bytes
        g0 = tl.where(live[:, None], g0, 0.0)
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
        if SPILL:
            tl.store(sums + hidden, tl.sum(tl.where(live[:, None], e1, 0.0), axis=0), mask=there)
            at = sums + H + hidden
            tl.store(at, tl.sum(tl.where(live[:, None], e2, 0.0), axis=0), mask=there)
        e1 = e1.to(x.dtype.element_ty)
        e2 = e2.to(x.dtype.element_ty)
        if SPILL:
            at = rows.to(tl.int64)[:, None] * H + hidden[None, :]
            inside = live[:, None] & there[None, :]
            tl.store(d1 + at, e1, mask=inside)
            tl.store(d2 + at, e2, mask=inside)
            tl.store(s + at, (a * (OFFSET + h2)).to(x.dtype.element_ty), mask=inside)
        dx0 = tl.dot(e1, u0, dx0, input_precision=PRECISION)
        dx0 = tl.dot(e2, v0, dx0, input_precision=PRECISION)
        if C1 > 0:
            dx1 = tl.dot(e1, u1, dx1, input_precision=PRECISION)
            dx1 = tl.dot(e2, v1, dx1, input_precision=PRECISION)
    store_rows(dx, dx0, rows, live, C, 0, C0, C)
    if C1 > 0:
        store_rows(dx, dx1, rows, live, C, C0, C1, C)
    if SPILL:
        _store_sums(sums + 2 * H, g0, live, 0, O0, OUT)
        if O1 > 0:
            _store_sums(sums + 2 * H, g1, live, O0, O1, OUT)


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
    db3_0 = tl.zeros([O0], tl.float32)
    if C1 > 0:
        u1 = load_rows(w1, hidden, there, stride_w1, C0, C1, C)
        v1 = load_rows(w2, hidden, there, stride_w2, C0, C1, C)
        dw1_1 = tl.zeros([BH, C1], tl.float32)
        dw2_1 = tl.zeros([BH, C1], tl.float32)
    if O1 > 0:
        t1 = load_columns(w3, hidden, there, stride_w3, O0, O1, OUT)
        dw3_1 = tl.zeros([BH, O1], tl.float32)
        db3_1 = tl.zeros([O1], tl.float32)
    for m in tl.range(program * BM, M, PROGRAMS * BM, num_stages=STAGES):
        rows = m + tl.arange(0, BM)
        live = rows < M
        x0 = load_rows(x, rows, live, stride_x, 0, C0, C)
        g0 = _upstream(dy, z, mean, p, q, rows, live, stride_dy, stride_z, 0, O0, OUT, AFFINE)
        h1 = tl.dot(u0, tl.trans(x0), input_precision=PRECISION)
        h2 = tl.dot(v0, tl.trans(x0), input_precision=PRECISION)
        ds = tl.dot(tl.trans(w0), tl.trans(g0), input_precision=PRECISION)
        if C1 > 0:
            x1 = load_rows(x, rows, live, stride_x, C0, C1, C)
            h1 = tl.dot(u1, tl.trans(x1), h1, input_precision=PRECISION)
            h2 = tl.dot(v1, tl.trans(x1), h2, input_precision=PRECISION)
        if O1 > 0:
            g1 = _upstream(dy, z, mean, p, q, rows, live, stride_dy, stride_z, O0, O1, OUT, AFFINE)
            ds = tl.dot(tl.trans(t1), tl.trans(g1), ds, input_precision=PRECISION)
        if BIAS1:
            h1 += load_vector(b1, chunk * BH, BH, H)[:, None]
        if BIAS2:
            h2 += load_vector(b2, chunk * BH, BH, H)[:, None]
        a = act_value(h1, ACT)
        h2 += OFFSET
        s = (a * h2).to(x.dtype.element_ty)
        dw3_0 = tl.dot(s, g0, dw3_0, input_precision=PRECISION)
        if O1 > 0:
            dw3_1 = tl.dot(s, g1, dw3_1, input_precision=PRECISION)
            db3_1 += tl.sum(g1.to(tl.float32), axis=0)
        db3_0 += tl.sum(g0.to(tl.float32), axis=0)
        e2 = ds * a
        db2 += tl.sum(e2, axis=1)
        e2 = e2.to(x.dtype.element_ty)
        dw2_0 = tl.dot(e2, x0, dw2_0, input_precision=PRECISION)
        if C1 > 0:
            dw2_1 = tl.dot(e2, x1, dw2_1, input_precision=PRECISION)
        e1 = act_backward(ds * h2, h1, ACT)
        db1 += tl.sum(e1, axis=1)
        e1 = e1.to(x.dtype.element_ty)
        dw1_0 = tl.dot(e1, x0, dw1_0, input_precision=PRECISION)
        if C1 > 0:
            dw1_1 = tl.dot(e1, x1, dw1_1, input_precision=PRECISION)
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
        tl.store(parts3 + program * OUT + cols, db3_0, mask=cols < OUT)
        if O1 > 0:
            cols = O0 + tl.arange(0, O1)
            tl.store(parts3 + program * OUT + cols, db3_1, mask=cols < OUT)
