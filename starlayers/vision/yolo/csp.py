"""Cross-stage partial stage of star blocks."""

import torch
from torch import Tensor, nn

from starlayers.checks import positive_int
from starlayers.vision.blocks import ConvNorm, StarBlock2d, check_images

__all__ = ["StarCSP"]


class StarCSP(nn.Module):
    """Stage of star blocks over half of the channels: `mix(concat(a, b, b_1, ..., b_depth))`.

    `a` and `b` are the halves of the channels of `split(x)`, and each `b_i` is a `StarBlock2d` of
    the one before, `b_1` of `b`. `split` and `mix` are 1x1 convolutions with BatchNorm and silu.
    The layout is that of the stages of YOLO8 and YOLO11, which end in `mix` too and whose blocks
    are bottlenecks of two 3x3 convolutions. Unlike those it keeps the number of channels, as the
    parser of ultralytics assumes for every class that it does not know.

    Shapes: (N, dim, H, W) -> (N, dim, H, W).

    Args:
        dim: channels, an even number. In a YAML file write `c2`, the parser's name for the channels
            of the row before: `[-1, 2, StarCSP, [c2]]`. A row of 2 is a chain of two stages.
        depth: number of star blocks.

    Raises:
        ValueError: an odd `dim`, or an input that is not (N, dim, H, W).

    Source: the stage after Wang et al., "CSPNet", arXiv 1911.11929; the block after Ma et al.,
    "Rewrite the Stars", arXiv 2403.19967.

    Example:
        >>> from starlayers.vision.yolo import StarCSP
        >>> stage = StarCSP(32, depth=2)
        >>> stage(torch.randn(1, 32, 20, 20)).shape
        torch.Size([1, 32, 20, 20])
        >>> stage.mix.conv.in_channels  # two halves, and one of each block
        64
    """

    def __init__(self, dim: int, depth: int = 1) -> None:
        super().__init__()
        self.dim = positive_int("StarCSP", "dim", dim)
        if dim % 2:
            raise ValueError(f"StarCSP: dim must be even, since it is split in halves, got {dim}")
        half = dim // 2
        self.split = ConvNorm(dim, dim, 1, act="silu")
        self.blocks = nn.ModuleList(
            StarBlock2d(half) for _ in range(positive_int("StarCSP", "depth", depth))
        )
        self.mix = ConvNorm((2 + depth) * half, dim, 1, act="silu")

    def forward(self, x: Tensor) -> Tensor:
        check_images("StarCSP", x, self.dim)
        maps = list(self.split(x).chunk(2, 1))
        for block in self.blocks:
            maps.append(block(maps[-1]))
        return self.mix(torch.cat(maps, 1))  # type: ignore[no-any-return]
