"""What the installed transformers calls the cache: `past_key_values`, from 5.24 on `cache`.

The family's code says `past_key_values`; where it meets transformers' own (masks, layers under
gradient checkpointing, outputs, `generate`) it says `CACHE`. Taking both names everywhere would be
wrong: up to 5.23 `cache` is the paged one of continuous batching, and goes through to attention.
"""

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any, TypeVar

from transformers.masking_utils import create_causal_mask
from transformers.utils.deprecation import deprecate_kwarg

__all__ = ["CACHE", "takes_cache"]

Forward = TypeVar("Forward", bound=Callable[..., Any])

CACHE = "cache" if "cache" in signature(create_causal_mask).parameters else "past_key_values"


def takes_cache(forward: Forward) -> Forward:
    """A `forward` whose parameter `past_key_values` has the installed transformers' name.

    Where that is `cache`, the old one is taken too, with the warning of transformers' own models.

    Example:
        >>> forward = takes_cache(lambda x, past_key_values=None: past_key_values)
        >>> list(signature(forward).parameters) == ["x", CACHE], forward(1, **{CACHE: 2})
        (True, 2)
    """
    if CACHE == "past_key_values":
        return forward

    @wraps(forward)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        if CACHE in kwargs:
            kwargs["past_key_values"] = kwargs.pop(CACHE)
        return forward(*args, **kwargs)

    named = signature(forward)
    parameters = [
        p.replace(name=CACHE) if p.name == "past_key_values" else p
        for p in named.parameters.values()
    ]
    renamed.__signature__ = named.replace(parameters=parameters)  # type: ignore[attr-defined]
    return deprecate_kwarg("past_key_values", "5.40.0", new_name=CACHE)(renamed)
