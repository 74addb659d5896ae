"""State of a module that was verified, and what has changed since."""

from collections.abc import Callable, Collection, Iterator
from functools import partial
from types import CodeType
from typing import Any

import torch
from torch import nn

from starlayers.dispatch import has_global_hooks
from starlayers.surgery.sandbox import FSDP_STATE

#: attributes that every module has; parameters, buffers and children are looked at by themselves
OWN = frozenset(vars(nn.Module()))
#: kinds of hooks that act on a forward or its gradient
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: values that are compared by value; other objects are compared by identity
VALUES = (bool, int, float, complex, str, bytes, type(None), tuple, torch.dtype)


class Snapshot:
    """State on which a verification rests: classes, forwards, plain attributes, no hooks.

    Tensors are no part of it, because what was verified holds for all their values.

    Args:
        module: the module.
        forward: its class's forward that was verified.
        apart: names of children that are left out, because whatever they are is called.

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
        self, module: nn.Module, forward: Callable[..., Any], apart: Collection[str] = ()
    ) -> None:
        self.forward, self.apart = forward, tuple(apart)
        #: dotted name, name of the parent, the part, its class's forward, its attributes
        self.parts: list[tuple[str, str, nn.Module, object, dict[str, Any]]] = []
        #: name, object and attributes of configs that the modules hold
        self.configs: list[tuple[str, Any, dict[str, Any]]] = []
        seen: set[int] = set()
        for name, part in parts_of(module, self.apart):
            own = forward if part is module else type(part).forward
            plain = {k: v for k, v in vars(part).items() if k not in OWN and not _is_added(k)}
            self.parts.append((name, name.rpartition(".")[0], part, own, plain))
            names = names_in_code(type(part))
            for key, value in plain.items():
                known = getattr(value, "__dict__", None)
                if isinstance(value, (nn.Module, type)) or callable(value) or not known:
                    continue
                if id(value) not in seen:
                    seen.add(id(value))
                    read = {k: v for k, v in known.items() if k in names and type(v) in VALUES}
                    self.configs.append((f"{name}.{key}".lstrip("."), value, read))

    def change(
        self,
        module: nn.Module,
        forward: Callable[..., Any] | None = None,
        *,
        with_hooks: bool = True,
    ) -> str:
        """Return the first change in words, empty if there is none.

        `forward` is what the module's class computes now, if it was given another class. Hooks
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
            if now is not own:
                return f"the forward of {name or 'its class'} was replaced"
            if len(state) != len(plain) + len(OWN) and (hidden := _hidden(part, plain)):
                return f"{name}.{hidden} hides a method of its class".lstrip(".")
            for key, value in plain.items():
                if (new := state.get(key, MISSING)) is not value and not _same(new, value):
                    return f"{name}.{key} is {new!r}, was {value!r}".lstrip(".")
        for name, config, read in self.configs:
            for key, value in read.items():
                if (new := vars(config).get(key, MISSING)) is not value and not _same(new, value):
                    return f"{name}.{key} is {new!r}, was {value!r}"
        return ""


def _hidden(part: nn.Module, plain: dict[str, Any]) -> str:
    """Return the name of a new attribute that hides one of the class, empty if none does."""
    new = [k for k in vars(part) if k not in OWN and k not in plain and not _is_added(k)]
    return next((k for k in new if hasattr(type(part), k)), "")


class _Missing:
    """Value of an attribute that is gone."""

    def __repr__(self) -> str:
        return "gone"


MISSING = _Missing()


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
    parts, kept = [], []

    def entry(value: Any, names: frozenset[str] | None = None) -> Any:
        if is_value(value):
            return type(value), value
        if type(value) is partial:  # each module has one of its own
            items = [value.func, *value.args, *value.keywords.values()]
            return partial, tuple(value.keywords), tuple(map(entry, items))
        kept.append(value)
        known = getattr(value, "__dict__", None)
        if names is None or not known or isinstance(value, (nn.Module, type)) or callable(value):
            return type(value), id(value)
        read = sorted(k for k in known if k in names)  # a config: what the forward reads of it
        return type(value), tuple((k, entry(known[k])) for k in read)

    for name, part in parts_of(module, apart):
        kind = type(part)
        names = names_in_code(kind)
        tensors = [
            (k, t if t is None else (t.shape, t.dtype, t.device, type(t)))
            for k, t in (*part._parameters.items(), *part._buffers.items())
        ]
        plain = [
            (k, None if (name, k) in without else entry(v, names))
            for k, v in vars(part).items()
            if k not in OWN and not k.startswith(FSDP_STATE)
        ]
        methods = [entry(value) for value in _functions(kind)]
        parts.append((name, entry(kind), tuple(methods), tuple(plain), tuple(tensors)))
    return tuple(parts), kept


def _functions(kind: type) -> Iterator[Any]:
    """Yield the attributes of a class and its bases below `nn.Module` that have code."""
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for value in vars(base).values():
            if hasattr(value, "__code__") or hasattr(value, "fget") or hasattr(value, "__func__"):
                yield value


def parts_of(module: nn.Module, apart: Collection[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules in a module by name, without those `apart`."""
    for name, part in module.named_modules():
        if not any(name == other or name.startswith(f"{other}.") for other in apart):
            yield name, part


def _is_added(name: str) -> bool:
    """Return True for the attributes that this library adds, or FSDP2."""
    return name == "star" or name.startswith(("star_", FSDP_STATE))


def _same(new: Any, old: Any) -> bool:
    """Return True for values that are equal; objects have to be the same one."""
    return type(new) is type(old) and type(old) in VALUES and bool(new == old)


def is_value(value: Any) -> bool:
    """Return True for values that are compared by value and can be in a key."""
    if type(value) not in VALUES:
        return False
    try:
        hash(value)
    except TypeError:  # a tuple of lists
        return False
    return True


def names_in_code(kind: type, *, constructors: bool = True) -> frozenset[str]:
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
        code = getattr(function, "__code__", None)
        if code is not None and (constructors or code.co_name != "__init__"):
            visit(code)
    return frozenset(names)
