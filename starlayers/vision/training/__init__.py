"""Resumable, distributed training of image classifiers.

Install with `pip install 'starlayers[training]'`, and `starlayers[plots]` for the curves and the
confusion matrix of a run.
"""

try:
    import accelerate as _accelerate  # noqa: F401
    import torchdata as _torchdata  # type: ignore[import-untyped]  # noqa: F401
    import torchmetrics as _torchmetrics  # noqa: F401
    import torchvision as _torchvision  # noqa: F401
    import tqdm as _tqdm  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"starlayers.vision.training needs {error.name}: pip install 'starlayers[training]'"
    ) from error

from starlayers.vision.training.data import TrainData
from starlayers.vision.training.loop import TrainResult, train
from starlayers.vision.training.recipe import TrainConfig
from starlayers.vision.training.rundir import RunDir

__all__ = ["RunDir", "TrainConfig", "TrainData", "TrainResult", "train"]
