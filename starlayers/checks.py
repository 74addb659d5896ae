"""Checks of arguments and inputs, with the layer and the value in the message."""

import operator
from collections.abc import Iterable
from contextlib import suppress

import torch
from torch import Tensor

__all__ = [
    "boolean",
    "finite",
    "floating_dtype",
    "floating_tensor",
    "one_of",
    "positive_int",
    "probability",
]


def one_of(layer: str, name: str, value: str, known: Iterable[str]) -> None:
    """Raise ValueError if `value` is not one of `known`."""
    if value not in known:
        raise ValueError(f"{layer}: unknown {name} {value!r}, choose one of {', '.join(known)}")


def boolean(layer: str, name: str, value: bool) -> bool:
    """Return `value`; raise TypeError if it is not True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{layer}: {name} must be True or False, got {value!r}")
    return value


def finite(layer: str, name: str, value: float) -> float:
    """Return `value` as a float; raise if it is not a finite number.

    Raises:
        TypeError: `value` is not a number.
        ValueError: `value` is infinite or NaN.
    """
    number = None
    # a number of a tensor that is trained would lose its gradient
    tensor = isinstance(value, Tensor) and (value.requires_grad or value.ndim)
    if not (tensor or isinstance(value, str) or type(value).__name__ in ("bool", "bool_")):
        with suppress(TypeError, ValueError, OverflowError):
            number = float(value)
    if number is None:
        raise TypeError(f"{layer}: {name} must be a number, got {value!r}")
    if not abs(number) <= torch.finfo(torch.float32).max:  # NaN too
        raise ValueError(f"{layer}: {name} must be a float32 that is finite, got {value}")
    return number


def floating_dtype(layer: str, dtype: torch.dtype | None) -> torch.dtype | None:
    """Return `dtype`; raise TypeError if it is neither `None` nor floating, of 16 bits or more."""
    known = isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1
    if dtype is not None and not known:
        raise TypeError(
            f"{layer}: dtype must be None or a floating torch.dtype of 16 bits or more, such as "
            f"torch.bfloat16, got {dtype!r}"
        )
    return dtype


def floating_tensor(layer: str, x: Tensor) -> None:
    """Raise TypeError if `x` is not a dense tensor of a floating dtype.

    `layer` begins the message.
    """
    if not isinstance(x, Tensor):
        remedy = "; use torch.as_tensor" if hasattr(x, "__len__") else ""
        raise TypeError(f"{layer} expects a tensor, got a {type(x).__name__}{remedy}")
    if not x.is_floating_point():
        raise TypeError(f"{layer} expects a floating tensor, got {x.dtype}; use x.float()")
    if x.is_nested and x.layout is torch.strided:
        raise TypeError(
            f"{layer} expects a dense tensor, got a nested one; use layout=torch.jagged or pad it"
        )
    if x.layout not in (torch.strided, torch.jagged):
        raise TypeError(f"{layer} expects a dense tensor, got {x.layout}; use x.to_dense()")


def positive_int(layer: str, name: str, value: int) -> int:
    """Return `value` as an int; raise if it is not an integer of at least 1.

    `layer` and `name` say whose argument it is in the message.

    Raises:
        TypeError: `value` is not an integer.
        ValueError: `value` is below 1.
    """
    number = None
    if not isinstance(value, bool) and not (isinstance(value, Tensor) and value.ndim):
        with suppress(TypeError):
            number = operator.index(value)
    if number is None:
        raise TypeError(f"{layer}: {name} must be an integer, got {value!r}")
    if number < 1:
        raise ValueError(f"{layer}: {name} must be at least 1, got {number}")
    return number


def probability(layer: str, name: str, value: float) -> float:
    """Return `value` as a float; raise if it lies outside of [0, 1).

    `layer` and `name` say whose argument it is in the message.

    Raises:
        TypeError: `value` is not a number.
        ValueError: `value` is outside of [0, 1).
    """
    number = finite(layer, name, value)
    if not 0.0 <= number < 1.0:
        raise ValueError(f"{layer}: {name} must be in [0, 1), got {value}")
    return number
