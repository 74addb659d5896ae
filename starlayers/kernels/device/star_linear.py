"""Fused matrix products of the wide star MLP, over tensor descriptors.

Descriptors (TMA on Hopper) keep addresses out of registers: with pointers two accumulators of
128 x 128 and three outputs need all 255 registers and spill, with descriptors 172.
"""

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from starlayers.kernels.device.activation import act_backward, act_value

__all__ = ["TensorDescriptor", "dgated", "star_linear"]


@triton.jit
def _tile(rows_total, cols_total, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Return first row and column of the tile; GROUP row tiles share their columns."""
    down = tl.cdiv(rows_total, BM)
    across = tl.cdiv(cols_total, BN)
    pid = tl.program_id(0)
    group = pid // (GROUP * across)
    size = tl.minimum(down - group * GROUP, GROUP)
    m = group * GROUP + (pid % (GROUP * across)) % size
    n = (pid % (GROUP * across)) // size
    return m * BM, n * BN


@triton.jit
def star_linear(
    x, w1, b1, w2, b2, y, h1, h2, M, N, K,
    ACT: tl.constexpr, OFFSET: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr,
    SAVE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Compute act(x w1' + b1) * (OFFSET + x w2' + b2); with SAVE both branches too."""
    m, n = _tile(M, N, BM, BN, GROUP)
    a = tl.zeros([BM, BN], tl.float32)
    b = tl.zeros([BM, BN], tl.float32)
    for k in tl.range(0, K, BK):
        t = x.load([m, k])
        a = tl.dot(t, tl.trans(w1.load([n, k])), a)
        b = tl.dot(t, tl.trans(w2.load([n, k])), b)
    cols = n + tl.arange(0, BN)
    if BIAS1:
        a += tl.load(b1 + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if BIAS2:
        b += tl.load(b2 + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if SAVE:
        h1.store([m, n], a.to(h1.dtype))
        h2.store([m, n], b.to(h2.dtype))
    y.store([m, n], (act_value(a, ACT) * (OFFSET + b)).to(y.dtype))


@triton.jit
def _gate(
    ds, h1, h2, d1, d2, s, m, n, ACT: tl.constexpr, OFFSET: tl.constexpr
):  # fmt: skip
    a = h1.load([m, n]).to(tl.float32)
    b = OFFSET + h2.load([m, n]).to(tl.float32)
    value = act_value(a, ACT)
    s.store([m, n], (value * b).to(s.dtype))
    d2.store([m, n], (ds * value).to(d2.dtype))
    d1.store([m, n], act_backward(ds * b, a, ACT).to(d1.dtype))


@triton.jit
def dgated(
    dy, w3, h1, h2, d1, d2, s, M, N, K,
    ACT: tl.constexpr, OFFSET: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Compute d1, d2, s of the star from dy (M, K), w3 (K, N) and h1, h2 (M, N).

    The descriptors of the (M, N) tensors are BN / 2 wide: the epilogue runs in two halves, so that
    six tiles never live at once (255 registers and spills of kilobytes otherwise).
    """
    m, n = _tile(M, N, BM, BN, GROUP)
    ds = tl.zeros([BM, BN], tl.float32)
    for k in tl.range(0, K, BK):
        ds = tl.dot(dy.load([m, k]), w3.load([k, n]), ds)
    left, right = tl.split(tl.permute(tl.reshape(ds, [BM, 2, BN // 2]), [0, 2, 1]))
    _gate(left, h1, h2, d1, d2, s, m, n, ACT, OFFSET)
    _gate(right, h1, h2, d1, d2, s, m, n + BN // 2, ACT, OFFSET)
