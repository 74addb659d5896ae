"""State that decides what a module computes: as a key, and what has changed of it."""

import hashlib
import inspect
from collections.abc import Callable, Collection
from functools import lru_cache, partial
from operator import attrgetter, is_, itemgetter
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from starlayers.dispatch import has_global_hooks
from starlayers.surgery.entries import (
    HOOKS,
    MISSING,
    VALUES,
    Contents,
    Entry,
    Missing,
    item_of,
    new_in,
    parts_of,
)
from starlayers.surgery.reached import entries_of

#: what `torch.export` replaces while it traces
PATCHED = ("Module.__call__", "Module._call_impl", "Module.__getattr__", "the call of nn.Linear")


class _Code(str):
    """Hash of a function's code, which stands for it in copies and pickles.

    A function is pickled by name, and may be another one where it is unpickled.
    """

    __slots__ = ()


class _Name(str):
    """Name of a class or builtin function, or of the class of an object, in copies and pickles."""

    __slots__ = ()


def _code_hash(function: Any) -> _Code:
    code = getattr(inspect.unwrap(function), "__code__", function)
    return _hash(code if isinstance(code, CodeType) else repr(function))


@lru_cache(maxsize=4096)
def _hash(code: CodeType | str) -> _Code:
    text = code if isinstance(code, str) else repr(_contents_of_code(code))
    return _Code(hashlib.sha256(text.encode()).hexdigest())


def _contents_of_code(code: CodeType) -> tuple[Any, ...]:
    constants = [
        _contents_of_code(c) if isinstance(c, CodeType)
        else sorted(map(repr, c)) if isinstance(c, frozenset)
        else c
        for c in code.co_consts
    ]  # fmt: skip
    return code.co_code, constants, code.co_names, code.co_varnames, code.co_freevars


def _portable(value: Any) -> Any:
    """Return what stands for a value in copies and pickles."""
    if type(value) in (*VALUES, _Code, _Name):
        return value
    if isinstance(value, tuple):  # contents begin with the class of the container
        return type(value)(map(_portable, value))
    if isinstance(value, (FunctionType, CodeType)):
        return _code_hash(value)
    if isinstance(value, MethodType):
        return _portable(value.__func__)
    if callable(value) and hasattr(value, "__qualname__"):
        return _Name(f"{getattr(value, '__module__', '')}.{value.__qualname__}")
    kind = type(value)
    return _Name(
        f"{'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__module__}.{kind.__qualname__}"
    )


class Snapshot:
    """State on which a verification rests: classes, forwards, attributes, no hooks.

    Tensors' values are no part of it, because what was verified holds for all of them. Looked at
    are attributes of the module and its parts, what objects and containers among them hold, methods
    and attributes of their classes, and globals and closures that their methods read.

    Args:
        module: the module.
        forward: its class's forward that was verified, or the method that was instead of it.
        apart: names of children that are left out, because whatever they are is called.
        kind: class to look at, by default that of the module.
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
        kind: type | None = None,
        names: Collection[str] | None = None,
        method: str = "forward",
    ) -> None:
        self.module: nn.Module = module
        self.kind: Any = kind or type(module)
        self.forward, self.apart = forward, tuple(apart)
        self.names, self.method = names, method
        #: values of a copy that has not looked at its own state yet
        self._kept: dict[str, Any] | None = None
        self.parts = [(n, p) for n, p in parts_of(module, apart) if n]
        #: change of the module from which this one was copied
        self.copied_after: str | None = ""
        self._watch(entries_of(module, self.kind, apart, names=names, method=method))

    def _watch(self, entries: list[Entry]) -> None:
        """Take entries, those of one dictionary together, which are compared in one go."""
        self.entries = entries
        state = vars(self.module)
        #: plain attributes of the module itself, for compilers to guard
        self.plain = tuple(
            (e.name, e.value)
            for e in entries
            if type(e.value) in VALUES and e.name in state and e.asked
        )
        self._others: list[Entry] = []
        #: of an object: the object, names and values there, and names that were not there
        found: dict[Any, tuple[Any, list[tuple[str, Any]], set[str]]] = {}
        for entry in entries:
            read: Any = entry.read
            if read.func not in (item_of, new_in, getattr):
                self._others.append(entry)
                continue
            holder, which = read.args[:2]
            by_attribute = read.func is getattr
            _, items, absent = found.setdefault((by_attribute, id(holder)), (holder, [], set()))
            if read.func is new_in:
                absent |= which
            else:
                items.append((which, entry.value))
        self._groups: list[tuple[Any, Any, tuple[Any, ...], frozenset[str]]] = []
        for (by_attribute, _), (holder, items, absent) in found.items():
            keys, values = [key for key, _ in items], tuple(value for _, value in items)
            if len(keys) == 1:  # a getter of one key would return no tuple
                keys, values = 2 * keys, 2 * values
            get = (attrgetter if by_attribute else itemgetter)(*keys) if keys else None
            self._groups.append((holder, get, values, frozenset(absent)))

    def __getstate__(self) -> dict[str, Any]:
        # a copy reads its own state: what can be compared there is kept, under its name
        if self._kept is not None:
            return vars(self)
        kept = {key: _portable(entry.value) for key, entry in _keyed(self.entries).items()}
        state = {**vars(self), "forward": _code_hash(self.forward), "_kept": kept}
        state["copied_after"] = self.copied_after or self._first_change()
        return state | {"entries": [], "parts": [], "_others": [], "_groups": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({"copied_after": None, **state})

    def _settle(self) -> None:
        """Look at the state of a copy, once it is complete."""
        kept, self._kept = self._kept or {}, None
        method = getattr(self.kind, self.method)
        fresh = Snapshot(self.module, method, self.apart, self.kind, self.names, self.method)
        self.forward, self.parts = _restored(self.forward, method), fresh.parts
        entries = _keyed(fresh.entries)
        old = self.copied_after is None  # pickled by an earlier version, which kept plain values
        kept = (
            {key: kept.get(key, _portable(e.value)) for key, e in entries.items()} if old else kept
        )
        restored = {
            key: e._replace(value=_restored(kept.get(key, MISSING), e.value))
            for key, e in entries.items()
            if e.asked or key in kept
        }
        if gone := kept.keys() - restored.keys():
            self.copied_after = self.copied_after or f"{min(gone)} is gone"
        self._watch(list(restored.values()))

    def change(
        self,
        module: nn.Module,
        forward: Callable[..., Any] | None = None,
        *,
        hooks_of: Collection[str] | None = None,
    ) -> str:
        """Return the first change in words, empty if there is none.

        `forward` is what the method is now, if the module was given another class. Hooks
        of the parts named in `hooks_of` are no change, because these parts are called.
        """
        if self._kept is not None:
            self._settle()
        if module is not self.module:
            return "it is a shallow copy of the module that was verified"
        if hooks_of is None and has_global_hooks():
            return "a global hook is registered"
        if (forward or getattr(self.kind, self.method)) is not self.forward:
            return f"the {self.method} of its class was replaced"
        for name, part in self.parts:
            state = vars(part)
            if any(state[kind] for kind in HOOKS) and name not in (hooks_of or ()):
                return f"{name} has hooks"
        return "" if self._as_before() else self._first_change()

    def _as_before(self) -> bool:
        """Return True if all values are the same; False says nothing, equal ones may be others."""
        if self.copied_after:
            return False
        try:
            for holder, get, values, absent in self._groups:
                if get is not None and not all(map(is_, get(holder), values)):
                    return False
                if absent and not holder.keys().isdisjoint(absent):
                    return False
        except (KeyError, AttributeError):
            return False
        for _, read, value, _, _ in self._others:
            new = read()
            if new is not value and not _same(new, value):
                return False
        return True

    def _first_change(self) -> str:
        tracing = torch.compiler.is_compiling()
        for name, read, value, words, _ in self.entries:
            new = read()
            if tracing and name in PATCHED:
                continue
            if new is not value and not _same(new, value):
                return words.format(new=new) if words else _sentence(name, new, value)
        return self.copied_after or ""


def _keyed(entries: list[Entry]) -> dict[str, Entry]:
    """Return entries by name, with a number after the names that occur more than once."""
    keyed: dict[str, Entry] = {}
    for entry in entries:
        name, number = entry.name, 2
        while name in keyed:
            name, number = f"{entry.name} ({number})", number + 1
        keyed[name] = entry
    return keyed


def _restored(kept: Any, now: Any) -> Any:
    """Return a value of a copy: what is there now, if it is what was kept of the value."""
    return now if _same(_portable(now), kept) else kept


def signature(
    module: nn.Module, apart: Collection[str] = (), without: Collection[tuple[str, str]] = ()
) -> tuple[tuple[Any, ...], list[Any]]:
    """Return all that can change what a forward computes but values of tensors, as a key.

    Modules with equal keys have the same graph. Objects without a value enter by their ids, which
    are theirs alone while they exist: they are returned too, for a cache to keep.

    Args:
        module: the module.
        apart: names of children that are left out.
        without: names of modules and of attributes in them whose values are left out.
    """
    kept: list[Any] = []
    owners = {id(part): name for name, part in module.named_modules()}

    def key(value: Any) -> Any:
        if type(value) in VALUES:
            return type(value), value
        if type(value) is Contents:
            return type(value), tuple(key(v) for v in value)
        if type(value) is partial:  # each module has one of its own
            items = [value.func, *value.args, *value.keywords.values()]
            return partial, tuple(value.keywords), tuple(map(key, items))
        if isinstance(value, MethodType) and id(value.__self__) in owners:
            return owners[id(value.__self__)], key(value.__func__)
        kept.append(value)
        return type(value), id(value)

    kind = type(module)
    left_out = {f"{name}.{attr}".lstrip(".") for name, attr in without}
    every = entries_of(module, kind, apart, identities=False)
    entries = tuple((e.name, key(e.value)) for e in every if e.name not in left_out)
    parts = []
    for name, part in parts_of(module, apart):
        tensors = tuple(
            (k, t if t is None else (t.shape, t.dtype, t.device, type(t)))
            for k, t in (*part._parameters.items(), *part._buffers.items())
        )
        parts.append((name, key(type(part)), key(vars(type(part)).get("forward")), tensors))
    return (tuple(parts), entries), kept


def _same(new: Any, old: Any) -> bool:
    """Return True for values that are equal; objects have to be the same one."""
    if type(new) is not type(old):
        return False
    if isinstance(old, tuple):
        return len(new) == len(old) and all(a is b or _same(a, b) for a, b in zip(new, old))
    if isinstance(old, MethodType):
        return new.__func__ is old.__func__ and new.__self__ is old.__self__
    equal: bool = type(old) in (*VALUES, _Code, _Name) and new == old
    return equal


def _sentence(name: str, new: Any, value: Any) -> str:
    if isinstance(value, Missing):
        return f"{name} is new"
    return f"{name} is {_words(new)}, was {_words(value)}"


def _words(value: Any) -> str:
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, (_Code, CodeType)):
        return "another function"
    if isinstance(value, _Name):
        article, space, _ = value.rpartition(" ")
        return article + space + value.rpartition(".")[2]
    if isinstance(value, (FunctionType, MethodType)):
        return value.__qualname__
    if callable(value) and hasattr(value, "__name__"):
        return str(value.__name__)
    plain = type(value) in VALUES or isinstance(value, (Missing, tuple))
    name = type(value).__name__
    return repr(value) if plain else f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
