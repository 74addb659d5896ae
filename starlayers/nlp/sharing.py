"""Model folders that load where starlayers is not installed."""

import os

from transformers import PreTrainedModel

from starlayers.nlp.auto import AUTO_CLASSES

__all__ = ["save_with_code"]


def save_with_code(model: PreTrainedModel, folder: str | os.PathLike[str]) -> None:
    """`model.save_pretrained(folder)`, with the code that computes it beside the weights.

    Such a folder, or a hub repository made of it, loads by
    `AutoModel...from_pretrained(folder, trust_remote_code=True)` without starlayers; with it
    installed the code there uses its fused layers. To have `push_to_hub` do the same, call
    `type(model).register_for_auto_class("AutoModelForCausalLM")` and the same on its config.

    Raises:
        ValueError: the model is none of the family's, such as one wrapped by PEFT.

    Example:
        >>> from starlayers.nlp import StarformerConfig, StarformerModel
        >>> model = StarformerModel(StarformerConfig(vocab_size=9, hidden_size=8,
        ...                                          num_hidden_layers=1, num_attention_heads=2))
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_with_code(model, folder)
        ...     "modeling_starformer.py" in os.listdir(folder)
        True
    """
    kind = type(model)
    auto = next((name for name, models in AUTO_CLASSES.items() if kind in models), None)
    if auto is None:
        known = ", ".join(m.__name__ for models in AUTO_CLASSES.values() for m in models)
        raise ValueError(
            f"save_with_code takes one of {known}; got {kind.__module__}.{kind.__name__} (a model "
            "that came from a folder's own code saves it by itself)"
        )
    config = type(model.config)
    before = kind._auto_class, config._auto_class
    # set for this one save only: afterwards ordinary saves are ordinary again
    kind._auto_class, config._auto_class = auto, "AutoConfig"
    try:
        model.save_pretrained(folder)
    finally:
        kind._auto_class, config._auto_class = before
