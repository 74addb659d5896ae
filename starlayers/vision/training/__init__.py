"""A resumable, distributed training loop for image classifiers."""

from starlayers.vision.training.loop import TrainResult, train
from starlayers.vision.training.recipe import TrainConfig
from starlayers.vision.training.rundir import RunDir

__all__ = ["RunDir", "TrainConfig", "TrainResult", "train"]
