"""Element-wise star and its backward in Triton; one pass over memory each."""

import triton
import triton.language as tl

from starlayers.kernels.device.activation import act_backward, act_value

__all__ = ["star_forward", "star_grad"]


@triton.jit
def _clamped(x, LOW: tl.constexpr, HIGH: tl.constexpr, CLAMP: tl.constexpr):
    """Clamp x; CLAMP is 1 for a lower limit alone, 2 for an upper one, 3 for both."""
    if CLAMP % 2 == 1:
        x = tl.maximum(x, LOW, propagate_nan=tl.PropagateNan.ALL)
    if CLAMP >= 2:
        x = tl.minimum(x, HIGH, propagate_nan=tl.PropagateNan.ALL)
    return x


@triton.jit
def _inside(g, x, LOW: tl.constexpr, HIGH: tl.constexpr, CLAMP: tl.constexpr):
    """Return g where x is strictly within its limits, else 0."""
    if CLAMP % 2 == 1:
        g = tl.where(x > LOW, g, 0.0)
    if CLAMP >= 2:
        g = tl.where(x < HIGH, g, 0.0)
    return g


@triton.jit
def _tile(rows, cols, BR: tl.constexpr, BC: tl.constexpr):
    # a flat grid: the y and z axes of a CUDA grid end at 65535
    across = tl.cdiv(cols, BC)
    pid = tl.program_id(0).to(tl.int64)
    r = (pid // across) * BR + tl.arange(0, BR)
    c = (pid % across) * BC + tl.arange(0, BC)
    return r[:, None], c[None, :], (r < rows)[:, None] & (c < cols)[None, :]


@triton.jit
def star_forward(
    x1, x2, y, rows, cols, stride1, stride2,
    ACT: tl.constexpr, OFFSET: tl.constexpr, CLAMP1: tl.constexpr, LOW1: tl.constexpr,
    HIGH1: tl.constexpr, CLAMP2: tl.constexpr, LOW2: tl.constexpr, HIGH2: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    r, c, live = _tile(rows, cols, BR, BC)
    a = tl.load(x1 + r * stride1 + c, mask=live, other=0.0).to(tl.float32)
    b = tl.load(x2 + r * stride2 + c, mask=live, other=0.0).to(tl.float32)
    a = _clamped(a, LOW1, HIGH1, CLAMP1)
    b = _clamped(b, LOW2, HIGH2, CLAMP2)
    s = act_value(a, ACT) * (OFFSET + b)
    tl.store(y + r * cols + c, s.to(y.dtype.element_ty), mask=live)


@triton.jit
def star_grad(
    dy, x1, x2, d1, d2, s, rows, cols, stride_dy, stride1, stride2, stride_d,
    ACT: tl.constexpr, OFFSET: tl.constexpr, CLAMP1: tl.constexpr, LOW1: tl.constexpr,
    HIGH1: tl.constexpr, CLAMP2: tl.constexpr, LOW2: tl.constexpr, HIGH2: tl.constexpr,
    PRODUCT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Compute both gradients; with PRODUCT also the product, from the same loads."""
    r, c, live = _tile(rows, cols, BR, BC)
    g = tl.load(dy + r * stride_dy + c, mask=live, other=0.0).to(tl.float32)
    raw1 = tl.load(x1 + r * stride1 + c, mask=live, other=0.0).to(tl.float32)
    raw2 = tl.load(x2 + r * stride2 + c, mask=live, other=0.0).to(tl.float32)
    a = _clamped(raw1, LOW1, HIGH1, CLAMP1)
    b = _clamped(raw2, LOW2, HIGH2, CLAMP2)
    g1 = act_backward(g * (OFFSET + b), a, ACT)
    value = act_value(a, ACT)
    if PRODUCT:
        product = value * (OFFSET + b)
        tl.store(s + r * cols + c, product.to(s.dtype.element_ty), mask=live)
    g2 = g * value
    g1 = _inside(g1, raw1, LOW1, HIGH1, CLAMP1)
    g2 = _inside(g2, raw2, LOW2, HIGH2, CLAMP2)
    tl.store(d1 + r * stride_d + c, g1.to(d1.dtype.element_ty), mask=live)
    tl.store(d2 + r * stride_d + c, g2.to(d2.dtype.element_ty), mask=live)
