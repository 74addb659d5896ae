"""BatchNorm as an affine map per channel, by the statistics of the batch or the running ones."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

__all__ = [
    "Affine",
    "norm_as_affine",
    "unusual",
    "update_statistics",
    "uses_batch_statistics",
]


def unusual(norm: nn.Module) -> str:
    """Return why PyTorch's own BatchNorm has to judge `norm`; empty if there is no reason."""
    if not isinstance(norm, nn.BatchNorm2d):
        return ""
    if (norm.running_mean is None) != (norm.running_var is None):
        return "a norm has only one of running_mean and running_var"
    return "" if norm.eps > 0 else f"a norm has eps={norm.eps}"


def uses_batch_statistics(norm: nn.Module) -> bool:
    """Return True if `norm` is a BatchNorm that normalises by the batch itself."""
    if not isinstance(norm, nn.BatchNorm2d):
        return False
    # as an attribute: somebody may have set a plain tensor in the place of the buffer
    return norm.training or norm.running_mean is None


@dataclass(frozen=True)
class Affine:
    """Affine map per channel of a BatchNorm: `scale * (x - center) + bias`, float32."""

    scale: Tensor
    center: Tensor
    bias: Tensor

    @property
    def shift(self) -> Tensor:
        """Constant term of the map: `scale * x + shift`."""
        return self.bias - self.scale * self.center


def norm_as_affine(
    norm: nn.Module, mean: Tensor | None, var: Tensor | None, count: int
) -> Affine | None:
    """Return `norm` as an affine map, or `None` for an Identity.

    `mean` and `var` are the batch's, over `count` values per channel. A norm in training uses them
    and updates its running statistics; one in eval uses its running statistics.
    """
    if not isinstance(norm, nn.BatchNorm2d):
        return None
    if uses_batch_statistics(norm):
        if count == 1:
            raise ValueError("BatchNorm in training needs more than 1 value per channel, got 1")
        update_statistics(norm, cast(Tensor, mean), cast(Tensor, var), count)
    else:
        mean, var = norm.running_mean, norm.running_var
    center = cast(Tensor, mean).float()
    scale = torch.rsqrt(cast(Tensor, var).float() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    bias = torch.zeros_like(center) if norm.bias is None else norm.bias.float()
    return Affine(scale, center, bias)


@torch.no_grad()
def update_statistics(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """Update the running statistics as `nn.BatchNorm2d` does in training."""
    if not (norm.training and norm.track_running_stats):
        return
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    if norm.running_mean is None or norm.running_var is None:
        return
    momentum: float | Tensor = norm.momentum or 0.0
    if norm.momentum is None and norm.num_batches_tracked is not None:
        momentum = 1.0 / norm.num_batches_tracked.float()
    unbiased = var * (count / (count - 1))
    for running, now in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        running.add_((now.to(running.dtype) - running) * momentum)
