"""Sizes and weights of linear layers, and which of them can have a gate."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm


class Projection(NamedTuple):
    """Sizes of a linear map over the last dimension, or 1 if `channels_first`."""

    in_features: int
    out_features: int
    channels_first: bool = False


def projection(module: nn.Module | None) -> Projection | None:
    """Return the sizes of a linear layer, or `None` for any other module.

    Linear layers are those with "Linear" in the name of their class or of a base class,
    `Conv1D` of transformers, and convolutions with a kernel of 1x1, stride 1, one group and no
    padding. A layer that PEFT has wrapped counts as the layer inside the wrapper.
    """
    base = base_layer(module)
    if isinstance(base, nn.Conv2d):
        pointwise = base.kernel_size == (1, 1) == base.stride and base.groups == 1
        unpadded = base.padding in (0, (0, 0), "valid", "same")
        sizes = Projection(base.in_channels, base.out_channels, True)
        return sizes if pointwise and unpadded else None
    is_conv1d = type(base).__name__ == "Conv1D"
    is_linear = is_conv1d or any("Linear" in kind.__name__ for kind in type(base).__mro__)
    size_names = ("nx", "nf") if is_conv1d else ("in_features", "out_features")
    n, f = (getattr(base, name, None) for name in size_names)
    return Projection(n, f) if is_linear and isinstance(n, int) and isinstance(f, int) else None


def base_layer(module: nn.Module | None) -> nn.Module | None:
    """Return the layer inside PEFT's wrappers, or the module itself."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def weight_of(module: nn.Module) -> Any:
    """Return the weight of a linear layer, or `None` if it has none.

    For a parametrised weight (`weight_norm`, `spectral_norm`) this is the tensor that it is
    computed from, so that reading it runs no parametrisation and updates no buffer.
    """
    base: Any = base_layer(module)
    if is_parametrized(base, "weight"):
        tensors = base.parametrizations.weight  # of several, as weight_norm has, the first
        return tensors.original if hasattr(tensors, "original") else tensors.original1
    return getattr(base, "weight", None)


def dtype_and_device(module: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Return dtype and device of the weight of a linear layer, the defaults for one without."""
    weight = weight_of(module)
    if not isinstance(weight, Tensor):
        return torch.get_default_dtype(), torch.device("cpu")
    return weight.dtype, weight.device


def gate_blocker(module: nn.Module) -> str | None:
    """Return the reason why a linear layer can have no gate, or `None` if it can.

    A gate takes the weight's dtype and device, so the weight must be an ordinary tensor of a
    floating-point dtype of at least 16 bits: quantised and lazy layers are refused.
    """
    weight, kind = weight_of(module), type(base_layer(module)).__name__
    if not isinstance(weight, Tensor):
        return f"{kind} has no weight tensor: quantised? starify before quantising"
    if hasattr(weight, "device_mesh"):
        return (
            f"the weight of {kind} is divided by FSDP2 or tensor parallelism: starify before that; "
            "starlayers.from_pretrained divides what was saved"
        )
    if type(weight) not in (Tensor, nn.Parameter):
        return (
            f"{kind} has a weight of type {type(weight).__name__}: starify before quantising, "
            "after initialising"
        )
    if not weight.is_floating_point() or weight.element_size() < 2:
        return f"{kind} holds {weight.dtype} weights: starify before quantising"
    return None


def recompute_blocker(module: nn.Module) -> str | None:
    """Return why a module must not run twice in one training step, or `None` if it may.

    Spectral norms and running statistics change a buffer in every forward in train mode.
    """
    for name, part in module.named_modules():
        where = f"{name!r}" if name else "it"
        spectral = any(isinstance(h, SpectralNorm) for h in part._forward_pre_hooks.values())
        parametrised = part._modules.get("parametrizations") or nn.Module()
        if spectral or next(parametrised.buffers(), None) is not None:
            return f"{where} has a parametrisation with state, which recompute would change twice"
        if isinstance(part, _NormBase) and part.running_mean is not None:
            return f"{where} has running statistics, which recompute would change twice"
    return None
