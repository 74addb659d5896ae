"""DemoNet: isotropic network of the paper's study of star against sum."""

from typing import Any

import torch
from torch import Tensor, nn

from starlayers.checks import one_of, positive_int, probability
from starlayers.coefficients.modules import SumMLP
from starlayers.modules import StarBlock, StarMLP
from starlayers.tracing import is_traced
from starlayers.vision.blocks import check_images
from starlayers.vision.layout import to_channels_last

#: how the branches of the MLP are combined -> its class
MLPS: dict[str, type[StarMLP]] = {"mul": StarMLP, "sum": SumMLP}


class _Depthwise(nn.Conv2d):
    """Depthwise convolution on (N, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class DemoNet(nn.Module):
    """Isotropic network for comparing star with sum, everything else equal.

    Patch embedding, `depth` blocks of LayerNorm, 7x7 depthwise convolution and a star MLP of
    expansion 3 with layer scale and residual, then mean pooling, LayerNorm and a linear head.
    The variants of `combine` and `act` have the same number of parameters.

    Shapes: (N, in_chans, H, W), both sides multiples of `patch_size` -> (N, num_classes).

    Args:
        depth: number of blocks.
        dim: channels of every block.
        combine: "mul" (star) or "sum".
        act: name in `ACTIVATIONS` for the first branch; `None` for no activation.
        num_classes: outputs of the head.
        in_chans: channels of the image.
        patch_size: side of the patches (16 in the paper, at 224x224).
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0 at the first.
        layer_scale: start value of the layer scale.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: an argument out of range; an image whose channels or sides do not
            fit.

    Source: Ma et al., "Rewrite the Stars", CVPR 2024, arXiv 2403.19967, section 3.4.

    Example:
        >>> net = DemoNet(depth=2, dim=32, combine="sum", act=None, num_classes=10, patch_size=4,
        ...               in_chans=1)
        >>> net(torch.randn(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        depth: int = 12,
        dim: int = 192,
        *,
        combine: str = "mul",
        act: str | None = "gelu",
        num_classes: int = 1000,
        in_chans: int = 3,
        patch_size: int = 16,
        drop_path_rate: float = 0.0,
        layer_scale: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        numbers = {"depth": depth, "dim": dim, "num_classes": num_classes, "in_chans": in_chans}
        for name, value in {**numbers, "patch_size": patch_size}.items():
            positive_int("DemoNet", name, value)
        probability("DemoNet", "drop_path_rate", drop_path_rate)
        one_of("DemoNet", "combine", combine, MLPS)
        mlp_class = MLPS[combine]
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.patch_size = patch_size
        self.stem = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size, **factory)
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.Sequential(
            *[
                StarBlock(
                    dim,
                    mlp_class(dim, 3 * dim, act=act, **factory),
                    pre=nn.Sequential(
                        nn.LayerNorm(dim, **factory),
                        _Depthwise(dim, dim, 7, padding=3, groups=dim, **factory),
                    ),
                    drop_path=rate,
                    layer_scale=layer_scale,
                )
                for rate in rates
            ]
        )
        self.norm = nn.LayerNorm(dim, **factory)
        self.head = nn.Linear(dim, num_classes, **factory)
        for m in self.modules():
            if isinstance(m, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                assert m.bias is not None
                nn.init.zeros_(m.bias)

    def forward(self, x: Tensor) -> Tensor:
        p = self.patch_size
        check_images("DemoNet", x, self.stem.in_channels)
        if not is_traced(x) and (x.shape[2] % p or x.shape[3] % p):
            raise ValueError(
                f"DemoNet expects sides that are multiples of {p}, got shape {tuple(x.shape)}"
            )
        x = self.stem(to_channels_last(x))
        x = self.blocks(x.permute(0, 2, 3, 1))
        return self.head(self.norm(x.mean((1, 2))))  # type: ignore[no-any-return]
