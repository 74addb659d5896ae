"""Rows of host time: what a call of an op or a block costs in Python until it is launched."""

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.depthwise import images
from benchmarks.gpu.kernels import double, mlp_inputs
from benchmarks.gpu.lab import Lab
from benchmarks.gpu.nets import DIRECTIONS, calibrated, on
from benchmarks.gpu.trial import Row, Subject, Trial, compare
from starlayers import StarBlock, StarMLP
from starlayers.functional import star_mlp_reference, star_reference
from starlayers.kernels.dwconv import dwconv
from starlayers.kernels.star import star
from starlayers.kernels.star_mlp import star_mlp
from starlayers.vision import StarBlock2d

CHANNELS = 64
#: what reads Python, not the GPU: so small that kernels never take longer than their launches
ROWS, SIDE = 4096, 14


def host() -> list[Row]:
    """Return a row for each op and block, in inference and with its backward."""
    builds: dict[str, Callable[..., Trial]] = {
        "star product": _product,
        "star MLP": _mlp,
        "depthwise 7x7": _dwconv,
        "StarBlock2d": partial(_block2d, batch=8),
        "StarBlock": _block,
    }
    rows = [
        Row("host", host_label(name, direction), partial(build, direction=direction), 3)
        for name, build in builds.items()
        for direction in DIRECTIONS
    ]
    # so small that "auto" may decline it: what the question costs
    declined = partial(_block2d, batch=1, backend="auto", direction="forward")
    return [*rows, Row("host", "StarBlock2d, one image, by auto", declined, 3)]


def host_label(name: str, direction: str) -> str:
    return f"{name}, {DIRECTIONS[direction]}"


def _trial(
    lab: Lab,
    direction: str,
    inputs: list[Tensor],
    definition: Callable[..., Tensor],
    fused: Callable[..., Tensor],
) -> Trial:
    wide = double(inputs)
    subjects = {
        "eager": Subject(partial(definition, *inputs), inputs),
        "fused": Subject(partial(fused, *inputs), inputs),
    }
    exact = Subject(partial(definition, *wide), wide)
    return compare(lab, subjects, exact, direction, baselines=["eager"], clock="host")


def _product(lab: Lab, direction: str) -> Trial:
    inputs = [lab.randn(lab.size(ROWS, 20), CHANNELS, grad=True, seed=i) for i in range(2)]

    def fused(x1: Tensor, x2: Tensor) -> Tensor:
        return star(x1, x2, "relu6", 0.0, [], [])  # type: ignore[no-any-return]

    return _trial(lab, direction, inputs, partial(star_reference, act="relu6"), fused)


def _mlp(lab: Lab, direction: str) -> Trial:
    inputs = mlp_inputs(lab, lab.size(ROWS, 20), CHANNELS, torch.bfloat16)

    def fused(*tensors: Tensor) -> Tensor:
        return star_mlp(*tensors, None, "relu6", 0.0, False)[0]  # type: ignore[no-any-return]

    return _trial(lab, direction, inputs, star_mlp_reference, fused)


def _dwconv(lab: Lab, direction: str) -> Trial:
    inputs = [t.requires_grad_() for t in images(lab, SIDE, CHANNELS, batch=8)]

    def definition(x: Tensor, k: Tensor, b: Tensor) -> Tensor:
        y = F.conv2d(x.permute(0, 3, 1, 2), k, b, padding=3, groups=len(k))
        return y.permute(0, 2, 3, 1)

    def fused(x: Tensor, k: Tensor, b: Tensor) -> Tensor:
        return dwconv(x, k, b, None, None, None, False)[0]  # type: ignore[no-any-return]

    return _trial(lab, direction, inputs, definition, fused)


def _block2d(lab: Lab, direction: str, batch: int, backend: str = "triton") -> Trial:
    torch.manual_seed(0)
    n, side, channels = lab.size((batch, SIDE, CHANNELS), (1, 4, 16))
    x = lab.randn(n, channels, side, side).contiguous(memory_format=torch.channels_last)
    model = calibrated(StarBlock2d(channels, device=lab.device), x)
    return _modules(lab, direction, model.bfloat16(), x, backend, folds=direction == "forward")


def _block(lab: Lab, direction: str) -> Trial:
    torch.manual_seed(0)
    mlp = StarMLP(CHANNELS, device=lab.device, dtype=torch.bfloat16)
    x = lab.randn(lab.size(256, 16), CHANNELS)
    return _modules(lab, direction, StarBlock(CHANNELS, mlp), x, "triton")


def _modules(
    lab: Lab,
    direction: str,
    model: torch.nn.Module,
    x: Tensor,
    backend: str,
    folds: bool = False,
) -> Trial:
    model = model.train(direction == "step")

    def subject(backend: str, dtype: torch.dtype = x.dtype, fold: bool = False) -> Subject:
        own = copy.deepcopy(model).to(dtype)
        if fold:  # in float32: the folded weights are then rounded once
            own = own.float()
            own.fuse()
            own = own.to(dtype)
        return Subject(partial(on(backend, own), x.to(dtype)), list(own.parameters()))

    subjects = {"eager": subject("eager"), "fused": subject(backend)}
    if folds:
        subjects["fused, fuse()"] = subject(backend, fold=True)
    exact = subject("eager", torch.float64)
    return compare(lab, subjects, exact, direction, baselines=["eager"], clock="host", grouped=True)
