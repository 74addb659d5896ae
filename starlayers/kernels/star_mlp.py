"""Fused star MLP as a library op; the hidden activation is never stored whole.

`starlayers::star_mlp(x, w1, b1, w2, b2, w3, b3, residual, act, offset, stats)` returns
`(y, mean, var)`: y is `reference.star_mlp_reference` of x (rows, in) plus the residual
(rows, out). With `stats`, mean and var are mean and biased variance of y over its rows, (out) in
float32, with gradients like any output: a BatchNorm after y is then an affine map. The backward
recomputes the hidden activation, so only the inputs and, with `stats`, y are saved.
"""

from typing import Any

import torch
from torch import Tensor

from starlayers.activations import get_activation
from starlayers.kernels.registration import (
    MLPGradients,
    MLPWeights,
    cast,
    define_gradient,
    define_op,
    library_gradients,
    no_autocast,
)
from starlayers.kernels.star_mlp_cpu import star_mlp_plain, star_mlp_plain_backward
from starlayers.kernels.star_mlp_launch import star_mlp_backward_kernel, star_mlp_kernel
from starlayers.kernels.statistics import (
    Outputs,
    Upstream,
    fake_statistics,
    save_inputs,
    saved_inputs,
    with_statistics,
)
from starlayers.reference import star_mlp_reference

__all__ = ["star_mlp", "star_mlp_backward"]


def _fake(
    x: Tensor, weights: MLPWeights, residual: Tensor | None, act: str, offset: float, stats: bool
) -> Outputs:
    return fake_statistics(x.new_empty(x.shape[0], weights.w3.shape[0]), stats)


star_mlp = define_op("star_mlp", star_mlp_kernel, plain=star_mlp_plain, fake=_fake)


def _fake_backward(
    upstream: Upstream, x: Tensor, weights: MLPWeights, act: str, offset: float
) -> MLPGradients:
    w1, _, w2, _, w3, _ = weights
    hidden, out = w1.shape[0], w3.shape[0]
    shapes = (x.shape, w1.shape, (hidden,), w2.shape, (hidden,), w3.shape, (out,))
    return tuple(x.new_empty(shape) for shape in shapes)  # type: ignore[return-value]


star_mlp_backward = define_op(
    "star_mlp_backward",
    star_mlp_backward_kernel,
    plain=star_mlp_plain_backward,
    fake=_fake_backward,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    *tensors, residual, act, offset, stats = inputs
    ctx.activation = get_activation(act)
    # without statistics a residual's gradient does not depend on it: it may change or be freed
    kept = residual if stats else None
    save_inputs(ctx, (*tensors, kept, act, offset, stats), output)


def _backward(ctx: Any, dy: Tensor, dmean: Tensor, dvar: Tensor) -> tuple[Any, ...]:
    inputs, upstream = saved_inputs(ctx, dy, dmean, dvar)
    x, *weights, _ = inputs
    act, offset, stats = ctx.options
    if get_activation(act) is not ctx.activation:
        raise RuntimeError(
            f"activation {act!r} was registered again between forward and backward; choose another "
            "name"
        )
    needs = ctx.needs_input_grad[:8]
    present: tuple[Tensor | None, ...] = (None,) * 7
    if torch.is_grad_enabled():

        def definition(x: Tensor, *others: Tensor | None) -> Any:
            *weights, residual = (cast(t, x.dtype) for t in others)  # biases may be float32
            y = star_mlp_reference(x, *weights, act, offset=offset)  # type: ignore[misc]
            y = y if residual is None else y + residual
            return with_statistics(y, True) if stats else y

        if stats:
            grads = library_gradients(definition, inputs, needs, [dy, dmean, dvar])
            return *grads, None, None, None
        if any(needs[:7]):
            needs_but_residual = (*needs[:7], False)
            present = library_gradients(definition, inputs, needs_but_residual, [dy])[:7]
        return *present, dy if needs[7] else None, None, None, None
    with no_autocast(dy):
        if any(needs[:7]):  # else only the residual needs a gradient: skip the kernel
            computed = star_mlp_backward(*upstream, x, *weights, act, offset)
            pairs = zip(inputs[:7], computed, strict=True)
            present = tuple(None if t is None else g for t, g in pairs)
        dresidual = upstream.total() if needs[7] else None
    return *present, dresidual, None, None, None


define_gradient(star_mlp, _backward, _save)
