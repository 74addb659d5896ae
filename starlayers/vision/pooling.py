"""Global pooling of feature maps, by the names that timm gives its kinds."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starlayers.tracing import record

__all__ = ["POOLS", "GlobalPool"]


def _avg(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, 1)


def _max(x: Tensor) -> Tensor:
    return F.adaptive_max_pool2d(x, 1)


def _mean(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True)


def _amax(x: Tensor) -> Tensor:
    return x.amax((2, 3), keepdim=True)


#: name of a pool -> function from features (N, C, h, w) to (N, C, 1, 1), or (N, 2 C, 1, 1)
POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "avg": _avg,
    "max": _max,
    "avgmax": lambda x: 0.5 * (_avg(x) + _max(x)),
    "catavgmax": lambda x: torch.cat((_avg(x), _max(x)), 1),
    "fast": _mean,
    "fastavg": _mean,
    "fastmax": _amax,
    "fastavgmax": lambda x: 0.5 * (_mean(x) + _amax(x)),
    "fastcatavgmax": lambda x: torch.cat((_mean(x), _amax(x)), 1),
    "": lambda x: x,
}


class GlobalPool(nn.Module):
    """Global pooling of feature maps to one value for each channel.

    Shapes: (N, C, h, w) -> (N, C, 1, 1); twice the channels for a "catavgmax", and nothing is
    pooled by "".

    Args:
        pool_type: "avg", "max", their mean "avgmax" or both of them "catavgmax"; the same with
            "fast" in front ("fast" is "fastavg"), which reduce instead of calling PyTorch's
            adaptive pools; "" for none.

    Raises:
        ValueError: another name.

    Example:
        >>> GlobalPool("catavgmax")(torch.randn(2, 16, 7, 7)).shape
        torch.Size([2, 32, 1, 1])
    """

    def __init__(self, pool_type: str = "avg") -> None:
        super().__init__()
        if pool_type not in POOLS:
            names = ", ".join(map(repr, POOLS))
            raise ValueError(f"unknown global_pool {pool_type!r}, choose one of {names}")
        self.pool_type = pool_type

    def forward(self, x: Tensor) -> Tensor:
        return POOLS[self.pool_type](x)

    __prepare_scriptable__ = record

    def feat_mult(self) -> int:
        """Return how many values it gives for each channel."""
        return 2 if self.pool_type.endswith("catavgmax") else 1

    def extra_repr(self) -> str:
        return repr(self.pool_type)
