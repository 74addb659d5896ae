"""Fused star MLP as a library op; the hidden activation is never stored whole.

`starlayers::star_mlp(x, w1, b1, w2, b2, w3, b3, residual, act, offset, stats)` returns
`(y, mean, var)`: y is `functional.star_mlp_reference` of x (rows, in) plus the residual
(rows, out). With `stats`, mean and var are mean and biased variance of y over its rows, (out) in
float32, with gradients like any output: a BatchNorm after y is then an affine map. The backward
recomputes the hidden activation, so only the inputs and, with `stats`, y are saved.
"""

from typing import Any

import torch
from torch import Tensor

from starlayers.functional import star_mlp_reference
from starlayers.kernels.registration import cast, define_op, library_gradients, no_autocast
from starlayers.kernels.star_mlp_cpu import blocked_backward, blocked_forward
from starlayers.kernels.star_mlp_launch import star_mlp_backward_kernel, star_mlp_kernel
from starlayers.kernels.statistics import (
    fake_statistics,
    statistics_gradient,
    upstream,
    with_statistics,
)

__all__ = ["star_mlp", "star_mlp_backward"]


def _plain(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w3: Tensor,
    b3: Tensor | None,
    residual: Tensor | None,
    act: str,
    offset: float,
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    b1, b2, b3 = (cast(b, x.dtype) for b in (b1, b2, b3))
    y = blocked_forward(x, w1, b1, w2, b2, w3, b3, act, offset)
    return with_statistics(y if residual is None else y + residual, stats)


def _fake(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w3: Tensor,
    b3: Tensor | None,
    residual: Tensor | None,
    act: str,
    offset: float,
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_statistics(x.new_empty(x.shape[0], w3.shape[0]), stats)


star_mlp = define_op("star_mlp", star_mlp_kernel, plain=_plain, fake=_fake)


def _plain_backward(
    dy: Tensor,
    z: Tensor | None,
    mean: Tensor | None,
    p: Tensor | None,
    q: Tensor | None,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w3: Tensor,
    act: str,
    offset: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    b1, b2 = cast(b1, x.dtype), cast(b2, x.dtype)
    return blocked_backward(upstream(dy, z, mean, p, q), x, w1, b1, w2, b2, w3, act, offset)


def _fake_backward(
    dy: Tensor,
    z: Tensor | None,
    mean: Tensor | None,
    p: Tensor | None,
    q: Tensor | None,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w3: Tensor,
    act: str,
    offset: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden, out = w1.shape[0], w3.shape[0]
    shapes = (x.shape, w1.shape, (hidden,), w2.shape, (hidden,), w3.shape, (out,))
    dx, dw1, db1, dw2, db2, dw3, db3 = (x.new_empty(shape) for shape in shapes)
    return dx, dw1, db1, dw2, db2, dw3, db3


star_mlp_backward = define_op(
    "star_mlp_backward", star_mlp_backward_kernel, plain=_plain_backward, fake=_fake_backward
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.act, ctx.offset, ctx.stats = inputs
    y, mean, _ = output
    ctx.save_for_backward(*tensors, *((y, mean) if ctx.stats else ()))


def _backward(ctx: Any, dy: Tensor, dmean: Tensor, dvar: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # read once: a checkpoint unpacks each tensor only once
    inputs = list(saved[:8])
    if torch.is_grad_enabled():
        needs = ctx.needs_input_grad[:8]
        grads = [dy, dmean, dvar] if ctx.stats else [dy]
        return *library_gradients(_definition(ctx), inputs, needs, grads), None, None, None
    x, w1, b1, w2, b2, w3, _, residual = inputs
    z = mean = p = q = None
    if ctx.stats:
        z, mean = saved[8:]
        p, q = statistics_gradient(dmean, dvar, x.shape[0])
    computed: tuple[Any, ...] = (None,) * 7
    with no_autocast(x):
        if any(ctx.needs_input_grad[:7]):  # else only the residual needs a gradient: skip K4
            options = (ctx.act, ctx.offset)
            computed = star_mlp_backward(dy, z, mean, p, q, x, w1, b1, w2, b2, w3, *options)
        dresidual = upstream(dy, z, mean, p, q) if residual is not None else None
    present = (None if t is None else g for t, g in zip(inputs[:7], computed, strict=True))
    return *present, dresidual, None, None, None


def _definition(ctx: Any) -> Any:
    def definition(*inputs: Any) -> Any:
        *weights, residual = inputs
        weights = [cast(w, inputs[0].dtype) for w in weights]  # biases may be float32
        y = star_mlp_reference(*weights, ctx.act, offset=ctx.offset)  # type: ignore[misc]
        y = y if residual is None else y + residual
        return with_statistics(y, True) if ctx.stats else y

    return definition


star_mlp.register_autograd(_backward, setup_context=_save)
