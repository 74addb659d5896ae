"""Checks that a compiler makes once, when it traces a call."""

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T", bound=Callable[..., object])


def evaluated_when_traced(function: T) -> T:
    """Return a function that compilers evaluate as they trace, and whose result they keep.

    It does what `torch.compiler.assume_constant_result` does, which loads the compiler: not at
    import, and not for models that are never compiled.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
