"""State outside of tensors that a forward may change: found, compared, and put back."""

import random
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from starlayers.surgery.entries import OWN, VALUES, functions_of, names_in_code, parts_of
from starlayers.surgery.trial_run import MismatchError

#: levels of objects inside of objects, and number of objects, that are looked at
DEPTH, MOST = 5, 5000


class State(NamedTuple):
    """State of one object: its name, what it was, how to read it and to put it back."""

    name: str
    value: Any
    read: Callable[[], Any]
    put: Callable[[Any], Any]
    own: bool = True


class Outside:
    """State of the objects that the methods of a module can reach: attributes, globals, closures.

    Random generators and containers are among them, tensors and modules are not.

    Args:
        module: the module.
        apart: names of children that are left out.

    Example:
        >>> __name__ = "mine"  # a module that is not the library's
        >>> calls = []
        >>> class Counts(nn.Identity):
        ...     def forward(self, x):
        ...         calls.append(len(calls))
        ...         return x
        >>> module = Counts()
        >>> outside = Outside(module)
        >>> _ = module(torch.ones(2))
        >>> outside.change(), outside.restore(), calls
        ('the global calls', None, [])
    """

    def __init__(self, module: nn.Module, apart: Collection[str] = ()) -> None:
        self.states: list[State] = []
        #: names of iterators, whose state cannot be read
        self.iterators: list[str] = []
        self._seen: dict[int, Any] = {}
        #: False for what only methods of other objects reach, which is put back and no obstacle
        self._own = True
        for name, part in parts_of(module, apart):
            names = names_in_code(type(part))
            for key, value in vars(part).items():
                if key not in OWN and (key in names or not isinstance(value, nn.Module)):
                    self._look(f"{name}.{key}".lstrip("."), value, names, used=key in names)
            self._class(type(part), names)

    def change(self) -> str:
        """Return the name of the first object that has changed, empty if there is none."""
        changed = (s.name for s in self.states if s.own and not _same(s.read(), s.value))
        return next(changed, "")

    def restore(self) -> None:
        """Put back what has changed."""
        for state in self.states:
            if not _same(state.read(), state.value):
                state.put(state.value)

    def _add(self, name: str, read: Callable[[], Any], put: Callable[[Any], Any]) -> None:
        self.states.append(State(name, read(), read, put, self._own))

    def _class(self, kind: type, names: Collection[str]) -> None:
        """Look at the attributes of a class, and at what its methods read."""
        for base in kind.__mro__:
            if id(base) in self._seen or not _foreign(base):
                continue
            self._seen[id(base)] = base
            self._add(base.__name__, partial(_plain, base), partial(_put_attributes, base))
            for key, value in _plain(base).items():
                self._look(f"{base.__name__}.{key}", value, names, used=key in names)
        for function in functions_of(kind):
            self._function(function, names)

    def _function(self, function: Any, names: Collection[str]) -> None:
        code = getattr(function, "__code__", None)
        if code is None or id(function) in self._seen or not _foreign(function):
            return
        self._seen[id(function)] = function
        words = frozenset(_names(code))
        scope = function.__globals__
        here = [k for k in words if k in scope]
        for key in here:
            value = scope[key]
            if not isinstance(value, ModuleType):
                self._look(f"the global {key}", value, words | frozenset(names), used=True)
            elif _foreign(value):
                inside = {k: v for k, v in vars(value).items() if k in words}
                self._add(key, partial(_items, vars(value), list(inside)), vars(value).update)
                for k, v in inside.items():
                    self._look(f"{key}.{k}", v, words, used=True)
        self._add("a global variable", partial(_items, scope, here), scope.update)
        for key, cell in zip(code.co_freevars, function.__closure__ or ()):
            try:
                value = cell.cell_contents
            except ValueError:  # it has none yet
                continue
            if key != "__class__":
                name = f"the variable {key}"
                self._add(name, partial(getattr, cell, "cell_contents"),
                          partial(setattr, cell, "cell_contents"))  # fmt: skip
                self._look(name, value, words | frozenset(names), used=True)
        defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        for value in defaults:
            self._look(f"a default of {function.__qualname__}", value, words, used=True)
        self._look(f"attributes of {function.__qualname__}", vars(function), words, used=True)

    def _look(
        self, name: str, value: Any, names: Collection[str], depth: int = DEPTH, *, used: bool
    ) -> None:
        """Look at an object and at those inside of it."""
        if type(value) in VALUES or isinstance(value, (Tensor, ModuleType, torch.Size)):
            return
        if id(value) in self._seen or depth == 0 or len(self._seen) > MOST:
            return
        if isinstance(value, (FunctionType, MethodType)):
            self._look_at_method(name, value, names, depth)
            return
        if isinstance(value, type):
            if _foreign(value):
                self._class(value, names)
            return
        self._seen[id(value)] = value
        inner: dict[str, Any] = {}
        if isinstance(value, random.Random):
            self._add(name, value.getstate, value.setstate)
        elif isinstance(value, torch.Generator):
            self._add(name, lambda: value.get_state().numpy().tobytes(), partial(_set_torch, value))
        elif type(value).__module__.startswith("numpy"):
            self._numpy(name, value)
        elif hasattr(type(value), "__next__"):
            self.iterators += [name] * (used and self._own)
        elif isinstance(value, (list, deque, dict, set)):
            kind = next(k for k in (list, deque, dict, set) if isinstance(value, k))
            self._add(name, partial(_contents, value), partial(_refill, kind, value))
            whole = isinstance(value, dict)
            items: Any = dict.items(value) if whole else enumerate(value)  # type: ignore[arg-type]
            inner = {f"[{k!r:.20}]": v for k, v in items}
        elif isinstance(value, (tuple, frozenset)):
            inner = {f"[{i}]": v for i, v in enumerate(value)}
        elif isinstance(value, partial):
            inner = {".func": value.func, ".args": value.args, ".keywords": value.keywords}
        elif isinstance(value, nn.Module):  # that is no child
            self._class(type(value), names)
            inner = {f".{k}": v for k, v in vars(value).items() if k not in OWN}
        elif _stateful(type(value)):
            inner = self._attributes(name, value)
            if _foreign(type(value)):
                own, self._own = self._own, False
                self._class(type(value), names)
                self._own = own
        for key, item in inner.items():
            self._look(f"{name}{key}", item, names, depth - 1, used=used)

    def _look_at_method(self, name: str, value: Any, names: Collection[str], depth: int) -> None:
        self._function(getattr(value, "__func__", value), names)
        if isinstance(value, MethodType) and not isinstance(value.__self__, nn.Module):
            self._look(name, value.__self__, names, depth - 1, used=True)

    def _attributes(self, name: str, value: Any) -> dict[str, Any]:
        state: Any = getattr(value, "__dict__", None)
        inner: dict[str, Any] = {}
        if isinstance(state, dict):
            self._add(name, partial(_contents, state), partial(_refill, dict, state))
            inner = {f".{k}": v for k, v in state.items()}
        for base in type(value).__mro__:
            slots = vars(base).get("__slots__", ())
            for key in [slots] if isinstance(slots, str) else slots:
                if not key.startswith("__") and hasattr(value, key):
                    self._add(f"{name}.{key}", partial(getattr, value, key, None),
                              partial(setattr, value, key))  # fmt: skip
                    inner[f".{key}"] = getattr(value, key)
        return inner

    def _numpy(self, name: str, value: Any) -> None:
        """Look at a generator or an array of numpy."""
        value = getattr(value, "_bit_generator", getattr(value, "bit_generator", value))
        if hasattr(value, "state"):
            kept = value.state
            read, put = (lambda: repr(value.state)), (lambda _: setattr(value, "state", kept))
            self._add(name, read, put)
        elif hasattr(value, "tobytes") and hasattr(value, "ndim"):
            copy = value.copy()
            self._add(name, value.tobytes, lambda _: value.__setitem__(..., copy))


def _set_torch(generator: torch.Generator, state: bytes) -> None:
    generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _plain(kind: type) -> dict[str, Any]:
    """Return the attributes of a class but methods and what Python puts into every class."""
    return {
        key: value
        for key, value in vars(kind).items()
        if not (key.startswith(("__", "_abc_")) or callable(value))
        and not hasattr(type(value), "__get__")
    }


def _foreign(value: Any) -> bool:
    """Return True for classes, functions and modules that are the user's or of another library."""
    name = getattr(value, "__module__", None) or getattr(value, "__name__", "")
    root = str(name).partition(".")[0]
    return root not in ("torch", "numpy", "starlayers") and (
        root == "__main__" or root not in sys.stdlib_module_names
    )


def _stateful(kind: type) -> bool:
    return _foreign(kind) or kind.__module__ in ("types", "collections", "dataclasses")


def _items(state: Any, keys: list[str]) -> dict[str, Any]:
    return {k: state[k] for k in keys if k in state}


def _contents(value: Any) -> Any:
    """Return the contents of a container, which `_refill` takes."""
    if isinstance(value, dict):
        return dict(dict.items(value))
    return set(value) if isinstance(value, set) else list(value)


def _refill(kind: Any, value: Any, contents: Any) -> None:
    kind.clear(value)
    (kind.extend if kind in (list, deque) else kind.update)(value, contents)


def _put_attributes(kind: type, contents: dict[str, Any]) -> None:
    for key in _plain(kind).keys() - contents.keys():
        delattr(kind, key)
    for key, value in contents.items():
        if vars(kind).get(key) is not value:
            setattr(kind, key, value)


def _same(a: Any, b: Any) -> bool:
    """Return True for equal plain values, and containers of the very same objects."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(a[k] is b[k] for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(x is y for x, y in zip(a, b))
    if isinstance(a, set):
        return {*map(id, a)} == {*map(id, b)}
    return a is b or (isinstance(a, (*VALUES, tuple)) and bool(a == b))


@contextmanager
def untouched(module: nn.Module, apart: Collection[str], *, forbidden: bool) -> Iterator[None]:
    """Put the state outside of a module back when the block ends.

    Raises:
        MismatchError: `forbidden`, and the block has changed it, or would use up an iterator.
    """
    outside = Outside(module, apart)
    if forbidden and outside.iterators:
        raise MismatchError(
            f"its forward may advance {outside.iterators[0]}, an iterator, which no graph shows"
        )
    try:
        yield
        change = outside.change()
    finally:
        outside.restore()
    if forbidden and change:
        raise MismatchError(f"its forward changes {change}, which a star would not")
