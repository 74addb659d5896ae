"""Networks made from the folder or the weights file of a training run, ready to predict."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from starlayers.vision.checkpoints import load_checkpoint
from starlayers.vision.models import from_architecture
from starlayers.vision.weights import read_metadata

__all__ = ["TrainedNet", "load_run"]


@dataclass(frozen=True)
class TrainedNet:
    """Network in eval mode, with the classes and the images that it was trained on.

    Attributes:
        model: from normalised images (N, C, H, W) to logits (N, classes).
        classes: names of the classes, in the order of the logits.
        mean: of each channel of the training pixels, scaled to 0..1.
        std: standard deviation, likewise.
        size: (H, W) of the training images.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
        >>> net = TrainedNet(model, ("cat", "dog"), (0.5,), (0.25,), (2, 2))
        >>> images = torch.randint(0, 256, (3, 1, 2, 2), dtype=torch.uint8)
        >>> net.logits(images).shape
        torch.Size([3, 2])
    """

    model: nn.Module
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Compute logits of images as they are stored, in 8 bits.

        Args:
            images: uint8 (N, C, H, W), on any device.

        Returns:
            Logits (N, classes), on the device of the model.

        Raises:
            TypeError: the images are not of type uint8.
            ValueError: another number of channels or another size than in training.
        """
        shape = (len(self.mean), *self.size)
        if images.dtype != torch.uint8:
            raise TypeError(f"images are uint8 from 0 to 255, got {images.dtype}")
        if images.ndim != 4 or tuple(images.shape[1:]) != shape:
            raise ValueError(
                f"the network was trained on images {shape}, got {tuple(images.shape)}; resize "
                "them (starlayers.datasets.load_image does), or call .model on normalised ones"
            )
        like = next(self.model.parameters())
        x = self.normalise(images.to(like.device))
        return self.model(x.to(like.dtype))  # type: ignore[no-any-return]

    def normalise(self, images: Tensor) -> Tensor:
        """Scale uint8 images to 0..1 and normalise them by the mean and std of the training.

        Example:
            >>> net = TrainedNet(nn.Identity(), ("cat", "dog"), (0.5,), (0.25,), (2, 2))
            >>> net.normalise(torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)).unique()
            tensor([2.])
        """
        mean, std = (
            torch.tensor(v, device=images.device)[:, None, None] for v in (self.mean, self.std)
        )
        return (images.float() / 255 - mean) / std

    def predict(self, images: Tensor, top: int = 1) -> list[list[tuple[str, float]]]:
        """Name the most likely classes of images, with their probabilities.

        Args:
            images: as for `logits`.
            top: number of classes for each image, the most likely first; at most all are returned.

        Example:
            >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
            >>> net = TrainedNet(model, ("cat", "dog"), (0.5,), (0.25,), (2, 2))
            >>> images = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
            >>> [len(classes) for classes in net.predict(images, top=2)]
            [2, 2, 2]
        """
        shares = self.logits(images).float().softmax(1)
        values, numbers = shares.topk(min(top, len(self.classes)), dim=1)
        return [
            [(self.classes[i], value) for i, value in zip(row, column, strict=True)]
            for row, column in zip(numbers.tolist(), values.tolist(), strict=True)
        ]


def load_run(
    path: str | os.PathLike[str], *, device: torch.device | str | None = None
) -> TrainedNet:
    """Make the trained network of a run: its architecture, weights, classes and normalisation.

    Args:
        path: folder of a finished run, whose `model.safetensors` is read, or a weights file, such
            as the `best.safetensors` of the folder or one of `save_weights`.
        device: where the network is put.

    Raises:
        FileNotFoundError: no weights there.
        ValueError: a damaged file, or one that does not say what network, classes or images it is
            of; the message names what is missing.
        ImportError: safetensors is not installed.

    Example:
        >>> import tempfile
        >>> from starlayers.vision import StarNet, save_weights
        >>> file = Path(tempfile.mkdtemp(), "model.safetensors")
        >>> model = StarNet(8, (1,), stage_strides=(1,), num_classes=2, in_chans=1)
        >>> save_weights(model, file, classes=["cat", "dog"], mean=[0.5], std=[0.25], size=28)
        >>> net = load_run(file.parent)
        >>> net.classes, net.size
        (('cat', 'dog'), (28, 28))
    """
    file = weights_file(Path(path))
    metadata = read_metadata(file)
    missing = [k for k in ("architecture", "classes", "mean", "std", "size") if k not in metadata]
    if missing:
        raise ValueError(
            f"{file} does not say its {', '.join(missing)}: it was not written by a run of StarNet "
            "or by save_weights with all of its arguments. Build the network and use "
            "load_checkpoint(model, path)"
        )
    model = from_architecture(metadata["architecture"])
    load_checkpoint(model, file)
    return TrainedNet(
        model.to(device).eval(),
        tuple(metadata["classes"]),
        tuple(metadata["mean"]),
        tuple(metadata["std"]),
        _pair(metadata["size"]),
    )


def weights_file(path: Path) -> Path:
    """Return the weights in the folder of a finished run, or the file itself.

    Raises:
        FileNotFoundError: no weights there.
    """
    if path.is_file():
        return path
    file = path / "model.safetensors"
    if file.is_file():
        return file
    if (best := path / "best.safetensors").is_file():
        raise FileNotFoundError(
            f"the run in {path} has not finished; resume it, or use its best weights so far, {best}"
        )
    raise FileNotFoundError(
        f"no weights in {path}: expected a weights file, or the folder of a run with "
        "model.safetensors"
    )


def _pair(size: Sequence[int]) -> tuple[int, int]:
    height, width = size
    return height, width
