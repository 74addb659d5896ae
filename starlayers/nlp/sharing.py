"""Saving of model folders that load without starlayers installed."""

import os

from transformers import PreTrainedModel

from starlayers.nlp.auto import AUTO_CLASSES


def save_with_code(model: PreTrainedModel, folder: str | os.PathLike[str]) -> None:
    """Save a Starformer together with the Python files that compute it.

    The folder, or a hub repository made of it, loads without starlayers by
    `AutoModel...from_pretrained(folder, trust_remote_code=True)`. Where starlayers is installed,
    the saved code uses its fused layers. To make `push_to_hub` upload the code too, call
    `type(model).register_for_auto_class("AutoModelForCausalLM")` and
    `type(model.config).register_for_auto_class()`.

    Args:
        model: an instance of a class in `starlayers.nlp`.
        folder: passed to `model.save_pretrained`.

    Raises:
        ValueError: `model` is of another class, such as one wrapped by PEFT.

    Example:
        >>> import tempfile
        >>> from starlayers.nlp import StarformerConfig, StarformerModel
        >>> model = StarformerModel(StarformerConfig(vocab_size=9, hidden_size=8,
        ...                                          num_hidden_layers=1, num_attention_heads=2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_with_code(model, folder)
        ...     "modeling_starformer.py" in os.listdir(folder)
        True
    """
    model_class = type(model)
    auto = next((name for name, models in AUTO_CLASSES.items() if model_class in models), None)
    if auto is None:
        known = ", ".join(m.__name__ for models in AUTO_CLASSES.values() for m in models)
        raise ValueError(
            f"save_with_code takes one of {known}; got {model_class.__module__}."
            f"{model_class.__name__} (a model loaded with the code in its folder saves that code "
            "with save_pretrained)"
        )
    config_class = type(model.config)
    before = model_class._auto_class, config_class._auto_class
    # save_pretrained copies the code of classes that have `_auto_class`: set for this save only
    model_class._auto_class, config_class._auto_class = auto, "AutoConfig"
    try:
        model.save_pretrained(folder)
    finally:
        model_class._auto_class, config_class._auto_class = before
