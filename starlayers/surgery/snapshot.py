"""State of a module that was verified, and what has changed since."""

import hashlib
import inspect
from collections.abc import Callable, Collection, Iterator
from functools import lru_cache, partial
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from starlayers.dispatch import has_global_hooks

#: attributes that every module has; parameters, buffers and children are looked at by themselves
OWN = frozenset(vars(nn.Module()))
#: kinds of hooks that act on a forward or its gradient
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: values that are compared by value; other objects are compared by identity
VALUES = (bool, int, float, complex, str, bytes, type(None), tuple, torch.dtype)


class Method:
    """Function of a class, known by its identity and, in copies and pickles, by its code.

    A function is pickled by name, and may be another one where it is unpickled.
    """

    def __init__(self, name: str, function: Any) -> None:
        self.name, self.function, self.code = name, function, ""

    def __getstate__(self) -> dict[str, Any]:
        code = self.code or code_hash(self.function)
        return {"name": self.name, "function": None, "code": code}

    def is_same(self, function: Any) -> bool:
        """Return True if a function is this one."""
        if self.function is None and code_hash(function) == self.code:
            self.function = function
        return function is self.function


def code_hash(function: Any) -> str:
    """Return a hash of a function's code, which differs between versions of Python."""
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None)
    text = repr(_code(code)) if code else f"{type(function)} {getattr(function, '__name__', '')}"
    return hashlib.sha256(text.encode()).hexdigest()


def _code(code: CodeType) -> tuple[Any, ...]:
    constants = [
        _code(c) if isinstance(c, CodeType) else sorted(map(repr, c)) if type(c) is frozenset else c
        for c in code.co_consts
    ]
    return code.co_code, constants, code.co_names, code.co_varnames, code.co_freevars


class Snapshot:
    """State on which a verification rests: classes, forwards, plain attributes, no hooks.

    Tensors are no part of it, because what was verified holds for all their values.

    Args:
        module: the module.
        forward: its class's forward that was verified, or the method that was instead of it.
        apart: names of children that are left out, because whatever they are is called.
        names: the module's own attributes that count, all of them by default.
        method: name of that method.

    Example:
        >>> module = nn.Sequential(nn.Linear(2, 2), nn.LeakyReLU(0.1))
        >>> snapshot = Snapshot(module, nn.Sequential.forward, apart=["0"])
        >>> snapshot.change(module)
        ''
        >>> module[1].negative_slope = 0.2
        >>> snapshot.change(module)
        '1.negative_slope is 0.2, was 0.1'
    """

    def __init__(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        apart: Collection[str] = (),
        names: Collection[str] | None = None,
        method: str = "forward",
    ) -> None:
        self.names = names
        #: dotted name, name of the parent, the part, its class's forward, its attributes
        self.parts: list[tuple[str, str, nn.Module, Method, dict[str, Any]]] = []
        #: name, object and attributes of configs that the modules hold
        self.configs: list[tuple[str, Any, dict[str, Any]]] = []
        seen: set[int] = set()
        for name, part in _parts(module, tuple(apart)):
            own = Method("forward", type(part).forward)
            own = Method(method, forward) if part is module else own
            plain = {k: v for k, v in vars(part).items() if k not in OWN and not _is_star(k)}
            self.parts.append((name, name.rpartition(".")[0], part, own, plain))
            read_names = names_in_code(type(part))
            for key, value in plain.items():
                known = getattr(value, "__dict__", None)
                if isinstance(value, (nn.Module, type)) or callable(value) or not known:
                    continue
                if not name and not self._counts(key):
                    continue
                if id(value) not in seen:
                    seen.add(id(value))
                    found = {k: known[k] for k in read_names & known.keys()}
                    read = {k: v for k, v in found.items() if type(v) in VALUES}
                    self.configs.append((f"{name}.{key}".lstrip("."), value, read))
        #: names of attributes of classes and of globals and closures that methods read, their
        #: places and values; `forward` is looked at above
        kinds = dict.fromkeys([type(module), *(type(part) for _, _, part, _, _ in self.parts[1:])])
        self.outside = [entry for kind in kinds for entry in _outside(kind)]
        self.kinds = list(kinds)

    def __getstate__(self) -> dict[str, Any]:
        # places are found again where a copy or pickle is made; their values are kept
        kept = {name: value for name, _, _, value in self.outside if type(value) in VALUES}
        return {**vars(self), "outside": kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        kept = state["outside"]
        entries = [entry for kind in self.kinds for entry in _outside(kind)]
        self.outside = [(n, place, key, kept.get(n, v)) for n, place, key, v in entries]

    def _counts(self, name: str) -> bool:
        """Return True if an attribute of the module itself counts."""
        return self.names is None or name in self.names

    def change(
        self,
        module: nn.Module,
        forward: Callable[..., Any] | None = None,
        *,
        with_hooks: bool = True,
    ) -> str:
        """Return the first change in words, empty if there is none.

        `forward` is what the method is now, if the module was given another class. Hooks
        count as changes unless `with_hooks` is False.
        """
        if with_hooks and has_global_hooks():
            return "a global hook is registered"
        for name, parent, part, own, plain in self.parts:
            state = vars(part)
            if name:
                holder = module.get_submodule(parent) if parent else module
                if holder._modules.get(name.rpartition(".")[2]) is not part:
                    return f"{name} was replaced"
                if with_hooks and any(state[kind] for kind in HOOKS):
                    return f"{name} has hooks"
                if "forward" in state and "forward" not in plain:
                    return f"{name} has a forward of its own"
            now = forward if not name and forward is not None else type(part).forward
            if now is not own.function and not own.is_same(now):
                return f"the {own.name} of {name or 'its class'} was replaced"
            if len(state) != len(plain) + len(OWN) and (added := _added(part, plain)):
                return f"{name}.{added}".lstrip(".")
            for key, value in plain.items():
                if (new := state.get(key, MISSING)) is value or _same(new, value):
                    continue
                if name or self._counts(key):
                    return f"{name}.{key} is {new!r}, was {value!r}".lstrip(".")
        for name, config, read in self.configs:
            for key, value in read.items():
                if (new := vars(config).get(key, MISSING)) is not value and not _same(new, value):
                    return f"{name}.{key} is {new!r}, was {value!r}"
        for name, place, key, value in self.outside:
            new = place.get(key, MISSING)
            if new is not value and not _same(new, value):
                known = type(value) in VALUES
                return f"{name} is {new!r}, was {value!r}" if known else f"{name} was replaced"
        return ""


class _Cell:
    """Variable of a closure as a mapping with one key."""

    def __init__(self, cell: Any) -> None:
        self.cell = cell

    def get(self, key: str, default: Any) -> Any:
        """Return the value of the variable."""
        return self.cell.cell_contents


def _outside(kind: type) -> list[tuple[str, Any, str, Any]]:
    """Return name, place, key and value of what methods of a class read outside of a module.

    These are its methods and plain attributes, and plain variables of globals and closures.
    Classes of PyTorch read nothing that changes.
    """
    entries: list[tuple[str, Any, str, Any]] = []
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        if base.__module__.startswith("torch."):
            continue
        for key, value in vars(base).items():
            if key != "forward" and not key.startswith("__") and _is_read(value):
                entries.append((f"{base.__name__}.{key}", vars(base), key, value))
    for value in _functions(kind):
        function = getattr(value, "fget", None) or getattr(value, "__func__", value)
        code, module = getattr(function, "__code__", None), getattr(function, "__module__", "")
        if code is None or str(module).startswith("torch."):
            continue
        variables = function.__globals__
        for key in code.co_names:
            if type(variables.get(key, MISSING)) in VALUES:
                entries.append((f"the global {key}", variables, key, variables[key]))
        for key, cell in zip(code.co_freevars, function.__closure__ or ()):
            filled = key != "__class__" and cell != CellType()
            if filled and type(cell.cell_contents) in VALUES:
                entries.append((f"the variable {key}", _Cell(cell), key, cell.cell_contents))
    return entries


def _is_read(value: Any) -> bool:
    """Return True for a method, a property or a plain value."""
    return type(value) in VALUES or isinstance(value, (FunctionType, property, staticmethod))


def _added(part: nn.Module, plain: dict[str, Any]) -> str:
    """Return in words a new attribute that the code of a class reads, empty if there is none.

    A forward is none: where it replaces that of the class, what was verified does not run at all.
    """
    for key in vars(part).keys() - plain.keys() - OWN - {"forward"}:
        if _is_star(key):
            continue
        if hasattr(type(part), key):
            return f"{key} hides a method of its class"
        if key in _names_in_code(type(part)):
            return f"{key} is new"
    return ""


class _Missing:
    """Value of an attribute that is gone."""

    def __repr__(self) -> str:
        return "gone"


MISSING = _Missing()


def signature(module: nn.Module) -> tuple[tuple[Any, ...], list[Any]]:
    """Return all that can change what a forward computes but values of tensors, as a key.

    Modules with equal keys have the same graph. Objects without a value enter by their ids, which
    are theirs alone while they exist: they are returned too, for a cache to keep.
    """
    parts, kept = [], []
    owners = {id(part): name for name, part in module.named_modules()}

    def entry(value: Any, names: frozenset[str] | None = None) -> Any:
        if type(value) in VALUES and _hashable(value):
            return type(value), value
        if isinstance(value, partial):
            words = tuple((k, entry(v)) for k, v in value.keywords.items())
            return partial, entry(value.func), tuple(map(entry, value.args)), words
        if isinstance(value, MethodType) and id(value.__self__) in owners:
            return owners[id(value.__self__)], entry(value.__func__)
        kept.append(value)
        known = getattr(value, "__dict__", None)
        if names is None or not known or isinstance(value, (nn.Module, type)) or callable(value):
            return type(value), id(value)
        read = sorted(k for k in known if k in names)  # a config: what the forward reads of it
        return type(value), tuple((k, entry(known[k])) for k in read)

    for name, part in module.named_modules():
        kind = type(part)
        names = names_in_code(kind)
        tensors = [
            (k, t if t is None else (t.shape, t.dtype, t.device, type(t)))
            for k, t in (*part._parameters.items(), *part._buffers.items())
        ]
        plain = [(k, entry(v, names)) for k, v in vars(part).items() if k not in OWN]
        methods = [entry(value) for value in _functions(kind)]
        parts.append((name, entry(kind), tuple(methods), tuple(plain), tuple(tensors)))
    return tuple(parts), kept


def _functions(kind: type) -> Iterator[Any]:
    """Yield the attributes of a class and its bases below `nn.Module` that have code."""
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for value in vars(base).values():
            if hasattr(value, "__code__") or hasattr(value, "fget") or hasattr(value, "__func__"):
                yield value


def _parts(module: nn.Module, apart: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
    for name, part in module.named_modules():
        if not any(name == other or name.startswith(f"{other}.") for other in apart):
            yield name, part


def _is_star(name: str) -> bool:
    """Return True for the attributes that this library adds."""
    return name == "star" or name.startswith("star_")


def _same(new: Any, old: Any) -> bool:
    """Return True for values that are equal; objects have to be the same one."""
    return type(new) is type(old) and type(old) in VALUES and bool(new == old)


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:  # a tuple of lists
        return False
    return True


def names_in_code(kind: type) -> frozenset[str]:
    """Return all names and strings in the methods of a class and its bases below `nn.Module`."""
    names: set[str] = set()

    def visit(code: CodeType) -> None:
        names.update(code.co_names)
        for constant in code.co_consts:
            if isinstance(constant, str):
                names.add(constant)
            elif isinstance(constant, CodeType):
                visit(constant)

    for value in _functions(kind):
        function = getattr(value, "fget", None) or getattr(value, "__func__", value)
        if (code := getattr(function, "__code__", None)) is not None:
            visit(code)
    return frozenset(names)


#: the same, faster, for a class that has not changed
_names_in_code: Callable[[type], frozenset[str]] = lru_cache(names_in_code)
