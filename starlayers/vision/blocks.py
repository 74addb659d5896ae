"""Building blocks of StarNet: convolution with BatchNorm, and the star block."""

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from starlayers.activations import get_activation
from starlayers.checks import positive_int
from starlayers.coefficients.modules import RankStarMLP, ScaledStarMLP
from starlayers.dispatch import FORWARDS, Plan, is_plain
from starlayers.modules import StarBlock, StarMLP
from starlayers.tracing import is_traced, record
from starlayers.vision import fused_block, fused_conv

# importable from here as well: networks pickled as a whole refer to this path
from starlayers.vision.layout import Activation, OnChannelsLast
from starlayers.vision.recordings import forget


class ConvNorm(nn.Sequential):
    """Convolution with "same" padding, followed by BatchNorm and an activation.

    On a GPU and without gradients it is one launch, whose result is in channels_last.

    Shapes: (N, in_chans, H, W) -> (N, out_chans, ceil(H / stride), ceil(W / stride)).

    Args:
        in_chans: channels of the input.
        out_chans: channels of the result.
        kernel_size: side of the kernel, odd.
        stride: stride in both directions.
        groups, dilation: as for `nn.Conv2d`.
        act: name in `ACTIVATIONS` of the activation, the child `act`; `None` for none.
        norm_layer: makes the norm, `norm_layer(out_chans, device=..., dtype=...)`.
        device, dtype: of the parameters.

    Raises:
        ValueError: `kernel_size` is even (no symmetric padding keeps the size then).

    Example:
        >>> ConvNorm(3, 8, 3, stride=2)(torch.randn(1, 3, 9, 9)).shape
        torch.Size([1, 8, 5, 5])
    """

    conv: nn.Conv2d
    bn: nn.Module

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        kernel_size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        dilation: int = 1,
        act: str | None = None,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        padding = same_padding(kernel_size, dilation)
        conv = nn.Conv2d(
            in_chans, out_chans, kernel_size, stride, padding, dilation, groups, **factory
        )
        super().__init__(OrderedDict(conv=conv, bn=norm_layer(out_chans, **factory)))
        if get_activation(act).name != get_activation(None).name:
            self.act = Activation(act)

    __prepare_scriptable__ = record

    def plan(self, x: Tensor) -> Plan:
        """Return the plan for images (N, in_chans, H, W): one launch, or why not."""
        return fused_conv.plan(self, x)

    def forward(self, x: Tensor) -> Tensor:
        y = fused_conv.compute(self, x)
        return super().forward(x) if y is None else y  # type: ignore[no-untyped-call]

    def train(self, mode: bool = True) -> "ConvNorm":
        """Set the mode of training, and forget launches recorded for inference."""
        forget(self)
        return super().train(mode)

    def fuse(self) -> None:
        """Fold the BatchNorm into the convolution, in place.

        Uses the running statistics. A second call changes nothing.
        """
        if isinstance(self.bn, nn.BatchNorm2d):
            self.conv = fuse_conv_bn_eval(self.conv, self.bn)
            self.bn = nn.Identity()


FORWARDS[ConvNorm] = ConvNorm.forward


class StarBlock2d(StarBlock):
    """Block of StarNet: `x + drop_path(dw(bn(mlp(bn(dw(x))))))`.

    `dw` are depthwise convolutions and `mlp` is a `StarMLP` over the channels of each pixel: a
    `StarBlock` whose `pre` is depthwise convolution and BatchNorm and whose `post` is BatchNorm
    and depthwise convolution. It computes in channels_last, in which the star MLP reads the
    channels as the last dimension without a copy; an input in another layout is copied once.

    Shapes: (N, dim, H, W) -> (N, dim, H, W).

    Args:
        dim: channels.
        kernel_size: side of the depthwise kernels, odd.
        dilation: pixels from one weight of these kernels to the next.
        mlp: module over the channels of each pixel, (..., dim) -> (..., dim), in the place of the
            star MLP of the next two arguments.
        expansion: hidden channels per channel; `dim * expansion` must be a whole number.
        act: name in `ACTIVATIONS` of the star MLP's activation; `None` for none.
        drop_path, layer_scale: as for `StarBlock`.
        norm_layer: makes the norms, `norm_layer(dim, device=..., dtype=...)`.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: as `StarBlock`; an even `kernel_size`; `mlp` together with options of
            the star MLP; an input that is not (N, dim, H, W).

    Source: Ma et al., "Rewrite the Stars", CVPR 2024, arXiv 2403.19967.

    Example:
        >>> StarBlock2d(16, expansion=3)(torch.randn(2, 16, 14, 14)).shape
        torch.Size([2, 16, 14, 14])
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 7,
        *,
        dilation: int = 1,
        mlp: nn.Module | None = None,
        expansion: float = 4,
        act: str | None = "relu6",
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        layer = type(self).__name__
        dim = positive_int(layer, "dim", dim)
        if mlp is not None and (expansion, act) != (4, "relu6"):
            raise ValueError(
                f"{layer}: expansion={expansion} and act={act!r} are of the star MLP that mlp= "
                "replaces; pass them to that module"
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        padding = same_padding(kernel_size, dilation)

        def depthwise() -> nn.Conv2d:
            return nn.Conv2d(dim, dim, kernel_size, 1, padding, dilation, dim, **factory)

        def norm() -> nn.Module:
            return norm_layer(dim, **factory)

        pre = OnChannelsLast(OrderedDict(conv=depthwise(), bn=norm()))
        post = OnChannelsLast(OrderedDict(bn=norm(), conv=depthwise()))
        if mlp is None:
            mlp = StarMLP(dim, hidden_channels(layer, dim, expansion), act=act, **factory)
        super().__init__(dim, mlp, pre=pre, post=post, drop_path=drop_path, layer_scale=layer_scale)
        self.dim = dim

    pre: OnChannelsLast
    post: OnChannelsLast

    def plan(self, x: Tensor) -> Plan:
        """Return the plan for images (N, dim, H, W): the whole block fused, or why not.

        Raises:
            RuntimeError: the backend is "triton" and cannot serve the block.
        """
        return fused_block.plan(self, x.permute(0, 2, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        check_images(type(self).__name__, x, self.dim)
        x_nhwc = x.permute(0, 2, 3, 1).contiguous()
        y = fused_block.compute(self, x_nhwc)
        y = super().forward(x_nhwc) if y is None else y
        return y.permute(0, 3, 1, 2)

    def train(self, mode: bool = True) -> "StarBlock2d":
        """Set the mode of training, and forget launches recorded for inference."""
        forget(self)
        return super().train(mode)

    def fuse(self) -> None:
        """Fold both BatchNorms and a learned scale into their neighbours, in place.

        Uses the running statistics. A second call changes nothing. Factors that depend on the input
        stay, and so do the norms around an MLP of another class or with hooks, whose result need
        not be that of its last layer.
        """
        pre, post, mlp = self.pre, self.post, self.mlp
        known = type(mlp).forward in (StarMLP.forward, RankStarMLP.forward)
        known = known and is_plain(mlp, type(mlp)) and is_plain(mlp.g, nn.Linear)
        if known and isinstance(pre.bn, nn.BatchNorm2d) and isinstance(post.bn, nn.BatchNorm2d):
            pre.conv, pre.bn = fuse_conv_bn_eval(pre.conv, pre.bn), nn.Identity()
            # g is pointwise, so the norm after it folds into it. The zero padding of the second
            # convolution comes after that norm, as before.
            mlp.g, post.bn = fuse_linear_bn_eval(mlp.g, post.bn), nn.Identity()
        if known and type(mlp) is ScaledStarMLP:
            self.mlp = mlp.fold()


def hidden_channels(layer: str, dim: int, expansion: float) -> int:
    """Return `dim * expansion`; raise ValueError if that is no whole number of at least 1."""
    hidden = dim * expansion
    # compare with a tolerance: 100 * 1.1 is 110.00000000000001
    if not 1 <= hidden < math.inf or abs(hidden - round(hidden)) > 1e-6:
        raise ValueError(
            f"{layer}: dim={dim} times expansion={expansion} gives {hidden} hidden channels; "
            "choose an expansion that makes it a whole number of at least 1"
        )
    return round(hidden)


def check_images(layer_name: str, x: Tensor, channels: int) -> None:
    """Check that `x` is a floating tensor of shape (N, channels, H, W)."""
    if is_traced(x):
        return
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"{layer_name} expects (N, {channels}, H, W), got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(
            f"{layer_name} expects a floating tensor, got {x.dtype}; use x.float() / 255"
        )


def same_padding(kernel_size: int, dilation: int = 1) -> int:
    """Return the padding on each side that keeps the size at stride 1."""
    positive_int("convolution", "dilation", dilation)
    if positive_int("convolution", "kernel_size", kernel_size) % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {kernel_size}")
    return kernel_size // 2 * dilation
