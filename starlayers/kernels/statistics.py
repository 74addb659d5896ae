"""Mean and variance of an op's output as further outputs, and their gradients."""

import torch
from torch import Tensor

from starlayers.kernels.registration import ceil_div, launch

# elements a program merges at a time: there are few programs, so each keeps many loads in flight
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
    """Return the empty mean and variance of an op called without `stats`."""
    return x.new_empty(0, dtype=torch.float32), x.new_empty(0, dtype=torch.float32)


def merged_statistics(parts: Tensor) -> tuple[Tensor, Tensor]:
    """Merge counts, means and squared deviations of tiles into mean and variance.

    `parts` is (tiles, 3, channels), as `store_statistics` writes it; the variance is biased.
    Source: Chan et al., "Updating formulae and a pairwise algorithm for computing sample
    variances", 1979.
    """
    tiles, _, channels = parts.shape
    mean, var = parts.new_empty(channels), parts.new_empty(channels)
    if not tiles:
        return mean.fill_(torch.nan), var.fill_(torch.nan)  # as torch for no elements
    from starlayers.kernels.device.tile import merge_statistics

    launch(
        merge_statistics, (ceil_div(channels, CHANNELS),), parts, mean, var, tiles, C=channels,
        BT=TILES, BC=CHANNELS, num_warps=WARPS,
    )  # fmt: skip
    return mean, var


def with_statistics(y: Tensor, stats: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return `y` and, with `stats`, mean and biased variance of its channels.

    Channels are the last dimension. Without `stats` both statistics are empty.
    """
    if not stats:
        return y, *empty_statistics(y)
    wide = y if y.dtype == torch.float64 else y.float()
    var, mean = torch.var_mean(wide.flatten(0, -2), 0, correction=0)
    return y, mean, var


def fake_statistics(y: Tensor, stats: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty tensors of the shapes and dtypes of `with_statistics`."""
    if not stats:
        return y, *empty_statistics(y)
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    return y, y.new_empty(y.shape[-1], dtype=dtype), y.new_empty(y.shape[-1], dtype=dtype)


def upstream(
    dy: Tensor, z: Tensor | None, mean: Tensor | None, p: Tensor | None, q: Tensor | None
) -> Tensor:
    """Return `dy + q + p (z - mean)`, the whole gradient that reaches an output `z`.

    `dy` is the gradient of `z` itself; `p` and `q` come from its statistics, see
    `statistics_gradient`. Without statistics it is `dy`.
    """
    if z is None or mean is None or p is None or q is None:
        return dy
    wide = dy if dy.dtype == torch.float64 else dy.float()
    return (wide + q + p * (z - mean)).to(dy.dtype)


def statistics_gradient(dmean: Tensor, dvar: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return p and q of `upstream` from the gradients of mean and variance.

    `count` is the number of rows that the statistics are over; the variance is biased.
    """
    return dvar * (2 / count), dmean / count
