"""Comparisons of blocks and whole networks: StarBlock2d, StarNet, and the nets of RL."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.kernels import AUTOTUNED, BASES, BATCH, MODE, stage_label, stages
from benchmarks.gpu.lab import GRAPH, Comparison, Lab, Subject, Trial, compare, reason, trial
from starlayers import StarBlock, StarMLP, use_backend, vision
from starlayers.vision import StarBlock2d, to_timm_state_dict

CLASSES = 1000
GATED_IMAGES = 16  # float64 activations of a whole batch would fill the GPU
TIMM = "timm, torch.compile"
OURS_COMPILED = "fused, torch.compile"


def on(backend: str, f: Callable[..., Any]) -> Callable[..., Any]:
    """`f` on a backend, chosen out of a compiler's sight."""

    def call(*args: Any) -> Any:
        with use_backend(backend):
            return f(*args)

    return call


def calibrated(model: nn.Module, x: Tensor) -> nn.Module:
    """`model` with the statistics of one batch, so that its norms do something in eval mode."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 1.0
    with torch.no_grad(), use_backend("eager"):
        model.train()(x.float())
    return model.eval()


# ---- StarBlock2d


def block() -> list[Comparison]:
    return [
        trial(
            "block", block_label(stage, direction),
            partial(_block, side=side, channels=channels, direction=direction),
            seconds=7 if direction == "forward" else 20, rank=0 if stage in (1, 3) else 2,
        )
        for stage, side, channels in stages(BASES["S4"])
        for direction in ("forward", "step")
    ]  # fmt: skip


def block_label(stage: int, direction: str) -> str:
    what = {"forward": "inference", "step": "forward and backward"}[direction]
    return f"{stage_label('S4', stage)}, {what}"


def _block(lab: Lab, side: int, channels: int, direction: str) -> Trial:
    torch.manual_seed(0)
    n, side = lab.size((BATCH, side), (1, 4))
    model = StarBlock2d(channels, device=lab.device)
    x = lab.randn(n, channels, side, side).contiguous(memory_format=torch.channels_last)
    model = calibrated(model, x[:GATED_IMAGES]).bfloat16().train(direction == "step")

    def subject(
        backend: str, wrap: Callable[..., Any] = lambda m: m, dtype: torch.dtype = x.dtype
    ) -> Subject:
        own = copy.deepcopy(model).to(dtype)
        images = x.detach().to(dtype).requires_grad_()
        return Subject(partial(on(backend, wrap(own)), images), [images, *own.parameters()])

    subjects = {
        "eager": subject("eager"),
        "torch.compile": subject("eager", lab.compiled),
        "fused": subject("triton"),
    }
    return compare(
        lab, subjects, subject("eager", dtype=torch.float64), direction,
        baselines=["torch.compile"], grouped=True,
    )  # fmt: skip


# ---- StarNet


def starnet() -> list[Comparison]:
    found = []
    for net, batch, task in product(("s4", "s1"), (256, 1), ("inference", "training")):
        build = partial(_starnet, name=f"starnet_{net}", batch=batch, training=task == "training")
        seconds = (40 if task == "inference" else 150) * (1 if net == "s4" else 0.7)
        # a training step on one image is a curiosity
        rank = 3 if (batch, task) == (1, "training") else 0 if net == "s4" else 2
        found.append(trial("StarNet", starnet_label(net, batch, task), build, seconds, rank))
    return found


def starnet_label(net: str, batch: int, task: str) -> str:
    return f"{net.upper()}, batch {batch}, {task}"


def autotuned() -> list[Comparison]:
    build = partial(_starnet, name="starnet_s4", batch=256, training=False, autotuned=True)
    return [trial("max-autotune", starnet_label("s4", 256, "inference"), build, 150, rank=3)]


def _starnet(lab: Lab, name: str, batch: int, training: bool, autotuned: bool = False) -> Trial:
    """Inference in bfloat16; a training step under autocast with SGD, as training is done."""
    torch.manual_seed(0)
    batch, size = lab.size((batch, 224), (min(batch, 2), 16))
    small = {"base_dim": 8, "depths": (1, 1), "num_classes": 10}
    ours = getattr(vision, name)(**lab.size({}, small | {"stage_strides": (2, 2)}))
    x = lab.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    ours = calibrated(ours.to(lab.device), lab.randn(2, 3, size, size)).train(training)
    if not training:
        ours = ours.bfloat16()
    models: dict[str, tuple[str, nn.Module, Callable[..., Any]]] = {
        "eager": ("eager", ours, lambda m: m),
        "fused": ("auto", ours, lambda m: m),
        OURS_COMPILED: ("auto", ours, lab.compiled),
    }
    peer = _timm(name, ours, lab.size({}, small))
    if peer is not None:
        models[TIMM] = ("eager", peer, lab.compiled)
        if not training:
            models["timm"] = ("eager", peer, lambda m: m)
        if autotuned:
            models[f"timm, {AUTOTUNED}"] = ("eager", peer, partial(lab.compiled, mode=MODE))
    if not training:
        # folded in float32: the folded weights are then rounded once
        folded = copy.deepcopy(ours).float().fuse().bfloat16()
        models["fused, fuse()"] = ("auto", folded, lambda m: m)
    make = _training if training else _inference
    programs, checks = {}, {}
    for key, (backend, model, wrap) in models.items():
        own = copy.deepcopy(model).to(memory_format=torch.channels_last)
        programs[key] = on(backend, make(wrap(own), own, x)[0])
        if "torch.compile" not in key:  # it would compile again for the gated batch
            # on a copy: a training step's check leaves running statistics and gradients behind
            gated = copy.deepcopy(own)
            checks[key] = on(backend, make(gated, gated, x[:GATED_IMAGES])[1])
        programs[key + GRAPH] = lab.captured(programs[key])
    exact = copy.deepcopy(ours).double()
    return Trial(
        programs, checks, on("eager", make(exact, exact, x[:GATED_IMAGES].double())[1]),
        [TIMM, TIMM + GRAPH], ahead=False,
        work={"images": batch},
    )  # fmt: skip


def _timm(name: str, ours: nn.Module, changes: dict[str, Any]) -> nn.Module | None:
    """timm's model with our weights, or None where timm cannot be imported."""
    try:
        import timm
    except ImportError as error:
        print(f"no baseline of timm's: {reason(error)}")
        return None
    model = timm.create_model(name, **changes)
    model.load_state_dict(to_timm_state_dict(ours))
    return model.to(next(ours.parameters())).train(ours.training)  # type: ignore[no-any-return]


Program = tuple[Callable[[], object], Callable[[], list[Tensor]]]


def _inference(model: Callable[..., Tensor], _: nn.Module, x: Tensor) -> Program:
    def run() -> list[Tensor]:
        with torch.inference_mode():
            return [model(x)]

    return run, run


def _training(model: Callable[..., Tensor], owner: nn.Module, x: Tensor) -> Program:
    target = torch.arange(len(x), device=x.device) % 10
    optimizer = torch.optim.SGD(owner.parameters(), lr=1e-4)
    narrow = x.dtype != torch.float64

    def backward() -> None:
        with torch.autocast(x.device.type, torch.bfloat16) if narrow else nullcontext():
            y = model(x)
        F.cross_entropy(y if y.dtype == torch.float64 else y.float(), target).backward()

    def run() -> None:
        backward()
        optimizer.step()
        optimizer.zero_grad()

    def check() -> list[Tensor]:
        backward()
        grads = [p.grad for p in owner.parameters() if p.grad is not None]
        optimizer.zero_grad()
        return [torch.cat([g.flatten() for g in grads])]

    return run, check


# ---- nets of reinforcement learning


def rl() -> list[Comparison]:
    """Small batches: what a program is launched with counts, so each one also as a CUDA graph."""
    found = []
    shapes = product((64, 128, 256), (torch.float32, torch.bfloat16), ("forward", "step"))
    for width, dtype, direction in shapes:
        for batch, kind in ((256, StarBlock), (64, StarBlock), (4096, StarBlock), (256, StarMLP)):
            # the compiler takes longest here: one batch size, one net
            compiled = (batch, kind) == (256, StarBlock)
            build = partial(
                _policy, kind=kind, batch=batch, width=width, dtype=dtype, direction=direction,
                compiled=compiled,
            )  # fmt: skip
            label = rl_label(kind.__name__, batch, width, dtype, direction)
            rank = 1 if compiled and width == 128 else 2
            found.append(trial("RL", label, build, seconds=10 if compiled else 3, rank=rank))
    return found


def rl_label(kind: str, batch: int, width: int, dtype: torch.dtype, direction: str) -> str:
    what = {"forward": "inference", "step": "forward and backward"}[direction]
    return f"{kind}, batch {batch}, width {width}, {str(dtype).removeprefix('torch.')}, {what}"


def _policy(
    lab: Lab,
    kind: type[nn.Module],
    batch: int,
    width: int,
    dtype: torch.dtype,
    direction: str,
    compiled: bool,
) -> Trial:
    torch.manual_seed(0)
    batch, width = lab.size((batch, width), (16, width // 4))
    mlp = StarMLP(width, device=lab.device, dtype=dtype)
    model = StarBlock(width, mlp) if kind is StarBlock else mlp
    x = lab.randn(batch, width, dtype=dtype)

    def subject(
        backend: str, wrap: Callable[..., Any] = lambda m: m, kind: torch.dtype = dtype
    ) -> Subject:
        own = copy.deepcopy(model).to(kind)
        return Subject(partial(on(backend, wrap(own)), x.to(kind)), list(own.parameters()))

    subjects = {"eager": subject("eager"), "fused": subject("triton")}
    if compiled:
        subjects["torch.compile"] = subject("eager", lab.compiled)
    return compare(
        lab, subjects, subject("eager", kind=torch.float64), direction, graphs=True, ahead=False,
        baselines=["torch.compile" + GRAPH if compiled else "eager" + GRAPH],
    )  # fmt: skip
