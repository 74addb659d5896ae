"""Networks of the commands: fresh ones for image data, and trained ones to start from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlayers.vision import STARNETS, StarNet, from_architecture, load_checkpoint, read_metadata
from starlayers.vision.checkpoints import pretrained_path
from starlayers.vision.models import MODELS
from starlayers.vision.trained import weights_file
from starlayers.vision.training import TrainData

__all__ = ["IMAGENET", "Start", "build", "open_start"]

# The published strides reduce a 28x28 image to one pixel. With a stem of stride 1 the maps have
# sides of 28, 14, 7, 4 and 2, on which a 7x7 kernel would mostly read padding, and 3x3 trains twice
# as fast on a CPU.
SMALL_IMAGES: dict[str, Any] = {"stem_stride": 1, "kernel_size": 3}
#: those of earlier runs, whose `config.json` does not say the architecture
EARLIER_SMALL_IMAGES: dict[str, Any] = {"stage_strides": (1, 2, 2, 1), "kernel_size": 3}
#: mean and std of the pixels, and size, that the published weights and timm's were trained with
IMAGENET: dict[str, Any] = {
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "size": [224, 224],
}


@dataclass(frozen=True)
class Start:
    """Trained weights to start from.

    Attributes:
        file: of the weights.
        model: name of the published network; `None` if the weights say their architecture.
        metadata: of `read_metadata`; mean, std and size are ImageNet's where a file does not say.
        known: the file itself says its mean and std.
    """

    file: Path
    model: str | None
    metadata: dict[str, Any]
    known: bool = True

    def normalisation(self, channels: int) -> dict[str, Any]:
        """Return mean and std for images of `channels`; averages, if the weights have others."""
        values = {name: self.metadata[name] for name in ("mean", "std")}
        return {name: _fit(value, channels) for name, value in values.items()}

    def build(self, data: TrainData, drop_path: float = 0.0) -> tuple[StarNet, tuple[str, ...]]:
        """Build the network with these weights; return it, and a line for what was adapted.

        The head is a fresh one unless the weights know the same classes.
        """
        classes, saved = list(data.classes), self.metadata.get("architecture")
        options: dict[str, Any] = {
            "in_chans": data.shape[0],
            "num_classes": len(classes),
            "drop_path_rate": drop_path,
        }
        if self.model:
            net = MODELS[self.model](**options)
        else:
            net = from_architecture(saved or {}, **options)
        fresh = {name: value.clone() for name, value in net.head.state_dict().items()}
        adapted = load_checkpoint(net, self.file).adapted
        theirs = self.metadata.get("classes", classes)
        if theirs != classes and len(theirs) == len(classes):
            net.head.load_state_dict(fresh)
            adapted += ("head: the checkpoint knows other classes, a fresh one is trained",)
        return net, adapted


def open_start(path: Path | None, model: str | None) -> Start:
    """Find the weights to start from, and what they say of themselves.

    Args:
        path: weights file or folder of a run; `None` for the published weights of `model`.
        model: name of a published network, which a file that knows its architecture must not have.

    Raises:
        FileNotFoundError: no weights there.
        ConnectionError: the hub cannot be reached for published weights.
        ValueError: no published weights, a damaged file, or one of a fused network.
    """
    if path is None:
        model = model or "starnet_s1"
        file = pretrained_path(model, STARNETS[model].hub_id)
    else:
        file = weights_file(path)
    found = read_metadata(file)
    if "architecture" not in found:
        model = model or "starnet_s1"
    elif model:
        raise ValueError(f"{file} says its architecture: leave --model out")
    elif found["architecture"].get("fused"):
        raise ValueError(f"{file} is of a fused network: start from the weights before fuse()")
    return Start(file, model, IMAGENET | found, "mean" in found or path is None)


def build(
    name: str,
    data: TrainData,
    drop_path: float = 0.0,
    *,
    small: Mapping[str, Any] = SMALL_IMAGES,
) -> StarNet:
    """Build a published StarNet for the channels, classes and size of `data`.

    Below 96 pixels it has other strides and kernels than published, those of `small`.

    Example:
        >>> from starlayers.datasets import load_images
        >>> build("starnet_s050", load_images("digits")).head.out_features
        10
    """
    return MODELS[name](
        in_chans=data.shape[0],
        num_classes=len(data.classes),
        drop_path_rate=drop_path,
        **(small if data.shape[-1] < 96 else {}),
    )


def _fit(values: Sequence[float], channels: int) -> tuple[float, ...]:
    if len(values) == channels:
        return tuple(values)
    return (sum(values) / len(values),) * channels
