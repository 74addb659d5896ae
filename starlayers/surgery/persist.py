"""Loading a starified model that transformers has saved."""

from os import PathLike
from typing import Any

from torch import nn

from starlayers.surgery.gates import gate_parameters
from starlayers.surgery.saving import GUARD, apply_record, note_in_config

__all__ = ["from_pretrained"]


def from_pretrained(auto_class: Any, path: str | PathLike[str], **kwargs: Any) -> Any:
    """Load a model that was starified and then saved by `save_pretrained`, gates and all.

    The config names the MLPs that were changed; the model is built with its gates in place and
    loaded by the loader of transformers, so that `dtype`, `device_map` and the rest work.

    Args:
        auto_class: `AutoModel`, `AutoModelForCausalLM`, ..., or a model class. It may have another
            head than the model that was saved, or none.
        path: a folder or the name of a model on the hub.
        kwargs: what `auto_class.from_pretrained` takes.

    Raises:
        ImportError: transformers is not installed.
        ValueError: no starified model was saved there, or by a newer starlayers, or without gates.
        TypeError: `auto_class` can load no model of this kind.

    Example:
        >>> import tempfile
        >>> from transformers import AutoModel, BertConfig, BertModel
        >>> from starlayers import from_pretrained, starify
        >>> folder = tempfile.mkdtemp()
        >>> small = BertConfig(hidden_size=8, num_attention_heads=2, intermediate_size=16)
        >>> starify(BertModel(small), gate="scale").save_pretrained(folder)
        >>> from_pretrained(AutoModel, folder).encoder.layer[0].intermediate.dense.spec
        'scale'
    """
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise ImportError(
            "starlayers.from_pretrained needs transformers: pip install 'starlayers[nlp]'"
        ) from error

    config = kwargs.pop("config", None)
    if config is None:
        hub = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
        asked = {name: kwargs[name] for name in hub if name in kwargs}
        trusted = kwargs.get("trust_remote_code")
        config = AutoConfig.from_pretrained(path, trust_remote_code=trusted, **asked)
    record = getattr(config, "star_mlp", None)
    if not record:
        raise ValueError(
            f"{path} holds no starified model: its config has no record of one. Load it with "
            f"{auto_class.__name__}.from_pretrained, then call starify"
        )
    fusions = {
        k: v for k, v in (getattr(config, "fusion_config", None) or {}).items() if k != GUARD
    }
    config.fusion_config = fusions or None
    own = _model_class(auto_class, config)

    # transformers builds the model itself, on the meta device: so the class that it builds from
    # installs the gates. The model then takes the class that it was saved as.
    def build(self: nn.Module, config: Any, *args: Any, **more: Any) -> None:
        own.__init__(self, config, *args, **more)
        apply_record(self, record, prefix=own.base_model_prefix)

    names = {"__init__": build, "__module__": own.__module__, "__qualname__": own.__qualname__}
    builder: Any = type(own.__name__, (own,), names)
    info = kwargs.pop("output_loading_info", False)
    model, found = builder.from_pretrained(path, config=config, output_loading_info=True, **kwargs)
    model.__class__ = own
    gates = {id(p) for p in gate_parameters(model)}
    ours = {name for name, p in model.named_parameters() if id(p) in gates}
    if lost := sorted(ours & set(found["missing_keys"])):
        raise ValueError(
            f"{path} lacks {len(lost)} weights of the gates that its config tells of, {lost[0]} "
            "first: a plain model was saved with a starified one's config, or a part was reverted"
        )
    note_in_config(model)
    return (model, found) if info else model


def _model_class(auto_class: Any, config: Any) -> Any:
    """The class that `auto_class` picks for a config, or itself where it is a model class."""
    mapping = getattr(auto_class, "_model_mapping", None)
    if mapping is None:
        if not hasattr(auto_class, "base_model_prefix"):
            raise TypeError(f"{auto_class!r} is no auto class or model class of transformers")
        return auto_class
    if type(config) not in mapping:
        raise TypeError(f"{auto_class.__name__} has no model for {type(config).__name__}")
    classes = mapping[type(config)]
    if not isinstance(classes, (tuple, list)):
        return classes
    saved = set(config.architectures or ())
    return next((c for c in classes if c.__name__ in saved), classes[0])
