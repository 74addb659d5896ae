"""Interface of the data sets that `train` takes."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

__all__ = ["TrainData", "class_weights", "labels_of"]


class TrainData(Protocol):
    """Image classification data: any object with these attributes.

    `starlayers.datasets.images.load_images` returns one. No base class is needed.

    Attributes:
        train: training images; item `i` is (uint8 image (C, H, W), class number).
        test: test images, likewise.
        classes: name of every class, in the order of their numbers.
        shape: (C, H, W) of every image.
        mean: mean of each channel over the training pixels, scaled to 0..1.
        std: standard deviation of each channel, likewise.

    Example:
        >>> from types import SimpleNamespace
        >>> from starlayers.vision.training import TrainConfig, train
        >>> from torch.utils.data import TensorDataset
        >>> pixels = torch.zeros(8, 1, 4, 4, dtype=torch.uint8)
        >>> pixels[::2] = 255
        >>> images = TensorDataset(pixels, torch.arange(8) % 2)
        >>> data = SimpleNamespace(train=images, test=images, classes=("white", "black"),
        ...                        shape=(1, 4, 4), mean=(0.5,), std=(0.5,))
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
        >>> config = TrainConfig(epochs=4, batch_size=8, lr=0.1)
        >>> train(model, data, config, progress=False).test_accuracy
        1.0
    """

    @property
    def train(self) -> Dataset[tuple[Tensor, Any]]: ...
    @property
    def test(self) -> Dataset[tuple[Tensor, Any]]: ...
    @property
    def classes(self) -> Sequence[str]: ...
    @property
    def shape(self) -> tuple[int, int, int]: ...
    @property
    def mean(self) -> Sequence[float]: ...
    @property
    def std(self) -> Sequence[float]: ...


def labels_of(dataset: Any) -> Tensor:
    """Return the class numbers of a data set, from its `targets` if it has them.

    A data set of another kind is read once, image by image.

    Example:
        >>> images = TensorDataset(torch.zeros(4, 1, 2, 2), torch.tensor([2, 0, 1, 1]))
        >>> labels_of(Subset(images, [3, 0]))
        tensor([1, 2])
    """
    if isinstance(dataset, Subset):
        return labels_of(dataset.dataset)[list(dataset.indices)]
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[1].long()
    targets = getattr(dataset, "targets", None)
    if targets is None:
        targets = [int(dataset[i][1]) for i in range(len(dataset))]
    return torch.as_tensor(targets).long()


def class_weights(labels: Tensor, classes: int) -> Tensor:
    """Return a weight for each class, the inverse of its number of images; 1 on average.

    A class without images has weight 0.

    Example:
        >>> class_weights(torch.tensor([0, 0, 0, 1]), 2)
        tensor([0.6667, 2.0000])
    """
    counts = torch.bincount(labels, minlength=classes)
    present = (counts > 0).sum()
    return torch.where(counts > 0, len(labels) / (present * counts), 0.0)
