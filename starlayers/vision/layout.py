"""Layers and functions for images in channels_last memory layout."""

from torch import Tensor, nn


class OnChannelsLast(nn.Sequential):
    """`nn.Sequential` of NCHW layers that takes and returns (N, H, W, C).

    Both transpositions are views: a channels_last tensor is never copied.
    """

    conv: nn.Conv2d
    bn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        y = x.permute(0, 3, 1, 2)
        for layer in self:
            y = layer(y)
        return y.permute(0, 2, 3, 1)


def to_channels_last(x: Tensor) -> Tensor:
    """Return `x` (N, C, H, W) in channels_last layout, copied only if necessary.

    Works under `torch.func.vmap`, which `x.contiguous(memory_format=...)` does not.
    """
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
