"""Backend switch: which paths star layers may take."""

import inspect
import os
from contextlib import ContextDecorator
from contextvars import ContextVar
from typing import Any

__all__ = ["BACKENDS", "backend_name", "use_backend"]

BACKENDS = ("auto", "eager", "cpu", "triton")
"""Names of the backends, for `use_backend` and the environment variable STARLAYERS_BACKEND.

Example:
    >>> from starlayers.backend import BACKENDS, backend_name
    >>> backend_name() in BACKENDS
    True
"""
ENV_VAR = "STARLAYERS_BACKEND"

# the dictionary behind os.environ: its own look-up of a missing name takes 0.5 us, as long as a
# matrix product of a small layer
_ENVIRONMENT: dict[Any, Any] | None = getattr(os.environ, "_data", None)
_KEY = getattr(os.environ, "encodekey", str)(ENV_VAR)

#: blocks that were entered and not left, the last in effect
_blocks: ContextVar[tuple["use_backend", ...]] = ContextVar("starlayers_backend", default=())


class use_backend(ContextDecorator):  # noqa: N801, named as torch.no_grad is
    """Choose how star layers compute inside a `with` block, or in a decorated function.

    The environment variable `STARLAYERS_BACKEND` does the same outside of blocks.

    `"auto"` uses a fused path where one applies and falls back silently; `"eager"` always runs
    the PyTorch definition; `"triton"` requires the fused GPU kernels, and `"cpu"` for star MLPs the
    row-blocked op of CPUs at any size, and both raise where these do not apply. Blocks nest, also
    where generators leave them in another order than they entered them. A block overrides the
    environment variable, which is read at every call. A compiled function keeps the backend it was
    traced with.

    Raises:
        ValueError: `name` is not one of the four.

    Example:
        >>> with use_backend("eager"):
        ...     backend_name()
        'eager'
    """

    def __init__(self, name: str) -> None:
        self.name = _checked(name, "use_backend")

    def __call__(self, func: Any) -> Any:
        """Decorate a function, which then always runs in a block."""
        asks = (inspect.isgeneratorfunction, inspect.isasyncgenfunction)
        if isinstance(func, type) or any(ask(func) for ask in (*asks, inspect.iscoroutinefunction)):
            raise TypeError(
                f"use_backend decorates functions that return at once, not {func!r}; enter a block "
                "inside of it"
            )
        return super().__call__(func)

    def __enter__(self) -> None:
        _blocks.set((*_blocks.get(), self))

    def __exit__(self, *_: object) -> None:
        blocks = _blocks.get()
        if self in blocks:  # the last entry of this block, wherever others stand
            last = len(blocks) - 1 - blocks[::-1].index(self)
            _blocks.set(blocks[:last] + blocks[last + 1 :])


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
    blocks = _blocks.get()
    if blocks:
        return blocks[-1].name
    if _ENVIRONMENT is None or _KEY in _ENVIRONMENT:
        name = os.environ.get(ENV_VAR) or None
        return name and _checked(name, ENV_VAR)
    return None


# Dynamo cannot trace a context variable before PyTorch 2.12. This mark makes it call the function
# once while tracing and keep the result. It is what torch.compiler.assume_constant_result sets; the
# decorator itself would import the compiler.
_forced_name._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _checked(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{where}: unknown backend {name!r}, choose one of {', '.join(BACKENDS)}")
    return name
