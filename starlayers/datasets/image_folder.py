"""Read a folder of image files, one subfolder a class, with pixels of any kind as 8-bit RGB."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starlayers.datasets.optional import require
from starlayers.datasets.splits import divide

PIL_Image: Any = require("PIL.Image")
PIL_ImageOps: Any = require("PIL.ImageOps")

__all__ = [
    "EXTENSIONS",
    "open_folder",
    "open_train_and_test",
    "read_image",
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
    return [train, test], f"images in {root}{_ignored_files(root / 'train', test_root)}"


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
        with PIL_Image.open(path) as image:
            return to_rgb(PIL_ImageOps.exif_transpose(image))
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and others
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


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
