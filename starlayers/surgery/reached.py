"""Search of all values outside of tensors that a forward can read."""

import logging
import sys
from collections.abc import Collection, Mapping
from enum import Enum
from functools import lru_cache, partial
from importlib.util import resolve_name
from types import (
    BuiltinFunctionType,
    CellType,
    FunctionType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any

from torch import Tensor, nn

from starlayers.surgery.adopted import Adopted
from starlayers.surgery.bytecode import names_of
from starlayers.surgery.entries import (
    CONTAINERS,
    ELSEWHERE,
    MISSING,
    OWN,
    VALUES,
    Entry,
    array_values,
    child_names,
    contents,
    contents_in,
    contents_of,
    count_hooks,
    hiding_names,
    is_added,
    is_array,
    item_of,
    new_in,
    parts_of,
    slot_value,
    tensor_names,
    value_or_contents,
)
from starlayers.surgery.kinds import (
    function_in,
    is_fixed,
    is_library_module,
    is_standard,
    items_of,
    keeps_its_state,
)

#: what calls of modules and attributes go through
MACHINERY = frozenset(
    {"__call__", "__getattr__", "__getattribute__", "_call_impl", "_wrapped_call_impl", "forward"}
)
#: methods of a class that is called
CONSTRUCTORS = ("__init__", "__new__", "__post_init__")
#: methods with names in underscores that no expression calls, and what Python keeps in classes
UNCALLED = frozenset(
    {*CONSTRUCTORS, "__copy__", "__deepcopy__", "__del__", "__getstate__", "__init_subclass__",
     "__reduce__", "__reduce_ex__", "__repr__", "__setstate__", "__str__", "_abc_impl"}
)  # fmt: skip
#: modules that are asked for the time
CLOCKS = ("time", "datetime", "timeit")
#: levels of objects that no name in the code leads to
DEPTH = 4
#: bytes of an array that are compared
MOST_BYTES = 1 << 14


def entries_of(
    module: nn.Module,
    kind: type,
    apart: Collection[str],
    *,
    identities: bool = True,
    names: Collection[str] | None = None,
    method: str = "forward",
) -> list[Entry]:
    """Return all that decides about a forward; a module and its parts by identity if asked for.

    Of the module's own attributes only those in `names` count, if it is given.
    """
    return _search(module, kind, apart, identities, names, method).entries


def unwatched(module: nn.Module, apart: Collection[str]) -> tuple[str, frozenset[str]]:
    """Return in words what a forward may read and nothing shows, and all names that it may read.

    Example:
        >>> __name__ = "mine"  # a module that is not the library's
        >>> import itertools
        >>> class Counts(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.steps = itertools.count()
        ...     def forward(self, x):
        ...         return x if next(self.steps) else 2 * x
        >>> unwatched(Counts(), ())[0]
        "its forward may read 'steps', a count, whose state nothing shows"
    """
    search = _search(module, type(module), apart, True, None, "forward")
    return next(iter(search.hidden), ""), search.names


def _search(
    module: nn.Module,
    kind: type,
    apart: Collection[str],
    identities: bool,
    counted: Collection[str] | None,
    method: str,
) -> "_Search":
    """Search until no function that is reached names anything new."""
    parts = [(n, p, kind if p is module else type(p)) for n, p in parts_of(module, apart)]
    kinds = frozenset(part_kind for _, _, part_kind in parts)
    own = _packages(kinds)
    start = MACHINERY | {method}
    names = _known_names.get((kinds, method), start)
    while True:
        search = _Search(own, names, identities, (getattr(kind, method, None), method))
        search.seen |= {id(part): True for _, part, _ in parts}  # a wrapper may hold them too
        for name, part, part_kind in parts:
            search.module(name, part, part_kind, apart, counted if part is module else None)
        for part_kind in dict.fromkeys(part_kind for _, _, part_kind in parts):
            search.of_class(part_kind)
        if apart:
            read = partial(getattr, nn.Linear, "__call__")
            search.add("the call of nn.Linear", read, nn.Linear.__call__)
        if search.found | start == names:
            if len(_known_names) > 999:
                _known_names.clear()
            _known_names[kinds, method] = names
            return search
        names = names | search.found if search.found > names - start else start | search.found


#: names that were found last for modules of these classes, to begin with
_known_names: dict[tuple[frozenset[type], str], frozenset[str]] = {}


@lru_cache(maxsize=1024)
def _packages(kinds: frozenset[type]) -> frozenset[str]:
    """Return the modules and packages in which classes and their bases are defined."""
    modules = {base.__module__ for kind in kinds for base in kind.__mro__}
    return frozenset(modules | {module.partition(".")[0] for module in modules})


class _Search:
    """Search under the assumption that code reads some names; `found` are those that it does."""

    def __init__(
        self, own: frozenset[str], names: frozenset[str], identities: bool, root: tuple[Any, str]
    ) -> None:
        self.own, self.names, self.identities, self.root = own, names, identities, root
        self.found: set[str] = set()
        self.entries: list[Entry] = []
        #: reasons, in the order in which they were found
        self.hidden: dict[str, None] = {}
        #: ids of what was met, with True for what the code may read itself
        self.seen: dict[int, bool] = {}

    def add(self, name: str, read: Any, value: Any, words: str = "", *, asked: bool = True) -> None:
        self.entries.append(Entry(name, read, value, words, asked))

    def hide(self, label: str, value: Any) -> None:
        kind = type(value).__name__
        a = "an" if kind[0] in "aeiouAEIOU" else "a"
        what = label if label.startswith("the ") else repr(label)
        self.hidden[f"its forward may read {what}, {a} {kind}, whose state nothing shows"] = None

    def absent(self, label: str, values: Mapping[str, Any], names: frozenset[str]) -> None:
        """Add that some names are not there."""
        names = frozenset(n for n in names if n not in values and n.isidentifier())
        if names:
            self.add(f"new in {label}", partial(new_in, values, names, label), "", "{new} is new")

    def module(
        self,
        name: str,
        part: nn.Module,
        kind: type,
        apart: Collection[str] = (),
        counted: Collection[str] | None = None,
    ) -> None:
        """Add what a module holds, and its class."""
        state, label = vars(part), f"{name}." if name else ""
        for key, value in list(state.items()):
            if key in OWN or is_added(key) or (counted is not None and key not in counted):
                continue
            if isinstance(value, Tensor):
                continue
            asked = key in self.names
            if not asked and not isinstance(value, CONTAINERS):
                if self.identities or type(value) in VALUES or callable(value):
                    self.add(label + key, partial(item_of, state, key), value, asked=False)
                continue
            skip = not (self.identities or type(value) in VALUES or callable(value))
            self.value(label + key, state, key, value, asked, skip=skip)
        # a wrapper on the instance that reaches this check is one that calls the own forward
        known = frozenset(state) | ({"forward"} if not name else set())
        words = "{new} was set on " + (name or "it") + ", over its own"
        self.add(
            f"{label}methods hidden",
            partial(hiding_names, part, kind, len(state), known),
            "",
            words,
        )
        self.absent(label, state, self.names - OWN - part._modules.keys() - known)
        self.add(f"{label}children", partial(child_names, part), child_names(part))
        for what, tensors in (("parameters", part._parameters), ("buffers", part._buffers)):
            self.add(label + what, partial(tensor_names, tensors), tensor_names(tensors))
        if self.identities:
            for key, child in part._modules.items():
                if label + key not in apart and not is_added(key):
                    self.add(label + key, partial(item_of, part._modules, key), child)
        if "forward" in state:
            self.add(f"{label}forward", partial(item_of, state, "forward"), state["forward"])
        if self.identities and name:
            self.add(f"the class of {name}", partial(getattr, part, "__class__"), type(part))
            forward = type(part).forward
            self.add(f"the forward of {name}", partial(getattr, type(part), "forward"), forward)

    def value(
        self,
        label: str,
        values: Mapping[str, Any],
        key: str,
        value: Any,
        asked: bool,
        depth: int = DEPTH,
        *,
        skip: bool = False,
    ) -> None:
        """Add a value in a mapping, and what is inside of it."""
        if isinstance(value, CONTAINERS):  # an export puts equal ones in their places
            self.add(label, partial(contents_of, values, key), contents(value), asked=asked)
        elif not skip:
            self.add(label, partial(item_of, values, key), value, asked=asked)
        self.inside(label, value, asked, depth)

    def inside(self, label: str, value: Any, asked: bool, depth: int = DEPTH) -> None:
        """Add what an object, a container or a function holds."""
        if type(value) in VALUES:
            return
        if isinstance(value, type):
            if asked:
                self.of_class(value, called=not issubclass(value, nn.Module))
            return
        before = self.seen.get(id(value))
        if before is not None and before >= asked:
            return
        self.seen[id(value)] = asked
        if isinstance(value, Tensor):
            if asked and not value.is_inference():
                self.add(
                    f"the version of {label}", partial(getattr, value, "_version"), value._version
                )
        elif isinstance(value, FunctionType):
            self.function(value)
        elif isinstance(value, MethodType):
            self.inside(label, value.__func__, asked, depth)
            if not isinstance(value.__self__, nn.Module):
                self.inside(label, value.__self__, asked, depth)
        elif isinstance(value, BuiltinFunctionType):
            if not isinstance(value.__self__, (ModuleType, type(None))):
                self.inside(label, value.__self__, asked, depth)
        elif isinstance(value, ModuleType):
            if asked:
                self.python_module(label, value)
        elif isinstance(value, nn.Module):  # one that is no registered child
            for inner, part in value.named_modules():
                name = f"{label}.{inner}".rstrip(".")
                self.add(f"hooks of {name}", partial(count_hooks, part), count_hooks(part))
                self.module(name, part, type(part))
                self.of_class(type(part))
        elif isinstance(value, CONTAINERS):
            self.items(label, value, asked, depth)
            if not is_library_module(type(value).__module__):
                self.attributes(label, value, asked, depth)
        elif isinstance(value, partial):
            for key in ("func", "args", "keywords"):
                item = getattr(value, key)
                if isinstance(item, CONTAINERS):
                    self.add(f"{label}.{key}", partial(contents, item), contents(item))
                self.inside(f"{label}.{key}", item, asked, depth)
        elif function_in(value) is not None:  # of `lru_cache`, for one
            self.inside(label, function_in(value), asked, depth)
        else:
            self.object(label, value, asked, depth)

    def items(self, label: str, value: Any, asked: bool, depth: int) -> None:
        for i, item in enumerate(items_of(value)):
            if type(item) not in VALUES:
                self.inside(f"{label}[{i}]", item, asked, depth)

    def object(self, label: str, value: Any, asked: bool, depth: int) -> None:
        """Add the attributes of an object, unless it is of a library that keeps its state."""
        if depth == 0:
            return
        if is_array(value):
            if value.nbytes <= MOST_BYTES:
                words = f"values of {label} were changed"
                self.add(
                    f"the values of {label}",
                    partial(array_values, value),
                    array_values(value),
                    words,
                )
            elif asked:
                self.hide(label, value)
            return
        if isinstance(value, logging.Logger):
            for key in ("level", "disabled"):
                self.add(f"{label}.{key}", partial(getattr, value, key), getattr(value, key))
            return
        if isinstance(value, Enum) and is_library_module(type(value).__module__):
            return
        if keeps_its_state(type(value)):
            if asked:
                self.hide(label, value)
            return
        if not is_fixed(type(value)):
            self.attributes(label, value, asked, depth)

    def attributes(self, label: str, value: Any, asked: bool, depth: int) -> None:
        state = getattr(value, "__dict__", {})
        for key, item in list(state.items()):
            named = key in self.names
            below = depth if named else depth - 1
            self.value(f"{label}.{key}", state, key, item, asked and named, below)
        for base in type(value).__mro__:
            for key, slot in vars(base).items():
                if isinstance(slot, MemberDescriptorType) and not key.startswith("__"):
                    read = partial(slot_value, value, slot)
                    self.add(f"{label}.{key}", read, read())
                    self.inside(f"{label}.{key}", getattr(value, key, None), asked, depth - 1)
        self.absent(f"{label}.", state, self.names)
        self.of_class(type(value))

    def python_module(self, label: str, module: ModuleType) -> None:
        """Add what code may ask of a module."""
        name, values = module.__name__, vars(module)
        if name in CLOCKS:
            self.hidden[f"its forward may ask for the time, of the module {name!r}"] = None
        library = self.is_library(name)
        for key in sorted(self.names & values.keys()):
            value = values[key]
            if key.startswith("__"):
                continue
            if not library:
                self.value(f"{label}.{key}", values, key, value, True)
            elif isinstance(value, CONTAINERS):
                self.add(f"{label}.{key}", partial(contents_of, values, key), contents(value))
            else:
                self.add(f"{label}.{key}", partial(item_of, values, key), value)
                if isinstance(value, ModuleType):
                    self.inside(f"{label}.{key}", value, True)
        if not library:
            self.absent(f"{label}.", values, self.names)

    def of_class(self, kind: type, *, called: bool = False) -> None:
        """Add methods and attributes of a class, and what its methods read outside."""
        for base in kind.__mro__:
            if id(base) in self.seen or base.__module__ in ("builtins", "typing", "abc", "enum"):
                continue
            self.seen[id(base)] = True
            if not issubclass(base, Adopted):
                self.of_base(base, called)

    def of_base(self, base: type, called: bool) -> None:
        values, library = vars(base), self.is_library(base.__module__)
        names = self.names | (MACHINERY - {"forward"})
        for key, value in list(values.items()):
            function, label = function_in(value), f"{base.__name__}.{key}"
            if isinstance(value, MemberDescriptorType):
                continue
            if key == self.root[1] and value is self.root[0]:  # which the snapshot compares itself
                self.inside(label, function, True)
                continue
            if library:
                if key in names and not (key == "forward" and base.__module__.startswith("torch.")):
                    self.add(label, partial(item_of, values, key), value)
                continue
            dunder = key.startswith("__")
            if key in (UNCALLED if not called else ()) or key in ELSEWHERE[1:]:
                continue
            if function is None and not dunder:
                self.value(label, values, key, value, key in self.names)
            elif function is not None and (dunder or key in self.names):
                self.add(label, partial(item_of, values, key), value)
                self.inside(label, function, True)
        if not library or issubclass(base, nn.Module):
            self.absent(f"{base.__name__}.", values, names)

    def function(self, function: Any) -> None:
        """Add the globals, closures and defaults that a function reads."""
        wrapped = getattr(function, "__wrapped__", None)
        if wrapped is not None:
            self.inside("", wrapped, True)
        variables, name = function.__globals__, function.__qualname__
        module = str(variables.get("__name__", ""))
        # of an installed package, only the files that define the parts are entered
        if self.is_library(module) or (is_library_module(module) and module not in self.own):
            return
        code = function.__code__
        names = names_of(code)
        self.found |= names.read
        if names.makes:
            self.hidden[f"{name} asks for an attribute by a name that it makes as it runs"] = None
        self.add(f"the code of {name}", partial(getattr, function, "__code__"), code)
        for kind in ("__defaults__", "__kwdefaults__"):
            value = getattr(function, kind)
            self.add(f"{kind} of {name}", partial(getattr, function, kind), value)
            if value and any(isinstance(item, CONTAINERS) for item in items_of(value)):
                read = partial(contents_in, function, kind)
                self.add(f"values in {kind} of {name}", read, contents(value))
            if value:
                self.items(f"{kind} of {name}", value, True, DEPTH)
        for key, value in vars(function).items():
            if key != "__wrapped__":
                self.value(f"{name}.{key}", vars(function), key, value, key in self.names)
        if vars(function):
            self.absent(f"{name}.", vars(function), self.names)
        missing = set()
        for key in sorted(names.variables):
            value = variables.get(key, MISSING)
            if value is MISSING:
                missing.add(key)
            else:
                self.value(f"the global {key}", variables, key, value, True)
        self.absent("the global ", variables, frozenset(missing))
        for key, level in sorted(names.imports):
            path = resolve_name("." * level + key, variables.get("__package__") or None)
            self.inside(f"the module {path}", sys.modules.get(path), True)
        for key, cell in zip(code.co_freevars, function.__closure__ or ()):
            if key != "__class__" and cell != CellType():
                item = cell.cell_contents
                self.add(f"the variable {key}", partial(contents_in, cell), value_or_contents(item))
                self.inside(f"the variable {key}", item, True)

    def is_library(self, module: str) -> bool:
        """Return True for a module of PyTorch, Python or a package that is not the model's own."""
        top = module.partition(".")[0]
        return is_library_module(module) and (top not in self.own or is_standard(top))
