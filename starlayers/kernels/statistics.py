"""Mean and variance of an op's output as outputs of their own, and what they send back."""

import torch
from torch import Tensor

from starlayers.kernels.registration import ceil_div, launch

# TILES * CHANNELS elements at a time: few programs, so each has to keep many loads in flight
TILES, CHANNELS = 1024, 4
WARPS = 8

__all__ = [
    "empty_statistics",
    "fake_statistics",
    "merged_statistics",
    "statistics_gradient",
    "upstream",
    "with_statistics",
]


def empty_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """What an op returns for mean and variance when they were not asked for."""
    return x.new_empty(0, dtype=torch.float32), x.new_empty(0, dtype=torch.float32)


def merged_statistics(parts: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance from per-tile counts, means and squared deviations.

    `parts` is (tiles, 3, channels), as the kernels leave them. Source: Chan et al., "Updating
    formulae and a pairwise algorithm for computing sample variances", 1979.
    """
    tiles, _, channels = parts.shape
    mean, var = parts.new_empty(channels), parts.new_empty(channels)
    if not tiles:
        return mean.fill_(torch.nan), var.fill_(torch.nan)  # of nothing, as torch has it
    from starlayers.kernels.device.tile import merge_statistics

    launch(
        merge_statistics, (ceil_div(channels, CHANNELS),), parts, mean, var, tiles, C=channels,
        BT=TILES, BC=CHANNELS, num_warps=WARPS,
    )  # fmt: skip
    return mean, var


def with_statistics(y: Tensor, stats: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`y` with mean and biased variance of its last dimension's channels, where asked for."""
    if not stats:
        return y, *empty_statistics(y)
    wide = y if y.dtype == torch.float64 else y.float()
    var, mean = torch.var_mean(wide.flatten(0, -2), 0, correction=0)
    return y, mean, var


def fake_statistics(y: Tensor, stats: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What `with_statistics` returns, in shape and dtype alone."""
    if not stats:
        return y, *empty_statistics(y)
    kind = torch.float64 if y.dtype == torch.float64 else torch.float32
    return y, y.new_empty(y.shape[-1], dtype=kind), y.new_empty(y.shape[-1], dtype=kind)


def upstream(
    dy: Tensor, z: Tensor | None, mean: Tensor | None, p: Tensor | None, q: Tensor | None
) -> Tensor:
    """dy + q + p (z - mean): the gradient that reaches z when its statistics were outputs too."""
    if z is None or mean is None or p is None or q is None:
        return dy
    wide = dy if dy.dtype == torch.float64 else dy.float()
    return (wide + q + p * (z - mean)).to(dy.dtype)


def statistics_gradient(dmean: Tensor, dvar: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """p and q of `upstream`, from the gradients of mean and biased variance over `count` rows."""
    return dvar * (2 / count), dmean / count
