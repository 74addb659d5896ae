"""Rows of blocks and whole networks: StarBlock2d, StarNet, and the nets of RL."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.kernels import BASES, BATCH, MODE, stage_label, stages
from benchmarks.gpu.lab import Lab
from benchmarks.gpu.trial import AUTOTUNED, GRAPH, Row, Subject, Trial, compare, reason
from starlayers import StarBlock, StarMLP, use_backend, vision
from starlayers.vision import StarBlock2d, to_timm_state_dict

GATED_IMAGES = 16  # float64 activations of a whole batch would fill the GPU
TIMM = "timm, torch.compile"
FUSED = "fused"
FOLDED = "fused, fuse()"
GRAPHED = "fused, fuse(graph=True)"
STEPS = "fused, graph_training()"
DIRECTIONS = {"forward": "inference", "step": "forward and backward"}


def on(backend: str, f: Callable[..., Any]) -> Callable[..., Any]:
    """Return `f` on a backend, chosen out of a compiler's sight."""

    def call(*args: Any) -> Any:
        with use_backend(backend):
            return f(*args)

    return call


def calibrated(model: nn.Module, x: Tensor) -> nn.Module:
    """Return `model` with the statistics of one batch, so that its norms act in eval mode."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 1.0
    with torch.no_grad(), use_backend("eager"):
        model.train()(x.float())
    return model.eval()


# ---- StarBlock2d


def block() -> list[Row]:
    return [
        Row("block", f"{stage_label('S4', stage)}, {what}",
            partial(_block, side=side, channels=channels, direction=direction), 7)
        for stage, side, channels in stages(BASES["S4"])
        for direction, what in DIRECTIONS.items()
    ]  # fmt: skip


def _block(lab: Lab, side: int, channels: int, direction: str) -> Trial:
    torch.manual_seed(0)
    n, side, channels = lab.size((BATCH, side, channels), (1, 4, 16))
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


def starnet(net: str, batch: int, task: str) -> Row:
    """Return the row of "inference" or "training" of a whole network and timm's.

    All programs are timed from Python and as a CUDA graph.
    """
    build = partial(_starnet, name=f"starnet_{net}", batch=batch, training=task == "training")
    warm = (FUSED, TIMM) if task == "training" else (FUSED, TIMM, FOLDED)
    return Row("starnet", starnet_label(net, batch, task), build, 20, warm)


def starnet_label(net: str, batch: int, task: str) -> str:
    return f"{net.upper()}, batch {batch}, {task}"


def compiled_starnet() -> list[Row]:
    """Return the rows of our network under the compiler, and of timm's with all its options."""
    rows = []
    for task in ("inference", "training"):
        build = partial(
            _starnet, name="starnet_s4", batch=256, training=task == "training", compiled=True
        )
        rows.append(Row("compiled", starnet_label("s4", 256, task), build, 60))
    return rows


def _starnet(lab: Lab, name: str, batch: int, training: bool, compiled: bool = False) -> Trial:
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
    }
    if compiled:
        models["fused, torch.compile"] = ("auto", ours, lab.compiled)
    else:
        models[FUSED] = ("auto", ours, lambda m: m)
        if training:
            models[STEPS] = ("auto", ours, partial(_graphed_steps, lab))
        else:
            # folded in float32: the folded weights are then rounded once
            folded = copy.deepcopy(ours).float().fuse().bfloat16()
            models[FOLDED] = ("auto", folded, lambda m: m)
            graphed = copy.deepcopy(ours).float().fuse(graph=True).bfloat16()
            models[GRAPHED] = ("auto", graphed, lambda m: m)
    peer = _timm(name, ours, lab.size({}, small))
    if peer is not None:
        models[TIMM] = ("eager", peer, lab.compiled)
        if compiled:
            models[f"timm, {AUTOTUNED}"] = ("eager", peer, partial(lab.compiled, mode=MODE))
    make = _training if training else _inference
    programs, checks = {}, {}
    for key, (backend, model, wrap) in models.items():
        own = copy.deepcopy(model).to(memory_format=torch.channels_last)
        programs[key] = on(backend, make(wrap(own), own, x)[0])
        if "torch.compile" not in key:  # it would compile again for the gated batch
            # on a copy: a training step's check leaves running statistics and gradients behind
            gated = copy.deepcopy(own)
            checks[key] = on(backend, make(wrap(gated), gated, x[:GATED_IMAGES])[1])
        if key not in (GRAPHED, STEPS):  # which capture themselves
            programs[key + GRAPH] = lab.captured(programs[key])
    exact = copy.deepcopy(ours).double()
    return Trial(
        programs, checks, on("eager", make(exact, exact, x[:GATED_IMAGES].double())[1]),
        [TIMM, TIMM + GRAPH], clock="call", work={"images": batch},
    )  # fmt: skip


def _timm(name: str, ours: nn.Module, changes: dict[str, Any]) -> nn.Module | None:
    """Return timm's model with our weights, or None where timm cannot be imported."""
    try:
        import timm
    except ImportError as error:
        print(f"no baseline of timm's: {reason(error)}")
        return None
    model = timm.create_model(name, **changes)
    model.load_state_dict(to_timm_state_dict(ours))
    return model.to(next(ours.parameters())).train(ours.training)  # type: ignore[no-any-return]


def _graphed_steps(lab: Lab, model: Any) -> Callable[[Tensor], Tensor]:
    """Return `model` with its steps captured on the first call, under the autocast of that call."""

    def call(x: Tensor) -> Tensor:
        if not lab.dry and "training_graph" not in vars(model):
            model.graph_training(x)
        y: Tensor = model(x)
        return y

    return call


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


def rl() -> list[Row]:
    """Return the rows of small batches, each program also as a CUDA graph: launches count."""
    rows = []
    shapes = product((64, 256), (torch.float32, torch.bfloat16), DIRECTIONS)
    for width, dtype, direction in shapes:
        for batch, kind in ((256, StarBlock), (64, StarBlock), (4096, StarBlock), (256, StarMLP)):
            # one batch size of one net also by the compiler, which takes longest here
            compiled = (batch, kind) == (256, StarBlock)
            build = partial(
                _policy, kind=kind, batch=batch, width=width, dtype=dtype, direction=direction,
                compiled=compiled,
            )  # fmt: skip
            named = [f"width {width}", str(dtype).removeprefix("torch."), DIRECTIONS[direction]]
            label = ", ".join([kind.__name__, f"batch {batch}", *named])
            rows.append(Row("rl", label, build, 4))
    return rows


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
    batch, width = lab.size((batch, width), (16, 16))
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
        lab, subjects, subject("eager", kind=torch.float64), direction, graphs=True, clock="call",
        baselines=["torch.compile" + GRAPH if compiled else "eager" + GRAPH],
    )  # fmt: skip
