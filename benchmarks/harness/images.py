"""Fashion-MNIST for the studies, and the recipe that its networks are trained by."""

from dataclasses import replace
from typing import Any, cast

from torch.utils.data import Subset

from starlayers.datasets.images import ImageData, load_images

#: what the studies do not vary; they state it, so that a library's default decides nothing
FIXED: dict[str, Any] = {
    "schedule": "cosine",
    "warmup": 0.1,
    "clip": 1.0,
    "crop": 0,
    "randaugment": 0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "ema": 0.0,
    "amp": False,
}


def benchmark_images(*, train: int | None = None, test: int | None = None) -> ImageData:
    """Load Fashion-MNIST, whole or its first `train` and `test` images; never a stand-in for it.

    Raises:
        FileNotFoundError: Fashion-MNIST is not in reach (the digits would be another benchmark).
    """
    data = load_images("fashion-mnist")
    if data.name != "fashion-mnist":
        raise FileNotFoundError(
            "Fashion-MNIST is not in reach: install the Debian package dataset-fashion-mnist or "
            "put the files under ~/.cache/starlayers/torchvision/FashionMNIST/FashionMNIST/raw"
        )
    parts: dict[str, Any] = {}
    for name, size in (("train", train), ("test", test)):
        if size is not None:
            parts[name] = Subset(cast(Any, getattr(data, name)), range(size))
    return replace(data, **parts)


def recipe(smoke: bool, **settings: Any) -> dict[str, Any]:
    """Return the whole recipe; a smoke run has one epoch of small batches."""
    short = {"epochs": 1, "batch_size": 64} if smoke else {}
    return {**settings, **FIXED, **short}


def train_on_images(model: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Train a model as the job says, and return its test accuracy, history and size."""
    from starlayers.vision.training import TrainConfig, train

    data = benchmark_images(train=job["train"], test=job["test"])
    config = TrainConfig(**job["recipe"], seed=job["seed"])
    result = train(model, data, config, progress=False)
    return {
        "test_accuracy": result.test_accuracy,
        "history": result.history,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
