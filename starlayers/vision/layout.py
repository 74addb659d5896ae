"""Small layers of networks for images, and their channels_last memory layout."""

from torch import Tensor, nn

from starlayers.activations import get_activation
from starlayers.dispatch import FORWARDS
from starlayers.tracing import record


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


class Activation(nn.Module):
    """Activation by its name in `ACTIVATIONS`, as a module that hooks and containers see.

    Shapes: any -> the same.

    Example:
        >>> import torch
        >>> Activation("relu6")(torch.tensor([-1.0, 3.0, 9.0]))
        tensor([0., 3., 6.])
    """

    def __init__(self, name: str | None) -> None:
        super().__init__()
        self.name = get_activation(name).name

    def forward(self, x: Tensor) -> Tensor:
        return get_activation(self.name).fn(x)

    __prepare_scriptable__ = record

    def extra_repr(self) -> str:
        return self.name


FORWARDS |= {Activation: Activation.forward, OnChannelsLast: OnChannelsLast.forward}


def to_channels_last(x: Tensor) -> Tensor:
    """Return `x` (N, C, H, W) in channels_last layout, copied only if necessary.

    Works under `torch.func.vmap`, which `x.contiguous(memory_format=...)` does not.
    """
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
