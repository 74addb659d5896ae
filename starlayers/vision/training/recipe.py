"""Recipe of a training run, and the optimizer parts made from it."""

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR
from torch.optim.swa_utils import AveragedModel

from starlayers.checks import boolean, positive_int
from starlayers.vision.training.data import TrainData


@dataclass(frozen=True)
class TrainConfig:
    """Recipe of a run: everything that changes its numbers.

    Args:
        epochs: passes over the training images.
        batch_size: images per step and process. One process keeps a last batch with fewer; several
            leave it out.
        lr: peak learning rate of AdamW.
        weight_decay: of weight matrices and kernels; norms, biases and layer scales have none.
        schedule: "cosine" (linear warm-up, then half a cosine to 0) or "onecycle".
        warmup: fraction of all steps in which the rate rises.
        label_smoothing: of the cross entropy.
        clip: largest gradient norm, 0 for no clipping.
        flip, crop, randaugment: of each image, see `augment.image_transform`.
        mixup, cutmix: of each batch, see `augment.batch_transform`.
        ema: decay of the averaged weights that are validated and saved, 0 for no averaging.
        norm_batches: training batches from which the BatchNorm statistics are estimated anew
            before each validation, see `reestimate_norms`; 0 keeps the running statistics.
        balance: "loss" weights each class by the inverse of its number of images, "sampling" draws
            the images of an epoch so that all classes are equally likely; "none" does neither.
        amp: bfloat16 mixed precision.
        compile: call `torch.compile` on the model.
        seed: of order, augmentation and dropout. The caller seeds the start weights.
        save_every: steps between saved states.
        workers: processes that load images; their number changes no result.

    Raises:
        ValueError: a value out of range, naming it.

    Example:
        >>> TrainConfig(epochs=10, mixup=0.2).schedule
        'cosine'
        >>> TrainConfig(ema=1.0)
        Traceback (most recent call last):
        ValueError: ema must be in [0, 1), got 1.0
    """

    epochs: int = 3
    batch_size: int = 128
    lr: float = 4e-3
    weight_decay: float = 0.05
    schedule: str = "cosine"
    warmup: float = 0.1
    label_smoothing: float = 0.1
    clip: float = 1.0
    flip: float = 0.5
    crop: int = 0
    randaugment: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0
    ema: float = 0.0
    norm_batches: int = 20
    balance: str = "none"
    amp: bool = False
    compile: bool = False
    seed: int = 0
    save_every: int = 200
    workers: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "save_every"):
            positive_int("TrainConfig", name, getattr(self, name))
        for field in fields(self):
            value: Any = getattr(self, field.name)
            if field.type is bool:
                boolean("TrainConfig", field.name, value)
            elif field.type is int and (isinstance(value, bool) or not isinstance(value, int)):
                raise TypeError(f"TrainConfig: {field.name} must be an integer, got {value!r}")
            elif field.type is float and (
                isinstance(value, bool) or not isinstance(value, int | float)
            ):
                raise TypeError(f"TrainConfig: {field.name} must be a number, got {value!r}")
        amounts = ("lr", "weight_decay", "clip", "crop", "randaugment", "mixup", "cutmix")
        for name in (*amounts, "norm_batches", "workers"):
            if not getattr(self, name) >= 0:  # so that NaN fails too
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip must be in [0, 1], got {self.flip}")
        for name in ("warmup", "label_smoothing", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.schedule not in ("cosine", "onecycle"):
            raise ValueError(f"schedule must be 'cosine' or 'onecycle', got {self.schedule!r}")
        if self.balance not in ("none", "loss", "sampling"):
            raise ValueError(f"balance must be 'none', 'loss' or 'sampling', got {self.balance!r}")

    @classmethod
    def for_data(cls, data: TrainData, **options: Any) -> "TrainConfig":
        """Choose what is not in `options` by the number and the size of the training images.

        Steps are what a network learns by, so few images get small batches and many epochs:
        batches of an eighth of the images, a power of two from 16 to 128; 1,000 steps, and at least
        4 epochs; a rate that follows the square root of the batch; random shifts by an eighth of
        the image where each is seen 20 times or more; weights averaged over a quarter of the steps.

        Raises:
            ValueError: an option out of range, naming it.

        Example:
            >>> from starlayers.datasets import load_images
            >>> config = TrainConfig.for_data(load_images("digits"), flip=0.0)
            >>> config.batch_size, config.epochs, config.lr, config.crop
            (128, 84, 0.004, 1)
        """
        images: Any = data.train
        n = len(images)
        fitting = min(n, 2 ** min(max(int(math.log2(max(n, 1) / 8)), 4), 7))
        batch = positive_int("TrainConfig", "batch_size", options.get("batch_size", fitting))
        steps = math.ceil(n / batch)
        epochs = positive_int(
            "TrainConfig", "epochs", options.get("epochs", max(4, math.ceil(1000 / steps)))
        )
        chosen: dict[str, Any] = {
            "batch_size": batch,
            "epochs": epochs,
            "lr": float(f"{4e-3 * math.sqrt(batch / 128):.2g}"),
            "crop": data.shape[-1] // 8 if epochs >= 20 else 0,
            "ema": round(max(0.0, min(0.9998, 1 - 4 / (steps * epochs))), 4),
        }
        return cls(**chosen | options)


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Group parameters: matrices and kernels decay; norms, biases and layer scales do not."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]


def lr_scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig, total: int) -> LRScheduler:
    """Return the learning rate schedule over `total` steps.

    "cosine" rises linearly over the first `warmup` of the steps and then falls along half a
    cosine to 0. "onecycle" is PyTorch's `OneCycleLR` with that fraction of rising steps.
    """
    if config.schedule == "onecycle":
        total = max(total, 3)  # OneCycleLR needs a step to rise, one to fall and one between
        return OneCycleLR(optimizer, config.lr, total, pct_start=max(config.warmup, 2 / total))
    warmup = max(1, round(config.warmup * total))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    return LambdaLR(optimizer, factor)


def ema_model(model: nn.Module, decay: float) -> AveragedModel:
    """Return an exponential moving average of `model`, of parameters and buffers.

    The decay of update `n` is `min(decay, (1 + n) / (10 + n))`, so that the average of a short run
    is not still at the start weights.
    """

    @torch.no_grad()
    def update(average: Any, current: Any, updates: Any) -> None:
        n = int(updates)
        if average[0].is_floating_point():
            torch._foreach_lerp_(average, current, 1 - min(decay, (1 + n) / (10 + n)))
        else:  # counters
            torch._foreach_copy_(average, current)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)
