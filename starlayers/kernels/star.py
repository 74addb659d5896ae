"""Element-wise star as library ops, over two tensors or one packed tensor.

`starlayers::star(x1, x2, act, offset, clamp1, clamp2)` is `reference.star_reference`. With
`x2=None`, `x1` holds both branches in the halves of its last dimension, and so does its gradient.
Nothing is written in place, and only the inputs are saved for the backward.
`starlayers::star_backward(dy, x1, x2, ..., product)` returns d1, d2 and, with `product`, the star
again. A clamp is [] or [least, greatest].
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from starlayers.activations import get_activation
from starlayers.kernels.registration import (
    ceil_div,
    define_gradient,
    define_op,
    launch,
    library_gradients,
    no_autocast,
    unit_stride,
)
from starlayers.reference import star_reference

__all__ = ["Options", "launch_backward", "star", "star_backward"]

ELEMENTS = 2048  # per program: 16 a thread, two 16-byte loads of each bfloat16 operand
WARPS = 4


class Options(NamedTuple):
    """Plain values of a star; a clamp is [] for none, or [least, greatest]."""

    act: str
    offset: float
    clamp1: list[float]
    clamp2: list[float]


def _branches(x1: Tensor, x2: Tensor | None) -> tuple[Tensor, Tensor]:
    if x2 is not None:
        return x1, x2
    if x1.ndim == 0 or x1.shape[-1] % 2:
        raise ValueError(f"a packed star needs an even last dimension, got {tuple(x1.shape)}")
    half = x1.shape[-1] // 2
    return x1[..., :half], x1[..., half:]


def _plain(x1: Tensor, x2: Tensor | None, options: Options) -> Tensor:
    a, b = _branches(x1, x2)
    act, offset, *clamps = options
    clamp1, clamp2 = ((c[0], c[1]) if c else None for c in clamps)
    return star_reference(a, b, act, offset=offset, clamp1=clamp1, clamp2=clamp2).contiguous()


def tile_shape(rows: int, cols: int) -> tuple[int, int]:
    """Return rows and columns of a tile of ELEMENTS: at most twice as wide as `cols`."""
    wide = ELEMENTS
    while wide // 2 >= cols and wide > 16:
        wide //= 2
    return ELEMENTS // wide, wide


def _matrix(x: Tensor) -> Tensor:
    """Return (..., cols) as (rows, cols) with unit column stride; a view if possible."""
    return unit_stride(x.reshape(-1, x.shape[-1]) if x.ndim else x.reshape(1, 1))


def _views(x1: Tensor, x2: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return both branches as matrices (rows, cols)."""
    if x2 is None:
        return _branches(_matrix(x1), None)
    if x1.is_contiguous() and x2.is_contiguous():  # one long row: no ragged edge per row
        return x1.view(1, -1), x2.view(1, -1)
    return _matrix(x1), _matrix(x2)


def _constants(options: Options, rows: int, cols: int) -> dict[str, object]:
    """Return the keyword arguments of a launch."""
    br, bc = tile_shape(rows, cols)
    mask1, low1, high1 = _bounds(options.clamp1)
    mask2, low2, high2 = _bounds(options.clamp2)
    return {
        "ACT": options.act, "OFFSET": options.offset,
        "CLAMP1": mask1, "LOW1": low1, "HIGH1": high1,
        "CLAMP2": mask2, "LOW2": low2, "HIGH2": high2,
        "BR": br, "BC": bc, "num_warps": WARPS,
    }  # fmt: skip


def _bounds(clamp: list[float]) -> tuple[int, float, float]:
    """Return the kernel's CLAMP mask and the limits; an infinite limit is none.

    The mask adds 1 for a lower and 2 for an upper limit. A limit that is not there is 0: Inductor
    writes constants by `repr`, and `inf` is not a Python name.
    """
    if not clamp:
        return 0, 0.0, 0.0
    low, high = clamp
    mask = (low > -math.inf) + 2 * (high < math.inf)
    return mask, low if mask % 2 else 0.0, high if mask >= 2 else 0.0


def _grid(rows: int, cols: int) -> tuple[int]:
    br, bc = tile_shape(rows, cols)
    return (ceil_div(rows, br) * ceil_div(cols, bc),)


def _kernel(x1: Tensor, x2: Tensor | None, options: Options) -> Tensor:
    y = x1.new_empty(_branches(x1, x2)[0].shape)
    if y.numel():
        from starlayers.kernels.device.star import star_forward

        a, b = _views(x1, x2)
        rows, cols = a.shape
        launch(
            star_forward, _grid(rows, cols), a, b, y, rows, cols, a.stride(0), b.stride(0),
            **_constants(options, rows, cols),
        )  # fmt: skip
    return y


def _backward_kernel(
    dy: Tensor, x1: Tensor, x2: Tensor | None, options: Options, product: bool
) -> tuple[Tensor, Tensor, Tensor]:
    d1 = x1.new_empty(x1.shape)
    d2 = x1.new_empty(0 if x2 is None else x2.shape)
    s = x1.new_empty(dy.shape if product else 0)
    launch_backward(dy, x1, x2, options, d1, d2, s if product else None)
    return d1, d2, s


def launch_backward(
    dy: Tensor,
    x1: Tensor,
    x2: Tensor | None,
    options: Options,
    d1: Tensor,
    d2: Tensor,
    s: Tensor | None,
) -> None:
    """Write both gradients and, if there is one, the star `s`; `d2` may be a dense `dy` itself."""
    if x1.numel():
        from starlayers.kernels.device.star import star_grad

        a, b = _views(x1, x2)
        rows, cols = a.shape
        g = dy.contiguous().view(rows, cols) if rows == 1 else _matrix(dy)
        if x2 is None:
            packed = d1.view(-1, 2 * cols)
            out1, out2 = packed[:, :cols], packed[:, cols:]
        else:
            out1, out2 = d1.view(rows, cols), d2.view(rows, cols)
        launch(
            star_grad, _grid(rows, cols), g, a, b, out1, out2, d1 if s is None else s, rows, cols,
            g.stride(0), a.stride(0), b.stride(0), out1.stride(0), PRODUCT=s is not None,
            **_constants(options, rows, cols),
        )  # fmt: skip


def _fake(x1: Tensor, x2: Tensor | None, options: Options) -> Tensor:
    return x1.new_empty(_branches(x1, x2)[0].shape)


star = define_op("star", _kernel, plain=_plain, fake=_fake)


def _plain_backward(
    dy: Tensor, x1: Tensor, x2: Tensor | None, options: Options, product: bool
) -> tuple[Tensor, Tensor, Tensor]:
    act, offset, clamp1, clamp2 = options
    activation = get_activation(act)
    a, b = _branches(x1, x2)
    inner = a.clamp(clamp1[0], clamp1[1]) if clamp1 else a
    outer = b.clamp(clamp2[0], clamp2[1]) if clamp2 else b
    outer = outer + offset if offset else outer
    value = activation.fn(inner)
    d2 = dy * value
    s = (value * outer).contiguous() if product else dy.new_empty(0)
    del value  # the peak of a wide MLP's backward is here
    d1 = activation.backward(dy * outer, inner)
    if clamp1:
        d1 = d1.where((a > clamp1[0]) & (a < clamp1[1]), 0)
    if clamp2:
        d2 = d2.where((b > clamp2[0]) & (b < clamp2[1]), 0)
    if x2 is None:
        return torch.cat((d1, d2), -1), dy.new_empty(0), s
    return d1.contiguous(), d2.contiguous(), s


def _fake_backward(
    dy: Tensor, x1: Tensor, x2: Tensor | None, options: Options, product: bool
) -> tuple[Tensor, Tensor, Tensor]:
    d2 = x1.new_empty(0 if x2 is None else x2.shape)
    return x1.new_empty(x1.shape), d2, x1.new_empty(dy.shape if product else 0)


star_backward = define_op(
    "star_backward", _backward_kernel, plain=_plain_backward, fake=_fake_backward
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x1, x2, *ctx.options = inputs
    ctx.save_for_backward(x1, x2)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x1, x2 = ctx.saved_tensors
    if torch.is_grad_enabled():

        def definition(x1: Tensor, x2: Tensor | None) -> Tensor:
            return _plain(x1, x2, Options(*ctx.options))

        grads = library_gradients(definition, [x1, x2], ctx.needs_input_grad[:2], [dy])
        return *grads, None, None, None, None
    with no_autocast(x1):
        d1, d2, _ = star_backward(dy, x1, x2, *ctx.options, False)
    return d1, (None if x2 is None else d2), None, None, None, None


define_gradient(star, _backward, _save)
