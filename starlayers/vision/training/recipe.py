"""Recipe of a training run, and the optimizer parts made from it."""

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from accelerate.utils import LoggerType
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR
from torch.optim.swa_utils import AveragedModel

from starlayers.checks import boolean, positive_int
from starlayers.vision.training.data import TrainData

#: field -> its values
CHOICES = {
    "schedule": ("cosine", "onecycle"),
    "balance": ("none", "loss", "sampling"),
    "amp_dtype": ("bfloat16", "float16"),
    "log_with": ("none", *(t.value for t in LoggerType if t is not LoggerType.ALL)),
}


@dataclass(frozen=True)
class TrainConfig:
    """Recipe of a run: everything that changes its numbers.

    Args:
        epochs: passes over the training images.
        batch_size: images per batch and process. One process keeps a last batch with fewer; several
            leave it out.
        accumulate: batches whose gradients are added up for one step; norms see single batches.
        optimizer: "adamw", or a name of timm's (`timm.optim.list_optimizers()`).
        lr: peak learning rate.
        weight_decay: of weight matrices and kernels; norms, biases and layer scales have none.
        layer_decay: factor of the rate from each block to the one before it, by timm; 1 for none.
        freeze: number of first stages of a StarNet that stay as they are, with the stem and their
            norm statistics; 0 for none.
        schedule: "cosine" (linear warm-up, then half a cosine to 0) or "onecycle".
        warmup: fraction of all steps in which the rate rises.
        label_smoothing: of the cross entropy.
        clip: largest gradient norm, 0 for no clipping.
        flip: probability that an image is mirrored.
        crop: largest shift of an image in both directions, in pixels; zeros move in.
        resized_crop: smallest share of an image's area that is cut out and resized; 0 for none.
        randaugment: number of RandAugment operations on an image.
        erase: probability that a rectangle of an image is erased.
        mixup, cutmix: parameter of the Beta distribution by which images are mixed; 0 for none.
        ema: decay of the averaged weights that are validated and saved, 0 for no averaging.
        norm_batches: training batches from which the BatchNorm statistics are estimated anew
            before each validation, see `reestimate_norms`; 0 keeps the running statistics.
        balance: "loss" weights each class by the inverse of its number of images, "sampling" draws
            the images of an epoch so that all classes are equally likely; "none" does neither.
        amp: mixed precision.
        amp_dtype: its type, "bfloat16", or "float16" on a GPU, where the loss is scaled.
        sync_bn: norms use the statistics of the batches of all processes; on GPUs.
        compile: call `torch.compile` on the model.
        seed: of order, augmentation and dropout. The caller seeds the start weights.
        save_every: steps between saved states.
        workers: processes that load images; their number changes no result.
        log_with: tracker that gets the metrics too, a name of accelerate's such as "tensorboard"
            (in the folder of the run) or "wandb"; "none" for none.

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
    accumulate: int = 1
    optimizer: str = "adamw"
    lr: float = 4e-3
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    freeze: int = 0
    schedule: str = "cosine"
    warmup: float = 0.1
    label_smoothing: float = 0.1
    clip: float = 1.0
    flip: float = 0.5
    crop: int = 0
    resized_crop: float = 0.0
    randaugment: int = 0
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    ema: float = 0.0
    norm_batches: int = 20
    balance: str = "none"
    amp: bool = False
    amp_dtype: str = "bfloat16"
    sync_bn: bool = False
    compile: bool = False
    seed: int = 0
    save_every: int = 200
    workers: int = 0
    log_with: str = "none"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "save_every"):
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
        for name in (*amounts, "freeze", "norm_batches", "workers"):
            if not getattr(self, name) >= 0:  # so that NaN fails too
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("flip", "resized_crop", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("warmup", "label_smoothing", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must be in (0, 1], got {self.layer_decay}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                *others, last = map(repr, choices)
                raise ValueError(
                    f"{name} must be {', '.join(others)} or {last}, got {getattr(self, name)!r}"
                )

    @classmethod
    def for_data(cls, data: TrainData, *, finetune: bool = False, **options: Any) -> "TrainConfig":
        """Choose what is not in `options` by the number and the size of the training images.

        Steps are what a network learns by, so few images get small batches and many epochs:
        batches of an eighth of the images, a power of two from 16 to 128; 1,000 steps, and at least
        4 epochs; a rate that follows the square root of the batch; random shifts by an eighth of
        the image where each is seen 20 times or more; no mirrored gray images, which may be of
        letters; weights averaged over a quarter of the steps.
        A trained network, `finetune`, gets half of the steps and a quarter of the rate.

        Raises:
            ValueError: an option out of range, naming it.

        Example:
            >>> from starlayers.datasets import load_images
            >>> config = TrainConfig.for_data(load_images("digits"))
            >>> config.batch_size, config.epochs, config.lr, config.flip, config.crop
            (128, 84, 0.004, 0.0, 1)
        """
        images: Any = data.train
        n = len(images)
        fitting = min(n, 2 ** min(max(int(math.log2(max(n, 1) / 8)), 4), 7))
        batch = positive_int("TrainConfig", "batch_size", options.get("batch_size", fitting))
        batches = positive_int("TrainConfig", "accumulate", options.get("accumulate", 1))
        steps = math.ceil(n / (batch * batches))
        wanted, rate = (500, 1e-3) if finetune else (1000, 4e-3)
        epochs = positive_int(
            "TrainConfig", "epochs", options.get("epochs", max(4, math.ceil(wanted / steps)))
        )
        shifted = epochs >= 20 and not options.get("resized_crop")
        chosen: dict[str, Any] = {
            "batch_size": batch,
            "epochs": epochs,
            "lr": float(f"{rate * math.sqrt(batch * batches / 128):.2g}"),
            "flip": 0.5 if data.shape[0] > 1 else 0.0,
            "crop": data.shape[-1] // 8 if shifted else 0,
            "ema": round(max(0.0, min(0.9998, 1 - 4 / (steps * epochs))), 4),
        }
        return cls(**chosen | options)


def param_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Group parameters: matrices and kernels decay; norms, biases and layer scales do not.

    With `layer_decay` below 1, timm divides them further, by the blocks that the model names.
    """
    if config.layer_decay < 1:
        named: Any = model
        if not hasattr(model, "group_matcher"):
            raise ValueError(
                f"layer_decay={config.layer_decay} needs a model with group_matcher(), as StarNet "
                f"and timm's models have; {type(model).__name__} has none"
            )
        groups: list[dict[str, Any]] = _timm_optim("layer_decay").param_groups_layer_decay(
            model, config.weight_decay, named.no_weight_decay(), layer_decay=config.layer_decay
        )
        return [{**group, "lr": config.lr * group.pop("lr_scale")} for group in groups]
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return the optimizer of a recipe: PyTorch's AdamW, or one of timm's by its name."""
    groups = param_groups(model, config)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98))
    optim = _timm_optim("optimizer")
    if config.optimizer not in optim.list_optimizers():
        raise ValueError(
            f"optimizer must be 'adamw' or a name in timm.optim.list_optimizers(), got "
            f"{config.optimizer!r}"
        )
    made: torch.optim.Optimizer = optim.create_optimizer_v2(groups, config.optimizer, lr=config.lr)
    return made


def _timm_optim(option: str) -> Any:
    try:
        import timm.optim
    except ImportError as error:
        raise ImportError(f"{option} needs timm: pip install timm") from error
    return timm.optim


def freeze_stages(model: nn.Module, count: int) -> None:
    """Switch off the gradients of the stem and the first `count` stages of a StarNet.

    Their norms keep their statistics in `train`, see `frozen_norms`.

    Raises:
        ValueError: the model is no StarNet, or has fewer stages.

    Example:
        >>> from starlayers.vision import StarNet
        >>> model = StarNet(8, (1, 1), stage_strides=(2, 2))
        >>> freeze_stages(model, 1)
        >>> sorted({n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad})
        ['head', 'norm', 'stages']
    """
    if not count:
        return
    stem, stages = (getattr(model, name, None) for name in ("stem", "stages"))
    if not (isinstance(stem, nn.Module) and isinstance(stages, nn.Sequential)):
        raise ValueError(
            f"freeze={count} needs a StarNet, whose first parts have names; of "
            f"{type(model).__name__} freeze the parts themselves, by requires_grad_(False)"
        )
    if count > len(stages):
        raise ValueError(f"freeze={count} is more than the {len(stages)} stages of the network")
    for part in (stem, *stages[:count]):
        part.requires_grad_(False)


def lr_scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig, total: int) -> LRScheduler:
    """Return the learning rate schedule over `total` steps.

    "cosine" rises linearly over the first `warmup` of the steps and then falls along half a
    cosine to 0. "onecycle" is PyTorch's `OneCycleLR` with that fraction of rising steps.
    """
    if config.schedule == "onecycle":
        total = max(total, 3)  # OneCycleLR needs a step to rise, one to fall and one between
        peaks = [group["lr"] for group in optimizer.param_groups]
        return OneCycleLR(optimizer, peaks, total, pct_start=max(config.warmup, 2 / total))
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
