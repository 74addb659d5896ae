"""Layers and functions for images in channels_last memory layout."""

from einops import rearrange
from torch import Tensor, nn

__all__ = ["OnChannelsLast", "to_channels_last"]


class OnChannelsLast(nn.Sequential):
    """`nn.Sequential` of NCHW layers that takes and returns (N, H, W, C).

    Both transpositions are views: a channels_last tensor is never copied.

    Shapes: (N, H, W, C) -> (N, H', W', C'), as the layers change them.

    Example:
        >>> from collections import OrderedDict
        >>> layers = OnChannelsLast(OrderedDict(conv=nn.Conv2d(4, 6, 3, stride=2)))
        >>> layers(torch.ones(2, 5, 5, 4)).shape
        torch.Size([2, 2, 2, 6])
    """

    conv: nn.Conv2d
    bn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        y = rearrange(x, "n h w c -> n c h w")
        for layer in self:
            y = layer(y)
        return rearrange(y, "n c h w -> n h w c")


def to_channels_last(x: Tensor) -> Tensor:
    """Return `x` (N, C, H, W) in channels_last layout, copied only if necessary.

    Works under `torch.func.vmap`, which `x.contiguous(memory_format=...)` does not.

    Example:
        >>> to_channels_last(torch.ones(2, 3, 4, 5)).stride()
        (60, 1, 15, 3)
    """
    return rearrange(rearrange(x, "n c h w -> n h w c").contiguous(), "n h w c -> n c h w")
