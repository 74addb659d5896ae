"""Checks of arguments and inputs, with the layer and the value in the message."""

import math
import operator
from collections.abc import Iterable

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


#: layouts that layers refuse, whatever the size of the call
SPARSE = (
    torch.sparse_coo,
    torch.sparse_csr,
    torch.sparse_csc,
    torch.sparse_bsr,
    torch.sparse_bsc,
)


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
    if isinstance(value, bool | str) or not hasattr(value, "__float__"):
        raise TypeError(f"{layer}: {name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{layer}: {name} must be finite, got {value}")
    return float(value)


def floating_dtype(layer: str, dtype: torch.dtype | None) -> torch.dtype | None:
    """Return `dtype`; raise TypeError if it is neither a floating dtype nor `None`."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"{layer}: dtype must be a floating torch.dtype or None, got {dtype!r}")
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
    if x.layout in SPARSE:
        raise TypeError(f"{layer} expects a dense tensor, got {x.layout}; use x.to_dense()")


def positive_int(layer: str, name: str, value: int) -> int:
    """Return `value` as an int; raise if it is not an integer of at least 1.

    `layer` and `name` say whose argument it is in the message.

    Raises:
        TypeError: `value` is not an integer.
        ValueError: `value` is below 1.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{layer}: {name} must be an integer, got {value!r}")
    value = operator.index(value)
    if value < 1:
        raise ValueError(f"{layer}: {name} must be at least 1, got {value}")
    return value


def probability(layer: str, name: str, value: float) -> float:
    """Return `value` as a float; raise if it lies outside of [0, 1).

    `layer` and `name` say whose argument it is in the message.

    Raises:
        ValueError: `value` is outside of [0, 1).
    """
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{layer}: {name} must be in [0, 1), got {value}")
    return float(value)
