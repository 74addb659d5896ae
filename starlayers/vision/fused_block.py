"""Fused GPU path of `StarBlock2d`: three kernels forward, and what lies between folded away.

BatchNorm never runs as an op of its own. The op in front of it also returns mean and variance of
its output. With these the norm is an affine map per channel, which is folded into the weights of
the star MLP's branches (they are pointwise, so this is exact), or applied by the second depthwise
convolution while it reads its input, because the zero padding must come after the norm. Gradients
reach the norm's parameters by autograd through these small tensors.

Without gradients the folded weights stay the same from call to call. The three launches are then
recorded once, with these weights, and repeated on later inputs (`compute`).
"""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from starlayers.activations import get_activation
from starlayers.dispatch import (
    FORWARDS,
    Plan,
    declined,
    exporting,
    is_plain,
    launches_directly,
    plan_block,
    plan_early,
    rules_blocks_out,
)
from starlayers.kernels.block import BlockWeights, train_block
from starlayers.kernels.dwconv import dwconv
from starlayers.kernels.fold import Norm
from starlayers.kernels.registration import MLPWeights, compute_dtype, first_misfit, no_autocast
from starlayers.kernels.star_mlp import star_mlp
from starlayers.kernels.versions import versions
from starlayers.modules import DropPath, StarMLP
from starlayers.vision.fused_conv import is_plain_convolution
from starlayers.vision.layout import OnChannelsLast
from starlayers.vision.norms import Affine, norm_as_affine, unusual, uses_batch_statistics
from starlayers.vision.recordings import kind_of, known, record, settled

if TYPE_CHECKING:
    from starlayers.vision.blocks import StarBlock2d

FORWARDS[DropPath] = DropPath.forward


def plan(block: "StarBlock2d", x: Tensor) -> Plan:
    """Return the plan for `block` on `x` (N, H, W, C).

    Raises:
        RuntimeError: the backend is "triton" and cannot serve the block.
    """
    plan = plan_early(x)
    if plan is not None:
        return plan
    weights = _structure_reason(block) or block.mlp.fusable()
    if isinstance(weights, str):
        return declined(weights, "this StarBlock2d")
    reason = unusual(block.pre.bn) or unusual(block.post.bn) or _misfit(block, x, weights)
    if reason:
        return declined(reason, "this StarBlock2d")
    return plan_block(x, weights, block.parameters(), block.mlp.act)


def _structure_reason(block: "StarBlock2d") -> str:
    """Return what was replaced in or attached to `block`; empty if it is as made."""
    modules = block._modules  # attributes of modules are slow
    mlp = modules["mlp"]
    if not is_plain(mlp, StarMLP):
        kind = type(mlp)
        hooked = "the MLP is hooked or has another forward"
        return hooked if kind is StarMLP else f"the MLP is no StarMLP but a {kind.__name__}"
    for name, order in (("pre", ["conv", "bn"]), ("post", ["bn", "conv"])):
        layers: Any = modules[name]
        if not is_plain(layers, OnChannelsLast) or list(layers._modules) != order:
            return f"{name!r} is hooked, wrapped or not just {' and '.join(order)}"
        conv, norm = layers._modules["conv"], layers._modules["bn"]
        if not (is_plain_convolution(conv) and _is_depthwise(conv)):
            return "a convolution is hooked, changed or not depthwise with odd kernel and stride 1"
        if not (is_plain(norm, nn.Identity) or is_plain(norm, nn.BatchNorm2d)):
            return f"a norm is hooked or a {type(norm).__name__} (needs BatchNorm2d or Identity)"
    return ""


def _misfit(block: "StarBlock2d", x: Tensor, weights: MLPWeights) -> str:
    """Say which tensor does not fit `x` (N, H, W, C): the definition broadcasts it, or raises."""
    channels = x.shape[-1]
    named: list[tuple[str, Any, Any]] = [("gamma", block.gamma, (channels,))]
    for part in ("pre", "post"):
        layers: Any = block._modules[part]
        conv, norm = layers.conv, layers.bn
        size = conv.kernel_size[0]
        named.append((f"{part}.conv.weight", conv.weight, (channels, 1, size, size)))
        named.append((f"{part}.conv.bias", conv.bias, (channels,)))
        for name in ("weight", "bias", "running_mean", "running_var"):
            named.append((f"{part}.bn.{name}", getattr(norm, name, None), (channels,)))
    named.append(("mlp.f1.weight", weights.w1, (weights.sizes[1], channels)))
    return first_misfit(named)


def _is_depthwise(conv: nn.Conv2d) -> bool:
    """Return True if `conv` is depthwise with odd kernel, stride 1, same padding."""
    size, width = conv.kernel_size[0], conv.in_channels
    # while torch.export traces, parameters are fake tensors
    return (
        (type(conv._parameters.get("weight")) is nn.Parameter or exporting())
        and size % 2 == 1
        and conv.kernel_size == (size, size)
        and conv.stride == (1, 1)
        and conv.dilation == (1, 1)
        and conv.padding == (size // 2, size // 2)
        and conv.groups == conv.out_channels == width
        and conv.padding_mode == "zeros"
    )


def compute(block: "StarBlock2d", x: Tensor) -> Tensor | None:
    """Compute `block` on `x` (N, H, W, C) fused; `None` where its definition is to do so."""
    if rules_blocks_out(x):
        return None
    # everything that could make recorded launches wrong is asked for anew: what is attached to the
    # block, the versions of its weights and statistics, the mode of the call
    key = kind_of(x, _tensors(block))
    state = None if key is None else _state(block)
    program = None if state is None else known(block, key, state)
    if program is not None:
        return program(x)
    if not plan(block, x).fused:
        return None
    if state is not None:
        return record(block, key, state, x, _tensors(block), partial(fused_block, block, x))
    weights = _trained(block, x)
    if weights is None:
        return fused_block(block, x)
    # its row may be that of another name
    return train_block(x, weights, get_activation(block.mlp.act).name, block.mlp.offset)


def _tensors(block: "StarBlock2d") -> Iterator[Tensor | None]:
    """Yield parameters and buffers of `block`."""
    modules: Any = block._modules
    yield block._parameters.get("gamma")
    for name in ("pre", "post", "mlp"):
        for layer in modules[name]._modules.values():
            if layer is not None:
                yield from layer._parameters.values()
                yield from layer._buffers.values()


def _state(block: "StarBlock2d") -> tuple[Any, ...] | None:
    """Return versions and settings of `block`; `None` if launches cannot stand for it."""
    modules: Any = block._modules
    mlp = modules["mlp"]
    if _structure_reason(block) or isinstance(mlp.fusable(), str):
        return None
    layers = [m for name in ("pre", "post") for m in modules[name]._modules.values()]
    if "gamma" not in block._parameters and block.gamma is not None:
        return None
    if not settled(layers):
        return None
    first, last = (modules[name]._modules["bn"] for name in ("pre", "post"))
    if _drop_path_acts(modules["drop_path"]):
        return None
    seen = versions(_tensors(block))
    if seen is None:
        return None
    settings = getattr(first, "eps", 0), getattr(last, "eps", 0), mlp.act, mlp.offset
    return (*seen, *settings, get_activation(mlp.act))


def _trained(block: "StarBlock2d", x: Tensor) -> BlockWeights | None:
    """Return the parameters of a block that is trained by `train_block`; `None` by the ops."""
    if not launches_directly(x, (), gradients=True) or compute_dtype(x) != x.dtype:
        return None
    if block.gamma is not None or _drop_path_acts(block.drop_path) or x.numel() == 0 or x.is_neg():
        return None
    norms = [layers.bn for layers in (block.pre, block.post)]
    first, last = (Norm.of(m) if isinstance(m, nn.BatchNorm2d) else None for m in norms)
    mlp = block.mlp.fusable()
    if first is None or last is None or isinstance(mlp, str):
        return None
    if not all(w is None or w.is_contiguous() for w in mlp):
        return None
    before, after = block.pre.conv, block.post.conv
    return BlockWeights(before.weight, before.bias, first, mlp, last, after.weight, after.bias)


def fused_block(block: "StarBlock2d", x: Tensor) -> Tensor:
    """Compute `block` on `x` (N, H, W, C) with the fused ops.

    Call it only if `plan(block, x)` is fused.
    """
    dtype = compute_dtype(x)
    mlp, first, last = block.mlp, block.pre.conv, block.post.conv
    act = get_activation(mlp.act).name  # its row may be that of another name
    w3 = mlp.g.weight.to(dtype)
    b3 = None if mlp.g.bias is None else mlp.g.bias.to(dtype)
    count = x[..., 0].numel()
    with no_autocast(x):
        v = x.to(dtype)
        return_statistics = [uses_batch_statistics(m.bn) for m in (block.pre, block.post)]
        y, mean, var = dwconv(v, first.weight, first.bias, None, None, None, return_statistics[0])
        branches = _folded_branches(mlp, norm_as_affine(block.pre.bn, mean, var, count), dtype)
        pixels = y.view(-1, mlp.in_features)
        pixels, mean, var = star_mlp(
            pixels, *branches, w3, b3, None, act, mlp.offset, return_statistics[1]
        )
        y, affine = pixels.view(x.shape), norm_as_affine(block.post.bn, mean, var, count)
        k, kb = last.weight, last.bias
        if block.gamma is not None:
            k = k * block.gamma[:, None, None, None]
            kb = None if kb is None else kb * block.gamma
        # the last kernel adds the residual, unless drop path comes before the sum or autocast
        # computes in a narrower dtype than that of the residual
        adds_residual = x.dtype == dtype and not _drop_path_acts(block.drop_path)
        scale, shift = (None, None) if affine is None else (affine.scale, affine.shift)
        y = dwconv(y, k, kb, scale, shift, v if adds_residual else None, False)[0]
    out: Tensor = y if adds_residual else x + block.drop_path(y)
    return out


def _drop_path_acts(drop_path: nn.Module) -> bool:
    """Return True if `drop_path` changes its input before the residual sum."""
    idle = is_plain(drop_path, DropPath) and not drop_path.training
    return not (idle or is_plain(drop_path, nn.Identity))


def _folded_branches(
    mlp: StarMLP, affine: Affine | None, dtype: torch.dtype
) -> tuple[Tensor | None, ...]:
    """Return w1, b1, w2, b2 of `mlp` with the affine map of its input folded in."""
    folded: list[Tensor | None] = []
    for f in (mlp.f1, mlp.f2):
        w, b = f.weight, f.bias
        if affine is None:
            folded += [w.to(dtype), None if b is None else b.to(dtype)]
            continue
        scaled = (w.float() * affine.scale).to(dtype)
        # multiply the mean by the weight as it was rounded, so that the rounding errors cancel
        constant = w.float() @ affine.bias - scaled.float() @ affine.center
        folded += [scaled, constant if b is None else constant + b]
    return tuple(folded)
