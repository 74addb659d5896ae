"""Command that writes a trained network to files of other engines."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from starlayers.commands.files import image_files
from starlayers.datasets.image_folder import load_image
from starlayers.datasets.images import load_images
from starlayers.vision import TrainedNet, export, load_run
from starlayers.vision.deploy.formats import FORMATS
from starlayers.vision.training import RunDir

__all__ = ["export_command"]

T = TypeVar("T")

#: value of --int8 without a folder
OWN = Path()


def export_command(words: Sequence[str]) -> int:
    """Export as the words of a command line say, and print what was written."""
    options = _parser().parse_args(words)
    if options.images < 1:
        raise ValueError(f"--images must be at least 1, got {options.images}")
    net = load_run(options.run)
    folder = options.out or (options.run if options.run.is_dir() else options.run.parent)
    stem = "model" if options.run.is_dir() else options.run.stem
    calibration = _calibration(net, options) if options.int8 is not None else None
    metadata = {name: list(getattr(net, name)) for name in ("classes", "mean", "std", "size")}
    for name in options.format:
        report = export(
            net.model,
            folder / f"{stem}{'' if calibration is None else '-int8'}{FORMATS[name].suffix}",
            format=name,
            shape=(len(net.mean), *net.size),
            dynamic=not options.fixed,
            metadata=metadata,
            int8=calibration,
        )
        print(f"{report}\n  {_megabytes(report.path):.2f} MB; inside: {', '.join(metadata)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="starlayers export",
        description="Write a trained network for other engines, with the names of its classes and "
        "the mean, std and size of its images inside, after comparing each file with PyTorch.",
    )
    add = parser.add_argument
    add("run", type=Path, help="folder of a run, or a weights file")
    add(
        "--format",
        nargs="+",
        choices=FORMATS,
        default=["onnx"],
        metavar="NAME",
        help=f"one or several of {', '.join(FORMATS)} (default onnx)",
    )
    add("--out", type=Path, help="folder of the files (default that of the run)")
    add(
        "--int8",
        nargs="?",
        type=Path,
        const=OWN,
        metavar="IMAGES",
        help="write in int8, calibrated by image files or folders of them; without a value by "
        "training images of the run (default off)",
    )
    add("--images", type=int, default=300, help="images that calibrate (default 300)")
    add(
        "--fixed",
        action="store_true",
        help="one image of the training's size, which some engines plan better (default off: "
        "batch, height and width are free)",
    )
    return parser


def _calibration(net: TrainedNet, options: argparse.Namespace) -> Tensor:
    """Return normalised images, at equal distances of those that there are."""
    if options.int8 != OWN:
        files = _spread(image_files(options.int8), options.images)
        images = []
        for file in files:
            try:
                images.append(load_image(file, (len(net.mean), *net.size)))
            except ValueError as error:
                print(error, file=sys.stderr)
        if not images:
            raise ValueError(f"none of the {len(files)} images in {options.int8} can be read")
    else:
        setup = RunDir.read_config(options.run if options.run.is_dir() else options.run.parent)
        data = load_images(
            setup["data"], path=setup["path"], size=net.size[0], skip_unreadable=True
        )
        numbers = _spread(range(len(data.train)), options.images)  # type: ignore[arg-type]
        images = [data.train[i][0] for i in numbers]
    return net.normalise(torch.stack(images))


def _spread(items: Sequence[T], count: int) -> list[T]:
    """Return `count` items at equal distances, or all if there are fewer."""
    step = max(1.0, len(items) / count)
    return [items[int(i * step)] for i in range(min(count, len(items)))]


def _megabytes(path: Path) -> float:
    """Return the size of a file with those that belong to it, or of a package."""
    files = path.rglob("*") if path.is_dir() else [path, path.with_suffix(".bin")]
    return sum(f.stat().st_size for f in files if f.is_file()) / 1e6
