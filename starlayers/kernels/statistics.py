"""Mean and variance of an op's output as further outputs, and their gradients."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from starlayers.kernels.registration import ceil_div, launch

# elements a program merges at a time: there are few programs, so each keeps many loads in flight
TILES, CHANNELS = 1024, 4
WARPS = 8

__all__ = [
    "Outputs",
    "Upstream",
    "empty_statistics",
    "fake_statistics",
    "merged_statistics",
    "save_inputs",
    "saved_inputs",
    "with_statistics",
]


#: output of an op, and mean and variance of it or empty tensors
Outputs = tuple[Tensor, Tensor, Tensor]


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


def with_statistics(y: Tensor, stats: bool) -> Outputs:
    """Return `y` and, with `stats`, mean and biased variance of its channels.

    Channels are the last dimension. Without `stats` both statistics are empty.
    """
    if not stats:
        return y, *empty_statistics(y)
    wide = y if y.dtype == torch.float64 else y.float()
    var, mean = torch.var_mean(wide.flatten(0, -2), 0, correction=0)
    return y, mean, var


def fake_statistics(y: Tensor, stats: bool) -> Outputs:
    """Return empty tensors of the shapes and dtypes of `with_statistics`."""
    if not stats:
        return y, *empty_statistics(y)
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    return y, y.new_empty(y.shape[-1], dtype=dtype), y.new_empty(y.shape[-1], dtype=dtype)


class Upstream(NamedTuple):
    """Gradients that reach an output `z`: its own, and those of its statistics.

    Together they are `dy + q + p (z - mean)`. All but `dy` are `None` without statistics.
    """

    dy: Tensor
    z: Tensor | None = None
    mean: Tensor | None = None
    p: Tensor | None = None
    q: Tensor | None = None

    def total(self) -> Tensor:
        """Return the whole gradient of `z`, in the dtype of `dy`."""
        dy, z, mean, p, q = self
        if z is None or mean is None or p is None or q is None:
            return dy
        wide = dy if dy.dtype == torch.float64 else dy.float()
        return (wide + q + p * (z - mean)).to(dy.dtype)


def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    """Save the inputs of an op whose last argument is `stats`; with it, also y and mean."""
    ctx.tensors = sum(x is None or isinstance(x, Tensor) for x in inputs)
    ctx.options = inputs[ctx.tensors :]
    saved = output[:2] if ctx.options[-1] else ()
    ctx.save_for_backward(*inputs[: ctx.tensors], *saved)


def saved_inputs(
    ctx: Any, dy: Tensor, dmean: Tensor, dvar: Tensor
) -> tuple[list[Tensor | None], Upstream]:
    """Return the inputs that `save_inputs` saved, and the gradients that reach the output.

    With mean and variance over n rows, biased, p is `2 dvar / n` and q is `dmean / n`.
    """
    tensors = ctx.saved_tensors  # read once: a checkpoint unpacks each tensor only once
    inputs = list(tensors[: ctx.tensors])
    if len(tensors) == ctx.tensors:
        return inputs, Upstream(dy)
    z, mean = tensors[ctx.tensors :]
    count = tensors[0][..., 0].numel()
    return inputs, Upstream(dy, z, mean, dvar * (2 / count), dmean / count)
