"""Values outside of tensors that decide what a forward computes, and how to read them again."""

from array import array
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from types import CellType, CodeType, FunctionType, MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn

from starlayers.surgery.adopted import Adopted
from starlayers.surgery.sandbox import FSDP_STATE

#: attributes that every module has; parameters, buffers and children are looked at by themselves
OWN = frozenset(vars(nn.Module()))
#: kinds of hooks that act on a forward or its gradient
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: values that are compared by value; other objects are compared by identity
VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
CONTAINERS = (list, tuple, dict, set, frozenset, deque, MappingProxyType, bytearray, array)
#: methods that no forward calls
ELSEWHERE = ("__init__", "__repr__", "extra_repr", "reset_parameters", "_init_weights")


class Entry(NamedTuple):
    """Value that decides about a forward: its name, how to read it again, and what it was.

    `words` is the sentence for a change, with "{new}" for the new value. `asked` is False for an
    attribute that no code names.
    """

    name: str
    read: Callable[[], Any]
    value: Any
    words: str = ""
    asked: bool = True


class Missing:
    """Value of an attribute that is not there."""

    def __repr__(self) -> str:
        return "gone"


MISSING = Missing()


class Contents(tuple[Any, ...]):
    """Contents of a container at one time: its class, then its items, containers by contents."""

    __slots__ = ()

    def __repr__(self) -> str:
        return repr(tuple(self[1:]))


def contents(value: Any, above: tuple[int, ...] = ()) -> Contents:
    """Return the contents of a container, those of containers in it as well.

    Example:
        >>> contents({"a": [1, (2,)]})
        ('a', (1, (2,)))
    """
    if id(value) in above:  # it contains itself
        return Contents([type(value)])
    items: Any = value
    if isinstance(value, (dict, MappingProxyType)):
        items = [x for pair in value.items() for x in pair]
    elif isinstance(value, (set, frozenset)):
        items = sorted(value, key=repr)
    within = (*above, id(value))
    return Contents(
        [type(value), *[contents(x, within) if isinstance(x, CONTAINERS) else x for x in items]]
    )


def item_of(values: Mapping[str, Any], key: str) -> Any:
    """Return a value, `MISSING` if there is none."""
    return values.get(key, MISSING)


def contents_of(values: Mapping[str, Any], key: str) -> Any:
    """Return the contents of a container in a mapping, or the value that is there now."""
    value = values.get(key, MISSING)
    return contents(value) if isinstance(value, CONTAINERS) else value


def new_in(values: Mapping[str, Any], names: frozenset[str], label: str) -> str:
    """Return the first of some names that is in a mapping, "" if none is."""
    new = min((name for name in names if name in values), default="")
    return new and label + new


def is_array(value: Any) -> bool:
    """Return True for an array of numpy."""
    return type(value).__module__ == "numpy" and type(value).__name__ == "ndarray"


def array_values(array: Any) -> tuple[Any, ...]:
    """Return dtype, shape and bytes of an array."""
    return (str(array.dtype), tuple(array.shape), array.tobytes())


def slot_value(value: Any, slot: Any) -> Any:
    """Return a value in a slot, contents of a container."""
    try:
        return value_or_contents(slot.__get__(value))
    except AttributeError:
        return MISSING


def value_or_contents(value: Any) -> Any:
    """Return a value, of a container its contents."""
    return contents(value) if isinstance(value, CONTAINERS) else value


def contents_in(value: Any, key: str = "cell_contents") -> Any:
    """Return an attribute, of a container its contents."""
    return value_or_contents(getattr(value, key))


def hiding_names(part: nn.Module, kind: type, size: int, known: frozenset[str]) -> str:
    """Return the names of new attributes that hide children or attributes of the class."""
    state = vars(part)
    if len(state) == size:
        return ""
    new = [k for k in state if k not in known and not is_added(k)]
    return ", ".join(k for k in new if hasattr(kind, k) or k in part._modules)


def child_names(part: nn.Module) -> str:
    """Return the names of a module's children, without those that are added."""
    modules = part._modules
    if "star_grown" in modules or "star_gate" in modules:
        return ", ".join(key for key in modules if not is_added(key))
    return ", ".join(modules)


def tensor_names(tensors: dict[str, Any]) -> str:
    """Return the names of tensors that are there."""
    return ", ".join([key for key, value in tensors.items() if value is not None])


def count_hooks(part: nn.Module) -> int:
    """Return how many hooks a module has."""
    return sum(len(vars(part)[kind]) for kind in HOOKS)


def parts_of(module: nn.Module, apart: Collection[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules in a module by name, without those `apart` and what this library adds."""
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):  # whose code is fixed
            continue
        if is_added(name.partition(".")[0]):
            continue
        if not any(name == other or name.startswith(f"{other}.") for other in apart):
            yield name, part


def is_added(name: str) -> bool:
    """Return True for the attributes that this library adds, or FSDP2."""
    ours = name in ("star", "star_gate", "star_grown", "star_use_nested_tensor")
    return ours or name.startswith(FSDP_STATE)


def _bases(kind: type) -> Iterator[type]:
    """Yield a class and its bases that are not PyTorch's, Python's or this library's own."""
    for base in kind.__mro__:
        foreign = not base.__module__.startswith(("torch.", "builtins", "typing"))
        if foreign and not issubclass(base, Adopted):
            yield base


def functions_of(kind: type) -> Iterator[Any]:
    """Yield the functions of a class and its bases that a forward may call."""
    for base in _bases(kind):
        for key, value in vars(base).items():
            function = getattr(value, "fget", None) or getattr(value, "__func__", value)
            if isinstance(function, FunctionType) and key not in ELSEWHERE:
                yield function


def names_in_code(kind: type) -> frozenset[str]:
    """Return all names and strings in the functions that a forward of a class may call."""
    names: set[str] = set()
    seen: set[int] = set()

    def visit(code: CodeType) -> None:
        names.update(code.co_names)
        for constant in code.co_consts:
            if isinstance(constant, str):
                names.add(constant)
            elif isinstance(constant, CodeType):
                visit(constant)

    def visit_function(function: Any) -> None:
        if id(function) in seen:
            return
        seen.add(id(function))
        visit(function.__code__)
        for key in function.__code__.co_names:  # helpers in the same file
            helper = function.__globals__.get(key)
            if callable(helper) and isinstance(own := getattr(helper, "__name__", None), str):
                names.add(own)  # its name where it is defined
            if getattr(helper, "__globals__", None) is function.__globals__:
                visit_function(helper)
        for cell in function.__closure__ or ():
            if cell != CellType() and isinstance(cell.cell_contents, FunctionType):
                visit_function(cell.cell_contents)

    for function in functions_of(kind):
        visit_function(function)
    return frozenset(names)
