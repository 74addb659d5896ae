"""Star MLP too wide to stay on chip: matrix products and the star.

`starlayers::star_mlp_wide(x, w1, b1, w2, b2, w3, b3, act, offset, recompute, gemm)` returns
`(y, h1, h2)`: y is `reference.star_mlp_reference`. The branches h1 and h2 are kept for the
backward; with `recompute` they are empty, and the backward computes them again. Their product is
never kept. `gemm` is "library" (cuBLAS, then `star`) or "triton" (`star_linear` and `dgated`).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from starlayers.kernels.registration import (
    MLPWeights,
    define_gradient,
    define_op,
    library_gradients,
    no_autocast,
)
from starlayers.kernels.star_linear import dgated, product_dgated, star_linear
from starlayers.reference import star_mlp_reference

__all__ = ["PROGRAMS", "star_mlp_wide"]


#: gemm -> op for both branches and their star, op for the gradients of both branches
PROGRAMS = {"library": (star_linear.plain, product_dgated), "triton": (star_linear, dgated)}


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


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.act, ctx.offset, ctx.recompute, ctx.gemm = inputs
    _, h1, h2 = output
    ctx.mark_non_differentiable(h1, h2)
    ctx.set_materialize_grads(False)  # else the backward gets zeros of (rows, hidden) for both
    ctx.save_for_backward(*tensors, h1, h2)


def _backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Any, ...]:
    """Return the gradients of the inputs that need one.

    Every tensor of (rows, hidden) is freed after its last product: five of them live at once, and
    at most three together with the gradient of a weight.
    """
    if dy is None:
        return (None,) * 11
    *inputs, h1, h2 = ctx.saved_tensors
    needs, nothing = ctx.needs_input_grad[:7], (None,) * 4
    if torch.is_grad_enabled():

        def definition(*inputs: Any) -> Tensor:
            return star_mlp_reference(*inputs, ctx.act, offset=ctx.offset)  # type: ignore[misc]

        return *library_gradients(definition, inputs, needs, [dy]), *nothing
    ctx.maybe_clear_saved_tensors()  # else both branches would live until the end
    x, w1, b1, w2, b2, w3, _ = inputs
    product, gate = PROGRAMS[ctx.gemm]
    with no_autocast(dy):
        if ctx.recompute and ctx.gemm == "library":  # no star needed here: `gate` returns it
            h1, h2 = F.linear(x, w1, b1), F.linear(x, w2, b2)
        elif ctx.recompute:
            h1, h2 = product(x, w1, b1, w2, b2, ctx.act, ctx.offset, True)[1:]
        d1, d2, s = gate(dy, w3, h1, h2, ctx.act, ctx.offset)
        del h1, h2
        dw3 = dy.t() @ s if needs[5] else None
        del s
        dx = (d1 @ w1).addmm_(d2, w2) if needs[0] else None
        dw1 = d1.t() @ x if needs[1] else None
        db1 = _sum(d1) if needs[2] else None
        del d1
        dw2 = d2.t() @ x if needs[3] else None
        db2, db3 = (_sum(d) if need else None for d, need in ((d2, needs[4]), (dy, needs[6])))
    return dx, dw1, db1, dw2, db2, dw3, db3, *nothing


def _sum(d: Tensor) -> Tensor:
    """Return the sum of d over its rows: the gradient of a bias.

    It is a matrix product, because `sum(0)` took three times as long as reading d.
    """
    return (d.new_ones(1, d.shape[0]) @ d).view(-1)


define_gradient(star_mlp_wide, _backward, _save)
