"""Sandbox for trial runs: copies of modules, preserved generators."""

import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy as shallow_copy
from enum import Enum
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from starlayers.surgery.kinds import is_library_module

#: seed of every trial run; any fixed number would do
SEED = 0x57A4

PLAIN = (Tensor, nn.Parameter)

#: attributes of `nn.Module` that `sandbox_copy` copies entry by entry
CONTAINERS = ("_parameters", "_buffers", "_modules")
#: start of the names of attributes in which FSDP2 keeps its state of a module
FSDP_STATE = "__composable_api_state_key"
HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def own_tensor(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor; of one on the meta device, random values on the CPU."""
    return random_tensor(tensor) if tensor.is_meta else tensor.detach().clone()


def usual_tensor(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor; random values for memory that nobody has written to yet."""
    plain = type(tensor) in PLAIN and tensor.is_floating_point() and not tensor.is_meta
    if plain and tensor.numel() and not tensor.detach().abs().max() < 1e4:
        return random_tensor(tensor)
    return own_tensor(tensor)


def random_tensor(tensor: Tensor) -> Tensor:
    """Return random weights of usual size, with the shape and dtype of a tensor."""
    device = "cpu" if tensor.is_meta else tensor.device
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
    fan_in = tensor.shape[1:].numel() if tensor.ndim > 1 else 1
    return torch.randn(tensor.shape, device=device).div_(fan_in**0.5).to(tensor.dtype)


def sandbox_copy(
    module: nn.Module,
    memo: dict[int, Any] | None = None,
    *,
    share: bool = False,
    make: Callable[[Tensor], Tensor] = own_tensor,
) -> Any:
    """Return a copy of a module to run without an effect on the module.

    Parameters, buffers, generators, containers, plain objects and child modules are copied, hooks
    and what FSDP2 added are left out, other attributes are shared: objects of libraries.

    Args:
        module: the module.
        memo: copies of objects that occur more than once, by the id of their original. What it has
            already is used, so it can put other modules in the place of some.
        share: keep the module's own parameters, to save memory.
        make: function from a tensor to its copy.
    """
    memo = {} if memo is None else memo
    if id(module) in memo:
        return memo[id(module)]
    copy = object.__new__(unsharded(type(module)))
    memo[id(module)] = copy
    state = copy.__dict__
    for name, value in vars(module).items():
        if name not in CONTAINERS and not name.startswith(FSDP_STATE):
            hooks = name.endswith("_hooks") or name.startswith(HOOKS)
            empty = hooks and isinstance(value, dict)
            state[name] = type(value)() if empty else _copied(value, memo, make)
    parameters, buffers = module._parameters.items(), module._buffers.items()
    state["_parameters"] = {k: p if share else _copied(p, memo, make) for k, p in parameters}
    state["_buffers"] = {k: _copied(b, memo, make) for k, b in buffers}
    state["_modules"] = {
        k: None if child is None else sandbox_copy(child, memo, share=share, make=make)
        for k, child in module._modules.items()
    }
    return copy


def unsharded(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class from which FSDP2 derived a module's class, or that class itself.

    `fully_shard` gives a module of class `K` a class with the bases `FSDPModule` and `K`.
    """
    bases = kind.__bases__
    return bases[1] if len(bases) == 2 and bases[0].__name__ == "FSDPModule" else kind


def _copied(value: Any, memo: dict[int, Any], make: Callable[[Tensor], Tensor]) -> Any:
    """Return a copy of a tensor, generator, container or plain object, others as they are."""
    if id(value) in memo:
        return memo[id(value)]
    copy: Any
    if isinstance(value, Tensor):
        copy = make(value)
        trains = value.requires_grad and copy.is_floating_point()
        copy = nn.Parameter(copy, trains) if isinstance(value, nn.Parameter) else copy
    elif isinstance(value, torch.Generator):
        copy = value.clone_state()
    elif type(value) in (list, set):
        copy = type(value)(_copied(v, memo, make) for v in value)
    elif type(value) is deque:
        copy = deque((_copied(v, memo, make) for v in value), value.maxlen)
    elif isinstance(value, dict):  # Counter and defaultdict among them
        copy = shallow_copy(value)
        for k, v in value.items():
            dict.__setitem__(copy, k, _copied(v, memo, make))
    elif isinstance(value, MethodType) and _is_plain_object(value.__self__):
        copy = MethodType(value.__func__, _copied(value.__self__, memo, make))
    elif _is_plain_object(value):
        copy = memo[id(value)] = _empty(type(value))
        vars(copy).update({k: _copied(v, memo, make) for k, v in vars(value).items()})
    else:
        return value
    memo[id(value)] = copy
    return copy


def _empty(kind: Any) -> Any:
    return kind.__new__(kind)


def _is_plain_object(value: Any) -> bool:
    """Return True for an object that is its attributes, of a class that is no library's."""
    kind: Any = type(value)
    own = not is_library_module(kind.__module__) or kind is SimpleNamespace
    return (
        own
        and not isinstance(value, (nn.Module, Enum))
        and (kind.__new__ is object.__new__ or kind is SimpleNamespace)
        and kind.__reduce_ex__ is object.__reduce_ex__
        and not any("__slots__" in vars(base) for base in kind.__mro__[:-1])
        and hasattr(value, "__dict__")
    )


@contextmanager
def preserved_generators(device: torch.device) -> Iterator[None]:
    """Restore the random generators of torch, Python and numpy when the block ends.

    Of torch these are the CPU's and, if `device` is a GPU, that GPU's.
    """
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)


@contextmanager
def default_state(device: torch.device, *, grad: bool = False) -> Iterator[None]:
    """Run the block without the user's device, modes, autocast and seeds.

    New tensors are on the CPU, gradients are off unless `grad` is True, and the random generators
    are restored when the block ends.
    """
    with (
        torch.device("cpu"),
        preserved_generators(device),
        torch.inference_mode(False),
        torch.set_grad_enabled(grad),
        torch.autocast(device.type, enabled=False),
    ):
        yield


def seed_generators(device: torch.device) -> None:
    """Seed the generators of Python and torch that `preserved_generators` restores.

    `torch.manual_seed` is no substitute: it seeds every GPU.
    """
    random.seed(SEED)
    torch.default_generator.manual_seed(SEED)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(SEED)
