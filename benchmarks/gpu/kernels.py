"""Comparisons of single kernels: K1, K3, K4, and the wide MLP of K2 and K5."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.lab import Comparison, Lab, Subject, Trial, compare, trial
from benchmarks.kernels import floor as floors
from starlayers.functional import star_mlp_reference, star_reference
from starlayers.kernels.star import star
from starlayers.kernels.star_mlp import star_mlp
from starlayers.kernels.star_mlp_wide import star_mlp_wide

BATCH = 256
BASES = {"S4": 32, "S1": 24}
AUTOTUNED = "torch.compile max-autotune"
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


def copy() -> list[Comparison]:
    def build(lab: Lab) -> Trial:
        x = lab.randn(lab.size(2**29, 2**10))
        y = torch.empty_like(x)
        run = partial(y.copy_, x)
        return Trial(
            {"copy": run}, {"copy": lambda: [run()]}, lambda: [x.double()], ["copy"],
            yardstick="copy", work={"bytes": 4 * x.numel()},
        )  # fmt: skip

    return [trial("copy", "1 GiB", build, seconds=2, rank=0)]


# ---- K1: the element-wise product


def k1() -> list[Comparison]:
    found = []
    for act, layout in (("silu", "two"), ("relu6", "two"), ("silu", "packed"), ("relu6", "packed")):
        for direction in ("forward", "backward"):
            found.append(
                trial(
                    "K1", k1_label(act, layout, direction),
                    partial(_k1, act=act, packed=layout == "packed", direction=direction),
                    seconds=3, rank=0,
                )
            )  # fmt: skip
    return found


def k1_label(act: str, layout: str, direction: str) -> str:
    return f"{act}, {layout}, {direction}"


def _k1(lab: Lab, act: str, packed: bool, direction: str, autotuned: bool = False) -> Trial:
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
        subjects[AUTOTUNED] = Subject(partial(lab.compiled(definition, MODE), *inputs), inputs)
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


# ---- K3 and K4: the narrow star MLP


def k3() -> list[Comparison]:
    return _narrow("K3", "forward")


def k4() -> list[Comparison]:
    return _narrow("K4", "backward")


def _narrow(case: str, direction: str) -> list[Comparison]:
    found = []
    for net, base in BASES.items():
        for stage, side, channels in stages(base):
            build = partial(
                _star_mlp, rows=BATCH * side * side, channels=channels, direction=direction
            )
            rank = 0 if net == "S4" else 2
            found.append(trial(case, stage_label(net, stage), build, seconds=3, rank=rank))
    for channels in (64, 256):
        build = partial(
            _star_mlp, rows=4096, channels=channels, direction=direction, dtype=torch.float32
        )
        found.append(trial(case, f"batch 4096, {channels} channels, fp32", build, 9, rank=2))
    return found


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
        subjects[AUTOTUNED] = Subject(partial(compiled, *inputs), inputs)
    wide = double(inputs)
    least = floors.mlp_forward if direction == "forward" else floors.mlp_backward_ideal
    return compare(
        lab, subjects, Subject(partial(star_mlp_reference, *wide), wide), direction,
        baselines=["torch.compile"],
        work=least_work(least(len(inputs[0]), channels, 4 * channels))
        if dtype.itemsize == 2
        else {},
    )  # fmt: skip


# ---- K2 and K5: the wide MLP


def wide() -> list[Comparison]:
    return [
        trial("wide", wide_label(tokens), partial(_wide, tokens=tokens), 8, rank=rank)
        for tokens, rank in ((4096, 0), (8192, 2))
    ]


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
        subjects[AUTOTUNED] = Subject(partial(lab.compiled(definition, MODE), *inputs), inputs)
    wider = double(inputs)
    exact = Subject(partial(definition, *wider), wider)
    return compare(
        lab, subjects, exact, "step", baselines=["torch.compile"],
        work={"flops": 9 * 2 * tokens * width * hidden},
    )  # fmt: skip


# ---- max-autotune, last because it compiles for minutes


def autotuned() -> list[Comparison]:
    """The main shapes again, with the compiler given all the time it wants."""
    found = [
        trial(
            "max-autotune", f"K1 {k1_label('silu', 'two', direction)}",
            partial(_k1, act="silu", packed=False, direction=direction, autotuned=True), 12, rank=3,
        )
        for direction in ("forward", "backward")
    ]  # fmt: skip
    for stage, side, channels in stages(BASES["S4"]):
        if stage in (1, 3):
            build = partial(
                _star_mlp, rows=BATCH * side * side, channels=channels, direction="forward",
                autotuned=True,
            )  # fmt: skip
            label = f"K3 {stage_label('S4', stage)}"
            found.append(trial("max-autotune", label, build, seconds=40, rank=3))
    build = partial(_wide, tokens=4096, autotuned=True)
    found.append(trial("max-autotune", wide_label(4096), build, seconds=90, rank=3))
    return found
