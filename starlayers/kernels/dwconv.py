"""Fused depthwise convolution over (N, height, width, C) as a library op.

`starlayers::dwconv(x, k, b, scale, shift, residual, stats)` returns `(y, mean, var)`:
y = k * (scale x + shift) + b + residual. Zeros surround the image *after* scale and shift, as for
a BatchNorm followed by a padded convolution. k is (C, 1, K, K) with odd K; b, scale, shift are (C);
the residual is shaped like y. With `stats`, mean and var are mean and biased variance of y per
channel, in float32, with gradients like any output.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from starlayers.kernels.registration import (
    ceil_div,
    define_gradient,
    define_op,
    launch,
    library_gradients,
    multiprocessors,
    no_autocast,
    pointer,
    tap_rows,
)
from starlayers.kernels.statistics import (
    Outputs,
    Upstream,
    empty_statistics,
    fake_statistics,
    merged_statistics,
    save_inputs,
    saved_inputs,
    with_statistics,
)

__all__ = [
    "Affine",
    "convolve",
    "dwconv",
    "dwconv_backward",
    "input_gradient",
    "kernel_sums",
]


ROWS = (14, 8, 7, 4, 2)  # candidates for TH, output rows of a tile
ROWS_WEIGHTS = ROWS[1:]  # for the kernel gradient, where 14 rows need too many registers
CHANNELS = (64, 32, 16)  # candidates for BC, channels of a tile: at least 32 bytes
ELEMENTS = 512  # BP * BC, columns by channels: four elements a thread
WARPS = 4
RESIDENT = 8  # programs of the kernel gradient per multiprocessor

#: sizes of the kernels that tensor cores apply: those that fit a band and fill most of it
BAND_SIZES = (7, 9)
#: tiles there, of NVIDIA's and AMD's GPUs: a channel's products are (BS, BI) by (BI, BW), the least
#: that the hardware has; BI is at least BW + size - 1
BANDS = {
    "cuda": {"BS": 16, "BW": 8, "BI": 16, "BC": 8, "num_warps": 8, "num_stages": 1},
    "hip": {"BS": 16, "BW": 16, "BI": 32, "BC": 8, "num_warps": 4, "num_stages": 1},
}
BAND_RESIDENT = 2  # programs per multiprocessor, as registers allow


class Affine(NamedTuple):
    """Affine map per channel before the convolution, `scale x + shift`; both `None` for none."""

    scale: Tensor | None
    shift: Tensor | None

    def checked(self) -> "Affine":
        """Return itself; raise if one of both is missing."""
        if (self.scale is None) != (self.shift is None):
            raise ValueError("dwconv: give both scale and shift, or neither")
        return self

    def apply(self, x: Tensor) -> Tensor:
        """Return the map of `x`, in its dtype."""
        scale, shift = self.checked()
        if scale is None or shift is None:
            return x
        wide = x if x.dtype == torch.float64 else x.float()
        return (wide * scale + shift).to(x.dtype)


def _plain(
    x: Tensor, k: Tensor, b: Tensor | None, affine: Affine, residual: Tensor | None, stats: bool
) -> Outputs:
    v = affine.apply(x).permute(0, 3, 1, 2)
    b = None if b is None else b.to(x.dtype)
    y = F.conv2d(v, k.to(x.dtype), b, padding=k.shape[-1] // 2, groups=k.shape[0])
    y = y.permute(0, 2, 3, 1)
    y = (y if residual is None else y + residual).contiguous()
    return with_statistics(y, stats)


def tile_shape(height: int, channels: int, among: tuple[int, ...] = ROWS) -> tuple[int, int, int]:
    """Return rows, columns and channels of a tile: TH, BP, BC.

    Of the candidates (rows from `among`), it takes those that pad `height` and `channels` least,
    and the largest of these. Columns fill the tile up to ELEMENTS.
    """
    rows = min(among, key=lambda n: (ceil_div(height, n) * n, -n))
    block = min(CHANNELS, key=lambda n: (ceil_div(channels, n) * n, -n))
    return rows, ELEMENTS // block, block


def on_tensor_cores(x: Tensor, size: int) -> bool:
    """Return True if kernels of this size are applied to `x` on tensor cores.

    CUDA cores apply all others: tensor cores would round float32 images, and bands of fewer taps
    are mostly zeros.
    """
    return x.dtype in (torch.float16, torch.bfloat16) and size in BAND_SIZES


def strip_rows(shape: torch.Size, size: int, band: dict[str, int], slots: int) -> int:
    """Return TH, the rows of a strip, for images of `shape` (N, height, width, C).

    A program takes a step for each of the TH + size - 1 rows that its strips read, in turns of
    `size`, and `slots` programs run at a time. Fewer rows mean more steps in total, but more
    programs to share them.
    """
    n, height, width, channels = shape

    def turns(rows: int) -> int:
        groups = ceil_div(n * ceil_div(height, rows), band["BS"])
        programs = groups * ceil_div(width, band["BW"]) * ceil_div(channels, band["BC"])
        return ceil_div(programs, slots) * ceil_div(rows + size - 1, size)

    return min((size, 2 * size, 4 * size, 8 * size), key=lambda rows: (turns(rows), rows))


class Tiling(NamedTuple):
    """Tiles that cover a batch of images, and what a launch needs of them."""

    extent: int  #: columns of all images in one line, or strips of them
    tiles: int  #: tiles, for each block of channels
    blocks: int  #: blocks of channels
    sums: int  #: partial sums of the kernel gradient
    shares: int  #: programs that compute such a sum for a block of channels
    constants: dict[str, int]  #: sizes of a tile, and options of a launch


def tiling(x: Tensor, size: int, among: tuple[int, ...] = ROWS) -> Tiling:
    """Return the tiles of images `x` (N, height, width, C) for kernels of `size`."""
    n, height, width, channels = x.shape
    processors = multiprocessors(x.device)
    if on_tensor_cores(x, size):
        band = BANDS["hip" if torch.version.hip else "cuda"]
        resident, shares = BAND_RESIDENT, 1
        rows = strip_rows(x.shape, size, band, resident * processors)
        extent = n * ceil_div(height, rows)
        tiles = ceil_div(extent, band["BS"]) * ceil_div(width, band["BW"])
        blocks = ceil_div(channels, band["BC"])
        constants = {"TH": rows, **band}
    else:
        # one program per column of taps: the K columns read the same images, from the cache
        resident, shares = RESIDENT, size
        rows, columns, block = tile_shape(height, channels, among)
        extent = n * width
        tiles = ceil_div(extent, columns) * ceil_div(height, rows)
        blocks = ceil_div(channels, block)
        constants = {"TH": rows, "BP": columns, "BC": block, "num_warps": WARPS}
    sums = min(tiles, max(1, resident * processors // (blocks * shares)))
    return Tiling(extent, tiles, blocks, sums, shares, constants)


def _kernel(
    x: Tensor, k: Tensor, b: Tensor | None, affine: Affine, residual: Tensor | None, stats: bool
) -> Outputs:
    """Compute the op `dwconv`; the module's docstring has arguments and results."""
    scale, shift = affine.checked()
    reduce = "statistics" if stats else ""
    y, parts = convolve(x, k, b=b, scale=scale, shift=shift, residual=residual, reduce=reduce)
    if not stats:
        return y, *empty_statistics(x)
    return y, *merged_statistics(parts)


def _backward_kernel(
    upstream: Upstream, x: Tensor, k: Tensor, affine: Affine
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the op `dwconv_backward`; returns dx, dk, db, dscale, dshift."""
    dx, parts = input_gradient(upstream, x, k, affine)
    total = kernel_sums(upstream, x, k, affine).sum(0)
    dk = k.new_empty(k.shape)
    dk.copy_(total[:-1].t().reshape(k.shape))
    db = total[-1].clone()
    if affine.scale is None:
        return dx, dk, db, *empty_statistics(x)
    dshift, dscale = parts.sum(0).unbind(0)
    return dx, dk, db, dscale.clone(), dshift.clone()


def input_gradient(
    upstream: Upstream,
    x: Tensor,
    k: Tensor,
    affine: Affine,
    *,
    taps: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return dx, plus `residual`; and with a map its gradients as (tiles, 2, C): shift, scale."""
    dy, z, mean, p, q = upstream
    reduce = "" if affine.scale is None else "dot"
    return convolve(
        dy, k, taps=taps, flip=True, shift=q, z=z, zmean=mean, zscale=p, factor=affine.scale,
        other=x, residual=residual, reduce=reduce,
    )  # fmt: skip


def kernel_sums(upstream: Upstream, x: Tensor, k: Tensor, affine: Affine) -> Tensor:
    """Return the gradients of kernel and bias, (programs, K K + 1, C) to be summed."""
    dy, z, mean, p, q = upstream
    scale, shift = affine
    x, dy, z = x.contiguous(), dy.contiguous(), None if z is None else z.contiguous()
    _, height, width, channels = x.shape
    size = k.shape[-1]
    over = tiling(x, size, ROWS_WEIGHTS)
    sums = x.new_empty(over.sums, size * size + 1, channels, dtype=torch.float32)
    if x.numel():
        _, dw_weights = _device_kernels(x, size)
        launch(
            dw_weights, (over.sums * over.blocks * over.shares,),
            dy, pointer(z, k), x, pointer(q, k), pointer(mean, k), pointer(p, k),
            pointer(scale, k), pointer(shift, k), sums, over.extent, over.tiles, over.sums,
            HEIGHT=height, WIDTH=width, C=channels, K=size, Z=z is not None,
            AFFINE=scale is not None, **over.constants,
        )  # fmt: skip
    return sums


def _device_kernels(x: Tensor, size: int) -> tuple[Any, Any]:
    """Return the Triton kernels that convolve `x` and that sum its kernel gradient."""
    if on_tensor_cores(x, size):
        from starlayers.kernels.device import dwconv_toeplitz

        return dwconv_toeplitz.dw_convolve_toeplitz, dwconv_toeplitz.dw_weights_toeplitz
    from starlayers.kernels.device import dwconv

    return dwconv.dw_convolve, dwconv.dw_weights


def convolve(
    x: Tensor,
    k: Tensor,
    *,
    taps: Tensor | None = None,
    b: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    z: Tensor | None = None,
    zmean: Tensor | None = None,
    zscale: Tensor | None = None,
    residual: Tensor | None = None,
    factor: Tensor | None = None,
    other: Tensor | None = None,
    flip: bool = False,
    reduce: str = "",
) -> tuple[Tensor, Tensor]:
    """Launch `dw_convolve`, which documents the arguments; returns y and tile sums.

    `taps` are `tap_rows(k)`, where the caller has them.
    """
    x, taps, size = x.contiguous(), tap_rows(k) if taps is None else taps, k.shape[-1]
    _, height, width, channels = x.shape
    over = tiling(x, size)
    y = x.new_empty(x.shape)
    sums = {"": 0, "dot": 2, "statistics": 3}[reduce]
    parts = x.new_empty(over.tiles if sums else 0, sums, channels, dtype=torch.float32)
    z, residual, other = (None if t is None else t.contiguous() for t in (z, residual, other))
    optional = (b, scale, shift, zmean, zscale, residual, other, factor)
    b_, scale_, shift_, zmean_, zscale_, residual_, other_, factor_ = (
        pointer(t, k) for t in optional
    )
    if x.numel():
        dw_convolve, _ = _device_kernels(x, size)
        launch(
            dw_convolve, (over.tiles * over.blocks,),
            x, pointer(z, k), taps, b_, scale_, shift_, zmean_, zscale_, residual_,
            other_, factor_, y, parts, over.extent, HEIGHT=height, WIDTH=width, C=channels,
            K=size, FLIP=flip, SCALE=scale is not None, SHIFT=shift is not None,
            Z=z is not None, BIAS=b is not None, FACTOR=factor is not None,
            RESIDUAL=residual is not None, REDUCE=reduce, **over.constants,
        )  # fmt: skip
    return y, parts


def _fake(
    x: Tensor, k: Tensor, b: Tensor | None, affine: Affine, residual: Tensor | None, stats: bool
) -> Outputs:
    return fake_statistics(x.new_empty(x.shape), stats)


dwconv = define_op("dwconv", _kernel, plain=_plain, fake=_fake)


def _plain_backward(
    upstream: Upstream, x: Tensor, k: Tensor, affine: Affine
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    g, scale = upstream.total().permute(0, 3, 1, 2), affine.scale
    v = affine.apply(x).permute(0, 3, 1, 2)
    channels, pad = k.shape[0], k.shape[-1] // 2
    dv, dk, db = torch.ops.aten.convolution_backward(
        g, v, k.to(x.dtype), [channels], [1, 1], [pad, pad], [1, 1], False, [0, 0], channels,
        [True, True, True],
    )  # fmt: skip
    dv = dv.permute(0, 2, 3, 1)
    dk = dk.to(k.dtype, memory_format=torch.contiguous_format)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    db = db.to(wide)
    if scale is None:
        return dv.contiguous(), dk, db, *empty_statistics(x)
    dv = dv.to(wide)
    dx = (dv * scale).to(x.dtype).contiguous()
    # sums of the rounded dx: the BatchNorm that subtracts them then removes rounding errors too
    dv = torch.where(scale == 0, dv, dx.to(wide) / torch.where(scale == 0, 1, scale))
    dscale, dshift = (dv * x).sum((0, 1, 2)), dv.sum((0, 1, 2))
    return dx, dk, db, dscale, dshift


def _fake_backward(
    upstream: Upstream, x: Tensor, k: Tensor, affine: Affine
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    db, dscale, dshift = (x.new_empty(x.shape[-1], dtype=wide) for _ in range(3))
    if affine.scale is None:
        dscale, dshift = empty_statistics(x)
    return x.new_empty(x.shape), k.new_empty(k.shape), db, dscale, dshift


dwconv_backward = define_op(
    "dwconv_backward", _backward_kernel, plain=_plain_backward, fake=_fake_backward
)


def _backward(ctx: Any, dy: Tensor, dmean: Tensor, dvar: Tensor) -> tuple[Any, ...]:
    inputs, upstream = saved_inputs(ctx, dy, dmean, dvar)
    (stats,) = ctx.options
    if torch.is_grad_enabled():

        def definition(*inputs: Any) -> Any:
            outputs = dwconv.plain(*inputs, stats)
            return outputs if stats else outputs[0]

        grads = [dy, dmean, dvar] if stats else [dy]
        return *library_gradients(definition, inputs, ctx.needs_input_grad[:6], grads), None
    x, k, _, scale, shift, residual = inputs
    with no_autocast(dy):
        computed = dwconv_backward(*upstream, x, k, scale, shift)
        dresidual = None if residual is None else upstream.total()
    present = (None if t is None else g for t, g in zip(inputs[:5], computed, strict=True))
    return *present, dresidual, None


define_gradient(dwconv, _backward, save_inputs)
