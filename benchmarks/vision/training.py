"""Recipe of the vision studies: every setting that decides a training run."""

from typing import Any

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


def recipe(smoke: bool, **settings: Any) -> dict[str, Any]:
    """Return the whole recipe; a smoke run has one epoch of small batches."""
    short = {"epochs": 1, "batch_size": 64} if smoke else {}
    return {**settings, **FIXED, **short}


def train_on_images(model: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Train a model as the job says, and return its test accuracy, history and size."""
    from benchmarks.harness.images import benchmark_images
    from starlayers.vision.training import TrainConfig, train

    data = benchmark_images(train=job["train"], test=job["test"])
    config = TrainConfig(**job["recipe"], seed=job["seed"])
    result = train(model, data, config, progress=False)
    return {
        "test_accuracy": result.test_accuracy,
        "history": result.history,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
