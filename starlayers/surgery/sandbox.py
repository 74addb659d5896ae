"""Sandbox for trial runs: copies of modules, preserved generators."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

#: seed of every trial run; any fixed number would do
SEED = 0x57A4

#: attributes of `nn.Module` that `sandbox_copy` copies entry by entry
CONTAINERS = ("_parameters", "_buffers", "_modules")
HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def sandbox_copy(
    module: nn.Module, memo: dict[int, Any] | None = None, *, share: bool = False
) -> Any:
    """Return a copy of a module to run without an effect on the module.

    Parameters, buffers, generators, lists, sets, dicts and child modules are copied, hooks are
    left out, other attributes are shared. Tensors on the meta device become random ones on the
    CPU. `memo` has the copies of objects that occur more than once, by the id of their original.
    With `share` the copy has the module's own parameters, to save memory.
    """
    memo = {} if memo is None else memo
    if id(module) in memo:
        return memo[id(module)]
    copy = object.__new__(type(module))
    memo[id(module)] = copy
    state = copy.__dict__
    for name, value in vars(module).items():
        if name not in CONTAINERS:
            hooks = name.endswith("_hooks") or name.startswith(HOOKS)
            empty = hooks and isinstance(value, dict)
            state[name] = type(value)() if empty else _copied(value, memo)
    parameters, buffers = module._parameters, module._buffers
    state["_parameters"] = {k: p if share else _copied(p, memo) for k, p in parameters.items()}
    state["_buffers"] = {k: _copied(b, memo) for k, b in buffers.items()}
    state["_modules"] = {
        k: None if child is None else sandbox_copy(child, memo, share=share)
        for k, child in module._modules.items()
    }
    return copy


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """Return a copy of a tensor, generator or container, others as they are."""
    if id(value) in memo:
        return memo[id(value)]
    copy: Any
    if isinstance(value, Tensor):
        copy = _random_like(value) if value.is_meta else value.detach().clone()
        copy = nn.Parameter(copy, value.requires_grad) if isinstance(value, nn.Parameter) else copy
    elif isinstance(value, torch.Generator):
        copy = value.clone_state()
    elif type(value) in (list, set):
        copy = type(value)(_copied(v, memo) for v in value)
    elif type(value) is dict:
        copy = {k: _copied(v, memo) for k, v in value.items()}
    else:
        return value
    memo[id(value)] = copy
    return copy


def _random_like(tensor: Tensor) -> Tensor:
    """Return random weights of usual size for a meta tensor."""
    fan_in = tensor.shape[-1] if tensor.ndim > 1 else 1
    return torch.randn(tensor.shape, device="cpu").div_(fan_in**0.5).to(tensor.dtype)


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


def seed_generators(device: torch.device) -> None:
    """Seed the generators of Python and torch that `preserved_generators` restores.

    `torch.manual_seed` is no substitute: it seeds every GPU.
    """
    random.seed(SEED)
    torch.default_generator.manual_seed(SEED)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(SEED)
