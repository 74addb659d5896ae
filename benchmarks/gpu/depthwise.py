"""Rows of the depthwise convolution and its gradients."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.kernels import BASES, BATCH, least_work, stage_label, stages
from benchmarks.gpu.lab import Lab
from benchmarks.gpu.trial import Row, Trial
from benchmarks.kernels import floor as floors
from starlayers.kernels import dwconv as dwconv_op

CONVOLUTIONS = ("forward", "dx", "dw", "dx and dw")
CUDNN = ["cuDNN NCHW", "cuDNN channels_last"]


def depthwise(net: str, directions: Sequence[str] = CONVOLUTIONS) -> list[Row]:
    return [
        Row("depthwise", f"{stage_label(net, stage)}, {direction}",
            partial(_dwconv, side=side, channels=channels, direction=direction))
        for direction in directions
        for stage, side, channels in stages(BASES[net])
    ]  # fmt: skip


def images(lab: Lab, side: int, channels: int, batch: int = BATCH) -> tuple[Tensor, Tensor, Tensor]:
    """Return x (N, side, side, C), kernels (C, 1, 7, 7) and bias (C)."""
    n, side, channels = lab.size((batch, side, channels), (1, 4, 16))
    return (
        lab.randn(n, side, side, channels),
        lab.randn(channels, 1, 7, 7, scale=1 / 7),
        lab.randn(channels),
    )


def _dwconv(lab: Lab, side: int, channels: int, direction: str) -> Trial:
    x, k, b = images(lab, side, channels)
    channels = len(k)
    dy = lab.randn(*x.shape, seed=1)
    gradients = [direction != "dw", direction != "dx", direction == "dx and dw"]

    def library(x: Tensor, k: Tensor, b: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        """On (N, C, height, width), in whatever layout it lies."""
        if direction == "forward":
            return (F.conv2d(x, k, b, padding=3, groups=channels),)
        return torch.ops.aten.convolution_backward(
            dy, x, k, [channels], [1, 1], [3, 3], [1, 1], False, [0, 0], channels, gradients
        )  # type: ignore[no-any-return]

    flipped = k.flip(-1, -2)
    leaves = [t.detach().requires_grad_() for t in (x, k, b)]

    @cache
    def gradient() -> Callable[[Any], tuple[Tensor, ...]]:
        y = dwconv_op.dwconv(*leaves, None, None, None, False)[0]
        return partial(torch.autograd.grad, y, grad_outputs=dy, retain_graph=True)

    def fused() -> tuple[Tensor, ...]:
        if direction == "forward":
            return (dwconv_op.dwconv(x, k, b, None, None, None, False)[0],)
        if direction == "dx":  # what the gradient launches
            return (dwconv_op.dwconv(dy, flipped, None, None, None, None, False)[0],)
        if direction == "dw":
            run = gradient()
            with mock.patch.object(dwconv_op, "convolve", return_value=(unused, unused)):
                return run(leaves[1])
        return gradient()(leaves)

    unused = torch.empty_like(x)
    last = [t.permute(0, 3, 1, 2) for t in (x, dy)]
    first = [t.contiguous() for t in last]
    kernel = k.contiguous(memory_format=torch.channels_last)
    runs: dict[str, Callable[[], Any]] = {
        "cuDNN NCHW": lambda: library(first[0], k, b, first[1]),
        "cuDNN channels_last": lambda: library(last[0], kernel, b, last[1]),
        "fused": fused,
    }

    def check(run: Callable[[], Any], channels_first: bool) -> Callable[[], list[Tensor]]:
        def tensors() -> list[Tensor]:
            found = [t for t in run() if t is not None]
            images = channels_first and direction != "dw"
            return [found[0].permute(0, 2, 3, 1), *found[1:]] if images else found

        return tensors

    wide = [t.double() for t in (last[0], k, b, last[1])]
    return Trial(
        dict(runs),
        {name: check(run, name != "fused") for name, run in runs.items()},
        check(lambda: library(*wide), True),
        CUDNN,
        yardstick="cuDNN channels_last",
        # either gradient alone moves and multiplies as much as the forward
        work=least_work(floors.depthwise_forward(x[..., 0].numel(), channels))
        if direction != "dx and dw"
        else {},
    )
