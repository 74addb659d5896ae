"""Deterministic shuffling and augmentation from (seed, epoch, index)."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision.transforms import v2


def mix_seeds(*numbers: int) -> int:
    """Return one seed for a generator that depends on all `numbers` and their order.

    Python's hash of a tuple of integers is the same in every process.
    """
    return hash(numbers) & (2**63 - 1)


class ShuffleSampler(Sampler[int]):
    """Random order of `length` images that depends on (seed, epoch) alone.

    Call `set_epoch` before each epoch; every iteration of one epoch gives the same order. With
    `weights` (length,) the images are drawn with replacement, each as often as its weight says.
    """

    def __init__(self, length: int, seed: int, weights: Tensor | None = None) -> None:
        self.length, self.seed, self.epoch = length, seed, 0
        self.weights = weights

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(mix_seeds(self.seed, self.epoch))
        if self.weights is None:
            order = torch.randperm(self.length, generator=generator)
        else:
            order = torch.multinomial(self.weights, self.length, True, generator=generator)
        yield from order.tolist()


class Augmented(Dataset[tuple[Tensor, Any]]):
    """Data set with a random transform whose randomness is (seed, epoch, index) alone.

    An image changes in the same way however many workers or processes load it, and wherever a
    stopped run goes on. Loading an image seeds PyTorch's CPU generator; the training loop, the
    only user, seeds it anew at every step.
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


def image_transform(
    size: int,
    *,
    flip: float,
    crop: int,
    randaugment: int,
    resized_crop: float = 0.0,
    erase: float = 0.0,
    fill: Sequence[int] = (0,),
) -> v2.Transform | None:
    """Return the random transform of images of side `size`, or `None` if all options are 0.

    `flip` is the probability of mirroring left and right, `crop` the largest shift in pixels in
    both directions (zeros move in), `resized_crop` the smallest share of the area that is cut out
    and resized to the whole, `randaugment` the number of RandAugment operations, `erase` the
    probability that a rectangle is erased. It gets the value `fill` of each channel.
    """
    steps: list[v2.Transform] = []
    if resized_crop:
        steps.append(v2.RandomResizedCrop(size, scale=(resized_crop, 1.0)))
    if flip:
        steps.append(v2.RandomHorizontalFlip(flip))
    if crop:
        steps.append(v2.RandomCrop(size, padding=crop))
    if randaugment:
        steps.append(v2.RandAugment(num_ops=randaugment))
    if erase:
        steps.append(v2.RandomErasing(erase, value=list(fill)))
    return v2.Compose(steps) if steps else None


def batch_transform(num_classes: int, *, mixup: float, cutmix: float) -> v2.Transform | None:
    """Return the random transform of whole batches, or `None` if both options are 0.

    The options are the parameters of the Beta distributions. With both, each batch gets MixUp or
    CutMix at random. The labels become probabilities of `num_classes` classes.
    """
    mixers: list[v2.Transform] = []
    if mixup:
        mixers.append(v2.MixUp(alpha=mixup, num_classes=num_classes))
    if cutmix:
        mixers.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))
    return v2.RandomChoice(mixers) if mixers else None
