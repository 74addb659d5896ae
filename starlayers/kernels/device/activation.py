"""Activations in Triton: value and derivative, chosen by name at compile time.

NaN passes through every activation, as in torch: comparisons that are false for NaN keep the input.
"""

import triton
import triton.language as tl

__all__ = ["act_backward", "act_value"]


@triton.jit
def _tanh(x):
    # Near 0 the exponential form cancels; the polynomial is that of Cephes' tanhf.
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.625, x + x * z * p, tl.where(x < 0, -large, large))


@triton.jit
def _log1p_exp(x):
    # log(1 + u) * u / ((1 + u) - 1) undoes the rounding of 1 + u (Kahan).
    u = tl.exp(x)
    w = 1.0 + u
    exact = tl.log(w) * (u / (w - 1.0))
    return tl.where(x > 20.0, x, tl.where(w == 1.0, u, exact))


@triton.jit
def act_value(x, ACT: tl.constexpr):
    """Apply the activation to a float32 tile."""
    if ACT == "identity":
        y = x
    elif ACT == "relu":
        y = tl.where(x < 0.0, 0.0, x)
    elif ACT == "relu6":
        y = tl.clamp(x, 0.0, 6.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        # tanh(u) = 2 sigmoid(2 u) - 1, and the sigmoid does not cancel
        y = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif ACT == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif ACT == "quick_gelu":
        y = x / (1.0 + tl.exp(-1.702 * x))
    elif ACT == "sigmoid":
        y = 1.0 / (1.0 + tl.exp(-x))
    elif ACT == "tanh":
        y = _tanh(x)
    elif ACT == "softplus":
        y = _log1p_exp(x)
    elif ACT == "squared_relu":
        r = tl.where(x < 0.0, 0.0, x)
        y = r * r
    else:
        tl.static_assert(ACT == "hardswish", "unknown activation")
        y = x * tl.clamp(x + 3.0, 0.0, 6.0, propagate_nan=tl.PropagateNan.ALL) * (1.0 / 6.0)
    return y


@triton.jit
def act_backward(g, x, ACT: tl.constexpr):
    """Return g act'(x); 0 where the activation is flat, also for an infinite g."""
    d = _derivative(x, ACT)
    return tl.where(d == 0.0, 0.0, g * d)


@triton.jit
def _derivative(x, ACT: tl.constexpr):
    """Return the activation's derivative at a float32 tile; at a kink as in torch."""
    if ACT == "identity":
        d = tl.full(x.shape, 1.0, tl.float32)
    elif ACT == "relu":
        d = tl.where(x <= 0.0, 0.0, 1.0)
    elif ACT == "relu6":
        d = tl.where((x <= 0.0) | (x >= 6.0), 0.0, 1.0)
    elif ACT == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        d = cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACT == "gelu_tanh":
        u = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        s = 1.0 / (1.0 + tl.exp(-u))
        other = 1.0 / (1.0 + tl.exp(u))  # 1 - s without cancelling
        d = s + x * s * other * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif ACT == "silu":
        s = 1.0 / (1.0 + tl.exp(-x))
        d = s * (1.0 + x * (1.0 - s))
    elif ACT == "quick_gelu":
        s = 1.0 / (1.0 + tl.exp(-1.702 * x))
        d = s * (1.0 + 1.702 * x * (1.0 - s))
    elif ACT == "sigmoid":
        s = 1.0 / (1.0 + tl.exp(-x))
        d = s * (1.0 - s)
    elif ACT == "tanh":
        t = _tanh(x)
        d = 1.0 - t * t
    elif ACT == "softplus":
        d = 1.0 / (1.0 + tl.exp(-x))
    elif ACT == "squared_relu":
        d = 2.0 * tl.where(x < 0.0, 0.0, x)
    else:
        tl.static_assert(ACT == "hardswish", "unknown activation")
        inside = x * (1.0 / 3.0) + 0.5
        d = tl.where(x <= -3.0, 0.0, tl.where(x >= 3.0, 1.0, inside))
    return d
