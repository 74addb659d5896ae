"""Fashion-MNIST for the studies, whole or a fixed part of it."""

from dataclasses import replace
from typing import Any, cast

from torch.utils.data import Subset

from starlayers.datasets.images import ImageData, load_images


def benchmark_images(*, train: int | None = None, test: int | None = None) -> ImageData:
    """Load Fashion-MNIST, whole or its first `train` and `test` images; never a stand-in for it.

    Raises:
        FileNotFoundError: Fashion-MNIST is not in reach (the digits would be another benchmark).
    """
    data = load_images("fashion-mnist")
    if data.name != "fashion-mnist":
        raise FileNotFoundError(
            "Fashion-MNIST is not in reach: install the Debian package dataset-fashion-mnist or "
            "put the files under ~/.cache/starlayers/FashionMNIST/raw"
        )
    parts: dict[str, Any] = {}
    for name, size in (("train", train), ("test", test)):
        if size is not None:
            parts[name] = Subset(cast(Any, getattr(data, name)), range(size))
    return replace(data, **parts)
