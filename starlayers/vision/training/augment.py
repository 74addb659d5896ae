"""Deterministic shuffling and augmentation from (seed, epoch, index)."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision.transforms import v2

__all__ = ["Augmented", "ShuffleSampler", "batch_transform", "image_transform", "mix_seeds"]


def mix_seeds(*numbers: int) -> int:
    """Return one seed for a generator that depends on all `numbers` and their order.

    Python's hash of a tuple of integers is the same in every process.

    Example:
        >>> mix_seeds(0, 1) == mix_seeds(0, 1), mix_seeds(0, 1) == mix_seeds(1, 0)
        (True, False)
    """
    return hash(numbers) & (2**63 - 1)


class ShuffleSampler(Sampler[int]):
    """Random order of `length` images that depends on (seed, epoch) alone.

    Call `set_epoch` before each epoch; every iteration of one epoch gives the same order.

    Example:
        >>> order = ShuffleSampler(4, seed=0)
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
        generator = torch.Generator().manual_seed(mix_seeds(self.seed, self.epoch))
        yield from torch.randperm(self.length, generator=generator).tolist()


class Augmented(Dataset[tuple[Tensor, Any]]):
    """Data set with a random transform whose randomness is (seed, epoch, index) alone.

    An image changes in the same way however many workers or processes load it, and wherever a
    stopped run goes on. Loading an image seeds PyTorch's CPU generator; the training loop, the
    only user, seeds it anew at every step.

    Args:
        dataset: items (image, label).
        transform: random function of an image.
        seed: seed of the run.

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
        torch.default_generator.manual_seed(mix_seeds(self.seed, self.epoch, index))
        return self.transform(image), label


def image_transform(size: int, *, flip: float, crop: int, randaugment: int) -> v2.Transform | None:
    """Return the random transform of single images, or `None` if all options are 0.

    Args:
        size: side of the images.
        flip: probability of mirroring left and right.
        crop: largest shift in pixels, in both directions; zeros move in.
        randaugment: number of RandAugment operations.

    Example:
        >>> mirror = image_transform(2, flip=1.0, crop=0, randaugment=0)
        >>> mirror(torch.tensor([[[1, 2], [3, 4]]])).tolist()
        [[[2, 1], [4, 3]]]
    """
    steps: list[v2.Transform] = []
    if flip:
        steps.append(v2.RandomHorizontalFlip(flip))
    if crop:
        steps.append(v2.RandomCrop(size, padding=crop))
    if randaugment:
        steps.append(v2.RandAugment(num_ops=randaugment))
    return v2.Compose(steps) if steps else None


def batch_transform(num_classes: int, *, mixup: float, cutmix: float) -> v2.Transform | None:
    """Return the random transform of whole batches, or `None` if both options are 0.

    With both, each batch gets MixUp or CutMix at random.

    Args:
        num_classes: the labels become probabilities of that many classes.
        mixup: parameter of MixUp's Beta distribution, 0 for no MixUp.
        cutmix: parameter of CutMix's Beta distribution, 0 for no CutMix.

    Example:
        >>> mix = batch_transform(3, mixup=0.2, cutmix=0.0)
        >>> images, labels = mix(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0]))
        >>> tuple(labels.shape), labels.sum(1).tolist()
        ((4, 3), [1.0, 1.0, 1.0, 1.0])
    """
    mixers: list[v2.Transform] = []
    if mixup:
        mixers.append(v2.MixUp(alpha=mixup, num_classes=num_classes))
    if cutmix:
        mixers.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))
    return v2.RandomChoice(mixers) if mixers else None
