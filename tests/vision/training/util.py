"""Tiny data and network for training tests, and the comparison of two runs."""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from starlayers.datasets.images import ImageData
from starlayers.vision.training import TrainConfig, TrainResult, train
from starlayers.vision.training.rundir import RunDir

CLASSES, SIDE = 4, 6


def tiny_data(train: int = 80, test: int = 37) -> ImageData:
    """Return images of noise with a stripe, whose place is the class."""
    g = torch.Generator().manual_seed(11)
    sets = []
    for n in (train, test):
        labels = torch.randint(0, CLASSES, (n,), generator=g)
        images = torch.randint(0, 140, (n, 1, SIDE, SIDE), generator=g)
        images[torch.arange(n), 0, labels + 1] += 60
        sets.append(TensorDataset(images.to(torch.uint8), labels))
    std, mean = torch.std_mean(sets[0].tensors[0] / 255)
    names = tuple("abcd")
    shape = (1, SIDE, SIDE)
    return ImageData("tiny", "made up", *sets, names, shape, (mean.item(),), (std.item(),))


def tiny_model(seed: int = 0, dropout: float = 0.2, norm: bool = True) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(SIDE * SIDE, 12, bias=not norm),  # before a norm its gradient is rounding
        nn.BatchNorm1d(12) if norm else nn.Identity(),
        nn.Tanh(),
        nn.Dropout(dropout),
        nn.Linear(12, CLASSES),
    )


#: five steps an epoch, with every source of randomness
RECIPE: dict[str, Any] = {
    "epochs": 3,
    "batch_size": 16,
    "lr": 2e-2,
    "crop": 1,
    "mixup": 0.3,
    "cutmix": 0.5,
    "ema": 0.9,
    "save_every": 2,
    "seed": 3,
}


def run(
    folder: Path | None = None,
    *,
    model: nn.Module | None = None,
    data: ImageData | None = None,
    resume: bool = False,
    **recipe: Any,
) -> TrainResult:
    """Train with `RECIPE`, changed by `recipe`."""
    config = TrainConfig(**{**RECIPE, **recipe})
    run_dir = RunDir(folder, vars(config), resume=resume) if folder else None
    return train(model or tiny_model(), data or tiny_data(), config, run_dir, progress=False)


def numbers(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the history without the seconds."""
    return [{k: v for k, v in line.items() if k != "seconds"} for line in history]


def assert_same_run(got: TrainResult, want: TrainResult, got_dir: Path, want_dir: Path) -> None:
    assert got.finished
    assert want.finished
    assert numbers(got.history) == numbers(want.history)
    assert (got_dir / "model.safetensors").read_bytes() == (
        want_dir / "model.safetensors"
    ).read_bytes()
    assert got.confusion is not None
    assert torch.equal(got.confusion, want.confusion)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def call_at_step(model: nn.Module, step: int, action: Any) -> nn.Module:
    """Call `action()` in the forward pass of training step `step`, counted from 1."""
    count = 0

    def hook(module: nn.Module, *_: object) -> None:
        nonlocal count
        trained = module.training and torch.is_grad_enabled()
        count += trained
        if trained and count == step:
            action()

    model.register_forward_hook(hook)
    return model


class ByHand:
    """AdamW on the network's loss, written out, for batches of all images without augmentation."""

    def __init__(self, model: nn.Module, data: ImageData, config: TrainConfig) -> None:
        self.model, self.config = model.train(), config
        images, self.labels = data.train.tensors
        self.x = (images / 255 - data.mean[0]) / data.std[0]
        self.m = [torch.zeros_like(p) for p in model.parameters()]
        self.v = [torch.zeros_like(p) for p in model.parameters()]
        self.steps = 0

    def loss(self) -> Tensor:
        log_p = F.log_softmax(self.model(self.x), 1)
        s = self.config.label_smoothing
        right = log_p[torch.arange(len(self.labels)), self.labels]
        return -((1 - s) * right + s * log_p.mean(1)).mean()

    def step(self, lr: float) -> float:
        c, params = self.config, list(self.model.parameters())
        loss = self.loss()
        grads = torch.autograd.grad(loss, params)
        norm = math.sqrt(sum(g.double().square().sum().item() for g in grads))
        scale = min(1.0, c.clip / norm) if c.clip else 1.0
        self.steps += 1
        t = self.steps
        with torch.no_grad():
            for p, g, m, v in zip(params, grads, self.m, self.v, strict=True):
                g = g * scale
                m.copy_(0.9 * m + 0.1 * g)
                v.copy_(0.98 * v + 0.02 * g * g)
                decay = c.weight_decay if p.ndim > 1 else 0.0
                step = (m / (1 - 0.9**t)) / ((v / (1 - 0.98**t)).sqrt() + 1e-8)
                p.sub_(lr * (decay * p + step))
        return loss.item()
