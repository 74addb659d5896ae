"""Backend switch: which paths star layers may take."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import checkpoint

__all__ = ["BACKENDS", "backend_name", "use_backend"]

#: names that `use_backend` and the environment variable accept
BACKENDS = ("auto", "eager", "cpu", "triton")
ENV_VAR = "STARLAYERS_BACKEND"

T = TypeVar("T")

# the dictionary behind os.environ: its own look-up of a missing name takes 0.5 us, as long as a
# matrix product of a small layer
_ENVIRONMENT: dict[Any, Any] | None = getattr(os.environ, "_data", None)
_KEY = getattr(os.environ, "encodekey", str)(ENV_VAR)

_forced: ContextVar[str | None] = ContextVar("starlayers_backend", default=None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose how star layers compute inside a `with` block.

    The environment variable `STARLAYERS_BACKEND` does the same outside of blocks.

    `"auto"` uses a fused path where one applies and falls back silently; `"eager"` always runs
    the PyTorch definition; `"triton"` requires the fused GPU kernels, and `"cpu"` for star MLPs the
    row-blocked op of CPUs at any size, and both raise where these do not apply. Blocks nest, and a
    block overrides the environment variable, which is read at every call. A compiled function
    keeps the backend it was traced with.

    Raises:
        ValueError: `name` is not one of the four.

    Example:
        >>> with use_backend("eager"):
        ...     backend_name()
        'eager'
    """
    token = _forced.set(_checked(name, "use_backend"))
    try:
        yield
    finally:
        _forced.reset(token)


def backend_name() -> str:
    """Return the backend in effect: "auto", "eager", "cpu" or "triton".

    Raises:
        ValueError: `STARLAYERS_BACKEND` holds an unknown name.

    Example:
        >>> backend_name()
        'auto'
    """
    return _forced_name() or "auto"


def _forced_name() -> str | None:
    name = _forced.get()
    if name is None and (_ENVIRONMENT is None or _KEY in _ENVIRONMENT):
        name = os.environ.get(ENV_VAR) or None
        return name and _checked(name, ENV_VAR)
    return name


# Dynamo cannot trace a context variable before PyTorch 2.12. This mark makes it call the function
# once while tracing and keep the result. It is what torch.compiler.assume_constant_result sets; the
# decorator itself would import the compiler.
_forced_name._dynamo_marked_constant = True  # type: ignore[attr-defined]


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


def recomputed(call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Run `call(*args)` as a checkpoint: save the inputs, repeat it in the backward.

    The repetition runs on the backend that is in effect now. `kwargs` go to
    `torch.utils.checkpoint.checkpoint`, which passes those it does not know on to `call`.
    """
    y: T = checkpoint(with_this_backend(call), *args, use_reentrant=False, **kwargs)
    return y


def _checked(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{where}: unknown backend {name!r}, choose one of {', '.join(BACKENDS)}")
    return name
