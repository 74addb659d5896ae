"""Rows of the strided convolutions of a StarNet, with norm and activation, in inference."""

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.gpu.kernels import BASES, BATCH, least_work
from benchmarks.gpu.lab import Lab
from benchmarks.gpu.nets import GATED_IMAGES, calibrated, on
from benchmarks.gpu.trial import Row, Subject, Trial, compare
from benchmarks.kernels import floor as floors
from starlayers.vision import ConvNorm
from starlayers.vision.fused_conv import compute
from starlayers.vision.layout import to_channels_last


def convolutions(net: str) -> list[Row]:
    """Return a row for the stem, with relu6, and for the convolution before each stage."""
    rows = []
    for i, (side, channels, out) in enumerate(floors.convolutions(BASES[net])):
        what = f"stage {i}" if i else "stem, relu6"
        build = partial(
            _convolution, side=side, channels=channels, out=out, act=None if i else "relu6"
        )
        label = f"{net} {what}, {side}x{side}, {channels} -> {out} channels"
        rows.append(Row("convolution", label, build))
    return rows


def _convolution(lab: Lab, side: int, channels: int, out: int, act: str | None) -> Trial:
    """Images of a stem lie as a loader has them; the others in channels_last."""
    torch.manual_seed(0)
    # the interpreter takes float16, but not bfloat16
    n, size, dtype = lab.size((BATCH, side, torch.bfloat16), (2, 9, torch.float16))
    x = lab.randn(n, channels, size, size, dtype=dtype)
    x = x if act else to_channels_last(x)
    layer = ConvNorm(channels, out, 3, stride=2, act=act, device=lab.device)
    layer = calibrated(layer, x[:GATED_IMAGES])

    def defined(own: nn.Module, images: Tensor) -> Tensor:
        return own(to_channels_last(images))

    def subject(call: Callable[..., Tensor], dtype: torch.dtype = dtype) -> Subject:
        return Subject(partial(call, copy.deepcopy(layer).to(dtype), x.to(dtype)))

    eager = on("eager", defined)
    subjects = {
        "eager": subject(eager),
        "torch.compile": subject(on("eager", lab.compiled(defined))),
        "fused": subject(on("triton", compute)),
    }
    work = floors.convolution(side, channels, out, act is not None)
    return compare(
        lab, subjects, subject(eager, torch.float64), "forward", baselines=["torch.compile"],
        work=least_work(work, "bytes"),
    )  # fmt: skip
