"""Fused GPU path of `ConvNorm` without gradients: convolution, norm and activation in one launch.

With gradients, under a compiler, a transform or a mode, while others capture a CUDA graph and on
CPUs the definition computes it, by cuDNN on NVIDIA's GPUs.
"""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from starlayers.activations import get_activation
from starlayers.dispatch import (
    Plan,
    is_plain,
    plan_convolution,
    rules_convolution_out,
    rules_kernels_out,
)
from starlayers.kernels.conv import Convolution, convolve
from starlayers.kernels.versions import versions
from starlayers.plans import has_triton_form
from starlayers.tracing import is_traced
from starlayers.vision.layout import Activation
from starlayers.vision.norms import norm_as_affine, unusual
from starlayers.vision.recordings import kind_of, known, record, settled

if TYPE_CHECKING:
    from starlayers.vision.blocks import ConvNorm

#: what a convolution calls in its forward
CONV_FORWARD = nn.Conv2d._conv_forward

EACH_STEP = "gradients, a cast, a compiler, a transform, a mode or a capture wants each step"
AMD = "launches on AMD's GPUs are not recorded"


def plan(layer: "ConvNorm", x: Tensor) -> Plan:
    """Return the plan for `layer` on `x` (N, C, H, W).

    Unlike other plans it raises under no backend: a convolution is no star, and cuDNN serves it
    where its kernel does not.
    """
    conv, act = _convolution(layer, x), fused_activation(layer)
    if isinstance(conv, str):
        return plan_convolution(x, None, (), act, conv)
    reason = "" if x.numel() else "the batch is empty"
    if not reason and kind_of(x, _tensors(layer)) is None:
        reason = AMD if torch.version.hip else EACH_STEP
    reason = reason or unusual(layer.bn)
    if not reason and _state(layer, conv) is None:
        reason = "the norm uses statistics of the batch, or a tensor is no parameter or buffer"
    tensors = [t for t in _tensors(layer) if t is not None and t.ndim]  # without a norm's counter
    if any(t.ndim != 4 and t.shape != (conv.out_channels,) for t in tensors):
        reason = "the norm or the bias has another number of channels"
    return plan_convolution(x, conv, tensors, act, reason)


def activation(layer: "ConvNorm") -> str | None:
    """Return the name of the activation that ends `layer`; `None` for none."""
    act = layer._modules.get("act")
    return act.name if isinstance(act, Activation) else None


def fused_activation(layer: "ConvNorm") -> str | None:
    """Return the activation that a launch of `layer` applies: `None` for one without Triton form.

    That one is called on the result of the launch.
    """
    act = activation(layer)
    return act if has_triton_form(act) else None


def is_plain_convolution(m: nn.Module) -> bool:
    """Return True if `m` is exactly an `nn.Conv2d`, with nothing attached or replaced."""
    own = "_conv_forward" not in m.__dict__ and nn.Conv2d._conv_forward is CONV_FORWARD
    return own and is_plain(m, nn.Conv2d)


def _convolution(layer: "ConvNorm", x: Tensor) -> Convolution | str:
    """Return the sizes of a layer that is as it was made, or what was changed in it."""
    modules: Any = layer._modules  # attributes of modules are slow
    if list(modules) not in (["conv", "bn"], ["conv", "bn", "act"]):
        return "its layers are not just conv, bn and act"
    if "act" in modules and not is_plain(modules["act"], Activation):
        return f"the activation is hooked or another module, {type(modules['act']).__name__}"
    conv, norm = modules["conv"], modules["bn"]
    weight = conv._parameters.get("weight") if is_plain_convolution(conv) else None
    if type(weight) is not nn.Parameter or weight.ndim != 4:
        return "the convolution is hooked, wrapped or not a Conv2d with a parameter"
    out, channels, size, _ = weight.shape
    step, pad = conv.stride[0] if type(conv.stride) is tuple else 0, size // 2
    same = size % 2 == 1 and weight.shape[3] == size and conv.padding == (pad, pad)
    plain = conv.dilation == (1, 1) and conv.groups == 1 and conv.padding_mode == "zeros"
    if not (same and plain and conv.stride == (step, step)):
        return "the convolution has groups, dilation, unequal sides, or padding not as made"
    if not (is_plain(norm, nn.BatchNorm2d) or is_plain(norm, nn.Identity)):
        return f"the norm is hooked or a {type(norm).__name__} (needs BatchNorm2d or Identity)"
    if x.ndim != 4 or x.shape[1] != channels:
        return f"the input is not (N, {channels}, H, W)"
    return Convolution(channels, out, size, step)


def compute(layer: "ConvNorm", x: Tensor) -> Tensor | None:
    """Compute `layer` on `x` (N, C, H, W) in one launch, channels_last.

    Returns `None` where the definition is to do so.
    """
    if rules_kernels_out(x) or torch.compiler.is_compiling() or is_traced(x):
        return None
    conv = _convolution(layer, x)
    if isinstance(conv, str) or rules_convolution_out(x, conv):
        return None
    key = kind_of(x, _tensors(layer))
    state = None if key is None else _state(layer, conv)
    if state is None:
        return None
    key = (*key, x.stride())
    program = known(layer, key, state)
    if program is not None:
        y = program(x)
    elif plan(layer, x).fused:
        y = record(layer, key, state, x, _tensors(layer), partial(_launched, layer, x))
    else:
        return None
    act, y = activation(layer), y.permute(0, 3, 1, 2)
    return y if act is None or fused_activation(layer) else get_activation(act).fn(y)


def _tensors(layer: "ConvNorm") -> Iterator[Tensor | None]:
    """Yield parameters and buffers of `layer`."""
    for m in layer._modules.values():
        yield from m._parameters.values()  # type: ignore[union-attr]
        yield from m._buffers.values()  # type: ignore[union-attr]


def _state(layer: "ConvNorm", conv: Convolution) -> tuple[Any, ...] | None:
    """Return versions and settings of `layer`; `None` if launches cannot stand for it."""
    modules: Any = layer._modules
    seen = versions(_tensors(layer)) if settled((modules["conv"], modules["bn"])) else None
    eps = getattr(modules["bn"], "eps", 0)
    return None if seen is None else (*seen, conv, eps, get_activation(activation(layer)))


def _launched(layer: "ConvNorm", x: Tensor) -> Tensor:
    """Return the result as (N, height, width, out), by a launch."""
    conv = layer.conv
    affine, w = norm_as_affine(layer.bn, None, None, 0), conv.weight
    shift = w.new_zeros(len(w), dtype=torch.float32) if conv.bias is None else conv.bias.float()
    scale = torch.ones_like(shift)
    if affine is not None:
        scale, shift = affine.scale, affine.bias + affine.scale * (shift - affine.center)
    name = get_activation(fused_activation(layer)).name
    return convolve(x, w, scale, shift, stride=conv.stride[0], act=name)
