"""Image data sets as uint8 tensors, from wherever they can be had; says where that was."""

import gzip
import inspect
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torchvision
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision.transforms import v2

from starlayers.datasets.packages import cache_dir, debian_package

__all__ = ["ImageData", "load_images"]

HUB_TIMEOUT_S = 10
Images = Dataset[tuple[Tensor, Any]]


@dataclass(frozen=True)
class ImageData:
    """A classification data set: `train` and `test` yield (uint8 image (C, H, W), class number).

    `mean` and `std` are per channel, of training pixels scaled to 0..1; `source` says in words
    where the data came from.

    Example:
        >>> data = load_images("digits")
        >>> data.shape, len(data.classes)
        ((1, 8, 8), 10)
    """

    name: str
    source: str
    train: Images
    test: Images
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_images(
    name: str = "fashion-mnist", *, path: str | os.PathLike[str] | None = None, size: int = 64
) -> ImageData:
    """Load an image data set.

    Args:
        name: "fashion-mnist"; "digits" (scikit-learn's, always there); the name of a torchvision
            data set with a train/test division, such as "CIFAR10"; or "folder" for images in
            class folders under `path`, either with `train` and `val` (or `test`) folders above
            them or divided here, one image in five for testing.
        path: the folder of "folder"; for the others where their files are or go.
        size: side to which images of "folder" and of varying sizes are resized and cropped.

    Fashion-MNIST comes from `path`, from the Debian package dataset-fashion-mnist, or from its
    download site; where none is in reach, "digits" steps in, and `source` says so.

    Raises:
        ValueError: an unknown name.
        FileNotFoundError: a folder that does not exist or holds no images.

    Example:
        >>> len(load_images("digits").test)
        360
    """
    if name == "fashion-mnist":
        return _fashion_mnist(path) or _digits("scikit-learn digits (no Fashion-MNIST in reach)")
    if name == "digits":
        return _digits("scikit-learn digits")
    if name == "folder":
        return _folder(path, size)
    return _torchvision(name, path, size)


def _fashion_mnist(path: str | os.PathLike[str] | None) -> ImageData | None:
    root = Path(path) if path else cache_dir()
    raw = root / "FashionMNIST" / "raw"
    source = f"files in {raw}"
    sets = _open_fashion_mnist(root, download=False)
    if sets is None:
        package = debian_package("dataset-fashion-mnist", "/usr/share/datasets/fashion-mnist")
        source = f"the {'Debian package dataset-fashion-mnist' if package else 'download site'}"
        if package:
            _gunzip(package, raw)
        sets = _open_fashion_mnist(root, download=not package)
    return None if sets is None else _from_arrays("fashion-mnist", source, sets)


def _open_fashion_mnist(root: Path, *, download: bool) -> list[Any] | None:
    opened = torchvision.datasets.FashionMNIST
    try:
        with _socket_timeout(HUB_TIMEOUT_S):
            return [opened(root, train=train, download=download) for train in (True, False)]
    except (OSError, RuntimeError):  # not there, or the site is not in reach
        return None


def _gunzip(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for archive in source.glob("*.gz"):
        partial = target / f"{archive.stem}.{os.getpid()}"
        with gzip.open(archive) as packed, partial.open("wb") as plain:
            shutil.copyfileobj(packed, plain)
        partial.rename(target / archive.stem)


def _torchvision(name: str, path: str | os.PathLike[str] | None, size: int) -> ImageData:
    factory = getattr(torchvision.datasets, name, None)
    parameters = inspect.signature(factory).parameters if inspect.isclass(factory) else {}
    if factory is None or not {"train", "split"} & set(parameters) or "download" not in parameters:
        raise ValueError(
            f"unknown data set {name!r}: use 'fashion-mnist', 'digits', 'folder', or a torchvision "
            "data set with a train/test division, such as 'CIFAR10'"
        )
    root = Path(path) if path else cache_dir()
    divisions: list[dict[str, Any]] = [{"train": True}, {"train": False}]
    if "train" not in parameters:
        divisions = [{"split": "train"}, {"split": "test"}]
    with _socket_timeout(HUB_TIMEOUT_S):
        sets = [factory(root, download=True, **division) for division in divisions]
    source = f"torchvision {name} in {root}"
    if isinstance(getattr(sets[0], "targets", None), list | Tensor) and hasattr(sets[0], "data"):
        return _from_arrays(name, source, sets)
    return _from_files(name, source, sets, size)


def _folder(path: str | os.PathLike[str] | None, size: int) -> ImageData:
    if path is None or not Path(path).is_dir():
        raise FileNotFoundError(f"data set 'folder' needs path=, a folder of images; got {path}")
    root = Path(path)
    test_root = next((root / n for n in ("val", "test", "valid") if (root / n).is_dir()), None)
    if (root / "train").is_dir() and test_root:
        sets: list[Any] = [_image_folder(root / "train"), _image_folder(test_root)]
        if sets[0].classes != sets[1].classes:
            raise ValueError(
                f"{root}: train has classes {sets[0].classes}, {test_root.name} has "
                f"{sets[1].classes}; they must be the same"
            )
        return _from_files("folder", f"images in {root}", sets, size)
    whole = _image_folder(root)
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0)).tolist()
    cut = max(1, len(whole) // 5)
    sets = [whole, whole]
    source = f"images in {root}, {cut} of {len(whole)} set aside for testing"
    return _from_files("folder", source, sets, size, parts=(order[cut:], order[:cut]))


def _image_folder(root: Path) -> Any:
    try:
        return torchvision.datasets.ImageFolder(str(root))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no images in class folders under {root}; expected {root}/<class>/<image>.jpg"
        ) from error


def _digits(source: str) -> ImageData:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = torch.from_numpy(bunch.images * 15).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(bunch.target)
    train, test = train_test_split(
        torch.arange(len(labels)).numpy(), test_size=0.2, random_state=0, stratify=labels.numpy()
    )
    sets = [TensorDataset(images[part], labels[part]) for part in (train, test)]
    return _describe("digits", source, sets, classes=[str(c) for c in range(10)])


def _from_arrays(name: str, source: str, sets: list[Any]) -> ImageData:
    tensors = []
    for s in sets:
        images = torch.as_tensor(s.data)
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        tensors.append(TensorDataset(images, torch.as_tensor(s.targets)))
    return _describe(name, source, tensors, classes=sets[0].classes)


def _from_files(
    name: str,
    source: str,
    sets: list[Any],
    size: int,
    parts: tuple[list[int], list[int]] | None = None,
) -> ImageData:
    to_tensor = v2.Compose([v2.RGB(), v2.PILToTensor(), v2.Resize(size), v2.CenterCrop(size)])
    classes = getattr(sets[0], "classes", None)
    for s in sets:
        s.transform = to_tensor
    if parts:
        sets = [Subset(s, part) for s, part in zip(sets, parts, strict=True)]
    if classes is None:
        classes = [str(c) for c in range(1 + max(int(label) for _, label in sets[1]))]
    return _describe(name, source, sets, classes=classes)


def _describe(name: str, source: str, sets: list[Any], *, classes: Sequence[str]) -> ImageData:
    train, test = sets
    n = len(train)
    sample = torch.stack([train[i][0] for i in range(0, n, max(1, n // 2000))]).float() / 255
    std, mean = torch.std_mean(sample, dim=(0, 2, 3))
    return ImageData(
        name=name,
        source=source,
        train=train,
        test=test,
        classes=tuple(classes),
        shape=cast(tuple[int, int, int], tuple(sample.shape[1:])),
        mean=tuple(mean.tolist()),
        std=tuple(std.clamp_min(1e-6).tolist()),
    )


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
