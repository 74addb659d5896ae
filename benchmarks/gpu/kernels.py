"""Rows of single kernels: copy, star product, star MLP, and the wide MLP."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.lab import Lab
from benchmarks.gpu.trial import AUTOTUNED, Row, Subject, Trial, compare
from benchmarks.kernels import floor as floors
from starlayers.functional import star_mlp_reference, star_reference
from starlayers.kernels.star import star
from starlayers.kernels.star_mlp import star_mlp
from starlayers.kernels.star_mlp_wide import star_mlp_wide

BATCH = 256
BASES = {"S4": 32, "S1": 24}
SEARCHED = f"torch.compile {AUTOTUNED}"
MODE = "max-autotune-no-cudagraphs"  # graphs are compared apart, for every program alike


def stages(base: int) -> Iterator[tuple[int, int, int]]:
    """Number, height (and width) and channels of the stages of a StarNet at 224 x 224."""
    for i in range(4):
        yield i + 1, 56 >> i, base << i


def stage_label(net: str, stage: int) -> str:
    side, channels = 56 >> (stage - 1), BASES[net] << (stage - 1)
    return f"{net} stage {stage}, {side}x{side}, {channels} channels"


def least_work(least: floors.Work, *more: str) -> dict[str, float]:
    return {"floor_us": least.floor, **{name: getattr(least, name) for name in more}}


def double(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


# ---- copy: what the memory gives


def copy() -> list[Row]:
    def build(lab: Lab) -> Trial:
        x = lab.randn(lab.size(2**29, 2**10))
        y = torch.empty_like(x)
        run = partial(y.copy_, x)
        return Trial(
            {"copy": run}, {"copy": lambda: [run()]}, lambda: [x.double()], ["copy"],
            yardstick="copy", work={"bytes": 4 * x.numel()},
        )  # fmt: skip

    return [Row("copy", "1 GiB", build, seconds=2)]


# ---- the element-wise product


def product() -> list[Row]:
    return [
        Row("product", f"{act}, {layout}, {direction}",
            partial(_product, act=act, packed=layout == "packed", direction=direction))
        for layout in ("two", "packed")
        for act in ("silu", "relu6")
        for direction in ("forward", "backward")
    ]  # fmt: skip


def _product(lab: Lab, act: str, packed: bool, direction: str, autotuned: bool = False) -> Trial:
    rows, cols = lab.size((8192, 14336), (8, 64))
    if packed:
        inputs = [lab.randn(rows, 2 * cols, grad=True)]
    else:
        inputs = [lab.randn(rows, cols, grad=True, seed=i) for i in range(2)]

    def definition(*branches: Tensor) -> Tensor:
        a, b = branches if len(branches) == 2 else branches[0].chunk(2, -1)
        return star_reference(a, b, act)

    subjects = {
        "eager": Subject(partial(definition, *inputs), inputs),
        "torch.compile": Subject(partial(lab.compiled(definition), *inputs), inputs),
        "fused": Subject(
            lambda: star(inputs[0], None if packed else inputs[1], act, 0.0, [], []), inputs
        ),
    }
    if autotuned:
        subjects[SEARCHED] = Subject(partial(lab.compiled(definition, MODE), *inputs), inputs)
    if not packed and act == "silu" and not lab.dry and (liger := _liger()):
        # its backward writes into what it saved, so only its first result is right
        own = [t.detach().clone().requires_grad_() for t in inputs]
        subjects["Liger"] = Subject(partial(liger, *own), own)
    wide = double(inputs)
    least = floors.star_forward if direction == "forward" else floors.star_backward
    return compare(
        lab, subjects, Subject(partial(definition, *wide), wide), direction,
        baselines=["torch.compile"], work=least_work(least(rows * cols), "bytes"),
    )  # fmt: skip


def _liger() -> Callable[..., Tensor] | None:
    try:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError:
        return None
    return LigerSiLUMulFunction.apply  # type: ignore[no-any-return]


# ---- the narrow star MLP


def star_mlps(case: str, net: str) -> list[Row]:
    """Return "mlp-forward" or "mlp-backward" at the stages of a net."""
    return [
        Row(case, stage_label(net, stage),
            partial(_star_mlp, rows=BATCH * side * side, channels=channels, direction=case[4:]))
        for stage, side, channels in stages(BASES[net])
    ]  # fmt: skip


def star_mlps_fp32(case: str) -> list[Row]:
    return [
        Row(case, f"batch 4096, {channels} channels, fp32",
            partial(_star_mlp, rows=4096, channels=channels, direction=case[4:],
                    dtype=torch.float32))
        for channels in (64, 256)
    ]  # fmt: skip


def mlp_inputs(lab: Lab, rows: int, channels: int, dtype: torch.dtype) -> list[Tensor]:
    """x, w1, b1, w2, b2, w3, b3 with branches of about unit size."""
    hidden = 4 * channels
    branch = [((hidden, channels), channels**-0.5), ((hidden,), 1)]
    rest = [((channels, hidden), hidden**-0.5), ((channels,), 1)]
    sizes = [((rows, channels), 1), *branch, *branch, *rest]
    return [
        lab.randn(*shape, dtype=dtype, grad=True, scale=scale, seed=i)
        for i, (shape, scale) in enumerate(sizes)
    ]


def _star_mlp(
    lab: Lab,
    rows: int,
    channels: int,
    direction: str,
    dtype: torch.dtype = torch.bfloat16,
    autotuned: bool = False,
) -> Trial:
    inputs = mlp_inputs(lab, lab.size(rows, 20), channels, dtype)
    subjects = {
        "eager": Subject(partial(star_mlp_reference, *inputs), inputs),
        "torch.compile": Subject(partial(lab.compiled(star_mlp_reference), *inputs), inputs),
        "fused": Subject(lambda: star_mlp(*inputs, None, "relu6", 0.0, False)[0], inputs),
    }
    if autotuned:
        compiled = lab.compiled(star_mlp_reference, MODE)
        subjects[SEARCHED] = Subject(partial(compiled, *inputs), inputs)
    wide = double(inputs)
    least = floors.mlp_forward if direction == "forward" else floors.mlp_backward_ideal
    return compare(
        lab, subjects, Subject(partial(star_mlp_reference, *wide), wide), direction,
        baselines=["torch.compile"],
        work=least_work(least(len(inputs[0]), channels, 4 * channels))
        if dtype.itemsize == 2
        else {},
    )  # fmt: skip


# ---- the wide MLP


def wide(tokens: int) -> Row:
    return Row("wide", wide_label(tokens), partial(_wide, tokens=tokens), seconds=8)


def wide_label(tokens: int) -> str:
    return f"{tokens} x 4096 -> 14336 -> 4096, forward and backward"


def _wide(lab: Lab, tokens: int, autotuned: bool = False) -> Trial:
    tokens, width, hidden = lab.size((tokens, 4096, 14336), (16, 32, 64))
    x = lab.randn(tokens, width, grad=True)
    w1 = lab.randn(hidden, width, scale=width**-0.5, grad=True)
    w2 = lab.randn(hidden, width, scale=width**-0.5, grad=True, seed=1)
    w3 = lab.randn(width, hidden, scale=hidden**-0.5, grad=True)
    inputs = [x, w1, w2, w3]

    def definition(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
        return star_mlp_reference(x, w1, None, w2, None, w3, None, "silu")

    def ours(gemm: str, recompute: bool) -> Subject:
        arguments = (x, w1, None, w2, None, w3, None, "silu", 0.0, recompute, gemm)
        return Subject(lambda: star_mlp_wide(*arguments)[0], inputs)

    subjects = {
        "eager": Subject(partial(definition, *inputs), inputs),
        "torch.compile": Subject(partial(lab.compiled(definition), *inputs), inputs),
        "library": ours("library", False),
        "library, recompute": ours("library", True),
        "triton": ours("triton", False),
        "triton, recompute": ours("triton", True),
    }
    if autotuned:
        subjects[SEARCHED] = Subject(partial(lab.compiled(definition, MODE), *inputs), inputs)
    wider = double(inputs)
    exact = Subject(partial(definition, *wider), wider)
    return compare(
        lab, subjects, exact, "step", baselines=["torch.compile"],
        work={"flops": 9 * 2 * tokens * width * hidden},
    )  # fmt: skip


# ---- the compiler given all the time it wants


def autotuned() -> list[Row]:
    act = partial(_product, act="silu", packed=False, autotuned=True)
    mlp = partial(_star_mlp, direction="forward", autotuned=True)
    builds: dict[str, Callable[[Lab], Trial]] = {
        "product, silu, forward": partial(act, direction="forward"),
        "product, silu, backward": partial(act, direction="backward"),
    }
    for stage, side, channels in stages(BASES["S4"]):
        if stage in (1, 3):
            label = f"mlp-forward, {stage_label('S4', stage)}"
            builds[label] = partial(mlp, rows=BATCH * side * side, channels=channels)
    builds[wide_label(4096)] = partial(_wide, tokens=4096, autotuned=True)
    return [Row("autotune", label, build, seconds=60) for label, build in builds.items()]
