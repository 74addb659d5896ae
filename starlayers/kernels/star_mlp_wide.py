"""Star MLP too wide to stay on chip: matrix products and K1, or K2 and K5.

`starlayers::star_mlp_wide(x, w1, b1, w2, b2, w3, b3, act, offset, recompute, gemm)` returns
`(y, h1, h2)`: y is `functional.star_mlp_reference`. The branches h1 and h2 are kept for the
backward; with `recompute` they are empty, and the backward computes them again. Their product is
never kept. `gemm` is "library" (cuBLAS, then K1) or "triton" (K2 and K5).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from starlayers.functional import star_mlp_reference
from starlayers.kernels.registration import library_gradients, no_autocast
from starlayers.kernels.star_linear import dgated, star_linear

__all__ = ["PROGRAMS", "star_mlp_wide"]


#: gemm -> op for both branches and their star, op for the gradients of both branches
PROGRAMS = {"library": (star_linear.plain, dgated.plain), "triton": (star_linear, dgated)}


@torch.library.custom_op("starlayers::star_mlp_wide", mutates_args=())
def star_mlp_wide(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w3: Tensor,
    b3: Tensor | None,
    act: str,
    offset: float,
    recompute: bool,
    gemm: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (rows, out) and both branches (rows, hidden), or empty ones."""
    product, _ = PROGRAMS[gemm]
    s, h1, h2 = product(x, w1, b1, w2, b2, act, offset, not recompute)
    return F.linear(s, w3, b3), h1, h2


@star_mlp_wide.register_fake
def _(x, w1, b1, w2, b2, w3, b3, act, offset, recompute, gemm):  # type: ignore[no-untyped-def]
    saved = 0 if recompute else (x.shape[0], w1.shape[0])
    return x.new_empty(x.shape[0], w3.shape[0]), x.new_empty(saved), x.new_empty(saved)


@torch.library.custom_op("starlayers::star_mlp_wide_backward", mutates_args=())
def star_mlp_wide_backward(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w3: Tensor,
    b3: Tensor | None,
    h1: Tensor,
    h2: Tensor,
    act: str,
    offset: float,
    recompute: bool,
    gemm: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return dx, dw1, db1, dw2, db2, dw3, db3; a missing bias has an empty gradient."""
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


@star_mlp_wide_backward.register_fake
def _(dy, x, w1, b1, w2, b2, w3, b3, h1, h2, *options):  # type: ignore[no-untyped-def]
    biases = ((0,) if b is None else b.shape for b in (b1, b2, b3))
    shapes = (x.shape, w1.shape, next(biases), w2.shape, next(biases), w3.shape, next(biases))
    return tuple(x.new_empty(shape) for shape in shapes)


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
    x, w1, b1, w2, b2, w3, b3 = inputs
    with no_autocast(x):
        grads = star_mlp_wide_backward(
            dy, x, w1, b1, w2, b2, w3, b3, h1, h2, ctx.act, ctx.offset, ctx.recompute, ctx.gemm
        )
    return *(None if t is None else g for t, g in zip(inputs, grads, strict=True)), *nothing


star_mlp_wide.register_autograd(_backward, setup_context=_save)
