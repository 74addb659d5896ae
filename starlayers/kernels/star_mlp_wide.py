"""Star MLP too wide to stay on chip: matrix products and K1, or K2 and K5.

`starlayers::star_mlp_wide(x, w1, b1, w2, b2, w3, b3, act, offset, recompute, gemm)` returns
`(y, h1, h2)`: y is `reference.star_mlp_reference`. The branches h1 and h2 are kept for the
backward; with `recompute` they are empty, and the backward computes them again. Their product is
never kept. `gemm` is "library" (cuBLAS, then K1) or "triton" (K2 and K5).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from starlayers.kernels.registration import (
    MLPGradients,
    MLPWeights,
    define_gradient,
    define_op,
    library_gradients,
    no_autocast,
)
from starlayers.kernels.star_linear import dgated, star_linear
from starlayers.reference import star_mlp_reference

__all__ = ["PROGRAMS", "star_mlp_wide"]


#: gemm -> op for both branches and their star, op for the gradients of both branches
PROGRAMS = {"library": (star_linear.plain, dgated.plain), "triton": (star_linear, dgated)}


def _forward(
    x: Tensor, weights: MLPWeights, act: str, offset: float, recompute: bool, gemm: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (rows, out) and both branches (rows, hidden), or empty ones."""
    w1, b1, w2, b2, w3, b3 = weights
    product, _ = PROGRAMS[gemm]
    s, h1, h2 = product(x, w1, b1, w2, b2, act, offset, not recompute)
    return F.linear(s, w3, b3), h1, h2


def _fake(
    x: Tensor, weights: MLPWeights, act: str, offset: float, recompute: bool, gemm: str
) -> tuple[Tensor, Tensor, Tensor]:
    rows, (_, hidden, out) = x.shape[0], weights.sizes
    saved = 0 if recompute else (rows, hidden)
    return x.new_empty(rows, out), x.new_empty(saved), x.new_empty(saved)


star_mlp_wide = define_op("star_mlp_wide", None, plain=_forward, fake=_fake)


def _gradients(
    dy: Tensor,
    x: Tensor,
    weights: MLPWeights,
    h1: Tensor,
    h2: Tensor,
    act: str,
    offset: float,
    recompute: bool,
    gemm: str,
) -> MLPGradients:
    """Return the gradients of x and of all weights; a missing bias has an empty one."""
    w1, b1, w2, b2, w3, b3 = weights
    product, gate = PROGRAMS[gemm]
    if recompute and gemm == "library":  # no star needed here: `gate` returns it
        h1, h2 = F.linear(x, w1, b1), F.linear(x, w2, b2)
    elif recompute:
        _, h1, h2 = product(x, w1, b1, w2, b2, act, offset, True)
    d1, d2, s = gate(dy, w3, h1, h2, act, offset)
    dw3 = dy.t() @ s
    del h1, h2, s
    dx = (d1 @ w1).addmm_(d2, w2)
    dw1, dw2 = d1.t() @ x, d2.t() @ x
    db1, db2, db3 = (_sum(d, b) for d, b in ((d1, b1), (d2, b2), (dy, b3)))
    return dx, dw1, db1, dw2, db2, dw3, db3


def _sum(d: Tensor, b: Tensor | None) -> Tensor:
    """Return the gradient of bias `b`, the sum of d over its rows; empty without `b`.

    It is a matrix product, because `sum(0)` took three times as long as reading d.
    """
    return d.new_empty(0) if b is None else (d.new_ones(1, len(d)) @ d).view(-1)


def _fake_gradients(
    dy: Tensor, x: Tensor, weights: MLPWeights, h1: Tensor, h2: Tensor, *options: Any
) -> MLPGradients:
    shapes = (x.shape, *((0,) if w is None else w.shape for w in weights))
    return tuple(x.new_empty(shape) for shape in shapes)  # type: ignore[return-value]


star_mlp_wide_backward = define_op(
    "star_mlp_wide_backward", None, plain=_gradients, fake=_fake_gradients
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.act, ctx.offset, ctx.recompute, ctx.gemm = inputs
    _, h1, h2 = output
    ctx.mark_non_differentiable(h1, h2)
    ctx.save_for_backward(*tensors, h1, h2)


def _backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Any, ...]:
    *inputs, h1, h2 = ctx.saved_tensors
    nothing = (None,) * 4
    if torch.is_grad_enabled():

        def definition(*inputs: Any) -> Tensor:
            return star_mlp_reference(*inputs, ctx.act, offset=ctx.offset)  # type: ignore[misc]

        return *library_gradients(definition, inputs, ctx.needs_input_grad[:7], [dy]), *nothing
    with no_autocast(dy):
        grads = star_mlp_wide_backward(
            dy, *inputs, h1, h2, ctx.act, ctx.offset, ctx.recompute, ctx.gemm
        )
    return *(None if t is None else g for t, g in zip(inputs, grads, strict=True)), *nothing


define_gradient(star_mlp_wide, _backward, _save)
