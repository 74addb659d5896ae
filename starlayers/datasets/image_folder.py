"""Read a folder of image files, one subfolder a class, with pixels of any kind as 8-bit RGB."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Subset

from starlayers.datasets.optional import require
from starlayers.datasets.splits import divide

PIL_Image: Any = require("PIL.Image")
PIL_ImageOps: Any = require("PIL.ImageOps")

__all__ = [
    "EXTENSIONS",
    "Remembered",
    "fit_to",
    "load_image",
    "open_folder",
    "open_train_and_test",
    "read_image",
    "readable",
    "split_folder",
    "to_rgb",
]

#: file names that are read; of an animation, the first frame
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".gif", ".webp", ".avif"),
    *(".bmp", ".ppm", ".pgm", ".pbm", ".tif", ".tiff"),
)
TEST_FOLDERS = ("val", "test", "valid")


def open_train_and_test(root: Path) -> tuple[list[Any], str] | None:
    """Open `root/train` and `root/val` (or `test`, `valid`), or return `None` without them.

    Returns:
        Training and test set, and their source in words.

    Raises:
        FileNotFoundError: no images in class folders.
        ValueError: the two have different classes.
    """
    test_root = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or test_root is None:
        return None
    train, test = open_folder(root / "train"), open_folder(test_root)
    if train.classes != test.classes:
        raise ValueError(
            f"{root}: train has classes {train.classes}, {test_root.name} has {test.classes}; they "
            "must be the same"
        )
    source = f"images in {root}{_sizes(train.targets)}"
    return [train, test], source + _ignored_files(root / "train", test_root)


def split_folder(root: Path) -> tuple[Any, list[list[int]], str]:
    """Open a folder and hold out one image in five of each class for testing.

    A class of two to nine images has one test image, a class of one image none.

    Returns:
        The images, the numbers of training and test images, and the source in words.

    Raises:
        FileNotFoundError: no images in class folders.
        ValueError: no class has two images.
    """
    images = open_folder(root)
    if max(Counter(images.targets).values()) < 2:
        raise ValueError(
            f"{root} has one image in each of its classes; a class needs two or more, so that one "
            "can be set aside for testing"
        )
    parts = divide(images.targets, lambda n: max(1, n // 5) if n > 1 else 0, ["test"])
    source = f"images in {root}, {len(parts['test'])} of {len(images)} set aside for testing"
    source += _sizes(images.targets[i] for i in parts["train"])
    return images, [parts["train"], parts["test"]], source + _ignored_files(root)


def open_folder(root: Path) -> Any:
    """Open images in class folders as a torchvision `DatasetFolder`.

    Raises:
        FileNotFoundError: `root` has no class folders, or one of them has no images.
    """
    datasets = require("torchvision.datasets")
    try:
        return datasets.DatasetFolder(str(root), loader=read_image, extensions=EXTENSIONS)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no images in class folders under {root}; expected {root}/<class>/<image>.jpg, each "
            f"class with one image at least ({error})"
        ) from error


def _sizes(labels: Iterable[int]) -> str:
    """Describe classes of unequal size: the largest has twice the smallest's images or more."""
    counts = Counter(labels).values()
    if max(counts) < 2 * min(counts):
        return ""
    return f", {min(counts)} to {max(counts)} training images a class"


def _ignored_files(*roots: Path) -> str:
    """Describe the files that are not read because of their names."""
    suffixes = [
        file.suffix.lower() or file.name
        for root in roots
        for file in sorted(root.rglob("*"))
        if file.is_file() and not file.name.startswith(".")
    ]
    others = [suffix for suffix in suffixes if suffix not in EXTENSIONS]
    if not others:
        return ""
    return f" ({len(others)} other files ignored: {', '.join(sorted(set(others)))})"


def read_image(path: str) -> Any:
    """Read an image file as an RGB `PIL.Image`, turned upright as its EXIF data say.

    Raises:
        ValueError: the file cannot be decoded, or its pixels have no known range.
    """
    try:
        # a stream: of a path, Pillow maps uncompressed TIFF files into memory, and mixes up the
        # sides of those whose orientation swaps them
        with open(path, "rb") as stream, PIL_Image.open(stream) as image:
            PIL_ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image)
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and others
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def fit_to(size: int) -> Callable[[Any], Tensor]:
    """Return the function from a `PIL.Image` to a uint8 tensor (3, size, size).

    The shorter side is resized to `size`, and the middle of the longer one is kept.

    Example:
        >>> from PIL import Image
        >>> fit_to(32)(Image.new("L", (200, 100))).shape
        torch.Size([3, 32, 32])
    """
    v2 = require("torchvision.transforms.v2")
    return v2.Compose(  # type: ignore[no-any-return]
        [to_rgb, v2.PILToTensor(), v2.Resize(size), v2.CenterCrop(size)]
    )


def load_image(path: str | os.PathLike[str], shape: tuple[int, int, int]) -> Tensor:
    """Read an image file as a training on images of `shape` sees it.

    Args:
        path: image of any kind that `load_images("folder")` reads.
        shape: (C, H, W) of the training images, with C = 3, or 1 for gray ones.

    Returns:
        uint8 tensor of that shape.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be read as an image, or another number of channels.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> file = Path(tempfile.mkdtemp(), "photo.png")
        >>> Image.new("RGB", (200, 100)).save(file)
        >>> load_image(file, (1, 28, 28)).shape
        torch.Size([1, 28, 28])
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no image file at {path}")
    channels, height, width = shape
    if channels not in (1, 3):
        raise ValueError(f"{path}: image files have 1 or 3 channels, the shape asks for {channels}")
    image = read_image(str(path))
    if channels == 1:
        image = image.convert("L")  # then its three equal channels are one
    if height != width:
        image = image.resize((width, height))
        return require("torchvision.transforms.v2").PILToTensor()(image)  # type: ignore[no-any-return]
    return fit_to(height)(image)[:channels]


class Remembered(Dataset[tuple[Tensor, Any]]):
    """Data set whose items are read once and kept in memory.

    Example:
        >>> reads = []
        >>> class Files(Dataset):
        ...     def __len__(self):
        ...         return 3
        ...     def __getitem__(self, i):
        ...         reads.append(i)
        ...         return torch.zeros(1, 4, 4), 0
        >>> images = Remembered(Files())
        >>> _ = images[1], images[1]
        >>> reads
        [1]
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.items: list[tuple[Tensor, Any] | None] = [None] * len(dataset)

    @property
    def targets(self) -> Sequence[int]:
        """Class numbers, where the files need not be read for them."""
        if isinstance(self.dataset, Subset):
            targets = self.dataset.dataset.targets  # type: ignore[attr-defined]
            return [targets[i] for i in self.dataset.indices]
        return self.dataset.targets  # type: ignore[no-any-return]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        item = self.items[index]
        if item is None:
            item = self.items[index] = self.dataset[index]
        return item


def readable(images: Remembered) -> tuple[Subset[tuple[Tensor, Any]], list[str]]:
    """Read all images; return those that can be read, and a message for each other file."""
    kept, messages = [], []
    for i in range(len(images)):
        try:
            images[i]
        except ValueError as error:
            messages.append(str(error))
        else:
            kept.append(i)
    return Subset(images, kept), messages


def to_rgb(image: Any) -> Any:
    """Convert a `PIL.Image` of any mode to 8-bit RGB.

    16-bit pixels are scaled from 0..65535, and floating-point pixels from 0..1, to 0..255 and
    rounded. Transparent pixels are laid over white. Pillow converts the other modes.

    Raises:
        ValueError: 32-bit integers, floating-point pixels outside 0..1, or a color space that
            Pillow does not convert.

    Example:
        >>> from PIL import Image
        >>> to_rgb(Image.new("I;16", (1, 1), 32896)).getpixel((0, 0))
        (128, 128, 128)
    """
    # Pillow gives 16-bit PGM files, and before version 11 also PNG files, the mode of 32 bits
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        image = PIL_Image.fromarray(_scaled(np.asarray(image) / 65535))
    elif image.mode == "I":
        raise ValueError("32-bit integer pixels have no known range; convert them to 8 or 16 bits")
    elif image.mode == "F":
        image = PIL_Image.fromarray(_scaled(np.asarray(image)))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        white = PIL_Image.new("RGBA", image.size, "white")
        image = PIL_Image.alpha_composite(white, image)
    return image.convert("RGB")


def _scaled(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    low, high = pixels.min(), pixels.max()
    if not (low >= 0 and high <= 1):  # also if one of them is NaN
        raise ValueError(
            f"floating-point pixels from {low:g} to {high:g}; 0 (black) to 1 (white) are read, so "
            "scale them to that, or convert them to 8 or 16 bits"
        )
    return np.rint(pixels * 255.0).astype(np.uint8)
