"""Image files that the words of a command line name."""

from pathlib import Path

from starlayers.datasets.image_folder import EXTENSIONS

__all__ = ["image_files"]


def image_files(path: Path) -> list[Path]:
    """Return a file, or the image files in a folder and the folders in it.

    Raises:
        FileNotFoundError: no such file, or no images in the folder.
    """
    if path.is_file():
        return [path]
    files = sorted(f for f in path.rglob("*") if f.is_file() and f.suffix.lower() in EXTENSIONS)
    if not files:
        raise FileNotFoundError(f"no image files in {path}" if path.is_dir() else f"no file {path}")
    return files
