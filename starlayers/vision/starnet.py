"""StarNet, with the interface that users of timm expect."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from starlayers.activations import get_activation
from starlayers.checks import positive_int, probability
from starlayers.coefficients.modules import ScaledStarOp
from starlayers.dispatch import is_plain
from starlayers.initialisation import shrink
from starlayers.modules import StarMLP, StarOp
from starlayers.tracing import record
from starlayers.vision.blocks import ConvNorm, StarBlock2d, check_images, hidden_channels
from starlayers.vision.features import FeatureInfo, stage_numbers
from starlayers.vision.fused_conv import compute
from starlayers.vision.graphed import Graphed
from starlayers.vision.graphs import Graphs
from starlayers.vision.hub import OnHub
from starlayers.vision.layout import Activation, to_channels_last
from starlayers.vision.names import adopt_names
from starlayers.vision.pooling import GlobalPool
from starlayers.vision.recompute import recompute

STEM_CHANNELS = 32


class StarNet(Graphed, OnHub):
    """StarNet image classifier and feature extractor.

    A strided 3x3 stem, then stages of one strided 3x3 convolution and `depths[i]` star blocks at
    `base_dim * 2**i` channels, a last BatchNorm, pooling, dropout and a linear head. These are its
    children, in this order: `nn.Sequential(*model.children())` computes the same. It computes in
    channels_last, whatever the layout of the input.

    Shapes: (N, in_chans, H, W) of any size -> (N, num_classes).

    Args:
        base_dim: channels of the first stage.
        depths: number of star blocks in each stage.
        mlp_ratio: hidden channels of the star MLPs over their channels.
        num_classes: outputs of the head; 0 for no head (returns pooled features).
        in_chans: channels of the image.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0 at the first.
        act: name in `ACTIVATIONS` for stem and blocks; `None` for no activation.
        mlp_layer: makes the MLP of a block, `mlp_layer(dim, hidden, act=act)`, with `device` and
            `dtype` if they are passed: `StarMLP`, or a class of `starlayers.coefficients.modules`.
        norm_layer: makes the norms, `norm_layer(channels)`, with `device` and `dtype` as for
            `nn.BatchNorm2d`: `partial(nn.BatchNorm2d, momentum=0.05)`.
        global_pool: "avg", "max", or another name that `GlobalPool` of `starlayers.vision.pooling`
            knows; "" for none (needs `num_classes=0`).
        kernel_size: side of the depthwise kernels, odd.
        stem_stride: stride of the stem; 1 suits images of 28 to 64 pixels.
        stage_strides: stride of the convolution that begins each stage.
        output_stride: pixels of the image that one of the last map stands for, at most: stages
            that would exceed it keep their resolution, and dilate their kernels instead. `None`
            for no limit.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: an argument out of range, naming it; an input with another number
            of channels or of integer type.

    Weights start as in timm: every convolution and linear weight from a normal distribution of
    deviation 0.02, truncated at -2 and 2. (The authors' code means the same but tests
    `isinstance(m, nn.Linear or nn.Conv2d)`, which leaves convolutions at PyTorch's default.)

    Source: Ma et al., "Rewrite the Stars", CVPR 2024, arXiv 2403.19967.

    Example:
        >>> model = StarNet(16, (1, 1, 3, 1), num_classes=10, in_chans=1, stem_stride=1)
        >>> model(torch.randn(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        base_dim: int = 32,
        depths: Sequence[int] = (3, 3, 12, 5),
        *,
        mlp_ratio: float = 4,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        act: str | None = "relu6",
        mlp_layer: Callable[..., nn.Module] = StarMLP,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        global_pool: str = "avg",
        kernel_size: int = 7,
        stem_stride: int = 2,
        stage_strides: Sequence[int] = (2, 2, 2, 2),
        output_stride: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        positive_int("StarNet", "base_dim", base_dim)
        if not depths or len(depths) != len(stage_strides):
            raise ValueError(
                f"StarNet: depths {tuple(depths)} and stage_strides {tuple(stage_strides)} must "
                "have one entry per stage, at least one"
            )
        for name, numbers in (("depths", depths), ("stage_strides", stage_strides)):
            for number in numbers:
                positive_int("StarNet", f"each of {name}", number)
        self.in_chans = positive_int("StarNet", "in_chans", in_chans)
        probability("StarNet", "drop_path_rate", drop_path_rate)
        self.grad_checkpointing = False
        self.feature_info = FeatureInfo()
        limit = math.inf
        if output_stride is not None:
            limit = positive_int("StarNet", "output_stride", output_stride)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        given = {name: value for name, value in factory.items() if value is not None}
        layers: dict[str, Any] = {"norm_layer": norm_layer, **factory}

        stem_stride = positive_int("StarNet", "stem_stride", stem_stride)
        self.stem = ConvNorm(in_chans, STEM_CHANNELS, 3, stride=stem_stride, act=act, **layers)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        chans, reduction, dilation = STEM_CHANNELS, stem_stride, 1
        stages = []
        for i, (depth, stride) in enumerate(zip(depths, stage_strides, strict=True)):
            dim = base_dim * 2**i
            if reduction * stride > limit:  # the kernels that follow see the pixels they would see
                down = ConvNorm(chans, dim, 3, dilation=dilation, **layers)
                dilation, stride = dilation * stride, 1
            else:
                down = ConvNorm(chans, dim, 3, stride=stride, dilation=dilation, **layers)
            blocks = [
                StarBlock2d(
                    dim,
                    kernel_size,
                    dilation=dilation,
                    mlp=mlp_layer(
                        dim, hidden_channels("StarNet", dim, mlp_ratio), act=act, **given
                    ),
                    drop_path=next(rates),
                    **layers,
                )
                for _ in range(depth)
            ]
            stages.append(nn.Sequential(down, *blocks))
            chans, reduction = dim, reduction * stride
            info = {"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"}
            self.feature_info.append(info)
        self.stages = nn.Sequential(*stages)
        self.num_features = chans
        self.norm: nn.Module = norm_layer(chans, **factory)
        self.global_pool = GlobalPool("")
        self.flatten: nn.Module = nn.Identity()
        self.head_drop = nn.Dropout(probability("StarNet", "drop_rate", drop_rate))
        self.reset_classifier(num_classes, global_pool)
        self.init_weights()

    @property
    def act(self) -> str:
        """Name of the stem's activation; those of the blocks are in their MLPs."""
        act = self.stem._modules.get("act")
        return act.name if isinstance(act, Activation) else get_activation(None).name

    @act.setter
    def act(self, name: str | None) -> None:
        self.stem.act = Activation(name)

    @property
    def drop_rate(self) -> float:
        """Rate of the dropout before the head."""
        return self.head_drop.p

    @drop_rate.setter
    def drop_rate(self, rate: float) -> None:
        self.head_drop.p = probability("StarNet", "drop_rate", rate)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set every parameter and statistic to its start value, also after `to_empty`."""
        for m in self.modules():
            reset = getattr(m, "reset_parameters", None)
            if reset is not None and not isinstance(m, StarOp):  # which resets its children
                reset()
            if isinstance(m, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
            own: Any = m.__dict__.get("reset_parameters")
            if own is not None:
                shrink(*own.args)  # this layer has a smaller start
        for m in self.modules():
            if isinstance(m, ScaledStarOp):
                m.reset_factors()
        if isinstance(self.head, nn.Linear):
            nn.init.zeros_(self.head.bias)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one of `num_classes` outputs.

        Args:
            num_classes: outputs; 0 for no head.
            global_pool: pooling from now on; `None` to keep it. A head needs one: where there is
                none to keep, it is "avg".

        Raises:
            ValueError: a negative `num_classes`, an unknown pool, or a head with the pool "". The
                model is then as before.

        Example:
            >>> model = StarNet(8, (1, 1), stage_strides=(2, 2))
            >>> model.reset_classifier(5)
            >>> model(torch.randn(1, 3, 32, 32)).shape
            torch.Size([1, 5])
        """
        kept = self.global_pool.pool_type or ("avg" if num_classes else "")
        pool = GlobalPool(kept if global_pool is None else global_pool)
        if num_classes != 0:
            positive_int("StarNet", "num_classes", num_classes)
        if num_classes and not pool.pool_type:
            raise ValueError(
                f"StarNet: num_classes={num_classes} needs a global_pool; without one use "
                "num_classes=0"
            )
        self.global_pool, self.num_classes = pool, num_classes
        self.flatten = nn.Flatten(1) if pool.pool_type else nn.Identity()
        self.head_hidden_size = self.num_features * pool.feat_mult()
        self.head: nn.Module = nn.Identity()
        if num_classes:
            like = self.stem.conv.weight
            self.head = nn.Linear(self.head_hidden_size, num_classes, True, like.device, like.dtype)
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
        for part in (self.global_pool, self.flatten, self.head):
            part.train(self.training)

    def get_classifier(self) -> nn.Module:
        """Return the head: `nn.Linear`, or `nn.Identity` without classes."""
        return self.head

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turn on gradient checkpointing: recompute each stage in the backward.

        Saves the activations inside the stages. BatchNorm statistics are updated once a step, as
        without it.
        """
        self.grad_checkpointing = enable

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Compute the features of several stages, for detection and segmentation.

        Args:
            x: images (N, in_chans, H, W).
            indices: stages to return: `None` for all, an int for that many last ones, or a
                sequence of stage numbers, negative ones counting from the end.
            norm: apply the final BatchNorm to the features of the last stage in the list.
            stop_early: do not compute stages after the last one in `indices`.
            output_fmt: "NCHW" only.
            intermediates_only: return the list alone.

        Returns:
            The features of the last stage computed (after the final BatchNorm if it is the last of
            the model), and the list of features, each
            (N, num_chs, ceil(H / reduction), ceil(W / reduction)) as in `feature_info`.

        Raises:
            ValueError: an index out of range or another `output_fmt`.

        Example:
            >>> model = StarNet(8, (1, 1, 1, 1), num_classes=0)
            >>> _, maps = model.forward_intermediates(torch.randn(1, 3, 64, 64), indices=(1, 3))
            >>> [tuple(m.shape) for m in maps]
            [(1, 16, 8, 8), (1, 64, 2, 2)]
        """
        if output_fmt != "NCHW":
            raise ValueError(f"StarNet: output_fmt must be 'NCHW', got {output_fmt!r}")
        wanted = set(stage_numbers("StarNet", len(self.stages), indices))
        last = len(self.stages) - 1
        maps: list[Tensor] = []
        x = self._stem(x)
        for i in range(max(wanted) + 1 if stop_early else last + 1):
            x = self._stage(i, x)
            if i in wanted:
                maps.append(self.norm(x) if norm and i == last else x)
        if intermediates_only:
            return maps
        return (self.norm(x) if i == last else x), maps

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove what the features of some stages do not need, in place.

        Args:
            indices: as for `forward_intermediates`.
            prune_norm: remove the final BatchNorm in any case; it goes with the last stage.
            prune_head: remove pooling and head in any case; they go with the last stage.

        Returns:
            The numbers of the stages asked for.

        Raises:
            ValueError: an index out of range.

        Example:
            >>> model = StarNet(8, (1, 1, 1, 1))
            >>> model.prune_intermediate_layers([0, 1]), len(model.stages), model.num_features
            ([0, 1], 2, 16)
        """
        numbers = stage_numbers("StarNet", len(self.stages), indices)
        shorter = max(numbers) + 1 < len(self.stages)
        self.stages = self.stages[: max(numbers) + 1]
        if prune_norm or shorter:
            self.norm = nn.Identity()
        if shorter:
            self.num_features = self.feature_info.channels(max(numbers))
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return numbers

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's patterns of parameter names for layer-wise rates, by block or by stage."""
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return {"stem": r"^stem\.", "blocks": [(blocks, None), (r"^norm\.", (99999,))]}

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay, beside biases and norms: none."""
        return set()

    def _stem(self, x: Tensor) -> Tensor:
        check_images("StarNet", x, self.in_chans)
        y = compute(self.stem, x) if is_plain(self.stem, ConvNorm) else None
        if y is not None:
            return y
        return self.stem(to_channels_last(x))  # type: ignore[no-any-return]

    def _stage(self, i: int, x: Tensor) -> Tensor:
        stage = self.stages[i]
        if self.grad_checkpointing and torch.is_grad_enabled():
            return recompute(stage, x)
        return stage(x)  # type: ignore[no-any-return]

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the features of images, after the final BatchNorm.

        Shapes: (N, in_chans, H, W) -> (N, num_features, h, w).
        """
        x = self._stem(x)
        for i in range(len(self.stages)):
            x = self._stage(i, x)
        return self.norm(x)  # type: ignore[no-any-return]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute logits from features, or pooled features with `pre_logits`.

        Shapes: (N, num_features, h, w) -> (N, num_classes), or (N, num_features).
        """
        x = self.head_drop(self.flatten(self.global_pool(x)))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        graphs = self._graphs()
        y = None if graphs is None else graphs.replayed(self, x)
        return self.forward_head(self.forward_features(x)) if y is None else y

    __prepare_scriptable__ = record

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        adopt_names(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if isinstance(pool := self.__dict__.pop("global_pool", None), str):
            self._add_steps(pool)

    def _add_steps(self, pool: str) -> None:
        """Make the steps of a network pickled when activation and pooling were no modules."""
        act, drop_rate = self.__dict__.pop("act"), self.__dict__.pop("drop_rate")
        if isinstance(self.stem, ConvNorm) and act != get_activation(None).name:
            self.act = act
        head = self._modules.pop("head")
        self.global_pool = GlobalPool(pool)
        self.flatten = nn.Flatten(1) if pool else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.add_module("head", head)  # after them, as it comes after them
        self.feature_info = FeatureInfo(self.feature_info)
        self.train(self.training)

    def fuse(self, *, graph: bool | str = False) -> "StarNet":
        """Fold every BatchNorm into its neighbour for inference, in place.

        Switches to eval mode, because only running statistics can be folded. The last norm has a
        sum in front of it and becomes a 1x1 depthwise convolution. Norms around MLPs of an unknown
        class stay. The outputs stay the same up to rounding. A fused model that is trained further
        trains without BatchNorm.

        Returns:
            The model.

        Example:
            >>> model = StarNet(8, (1, 1), stage_strides=(2, 2)).fuse()
            >>> any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
            False
        """
        if graph not in (False, True, "auto"):
            raise ValueError(f"StarNet: graph must be True, False or 'auto', got {graph!r}")
        self.eval()
        for m in self.modules():
            if isinstance(m, ConvNorm | StarBlock2d):
                m.fuse()
        if isinstance(self.norm, nn.BatchNorm2d):
            self.norm = _norm_as_conv(self.norm)
        self.__dict__.pop("graphs", None)
        if graph:
            self.graphs = Graphs(always=graph is True)
        return self


def _norm_as_conv(bn: nn.BatchNorm2d) -> nn.Conv2d:
    """Return a 1x1 depthwise convolution that computes `bn` in eval mode."""
    n, like = bn.num_features, bn.weight
    conv = nn.Conv2d(n, n, 1, groups=n, bias=False, device=like.device, dtype=like.dtype)
    nn.init.ones_(conv.weight)
    return fuse_conv_bn_eval(conv.eval(), bn)
