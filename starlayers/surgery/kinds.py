"""Kinds of values by what of them can be watched."""

import argparse
import sys
import sysconfig
from functools import cached_property, lru_cache, partialmethod, singledispatchmethod
from types import (
    FunctionType,
    GeneratorType,
    MappingProxyType,
    MemberDescriptorType,
    SimpleNamespace,
)
from typing import Any

#: modules of the standard library whose objects are their attributes
PLAIN_MODULES = ("abc", "argparse", "collections", "configparser", "dataclasses", "enum")
#: modules of the standard library whose objects do not change
FIXED_MODULES = (
    "builtins", "datetime", "decimal", "fractions", "functools", "inspect", "operator", "pathlib",
    "re", "types", "typing", "uuid",
)  # fmt: skip
#: builtin objects that change when they are used
ITERATORS: tuple[type, ...] = (
    type(iter(())),
    type(iter([])),
    GeneratorType,
    map,
    zip,
    filter,
    enumerate,
    memoryview,
)


@lru_cache(maxsize=4096)
def is_library_module(module: str) -> bool:
    """Return True for a module of PyTorch, Python or an installed package."""
    top = module.partition(".")[0]
    if is_standard(top):
        return True
    file = getattr(sys.modules.get(top), "__file__", None)
    return file is not None and ("site-packages" in file or "dist-packages" in file)


@lru_cache(maxsize=4096)
def is_standard(top: str) -> bool:
    """Return True for the name of PyTorch, this library or a package of Python."""
    if top in ("torch", "starlayers", "builtins", "numpy", *sys.builtin_module_names):
        return True
    file = getattr(sys.modules.get(top), "__file__", None)
    if file is None:
        return top in sys.stdlib_module_names
    folders = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib")]
    installed = "site-packages" in file or "dist-packages" in file
    return not installed and any(file.startswith(folder) for folder in folders)


def keeps_its_state(kind: type) -> bool:
    """Return True for a class of the standard library whose objects do not show their state.

    So are those of other libraries without attributes: iterators, weak references, variables of
    threads, contexts and processes.
    """
    if issubclass(kind, ITERATORS):
        return True
    if issubclass(kind, (SimpleNamespace, argparse.Namespace)) or is_fixed(kind):
        return False
    for base in kind.__mro__:
        top = base.__module__.partition(".")[0]
        if is_standard(top) and top not in ("torch", "starlayers", *FIXED_MODULES, *PLAIN_MODULES):
            return True
    return is_library_module(kind.__module__) and not _has_attributes(kind)


def is_fixed(kind: type) -> bool:
    """Return True for a class of which only the identity of an object counts."""
    if issubclass(kind, ITERATORS):
        return False
    top = kind.__module__.partition(".")[0]
    if issubclass(kind, (SimpleNamespace, argparse.Namespace)):
        return False
    return top in ("torch", "starlayers", "numpy", *FIXED_MODULES) and is_standard(top)


def _has_attributes(kind: type) -> bool:
    return kind.__dictoffset__ != 0 or any(
        isinstance(value, MemberDescriptorType)
        for base in kind.__mro__
        for value in vars(base).values()
    )


def function_in(value: Any) -> Any:
    """Return the function in a descriptor or around a cache, `None` if there is none."""
    if isinstance(value, FunctionType):
        return value
    if isinstance(value, property):
        return value.fget
    if isinstance(value, (staticmethod, classmethod)):
        return value.__func__
    if isinstance(value, (cached_property, partialmethod, singledispatchmethod)):
        return value.func
    return value.__wrapped__ if isinstance(value, type(is_library_module)) else None


def items_of(value: Any) -> Any:
    """Return the items of a container, the values of a dictionary."""
    return value.values() if isinstance(value, (dict, MappingProxyType)) else value
