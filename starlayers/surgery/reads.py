"""Attributes that a module's forward reads; the others decide nothing about a verification."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from starlayers.surgery.entries import OWN, VALUES, names_in_code, parts_of
from starlayers.surgery.sandbox import FSDP_STATE

#: values of attributes by the names of module and attribute, and the names alone
Attributes = dict[tuple[str, str], Any]
Reads = set[tuple[str, str]]

#: stands for all names where reads cannot be recorded
EVERY = ("*", "*")


def unnamed_attributes(module: nn.Module, apart: Collection[str] = ()) -> Attributes:
    """Return plain values in a module that no method but constructors names.

    A forward may read one by a function elsewhere: `recorded_reads` tells.

    Example:
        >>> class Layer(nn.Identity):
        ...     def __init__(self, layer_idx):
        ...         super().__init__()
        ...         self.layer_idx = layer_idx
        >>> unnamed_attributes(Layer(3))
        {('', 'layer_idx'): 3}
    """
    found: Attributes = {}
    for name, part in parts_of(module, apart):
        names = names_in_code(type(part))
        for key, value in vars(part).items():
            plain = key not in OWN and not key.startswith(FSDP_STATE)
            if plain and key not in names and type(value) in VALUES:
                found[name, key] = value
    return found


@contextmanager
def recorded_reads(module: nn.Module) -> Iterator[Reads]:
    """Record which attributes of a module and its parts are read while the block runs.

    Yields the set of them, as names of module and attribute.

    Example:
        >>> dropout = nn.Dropout(0.1)
        >>> with recorded_reads(dropout) as reads:
        ...     probability = dropout.p
        >>> ("", "p") in reads, ("", "inplace") in reads, type(dropout)
        (True, False, <class 'torch.nn.modules.dropout.Dropout'>)
    """
    reads: Reads = set()
    kinds = [(part, type(part)) for part in module.modules()]
    try:
        for name, part in module.named_modules():
            part.__class__ = _recording(type(part), name, reads)
        yield reads
    finally:
        for part, kind in kinds:
            part.__class__ = kind  # type: ignore[assignment]


def _recording(kind: type[nn.Module], name: str, reads: Reads) -> Any:
    """Return a subclass that notes which attributes are read."""

    def read(self: nn.Module, key: str) -> Any:
        reads.add((name, key))
        return kind.__getattribute__(self, key)

    members = {"__getattribute__": read, "__module__": kind.__module__}
    return type.__new__(type(kind), kind.__name__, (_Unregistered, kind), members)


class _Unregistered(nn.Module):
    """Base of a class of which its other bases are not told."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass
