"""Star features extractors: flat observations, images, dictionaries."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_flattened_obs_dim, is_image_space
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor
from torch import Tensor, nn

from starlayers.modules import StarBlock, positive_int
from starlayers.rl.trunks import KeepsInit, activation_row, build_trunk, end_in_zero
from starlayers.vision.blocks import OnChannelsLast

__all__ = ["StarCnnExtractor", "StarCombinedExtractor", "StarExtractor"]


class StarExtractor(KeepsInit, BaseFeaturesExtractor):
    """A star trunk over flat observations, as a features extractor of SB3.

    Beware that SB3 puts an MLP of its own behind an extractor unless `net_arch=[]` is given.
    Shapes: (batch, *observation) -> (batch, features_dim).

    Args:
        observation_space: any space SB3 flattens.
        features_dim: channels of the result.
        net: a row of `NETS`.
        depth: layers, or residual blocks.
        activation_fn: a name from `ACTIVATIONS`, or a class as SB3 takes it.
        norm: "layer", "rms" or `None`.

    Raises:
        TypeError, ValueError: an option out of range, naming it.

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
            act=activation_row(activation_fn),
            norm=norm,
        )

    def forward(self, observations: Tensor) -> Tensor:
        return self.trunk(self.flatten(observations))  # type: ignore[no-any-return]


class StarCnnExtractor(KeepsInit, BaseFeaturesExtractor):
    """A small StarNet over images, as a features extractor of SB3.

    A strided stem, then stages of a strided 3x3 convolution and star blocks, then one linear
    layer. Strides follow the size of the image: 84x84 and 64x64 shrink by four in the stem and by
    two in each stage; grids below 16 pixels keep their size in the stem. Norms are over channels:
    PPO collects in eval mode and learns in train mode, and batch statistics would make the two
    disagree.

    Shapes: (batch, C, H, W) -> (batch, features_dim); uint8 images, which SB3 scales to [0, 1],
    or floats.

    Args:
        observation_space: a `Box` of three dimensions, channels first.
        features_dim: channels of the result.
        normalized_image: accepted as SB3's CNN does; floats are taken either way.
        dims: channels of the stages.
        depths: star blocks in each stage.
        activation_fn: of the star blocks; a name from `ACTIVATIONS`, or a class as SB3 takes it.

    Raises:
        ValueError: a space that is no image or has its channels last, `dims` and `depths` of
            different lengths.

    Example:
        >>> space = spaces.Box(0, 255, (4, 84, 84), dtype="uint8")
        >>> StarCnnExtractor(space)(torch.rand(2, 4, 84, 84)).shape
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
        act = activation_row(activation_fn)
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
            raise ValueError(f"StarCnnExtractor: dims={dims} and depths={depths} differ in length")
        super().__init__(observation_space, positive_int("StarCnn", "features_dim", features_dim))
        channels, size = shape[0], min(shape[1:])
        kernel, stride = (8, 4) if size >= 48 else (3, 2) if size >= 16 else (3, 1)
        self.stem = nn.Conv2d(channels, dims[0], kernel, stride, padding=kernel // 2)
        self.stem_norm = nn.LayerNorm(dims[0])
        size = (size + 2 * (kernel // 2) - kernel) // stride + 1
        stages, before = [], dims[0]
        for dim, depth in zip(dims, depths):
            stride = 2 if size > 4 else 1
            size = (size - 1) // stride + 1
            down = nn.Conv2d(before, dim, 3, stride, padding=1)
            blocks = [_block(dim, act) for _ in range(depth)]
            stages.append(nn.Sequential(OnChannelsLast(OrderedDict(conv=down)), *blocks))
            before = dim
        self.stages = nn.Sequential(*stages, nn.LayerNorm(before))
        with torch.no_grad():
            flat = self._maps(torch.zeros(1, *shape)).numel()
        self.head = nn.Sequential(nn.Linear(flat, features_dim), nn.ReLU())

    def _maps(self, images: Tensor) -> Tensor:
        pixels = rearrange(self.stem(images), "n c h w -> n h w c")
        return self.stages(self.stem_norm(pixels))  # type: ignore[no-any-return]

    def forward(self, observations: Tensor) -> Tensor:
        return self.head(self._maps(observations).flatten(1))  # type: ignore[no-any-return]

    def reset_star(self, gain: float) -> None:
        super().reset_star(gain)
        for module in self.modules():
            # an orthogonal (C, 9) matrix gives a filter of one channel next to no weight
            if isinstance(module, nn.Conv2d) and module.groups > 1:
                module.reset_parameters()


def _block(dim: int, act: str) -> StarBlock:
    """A star block over (N, H, W, C) with depthwise 3x3 convolutions, at first the identity."""

    def depthwise() -> OnChannelsLast:
        return OnChannelsLast(OrderedDict(conv=nn.Conv2d(dim, dim, 3, padding=1, groups=dim)))

    pre = nn.Sequential(depthwise(), nn.LayerNorm(dim))
    block = StarBlock(dim, expansion=2, act=act, offset=1.0, pre=pre, post=depthwise())
    end_in_zero(block)
    return block


class StarCombinedExtractor(KeepsInit, CombinedExtractor):
    """A features extractor for dictionaries: images through a StarNet, the rest flattened.

    As SB3's `CombinedExtractor`, whose place it takes. Shapes: a dictionary of (batch, ...) ->
    (batch, features_dim), the features of the keys side by side.

    Args:
        observation_space: a `Dict` of spaces.
        cnn_output_dim: features of each image.
        normalized_image: whether images are floats already.
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
        sizes = {
            key: cnn_output_dim
            if is_image_space(space, normalized_image=normalized_image)
            else get_flattened_obs_dim(space)
            for key, space in observation_space.spaces.items()
        }
        # SB3 tells subclasses of its own extractor when images are floats already; the networks of
        # that one are not made
        BaseFeaturesExtractor.__init__(self, observation_space, sum(sizes.values()))
        self.extractors = nn.ModuleDict(
            {
                key: StarCnnExtractor(space, cnn_output_dim, normalized_image, **kwargs)
                if is_image_space(space, normalized_image=normalized_image)
                else nn.Flatten()
                for key, space in observation_space.spaces.items()
            }
        )

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        parts = [extractor(observations[key]) for key, extractor in self.extractors.items()]
        return torch.cat(parts, dim=1)
