"""Order of the training images and changes to them, from nothing but seed, epoch and number."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision.transforms import v2

__all__ = ["Augmented", "Shuffled", "image_transform", "mixing"]


def _seed(*numbers: int) -> int:
    # Python's hash of a tuple of integers is the same in every process
    return hash(numbers) & (2**63 - 1)


class Shuffled(Sampler[int]):
    """A random order of `length` images that depends on (seed, epoch) alone.

    Example:
        >>> order = Shuffled(4, seed=0)
        >>> sorted(order), list(order) == list(order)
        ([0, 1, 2, 3], True)
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed, self.epoch = length, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(_seed(self.seed, self.epoch))
        yield from torch.randperm(self.length, generator=generator).tolist()


class Augmented(Dataset[tuple[Tensor, Any]]):
    """`dataset` with `transform` on each image, its randomness drawn from (seed, epoch, index).

    So an image changes in the same way however many workers or processes load it and wherever a
    stopped run goes on. It seeds PyTorch's CPU generator, which the training loop, its only user,
    seeds anew at every step.

    Example:
        >>> noisy = Augmented([(torch.zeros(2), 7)], lambda x: torch.rand(2), seed=1)
        >>> bool((noisy[0][0] == noisy[0][0]).all()), noisy[0][1]
        (True, 7)
    """

    def __init__(self, dataset: Any, transform: Callable[[Tensor], Tensor], seed: int) -> None:
        self.dataset, self.transform, self.seed, self.epoch = dataset, transform, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image, label = self.dataset[index]
        torch.default_generator.manual_seed(_seed(self.seed, self.epoch, index))
        return self.transform(image), label


def image_transform(size: int, *, flip: float, crop: int, randaugment: int) -> v2.Transform | None:
    """Random flip with probability `flip`, shift by up to `crop` pixels, `randaugment` operations.

    Example:
        >>> image_transform(28, flip=0.0, crop=0, randaugment=0) is None
        True
    """
    steps: list[v2.Transform] = []
    if flip:
        steps.append(v2.RandomHorizontalFlip(flip))
    if crop:
        steps.append(v2.RandomCrop(size, padding=crop))
    if randaugment:
        steps.append(v2.RandAugment(num_ops=randaugment))
    return v2.Compose(steps) if steps else None


def mixing(num_classes: int, *, mixup: float, cutmix: float) -> v2.Transform | None:
    """MixUp and CutMix with these Beta parameters, either at random where both are positive.

    Example:
        >>> mix = mixing(3, mixup=0.2, cutmix=0.0)
        >>> images, labels = mix(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0]))
        >>> tuple(labels.shape)
        (4, 3)
    """
    mixers: list[v2.Transform] = []
    if mixup:
        mixers.append(v2.MixUp(alpha=mixup, num_classes=num_classes))
    if cutmix:
        mixers.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))
    return v2.RandomChoice(mixers) if mixers else None
