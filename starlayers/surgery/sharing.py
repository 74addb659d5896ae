"""Starified models in folders that the auto classes of transformers load."""

import os
from pathlib import Path
from typing import Any

from starlayers.surgery.saving import CODE_MODULE, record_of

__all__ = ["save_with_code"]

CODE = '''"""Loader of a model with star layers; it needs `pip install starlayers`."""

import starlayers
import transformers


class Loader:
    """Load the model of this folder as the auto class of the same name does."""

    @classmethod
    def from_pretrained(cls, path, *args, trust_remote_code=None, **kwargs):
        auto_class = getattr(transformers, cls.__name__)
        return starlayers.from_pretrained(auto_class, path, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class=None):
        """Do nothing: what is loaded has a class of transformers."""


def __getattr__(name):
    if name.startswith("AutoModel"):
        return type(name, (Loader,), {})
    raise AttributeError(name)
'''


def save_with_code(model: Any, folder: str | os.PathLike[str], **kwargs: Any) -> None:
    """Save a starified model so that auto classes load it where starlayers is installed.

    The folder, or a hub repository made of it, loads by
    `AutoModel...from_pretrained(folder, trust_remote_code=True)` and in pipelines. Beside what
    `save_pretrained` writes it has a short Python file, which calls `starlayers.from_pretrained`;
    transformers asks for starlayers by name where it is missing. For people without starlayers,
    `merge` the model instead, where that is possible.

    Args:
        model: a starified model of transformers.
        folder: where to save it.
        kwargs: arguments of `model.save_pretrained`.

    Raises:
        ValueError: the model has no gates or grown products, or has code of its own in its folder.

    Example:
        >>> import tempfile
        >>> from transformers import AutoModel, BertConfig, BertModel
        >>> from starlayers.surgery import starify
        >>> small = BertConfig(hidden_size=8, num_attention_heads=2, intermediate_size=16)
        >>> folder = tempfile.mkdtemp()
        >>> save_with_code(starify(BertModel(small)), folder)
        >>> sorted(os.listdir(folder))
        ['config.json', 'model.safetensors', 'modeling_starlayers.py']
    """
    from transformers.models.auto import modeling_auto

    config, kind = model.config, type(model).__name__
    layers = record_of(model).get("layers", ())
    if not any(layer.get("gate") or layer.get("grow") for layer in layers):
        raise ValueError(
            f"save_with_code: this {kind} has no gates or grown products: save_pretrained is enough"
        )
    if getattr(config, "auto_map", None):
        raise ValueError(
            f"save_with_code: {kind} has code of its own, by its config's auto_map; share it with "
            "save_pretrained, and load it with starlayers.from_pretrained"
        )
    names = [
        name
        for name, auto_class in vars(modeling_auto).items()
        if name.startswith("AutoModel")
        and type(config) in getattr(auto_class, "_model_mapping", ())
    ]
    if not names:
        raise ValueError(f"save_with_code: no auto class of transformers loads a {kind}")
    Path(folder).mkdir(parents=True, exist_ok=True)
    written = Path(folder) / f"{CODE_MODULE}.tmp"
    written.write_text(CODE)
    written.replace(Path(folder) / f"{CODE_MODULE}.py")
    config.auto_map = {name: f"{CODE_MODULE}.{name}" for name in names}
    try:
        model.save_pretrained(folder, **kwargs)
    finally:
        del config.auto_map
