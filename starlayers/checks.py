"""Checks of constructor arguments, with the layer and the value in the message."""

import operator
from collections.abc import Iterable

__all__ = ["one_of", "positive_int", "probability"]


def one_of(layer: str, name: str, value: str, known: Iterable[str]) -> None:
    """Raise ValueError if `value` is not one of `known`."""
    if value not in known:
        raise ValueError(f"{layer}: unknown {name} {value!r}, choose one of {', '.join(known)}")


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
