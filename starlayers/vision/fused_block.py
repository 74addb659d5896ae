"""Fused GPU path of `StarBlock2d`: three ops for a block in each direction.

BatchNorm never runs as an op of its own. The op in front of it also returns mean and variance of
its output. With these the norm is an affine map per channel, which is folded into the weights of
the star MLP's branches (they are pointwise, so this is exact), or applied by the second depthwise
convolution while it reads its input, because the zero padding must come after the norm. Gradients
reach the norm's parameters by autograd through these small tensors.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from starlayers.dispatch import (
    FORWARDS,
    Plan,
    declined,
    exporting,
    is_plain,
    plan_block,
    plan_early,
)
from starlayers.kernels.dwconv import dwconv
from starlayers.kernels.registration import compute_dtype, no_autocast
from starlayers.kernels.star_mlp import star_mlp
from starlayers.modules import DropPath, StarMLP
from starlayers.vision.layout import OnChannelsLast

if TYPE_CHECKING:
    from starlayers.vision.blocks import StarBlock2d

FORWARDS |= {DropPath: DropPath.forward, OnChannelsLast: OnChannelsLast.forward}


def plan(block: "StarBlock2d", x: Tensor) -> Plan:
    """Return the plan for `block` on `x` (N, H, W, C).

    Raises:
        RuntimeError: the backend is "triton" and cannot serve the block.
    """
    plan = plan_early(x)
    if plan is not None:
        return plan
    reason = _structure_reason(block)
    weights = reason or block.mlp.fusable()
    if isinstance(weights, str):
        return declined(weights, "this StarBlock2d")
    return plan_block(x, weights, block.parameters(), block.mlp.act)


def _structure_reason(block: "StarBlock2d") -> str:
    """Return what was replaced in or attached to `block`; empty if it is as made."""
    if not is_plain(block.mlp, StarMLP):
        return f"the MLP is hooked, wrapped or not a StarMLP but a {type(block.mlp).__name__}"
    for name, layers, order in (
        ("pre", block.pre, ["conv", "bn"]),
        ("post", block.post, ["bn", "conv"]),
    ):
        if not is_plain(layers, OnChannelsLast) or list(layers._modules) != order:
            return f"{name!r} is hooked, wrapped or not just {' and '.join(order)}"
        if not (is_plain(layers.conv, nn.Conv2d) and _is_depthwise(layers.conv)):
            return "a convolution is hooked, changed or not depthwise with odd kernel and stride 1"
        norm = layers.bn
        if not (is_plain(norm, nn.Identity) or is_plain(norm, nn.BatchNorm2d)):
            return f"a norm is hooked or a {type(norm).__name__} (needs BatchNorm2d or Identity)"
    return ""


def _is_depthwise(conv: nn.Conv2d) -> bool:
    """Return True if `conv` is depthwise with odd kernel, stride 1, same padding."""
    size, width = conv.kernel_size[0], conv.in_channels
    # while torch.export traces, parameters are fake tensors
    plain_weight = type(conv.weight) is nn.Parameter or exporting()
    return (
        plain_weight
        and size % 2 == 1
        and conv.kernel_size == (size, size)
        and conv.stride == (1, 1)
        and conv.dilation == (1, 1)
        and conv.padding == (size // 2, size // 2)
        and conv.groups == conv.out_channels == width
        and conv.padding_mode == "zeros"
    )


def fused_block(block: "StarBlock2d", x: Tensor) -> Tensor:
    """Compute `block` on `x` (N, H, W, C) with the fused kernels.

    Call it only if `plan(block, x)` is fused.
    """
    dtype = compute_dtype(x)
    mlp, first, last = block.mlp, block.pre.conv, block.post.conv
    w3 = mlp.g.weight.to(dtype)
    b3 = None if mlp.g.bias is None else mlp.g.bias.to(dtype)
    count = x[..., 0].numel()
    with no_autocast(x):
        v = x.to(dtype)
        return_statistics = [_uses_batch_statistics(m.bn) for m in (block.pre, block.post)]
        y, mean, var = dwconv(v, first.weight, first.bias, None, None, None, return_statistics[0])
        branches = _folded_branches(mlp, _norm_as_affine(block.pre.bn, mean, var, count), dtype)
        pixels = y.view(-1, mlp.in_features)
        pixels, mean, var = star_mlp(
            pixels, *branches, w3, b3, None, mlp.act, mlp.offset, return_statistics[1]
        )
        y, affine = pixels.view(x.shape), _norm_as_affine(block.post.bn, mean, var, count)
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


def _uses_batch_statistics(norm: nn.Module) -> bool:
    return isinstance(norm, nn.BatchNorm2d) and (norm.training or norm.running_mean is None)


@dataclass(frozen=True)
class _Affine:
    """Affine map per channel of a BatchNorm: `scale * (x - center) + bias`, float32."""

    scale: Tensor
    center: Tensor
    bias: Tensor

    @property
    def shift(self) -> Tensor:
        """Constant term of the map: `scale * x + shift`."""
        return self.bias - self.scale * self.center


def _norm_as_affine(
    norm: nn.Module, mean: Tensor | None, var: Tensor | None, count: int
) -> _Affine | None:
    """Return `norm` as an affine map, or `None` for an Identity.

    `mean` and `var` are the batch's, over `count` values per channel. A norm in training uses them
    and updates its running statistics; one in eval uses its running statistics.
    """
    if not isinstance(norm, nn.BatchNorm2d):
        return None
    if _uses_batch_statistics(norm):
        if count == 1:
            raise ValueError("BatchNorm in training needs more than 1 value per channel, got 1")
        _update_statistics(norm, cast(Tensor, mean), cast(Tensor, var), count)
    else:
        mean, var = norm.running_mean, norm.running_var
    center = cast(Tensor, mean).float()
    scale = torch.rsqrt(cast(Tensor, var).float() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    bias = torch.zeros_like(center) if norm.bias is None else norm.bias.float()
    return _Affine(scale, center, bias)


@torch.no_grad()
def _update_statistics(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """Update the running statistics as `nn.BatchNorm2d` does in training."""
    if not (norm.training and norm.track_running_stats):
        return
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    if norm.running_mean is None or norm.running_var is None:
        return
    momentum: float | Tensor = norm.momentum or 0.0
    if norm.momentum is None and norm.num_batches_tracked is not None:
        momentum = 1.0 / norm.num_batches_tracked.float()
    unbiased = var * (count / (count - 1))
    for running, now in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        running.add_((now.to(running.dtype) - running) * momentum)


def _folded_branches(
    mlp: StarMLP, affine: _Affine | None, dtype: torch.dtype
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
