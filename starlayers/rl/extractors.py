"""Star features extractors for flat observations, images and dictionaries."""

from collections.abc import Sequence
from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_flattened_obs_dim, is_image_space
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
)
from torch import Tensor, nn

from starlayers.checks import positive_int
from starlayers.modules import StarBlock
from starlayers.rl.trunks import KeepsInit, activation_name, build_trunk, star_residual


class StarExtractor(KeepsInit, BaseFeaturesExtractor):
    """Features extractor of flat observations: a trunk of star layers.

    Beware that SB3 puts an MLP of its own behind an extractor unless `net_arch=[]` is given.

    Shapes: (batch, *observation) -> (batch, features_dim).

    Args:
        observation_space: any space that SB3 flattens.
        features_dim: channels of the result, and width of every layer.
        net: a name in `NETS`.
        depth: number of layers, or of residual blocks.
        activation_fn: a name from `ACTIVATIONS`, or a class as SB3 takes it.
        norm: "layer", "rms", "none" or `None`.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range; the message names it.

    Example:
        >>> from stable_baselines3 import PPO
        >>> kwargs = {"features_extractor_class": StarExtractor, "net_arch": []}
        >>> model = PPO("MlpPolicy", "CartPole-v1", policy_kwargs=kwargs)
        >>> model.policy.features_dim
        64
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        features_dim: int = 64,
        *,
        net: str = "star",
        depth: int = 2,
        activation_fn: str | type[nn.Module] | None = "tanh",
        norm: str | None = None,
    ) -> None:
        features_dim = positive_int("StarExtractor", "features_dim", features_dim)
        depth = positive_int("StarExtractor", "depth", depth)
        super().__init__(observation_space, features_dim)
        self.flatten = nn.Flatten()
        self.trunk = build_trunk(
            net,
            get_flattened_obs_dim(observation_space),
            [features_dim] * depth,
            act=activation_name(activation_fn),
            norm=norm,
        )

    def forward(self, observations: Tensor) -> Tensor:
        return self.trunk(self.flatten(observations))  # type: ignore[no-any-return]


class StarCnnExtractor(KeepsInit, BaseFeaturesExtractor):
    """Features extractor of images: a small StarNet.

    A strided stem, then stages of a strided 3x3 convolution and star blocks, then one linear
    layer with a ReLU. Strides follow the shorter side of the image, in pixels: from 48 the stem
    divides it by four (8x8 kernel), from 16 by two (3x3), below it keeps the size; a stage divides
    by two while more than 4 pixels are left. Norms are over channels: PPO collects in evaluation
    mode and learns in training mode, and batch statistics would make the two disagree.

    Shapes: (batch, C, H, W) -> (batch, features_dim); uint8 images, which SB3 scales to [0, 1],
    or floats.

    Args:
        observation_space: a `Box` of three dimensions, channels first.
        features_dim: channels of the result.
        normalized_image: accepted for SB3, which passes it; bytes and floats are taken either way.
        dims: channels of each stage.
        depths: number of star blocks in each stage.
        activation_fn: of the star blocks; a name from `ACTIVATIONS`, or a class as SB3 takes it.

    Raises:
        TypeError: `features_dim` is no integer, or `activation_fn` neither a name nor a class.
        ValueError: a space that is no image or has its channels last, `dims` and `depths` of
            different lengths, an unknown activation, `features_dim` below 1.

    Example:
        >>> space = spaces.Box(0, 255, (4, 84, 84), dtype="uint8")
        >>> extractor = StarCnnExtractor(space)
        >>> extractor.stem
        Conv2d(4, 32, kernel_size=(8, 8), stride=(4, 4), padding=(4, 4))
        >>> extractor(torch.rand(2, 4, 84, 84)).shape
        torch.Size([2, 512])
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        features_dim: int = 512,
        normalized_image: bool = False,
        *,
        dims: Sequence[int] = (32, 64),
        depths: Sequence[int] = (1, 1),
        activation_fn: str | type[nn.Module] | None = "relu6",
    ) -> None:
        act = activation_name(activation_fn)
        shape = getattr(observation_space, "shape", None)
        if not isinstance(observation_space, spaces.Box) or shape is None or len(shape) != 3:
            raise ValueError(
                f"StarCnnExtractor expects a Box of shape (C, H, W), got {observation_space}; "
                "StarMlpPolicy and StarMultiInputPolicy take other spaces"
            )
        if shape[2] <= 4 < min(shape[:2]):
            raise ValueError(
                f"StarCnnExtractor expects channels first, and {shape} looks like channels last; "
                "VecTransposeImage turns bytes, gymnasium's TransformObservation floats"
            )
        if len(dims) != len(depths) or not dims:
            raise ValueError(
                f"StarCnnExtractor: dims={dims} and depths={depths} need one entry for each stage"
            )
        super().__init__(
            observation_space, positive_int("StarCnnExtractor", "features_dim", features_dim)
        )
        channels, size = shape[0], min(shape[1:])
        kernel, stride = (8, 4) if size >= 48 else (3, 2) if size >= 16 else (3, 1)
        self.stem = nn.Conv2d(channels, dims[0], kernel, stride, padding=kernel // 2)
        self.stem_norm = nn.LayerNorm(dims[0])
        size = (size + 2 * (kernel // 2) - kernel) // stride + 1
        stages, previous = [], dims[0]
        for dim, depth in zip(dims, depths):
            stride = 2 if size > 4 else 1
            size = (size - 1) // stride + 1
            down = ChannelsLastConv(nn.Conv2d(previous, dim, 3, stride, padding=1))
            stages.append(nn.Sequential(down, *(_star_block(dim, act) for _ in range(depth))))
            previous = dim
        self.stages = nn.Sequential(*stages, nn.LayerNorm(previous))
        with torch.no_grad():
            flat = self.feature_maps(torch.zeros(1, *shape)).numel()
        self.head = nn.Sequential(nn.Linear(flat, features_dim), nn.ReLU())

    def feature_maps(self, images: Tensor) -> Tensor:
        """Compute the maps before the last linear layer: (batch, height, width, channels)."""
        pixels = self.stem(images).permute(0, 2, 3, 1)
        return self.stages(self.stem_norm(pixels))  # type: ignore[no-any-return]

    def forward(self, observations: Tensor) -> Tensor:
        return self.head(self.feature_maps(observations).flatten(1))  # type: ignore[no-any-return]

    def reset_star(self, gain: float) -> None:
        super().reset_star(gain)
        for module in self.modules():
            # depthwise filters: an orthogonal (channels, 9) matrix makes each of them nearly zero
            if isinstance(module, nn.Conv2d) and module.groups > 1:
                module.reset_parameters()


class ChannelsLastConv(nn.Module):
    """Convolution over (N, H, W, C) tensors."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # type: ignore[no-any-return]


def _depthwise(dim: int) -> ChannelsLastConv:
    return ChannelsLastConv(nn.Conv2d(dim, dim, 3, padding=1, groups=dim))


def _star_block(dim: int, act: str) -> StarBlock:
    """Make a depthwise star block over (N, H, W, C), at first the identity."""
    pre = nn.Sequential(_depthwise(dim), nn.LayerNorm(dim))
    return star_residual(dim, act, pre, _depthwise(dim))


class StarCombinedExtractor(KeepsInit, CombinedExtractor):
    """Features extractor of dictionaries: StarNets for images, the rest flattened.

    It takes the place of SB3's `CombinedExtractor`.

    Shapes: a dictionary of (batch, ...) -> (batch, features_dim), the features of all keys
    concatenated.

    Args:
        observation_space: a `Dict` of spaces.
        cnn_output_dim: features of each image.
        normalized_image: True if images are floats from 0 to 1 already.
        kwargs: passed on to each `StarCnnExtractor`.

    Raises:
        ValueError: the space is no `Dict`.

    Example:
        >>> vector = spaces.Box(-1, 1, (3,))
        >>> space = spaces.Dict({"a": vector, "b": spaces.Box(0, 255, (3, 36, 36), dtype="uint8")})
        >>> StarCombinedExtractor(space, cnn_output_dim=16).features_dim
        19
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        cnn_output_dim: int = 256,
        normalized_image: bool = False,
        **kwargs: Any,
    ) -> None:
        if not isinstance(observation_space, spaces.Dict):
            raise ValueError(f"StarCombinedExtractor expects a Dict space, got {observation_space}")
        extractors = {
            key: StarCnnExtractor(space, cnn_output_dim, normalized_image, **kwargs)
            if is_image_space(space, normalized_image=normalized_image)
            else FlattenExtractor(space)
            for key, space in observation_space.spaces.items()
        }
        features_dim = sum(extractor.features_dim for extractor in extractors.values())
        # subclasses of SB3's extractor are told by SB3 when images are floats already; its
        # constructor is skipped, because it would build networks of its own
        BaseFeaturesExtractor.__init__(self, observation_space, features_dim)
        self.extractors = nn.ModuleDict(extractors)
