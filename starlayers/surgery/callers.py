"""Functions that call a layer of an MLP by itself, past the activation."""

import dis
from collections.abc import Iterator
from types import CodeType
from typing import Any

from torch import nn

from starlayers.surgery.entries import functions_of
from starlayers.surgery.site import Site, join

#: names of methods that set values and call no layer
SETTERS = ("init", "reset")


def other_caller(model: nn.Module, owner: str, site: Site, verified: str | None = None) -> str:
    """Return the method that calls a plain MLP's first layer elsewhere, "" if none does.

    After `starify` the layer returns the product, so it must only be called in front of its
    activation. The forwards of the module that holds it were verified; looked at are the code of
    its other methods, which they do not reach, and that of all methods of the modules above.

    Args:
        model: the model.
        owner: name of the module that contains the MLP.
        site: names of the MLP's parts.
        verified: name of the outermost module whose forward was verified, by default the owner.

    Example:
        >>> class MLP(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc1, self.act, self.fc2 = nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)
        ...     def forward(self, x):
        ...         return self.fc2(self.act(self.fc1(x)))
        ...     def features(self, x):
        ...         return self.fc1(x)
        >>> other_caller(MLP(), "", Site("chain", "plain", "fc1", "act", "fc2"))
        'MLP.features'
    """
    path = join(owner, site.inp).split(".")
    outermost = owner if verified is None else verified
    highest = len(outermost.split(".")) if outermost else 0
    for depth in reversed(range(len(path))):
        kind = type(model.get_submodule(".".join(path[:depth])))
        reached = _reached_by_forward(kind) if depth >= highest else frozenset()
        others = [f for name, f in _methods(kind) if name not in reached]
        if found := _first_that_calls(others, path[depth:]):
            return found
    return ""


def call_in_forward(module: nn.Module, name: str) -> str:
    """Return the method that a module's forward reaches and that calls a part, "" if none does."""
    reached = _reached_by_forward(type(module))
    functions = [f for name, f in _methods(type(module)) if name in reached]
    return _first_that_calls(functions, name.split("."))


def _first_that_calls(functions: list[Any], path: list[str]) -> str:
    for function in functions:
        setter = function.__name__.lstrip("_").startswith(SETTERS)
        if not setter and _calls(function.__code__, path):
            return str(function.__qualname__)
    return ""


def _reached_by_forward(kind: type[nn.Module]) -> frozenset[str]:
    """Return the names of the methods that the forward of a class calls, itself among them."""
    names: dict[str, set[str]] = {}
    for name, function in _methods(kind):  # of all bases, because `super()` calls theirs
        names.setdefault(name, set()).update(_names(function.__code__))
    reached, new = set[str](), {"forward"}
    while new:
        reached |= new
        new = set.union(*(names.get(name, set()) for name in new)) & names.keys() - reached
    return frozenset(reached)


def _methods(kind: type[nn.Module]) -> Iterator[tuple[str, Any]]:
    """Yield the functions of a class and its bases by the names under which they are called."""
    called: dict[int, list[str]] = {}
    for base in kind.__mro__:
        for name, value in vars(base).items():
            function = getattr(value, "fget", None) or getattr(value, "__func__", value)
            called.setdefault(id(function), []).append(name)
    for function in functions_of(kind):
        yield from ((name, function) for name in called.get(id(function), ()))


def _names(code: CodeType) -> Iterator[str]:
    for part in _codes(code):
        yield from part.co_names


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Yield a code and those of functions inside of it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _calls(code: CodeType, path: list[str]) -> bool:
    """Return True if a code has a call `....a.b[0](...)`, where `path` is a, b, 0."""
    attributes = {name for name in path if not name.isdecimal()}
    return any(_calls_in(part, path) for part in _codes(code) if attributes <= {*part.co_names})


def _calls_in(code: CodeType, path: list[str]) -> bool:
    wanted = [int(name) if name.isdecimal() else name for name in path]
    steps = list(dis.get_instructions(code))
    #: places of attributes and indices among the instructions, and their values
    found = [
        (i, step.argval) for i, step in enumerate(steps)
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD")
        or (step.opname.startswith("LOAD_") and type(step.argval) is int and _indexes(steps[i + 1]))
    ]  # fmt: skip
    for start in range(len(found) - len(wanted) + 1):
        some = found[start : start + len(wanted)]
        if [value for _, value in some] == wanted and _is_called(steps, some[-1][0]):
            return True
    return False


def _indexes(step: dis.Instruction) -> bool:
    return step.opname == "BINARY_SUBSCR" or step.argrepr == "[]"


def _is_called(steps: list[dis.Instruction], place: int) -> bool:
    """Return True if what an instruction loads is called, not asked for an attribute."""
    step = steps[place]
    if type(step.argval) is int:
        return steps[place + 2].opname not in ("LOAD_ATTR", "LOAD_METHOD")
    return step.opname == "LOAD_METHOD" or "NULL|self" in step.argrepr
