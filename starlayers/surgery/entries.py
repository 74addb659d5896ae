"""Values outside of tensors that decide what a forward computes, and how to read them again."""

from collections.abc import Callable, Collection, Iterator
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from starlayers.surgery.adopted import Adopted
from starlayers.surgery.sandbox import FSDP_STATE

#: attributes that every module has; parameters, buffers and children are looked at by themselves
OWN = frozenset(vars(nn.Module()))
#: kinds of hooks that act on a forward or its gradient
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: values that are compared by value; other objects are compared by identity
VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
CONTAINERS = (list, tuple, dict, set, frozenset)
#: methods that no forward calls
ELSEWHERE = ("__init__", "__repr__", "extra_repr", "reset_parameters", "_init_weights")
#: levels of objects inside of objects that are looked at
DEPTH = 3


class Entry(NamedTuple):
    """Value that decides about a forward: its name, how to read it again, and what it was.

    `words` is the sentence for a change, with "{new}" for the new value.
    """

    name: str
    read: Callable[[], Any]
    value: Any
    words: str = ""


class Missing:
    """Value of an attribute that is not there."""

    def __repr__(self) -> str:
        return "gone"


MISSING = Missing()


class Contents(tuple[Any, ...]):
    """Contents of a container at one time."""

    __slots__ = ()


def _contents(value: Any) -> Contents:
    if isinstance(value, dict):
        return Contents(x for pair in value.items() for x in pair)
    if isinstance(value, (set, frozenset)):
        return Contents(sorted(value, key=repr))
    return Contents(value)


def _contents_of(state: dict[str, Any], key: str) -> Any:
    value = state.get(key, MISSING)
    return _contents(value) if isinstance(value, CONTAINERS) else value


def parts_of(module: nn.Module, apart: Collection[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules in a module by name, without those `apart`."""
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):  # whose code is fixed
            continue
        if not any(name == other or name.startswith(f"{other}.") for other in apart):
            yield name, part


def entries_of(
    module: nn.Module,
    kind: type,
    apart: Collection[str],
    *,
    identities: bool = True,
    names: Collection[str] | None = None,
) -> Iterator[Entry]:
    """Yield all that decides about a forward; a module and its parts by identity if asked for.

    Of the module's own attributes only those in `names` count, if it is given.
    """
    seen: set[int] = set()
    kinds: dict[type, None] = {}
    for name, part in parts_of(module, apart):
        own_kind = kind if part is module else type(part)
        kinds[own_kind] = None
        own_names = names if part is module else None
        yield from _of_module(name, part, own_kind, seen, identities, apart, own_names)
        if identities and name:
            yield Entry(f"the class of {name}", partial(getattr, part, "__class__"), type(part))
            read = partial(getattr, type(part), "forward")
            yield Entry(f"the forward of {name}", read, type(part).forward)
    for own_kind in kinds:
        yield from _of_class(own_kind, seen)


def _of_module(
    name: str,
    part: nn.Module,
    kind: type,
    seen: set[int],
    identities: bool,
    apart: Collection[str],
    counted: Collection[str] | None = None,
) -> Iterator[Entry]:
    state, names = vars(part), names_in_code(kind)
    label = f"{name}." if name else ""
    plain = {k: v for k, v in state.items() if k not in OWN and not _is_added(k)}
    if counted is not None:
        plain = {k: v for k, v in plain.items() if k in counted}
    for key, value in plain.items():
        if isinstance(value, Tensor):
            continue
        if isinstance(value, CONTAINERS):  # an export puts equal ones in their places
            read = partial(_contents_of, state, key)
            yield Entry(label + key, read, _contents(value))
        elif identities or type(value) in VALUES or callable(value):
            yield Entry(label + key, partial(state.get, key, MISSING), value)
        if type(value) not in VALUES and key in names:
            yield from _inside(label + key, value, seen, DEPTH)
    # what a forward asks for and is not there, or is None
    for key in names - state.keys() - OWN:
        if not hasattr(kind, key) and key not in part._modules and key.isidentifier():
            yield Entry(label + key, partial(state.get, key, MISSING), MISSING)
    # a wrapper on the instance that reaches this check is one that calls the module's own forward
    known = frozenset(state) | ({"forward"} if not name else set())
    hides = partial(_hiding, part, kind, len(state), known)
    yield Entry(
        f"{label}methods hidden", hides, "", "{new} was set on " + (name or "it") + ", over its own"
    )
    yield Entry(f"{label}children", partial(_children, part), _children(part))
    for what, tensors in (("parameters", part._parameters), ("buffers", part._buffers)):
        yield Entry(label + what, partial(_filled, tensors), _filled(tensors))
    if identities:
        for key, child in part.named_children():
            if label + key not in apart and not _is_added(key):
                yield Entry(label + key, partial(part._modules.get, key, MISSING), child)
    if "forward" in state:
        yield Entry(f"{label}forward", partial(state.get, "forward", MISSING), state["forward"])


def _hiding(part: nn.Module, kind: type, size: int, known: frozenset[str]) -> str:
    """Return the names of new attributes that hide children or attributes of the class."""
    state = vars(part)
    if len(state) == size:
        return ""
    new = [k for k in state if k not in known and not _is_added(k)]
    return ", ".join(k for k in new if hasattr(kind, k) or k in part._modules)


def _children(part: nn.Module) -> str:
    return ", ".join(key for key, _ in part.named_children() if not _is_added(key))


def _filled(tensors: dict[str, Any]) -> str:
    return ", ".join(key for key, value in tensors.items() if value is not None)


def _inside(name: str, value: Any, seen: set[int], depth: int) -> Iterator[Entry]:
    """Yield what an object, a container or a function holds."""
    if id(value) in seen or depth == 0 or isinstance(value, (Tensor, type)):
        return
    if isinstance(value, (FunctionType, MethodType)):
        yield from _of_function(getattr(value, "__func__", value), seen)
        return
    seen.add(id(value))
    if isinstance(value, CONTAINERS):
        yield Entry(name, partial(_contents, value), _contents(value))
        items = value.values() if isinstance(value, dict) else value
        for i, item in enumerate(items):
            if type(item) not in VALUES:
                yield from _inside(f"{name}[{i}]", item, seen, depth - 1)
        return
    if isinstance(value, nn.Module):  # one that is no registered child
        for inner, part in value.named_modules():
            label = f"{name}.{inner}".rstrip(".")
            yield Entry(f"hooks of {label}", partial(_hooks, part), _hooks(part))
            yield from _of_module(label, part, type(part), seen, True, ())
        return
    if isinstance(value, partial):
        yield from _inside(f"{name}.keywords", value.keywords, seen, depth - 1)
        yield from _inside(f"{name}.func", value.func, seen, depth - 1)
        return
    slots = [s for base in type(value).__mro__ for s in vars(base).get("__slots__", ())]
    for key in [*getattr(value, "__dict__", {}), *slots]:
        item = getattr(value, key, MISSING) if key in slots else vars(value)[key]
        read = partial(getattr, value, key, MISSING) if key in slots else partial(_item, value, key)
        if not isinstance(item, CONTAINERS):  # whose contents count
            yield Entry(f"{name}.{key}", read, item)
        elif key not in slots:
            yield Entry(f"{name}.{key}", partial(_contents_of, vars(value), key), _contents(item))
        if type(item) not in VALUES:
            yield from _inside(f"{name}.{key}", item, seen, depth - 1)
    yield Entry(f"attributes of {name}", partial(_size, value), _size(value))
    if not type(value).__module__.startswith(("torch.", "builtins")):
        yield from _of_class(type(value), seen)


def _item(value: Any, key: str) -> Any:
    return vars(value).get(key, MISSING)


def _size(value: Any) -> int:
    return len(getattr(value, "__dict__", ()))


def _hooks(part: nn.Module) -> int:
    return sum(len(vars(part)[kind]) for kind in HOOKS)


def _of_class(kind: type, seen: set[int]) -> Iterator[Entry]:
    """Yield methods and plain attributes of a class, and what its methods read outside.

    Classes of PyTorch read nothing that changes.
    """
    for base in _bases(kind):
        for key, value in vars(base).items():
            if key in ("forward", *ELSEWHERE) or (key.startswith("__") and key != "__call__"):
                continue
            if type(value) in (*VALUES, FunctionType, property, staticmethod, classmethod):
                read = partial(vars(base).get, key, MISSING)
                yield Entry(f"{base.__name__}.{key}", read, value)
    for function in functions_of(kind):
        yield from _of_function(function, seen)


def _bases(kind: type) -> Iterator[type]:
    """Yield a class and its bases that are not PyTorch's, Python's or this library's own."""
    for base in kind.__mro__:
        foreign = not base.__module__.startswith(("torch.", "builtins", "typing"))
        if foreign and not issubclass(base, Adopted):
            yield base


def _of_function(function: Any, seen: set[int]) -> Iterator[Entry]:
    """Yield the globals, closures and defaults that a function reads."""
    code = getattr(function, "__code__", None)
    if code is None or id(function) in seen:
        return
    if str(getattr(function, "__module__", "")).startswith(("torch.", "starlayers.surgery.reads")):
        return
    seen.add(id(function))
    name = function.__qualname__
    for kind in ("__defaults__", "__kwdefaults__"):
        yield Entry(f"{kind} of {name}", partial(getattr, function, kind), getattr(function, kind))
    variables = function.__globals__
    for key in code.co_names:
        value = variables.get(key, MISSING)
        if value is MISSING or isinstance(value, type) or type(value).__name__ == "module":
            continue
        yield Entry(f"the global {key}", partial(variables.get, key, MISSING), value)
        here = getattr(value, "__globals__", None) is variables  # a helper beside it
        if here or isinstance(value, CONTAINERS):
            yield from _inside(f"the global {key}", value, seen, 2)
    for key, cell in zip(code.co_freevars, function.__closure__ or ()):
        if key != "__class__" and cell != CellType():
            read = partial(getattr, cell, "cell_contents")
            yield Entry(f"the variable {key}", read, cell.cell_contents)
            if type(cell.cell_contents) not in VALUES:
                yield from _inside(f"the variable {key}", cell.cell_contents, seen, 2)


def _is_added(name: str) -> bool:
    """Return True for the attributes that this library adds, or FSDP2."""
    ours = name in ("star", "star_gate", "star_grown", "star_use_nested_tensor")
    return ours or name.startswith(FSDP_STATE)


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
            if getattr(helper, "__globals__", None) is function.__globals__:
                visit_function(helper)
        for cell in function.__closure__ or ():
            if cell != CellType() and isinstance(cell.cell_contents, FunctionType):
                visit_function(cell.cell_contents)

    for function in functions_of(kind):
        visit_function(function)
    return frozenset(names)
