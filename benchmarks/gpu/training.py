"""One training run, fused and eager in alternating steps: the same seed, the same batches."""

import copy
import gzip
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.lab import Comparison, Lab
from starlayers import use_backend
from starlayers.vision import StarNet

SECONDS = 30
BACKENDS = {"fused": "triton", "eager": "eager"}
WARMUP = 5  # steps in which kernels compile
POINTS = 200  # of each loss curve in the results


def training(data: Path | None) -> list[Comparison]:
    def run(lab: Lab) -> dict[str, Any]:
        return _run(lab, data)

    return [Comparison("training", "StarNet-S1 on 28x28, batch 256", run, SECONDS + 15)]


def _run(lab: Lab, data: Path | None) -> dict[str, Any]:
    source, images, labels = load(lab, data)
    model = _model(lab)
    nets = {name: copy.deepcopy(model) for name in BACKENDS}
    steps = {name: _stepper(nets[name], backend) for name, backend in BACKENDS.items()}
    losses: dict[str, list[Tensor]] = {name: [] for name in BACKENDS}
    seconds: dict[str, list[float]] = {name: [] for name in BACKENDS}
    batch = lab.size(256, 8)
    generator = torch.Generator(lab.device).manual_seed(0)
    began = time.perf_counter()
    while len(losses["eager"]) < 2 if lab.dry else time.perf_counter() - began < SECONDS:
        chosen = torch.randint(len(images), (batch,), generator=generator, device=lab.device)
        x, y = images[chosen].float() / 255, labels[chosen]
        for name, step in steps.items():
            _synchronize(lab)
            before = time.perf_counter()
            losses[name].append(step(x, y))
            _synchronize(lab)
            seconds[name].append(time.perf_counter() - before)
    curves = {name: [float(loss) for loss in found] for name, found in losses.items()}
    apart = [abs(a - b) for a, b in zip(*curves.values(), strict=True)]
    row: dict[str, Any] = {"data": source, "steps": len(apart), "max_loss_difference": max(apart)}
    every = -(-len(apart) // POINTS)
    programs: dict[str, dict[str, Any]] = {
        name: {"losses": found[::every], "last_loss": sum(found[-50:]) / len(found[-50:])}
        for name, found in curves.items()
    }
    if not lab.dry:
        for name, found in seconds.items():
            median = float(np.median(found[WARMUP:]))
            programs[name] |= {"median_ms": 1e3 * median, "images_s": batch / median}
        for name in programs:
            programs[name]["ratio"] = programs[name]["median_ms"] / programs["eager"]["median_ms"]
        row["baseline"] = "eager"
    wrong = [n for n, curve in curves.items() if not np.isfinite(curve).all()]
    failures = [f"{name}: the loss is not finite" for name in wrong]
    status = "failed" if failures else "not measured" if lab.dry else "measured"
    return row | {"programs": programs, "failures": failures, "status": status}


def _model(lab: Lab) -> nn.Module:
    torch.manual_seed(0)
    base, depths, strides = lab.size((24, (2, 2, 8, 3), (1, 2, 2, 2)), (8, (1, 1), (4, 4)))
    return StarNet(
        base, depths, num_classes=10, in_chans=1, stem_stride=1, stage_strides=strides
    ).to(lab.device, memory_format=torch.channels_last)


def _stepper(model: nn.Module, backend: str) -> Callable[[Tensor, Tensor], Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)

    def step(x: Tensor, y: Tensor) -> Tensor:
        with use_backend(backend), torch.autocast(x.device.type, torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def _synchronize(lab: Lab) -> None:
    if lab.device.type == "cuda":
        torch.cuda.synchronize()


def load(lab: Lab, data: Path | None) -> tuple[str, Tensor, Tensor]:
    """What the data is, its uint8 images (N, 1, 28, 28) and its labels (N)."""
    if data is None:
        return ("ten random patterns, shifted and noisy", *_patterns(lab))
    images = torch.from_numpy(_idx(data, "train-images-idx3-ubyte"))[:, None]
    labels = torch.from_numpy(_idx(data, "train-labels-idx1-ubyte")).long()
    return (
        "training images of the folder given with --data",
        images.to(lab.device),
        labels.to(lab.device),
    )


def _idx(folder: Path, name: str) -> np.ndarray:
    """An array in the format of MNIST, compressed or not."""
    packed = folder / f"{name}.gz"
    content = (
        gzip.decompress(packed.read_bytes()) if packed.is_file() else (folder / name).read_bytes()
    )
    dimensions = content[3]
    shape = np.frombuffer(content, ">i4", dimensions, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy()


def _patterns(lab: Lab) -> tuple[Tensor, Tensor]:
    count = lab.size(60_000, 64)
    generator = torch.Generator(lab.device).manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=lab.device)

    patterns = F.interpolate(draw(10, 1, 7, 7), size=(36, 36), mode="bilinear").squeeze(1)
    labels = torch.randint(10, (count,), generator=generator, device=lab.device)
    corner = torch.randint(9, (2, count, 1), generator=generator, device=lab.device)
    rows, cols = corner + torch.arange(28, device=lab.device)
    shifted = patterns[labels[:, None, None], rows[:, :, None], cols[:, None, :]]
    noisy = shifted + draw(count, 28, 28)
    return (128 + 48 * noisy).clamp(0, 255).byte()[:, None], labels
