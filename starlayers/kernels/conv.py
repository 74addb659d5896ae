"""Strided convolution of images with a norm in evaluation mode and an activation, in one launch.

It computes `act(scale (w * x) + shift)`, without gradients, with zeros around the images.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from starlayers.kernels.registration import ceil_div, launch, precision
from starlayers.kernels.tiles import family

__all__ = ["Convolution", "Tile", "convolve", "tile_of", "weight_rows"]

#: images of at most so many channels contract over all taps in one product: 27 rows for RGB, in
#: place of nine products that are mostly zeros
PATCH_CHANNELS = 4
ROWS = 128  # output pixels of a tile


class Convolution(NamedTuple):
    """Sizes of a convolution."""

    in_channels: int
    out_channels: int
    #: rows of taps, odd, and step in both directions
    size: int
    stride: int

    @property
    def contraction(self) -> int:
        """Products that each output sums."""
        return self.in_channels * self.size**2

    def pixels(self, shape: torch.Size) -> int:
        """Return the number of output pixels of images of `shape` (N, C, height, width)."""
        n, _, height, width = shape
        return n * ceil_div(height, self.stride) * ceil_div(width, self.stride)


class Tile(NamedTuple):
    """Tile of a launch: output pixels, output channels, depth of a product, and how it runs."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def tile_of(conv: Convolution, of: str, element_size: int) -> Tile:
    """Return the tile of a convolution on GPUs of the family `of`.

    Up to 32 channels of the result take 32 columns, others 64 or 128: whichever pads least, and the
    more of both. Chosen by ahead-of-time compilation (`make kernels`): none spills registers.
    """
    channels, wide = conv.out_channels, element_size == 4
    columns = 32
    if channels > 32:
        among = (64,) if wide else (64, 128)
        columns = min(among, key=lambda n: (ceil_div(channels, n) * n, -n))
    if conv.in_channels <= PATCH_CHANNELS:
        return Tile(ROWS, columns, 32, 8 if columns > 64 else 4, 1)
    depth = 16 if conv.in_channels <= 16 else 32 if conv.in_channels <= 32 or wide else 64
    if wide:
        return Tile(ROWS // 2, columns, depth, 8, 1 if of == "small" else 2)
    return Tile(ROWS, columns, depth, 8 if columns > 64 else 4, 2 if of == "small" else 3)


def weight_rows(w: Tensor, tile: Tile, dtype: torch.dtype) -> Tensor:
    """Return weights (out, in, K, K) as the rows and columns that the kernel reads, in `dtype`.

    Zeros fill what a tile has beyond taps and channels.
    """
    out, channels = w.shape[:2]
    if channels <= PATCH_CHANNELS:
        rows = w.reshape(out, -1).t()
        rows = F.pad(rows, (0, 0, 0, -len(rows) % tile.depth))
    else:
        taps = w.permute(2, 3, 1, 0).flatten(0, 1)
        rows = F.pad(taps, (0, 0, 0, -channels % tile.depth)).flatten(0, 1)
    return F.pad(rows, (0, -out % tile.columns)).to(dtype).contiguous()


def convolve(
    x: Tensor, w: Tensor, scale: Tensor, shift: Tensor, *, stride: int, act: str
) -> Tensor:
    """Return act(scale (w * x) + shift) as (N, height, width, out), rounded once.

    Shapes: x (N, in, H, W) at any strides, w (out, in, K, K) with odd K; scale, shift (out) in
    float32.
    """
    from starlayers.kernels.device.conv import convolve as kernel

    out, channels, size, _ = w.shape
    conv = Convolution(channels, out, size, stride)
    tile = tile_of(conv, family(x.device), x.element_size())
    n, _, height, width = x.shape
    y = x.new_empty(n, ceil_div(height, stride), ceil_div(width, stride), out)
    if y.numel():
        # strides are constants, so that the compiler sees how well addresses are aligned
        strides = dict(zip(("STRIDE_N", "STRIDE_C", "STRIDE_H", "STRIDE_W"), x.stride()))
        pixels = conv.pixels(x.shape)
        launch(
            kernel, (ceil_div(pixels, tile.rows) * ceil_div(out, tile.columns),),
            x, weight_rows(w, tile, x.dtype), scale, shift, y, pixels, **strides,
            C=channels, HEIGHT=height, WIDTH=width, OUT=out, K=size, STRIDE=stride, ACT=act,
            PRECISION=precision(x), PATCH=channels <= PATCH_CHANNELS, BM=tile.rows,
            BN=tile.columns, BK=tile.depth, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return y
