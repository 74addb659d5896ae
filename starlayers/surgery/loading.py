"""Load models of transformers, starified ones or such that are to be."""

from collections.abc import Mapping
from os import PathLike
from typing import Any

from torch import nn

from starlayers.surgery.adapters import HUB_OPTIONS
from starlayers.surgery.saving import load_starified
from starlayers.surgery.starify import starify as starify_model

__all__ = ["from_pretrained"]


def from_pretrained(
    auto_class: Any,
    path: str | PathLike[str],
    *,
    starify: Mapping[str, Any] | bool = False,
    **kwargs: Any,
) -> Any:
    """Load a model of transformers with star MLPs.

    A model that was starified and saved by `save_pretrained` gets its gates: its config holds the
    record of `starify`. With `starify` any other model is loaded as it is, then starified.
    transformers builds and loads the model, so `dtype`, `device_map`, `quantization_config` and its
    other options work.

    Args:
        auto_class: `AutoModel`, `AutoModelForCausalLM`, ..., or a model class. It may have another
            head than the saved model, or none.
        path: a folder, or the name of a model on the hub.
        starify: arguments of `starlayers.starify` for the loaded model; True for its defaults. On a
            model that was starified before they are a second call of `starify`: trained gates stay,
            `recompute`, `grow` and `mode="fuse"` are added.
        kwargs: arguments of `auto_class.from_pretrained`.

    Returns:
        The model, or with `output_loading_info=True` the pair (model, loading info).

    Raises:
        ImportError: transformers is not installed.
        ValueError: the model at `path` was not starified and `starify` is not given, it was saved
            by a newer starlayers, lacks weights of its gates, or has other gates than `starify`
            asks for; or `starify` finds no MLP to replace.
        TypeError: `auto_class` has no model for this config, or `starify` has the wrong type.

    Example:
        >>> import tempfile
        >>> from transformers import AutoModel, BertConfig, BertModel
        >>> from starlayers import from_pretrained
        >>> folder, starred = tempfile.mkdtemp(), tempfile.mkdtemp()
        >>> small = BertConfig(hidden_size=8, num_attention_heads=2, intermediate_size=16)
        >>> BertModel(small).save_pretrained(folder)
        >>> model = from_pretrained(AutoModel, folder, starify={"gate": "scale"})
        >>> model.encoder.layer[0].intermediate.dense.spec
        'scale'
        >>> model.save_pretrained(starred)
        >>> from_pretrained(AutoModel, starred).encoder.layer[0].intermediate.dense.spec
        'scale'
    """
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise ImportError(
            "starlayers.from_pretrained needs transformers: pip install 'starlayers[nlp]'"
        ) from error

    options = _options(starify)
    config = kwargs.pop("config", None)
    own_config = config is None
    if own_config:
        hub = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        trusted = kwargs.get("trust_remote_code")
        config = AutoConfig.from_pretrained(path, trust_remote_code=trusted, **hub)
    record = getattr(config, "star_mlp", None)
    if record:
        _check_same_gates(record, options or {}, path)
        loaded = load_starified(auto_class, path, config, **kwargs)
    elif options is None:
        raise ValueError(
            f"{path} holds no starified model: its config has no record of one. Load it with "
            f"{auto_class.__name__}.from_pretrained, or here with starify=True (or a dictionary of "
            "starify's arguments) to starify it when it is loaded"
        )
    else:
        # without a config of the user's transformers reads it again, with overrides in `kwargs`
        given = {} if own_config else {"config": config}
        loaded = auto_class.from_pretrained(path, **given, **kwargs)
    if options is not None:
        model: nn.Module = loaded[0] if isinstance(loaded, tuple) else loaded
        starify_model(model, **options)
    return loaded


def _options(starify: Mapping[str, Any] | bool) -> dict[str, Any] | None:
    """Return the arguments for `starify`, or `None` if it is not asked for."""
    if isinstance(starify, bool):
        return {} if starify else None
    if not isinstance(starify, Mapping):
        raise TypeError(
            "from_pretrained: starify must be True or a dictionary of starify's arguments, as in "
            f"starify={{'mode': 'fuse'}}, got {starify!r}"
        )
    return dict(starify)


def _check_same_gates(record: dict[str, Any], options: dict[str, Any], path: Any) -> None:
    """Raise a ValueError if gates are asked for that are not those of a saved model."""
    for name in ("gate", "grow"):
        saved = sorted({str(layer[name]) for layer in record["layers"] if layer.get(name)})
        asked = str(options.get(name) or "")
        if asked and saved and saved != [asked]:
            raise ValueError(
                f"{path} holds a starified model with {name}={', '.join(saved)}, and "
                f"starify asks for {name}={asked}: leave {name} out to load the gates as they "
                "were trained, or load the plain model"
            )
