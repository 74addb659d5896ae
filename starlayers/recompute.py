"""Recomputation: save the inputs of a call, and run it again in the backward."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import checkpoint, noop_context_fn

from starlayers.backend import backend_name, use_backend
from starlayers.dispatch import is_transformed
from starlayers.tracing import is_traced

__all__ = ["recomputed"]

T = TypeVar("T")


def with_this_backend(call: Callable[..., T]) -> Callable[..., T]:
    """Wrap `call` so that it always runs on the backend that is in effect now.

    A checkpoint repeats the forward during the backward. That may happen outside of the
    `use_backend` block, and on a thread of autograd, which does not see context variables.
    """
    if torch.compiler.is_compiling():  # a compiled function keeps its backend anyway
        return call
    name = backend_name()

    def wrapped(*args: object, **kwargs: object) -> T:
        with use_backend(name):
            return call(*args, **kwargs)

    return wrapped


def recomputed(
    call: Callable[..., T], *args: Any, context_fn: Any = noop_context_fn, **kwargs: Any
) -> T:
    """Run `call(*args)` as a checkpoint: save the inputs, repeat it in the backward.

    The repetition runs on the backend that is in effect now. `context_fn` is that of
    `torch.utils.checkpoint.checkpoint`; `kwargs` go to `call`. Transforms of torch.func and
    `torch.jit.trace` know no checkpoints: under them `call` runs as it is.
    """
    if is_transformed() or is_traced(None):
        return call(*args, **kwargs)
    call = with_this_backend(call)
    y: T = checkpoint(call, *args, use_reentrant=False, context_fn=context_fn, **kwargs)
    return y
