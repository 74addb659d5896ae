"""Name of the cache argument in the installed transformers.

Up to 5.23 it is `past_key_values`, from 5.24 on `cache`. Starformer code says `past_key_values`
and uses `CACHE` where it calls transformers (masks, layers under gradient checkpointing, outputs,
`generate`). Accepting both names everywhere would be wrong: up to 5.23 `cache` is the paged cache
of continuous batching, which has to reach the attention function unchanged.
"""

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any, TypeVar

from transformers.masking_utils import create_causal_mask
from transformers.utils.deprecation import deprecate_kwarg

Forward = TypeVar("Forward", bound=Callable[..., Any])

CACHE = "cache" if "cache" in signature(create_causal_mask).parameters else "past_key_values"


def takes_cache(forward: Forward) -> Forward:
    """Rename the argument `past_key_values` of `forward` to `CACHE`.

    Where `CACHE` is "cache", `past_key_values` still works and warns that it is deprecated, as in
    transformers' own models. Where it is "past_key_values", `forward` is returned unchanged.

    Example:
        >>> @takes_cache
        ... def forward(x, past_key_values=None):
        ...     return x, past_key_values
        >>> list(signature(forward).parameters) == ["x", CACHE]
        True
        >>> forward(1, **{CACHE: 2})
        (1, 2)
    """
    if CACHE == "past_key_values":
        return forward

    @wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if CACHE in kwargs:
            kwargs["past_key_values"] = kwargs.pop(CACHE)
        return forward(*args, **kwargs)

    original = signature(forward)
    parameters = [
        p.replace(name=CACHE) if p.name == "past_key_values" else p
        for p in original.parameters.values()
    ]
    wrapper.__signature__ = original.replace(parameters=parameters)  # type: ignore[attr-defined]
    return deprecate_kwarg("past_key_values", "5.40.0", new_name=CACHE)(wrapper)
