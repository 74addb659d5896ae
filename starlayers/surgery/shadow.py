"""A stand-in for a module: the same weights in objects that nobody else holds."""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["shadow"]


def shadow(module: nn.Module, memo: dict[int, Any] | None = None) -> Any:
    """The same parameters in new module objects, without hooks and with copied buffers.

    Parameters and buffers on the meta device become random ones on the CPU.

    Example:
        >>> linear = nn.Linear(2, 2)
        >>> other = shadow(linear)
        >>> other is linear, other.weight is linear.weight
        (False, True)
    """
    memo = {} if memo is None else memo
    if id(module) in memo:
        return memo[id(module)]
    copy = object.__new__(type(module))
    memo[id(module)] = copy
    state = copy.__dict__
    state.update(vars(module))
    for name, value in vars(module).items():
        if name.endswith("_hooks") or name.startswith(("_forward_hooks", "_forward_pre_hooks")):
            state[name] = type(value)() if isinstance(value, dict) else value
    state["_buffers"] = {k: _real(b, memo, clone=True) for k, b in module._buffers.items()}
    state["_parameters"] = {k: _real(p, memo) for k, p in module._parameters.items()}
    state["_modules"] = {
        k: None if child is None else shadow(child, memo) for k, child in module._modules.items()
    }
    return copy


def _real(tensor: Tensor | None, memo: dict[int, Any], *, clone: bool = False) -> Any:
    if tensor is None or tensor.device.type != "meta":
        return tensor.clone() if clone and tensor is not None else tensor
    if id(tensor) not in memo:
        fan_in = tensor.shape[-1] if tensor.ndim > 1 else 1
        real = torch.randn(tensor.shape, device="cpu").div_(fan_in**0.5).to(tensor.dtype)
        memo[id(tensor)] = nn.Parameter(real) if isinstance(tensor, nn.Parameter) else real
    return memo[id(tensor)]
