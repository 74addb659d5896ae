"""A stand-in for a module, to run without leaving a trace in the module or anywhere else."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["seed", "shadow", "untraced"]

SEED = 0x57A4
HELD = ("_parameters", "_buffers", "_modules")


def shadow(module: nn.Module, memo: dict[int, Any] | None = None, *, share: bool = False) -> Any:
    """A copy of a module without its hooks: what it runs and changes is its own.

    Parameters and buffers on the meta device become random ones on the CPU. With `share` the
    parameters are the module's own, for what may be too large to have twice.

    Example:
        >>> linear = nn.Linear(2, 2)
        >>> other = shadow(linear)
        >>> other.weight is linear.weight, torch.equal(other.weight, linear.weight)
        (False, True)
    """
    memo = {} if memo is None else memo
    if id(module) in memo:
        return memo[id(module)]
    copy = object.__new__(type(module))
    memo[id(module)] = copy
    state = copy.__dict__
    rest = {k: v for k, v in vars(module).items() if k not in HELD}
    for name, value in rest.items():
        hooks = name.endswith("_hooks") or name.startswith(("_forward_hooks", "_forward_pre_hooks"))
        state[name] = type(value)() if hooks and isinstance(value, dict) else _copied(value, memo)
    for held in HELD[:2]:
        own = held == "_parameters" and share
        tensors = getattr(module, held).items()
        state[held] = {k: t if own else _copied(t, memo) for k, t in tensors}
    state["_modules"] = {
        k: None if child is None else shadow(child, memo, share=share)
        for k, child in module._modules.items()
    }
    return copy


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """A tensor, a generator or a plain container as a copy; anything else as it is."""
    if id(value) in memo:
        return memo[id(value)]
    copy: Any
    if isinstance(value, Tensor):
        copy = _random(value) if value.is_meta else value.detach().clone()
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


def _random(tensor: Tensor) -> Tensor:
    fan_in = tensor.shape[-1] if tensor.ndim > 1 else 1
    return torch.randn(tensor.shape, device="cpu").div_(fan_in**0.5).to(tensor.dtype)


@contextmanager
def untraced(device: torch.device) -> Iterator[None]:
    """Give back every generator of random numbers as it was: torch's, Python's and numpy's."""
    numpy = sys.modules.get("numpy")
    python = random.getstate()
    arrays = numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(arrays)


def seed(device: torch.device) -> None:
    """Seed the generators that `untraced` gives back; `torch.manual_seed` seeds every GPU too."""
    random.seed(SEED)
    torch.default_generator.manual_seed(SEED)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(SEED)
