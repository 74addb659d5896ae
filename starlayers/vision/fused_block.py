"""The star block of StarNet on the fused kernels: three ops for a whole block, in both directions.

BatchNorm never runs by itself. The op before it yields mean and variance of what it writes; the
norm is then an affine map per channel, folded into the weights of the star MLP's branches (they are
pointwise, so this is exact) or applied by the second convolution on its way in, where the zeros
around the image must come after it. Gradients follow by autograd through these small tensors.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from starlayers.backend import (
    backend_name,
    checked_reason,
    compute_dtype,
    definition_blocker,
    exporting,
    is_plain,
    kernel_blocker,
    needs_gradients,
)
from starlayers.modules import DropPath, StarMLP

if TYPE_CHECKING:
    from starlayers.vision.blocks import StarBlock2d

__all__ = ["fused_block", "fused_block_blocker"]


def fused_block_blocker(block: "StarBlock2d", x: Tensor) -> str | None:
    """Why `block(x)` must run module by module, or `None` when the fused kernels serve.

    Raises:
        RuntimeError: the backend is "triton" and it cannot serve; the message says why.

    Example:
        >>> from starlayers.vision import StarBlock2d
        >>> fused_block_blocker(StarBlock2d(8), torch.ones(1, 8, 7, 7))
        "no Triton kernel for device 'cpu'"
    """
    if backend_name() == "eager":
        return "the eager backend was asked for"
    if x.device.type == "cpu" and backend_name() == "auto":
        return "no Triton kernel for device 'cpu'"  # first, for those who would notice the rest
    return checked_reason(_blocker(block, x), "this StarBlock2d")


def _blocker(block: "StarBlock2d", x: Tensor) -> str | None:
    from starlayers.vision.blocks import OnChannelsLast

    if not is_plain(block.mlp, StarMLP):
        return f"the MLP is hooked, wrapped or not a StarMLP but a {type(block.mlp).__name__}"
    for name, side in (("pre", block.pre), ("post", block.post)):
        order = ["conv", "bn"] if name == "pre" else ["bn", "conv"]
        if not is_plain(side, OnChannelsLast) or list(side._modules) != order:
            return f"{name!r} is hooked, wrapped or not just {' and '.join(order)}"
        if not (is_plain(side.conv, nn.Conv2d) and _depthwise(side.conv)):
            return "a convolution is hooked, changed or not depthwise with odd kernel and stride 1"
        if not (is_plain(side.bn, nn.Identity) or is_plain(side.bn, nn.BatchNorm2d)):
            return f"a norm is hooked or a {type(side.bn).__name__} (needs BatchNorm2d or Identity)"
    if x.numel() == 0:
        return "the batch is empty"
    reason = definition_blocker(block.mlp)
    reason = reason or kernel_blocker((x, *block.parameters()), block.mlp.act)
    if reason is not None:
        return reason
    from starlayers.kernels.layer import too_few, too_wide

    return too_few(x, block.mlp) or too_wide(
        x.device, compute_dtype(x), block.mlp, training=needs_gradients(x, *block.parameters())
    )


def _depthwise(conv: nn.Conv2d) -> bool:
    size, width = conv.kernel_size[0], conv.in_channels
    # torch.export puts fake tensors in the place of parameters while it traces
    plain = type(conv.weight) is nn.Parameter or exporting()
    wanted = ((size, size), (1, 1), (1, 1), (size // 2, size // 2), width, width, "zeros")
    return (
        size % 2 == 1
        and plain
        and wanted
        == (
            conv.kernel_size,
            conv.stride,
            conv.dilation,
            conv.padding,
            conv.groups,
            conv.out_channels,
            conv.padding_mode,
        )
    )


def fused_block(block: "StarBlock2d", x: Tensor) -> Tensor:
    """`block` on x (N, height, width, C), where `fused_block_blocker` found no obstacle."""
    from starlayers.kernels.dwconv import dwconv
    from starlayers.kernels.registration import no_autocast
    from starlayers.kernels.star_mlp import star_mlp

    dtype = compute_dtype(x)
    mlp, first, last = block.mlp, block.pre.conv, block.post.conv
    w3 = mlp.g.weight.to(dtype)
    b3 = None if mlp.g.bias is None else mlp.g.bias.to(dtype)
    count = x[..., 0].numel()
    with no_autocast(x):
        v = x.to(dtype)
        statistics = [_batch_statistics(side.bn) for side in (block.pre, block.post)]
        y, mean, var = dwconv(v, first.weight, first.bias, None, None, None, statistics[0])
        branches = _branches(mlp, _normed(block.pre.bn, mean, var, count), dtype)
        rows, mean, var = star_mlp(
            y.view(-1, mlp.in_features), *branches, w3, b3, None, mlp.act, mlp.offset, statistics[1]
        )
        y, after = rows.view(x.shape), _normed(block.post.bn, mean, var, count)
        k, kb = last.weight, last.bias
        if block.gamma is not None:
            k = k * block.gamma[:, None, None, None]
            kb = None if kb is None else kb * block.gamma
        direct = x.dtype == dtype and not _drops(block.drop_path)
        scale, shift = (None, None) if after is None else (after.scale, after.shift)
        y = dwconv(y, k, kb, scale, shift, v if direct else None, False)[0]
    out: Tensor = y if direct else x + block.drop_path(y)
    return out


def _drops(drop_path: nn.Module) -> bool:
    """Whether anything happens between the block and the sum with its input."""
    idle = is_plain(drop_path, DropPath) and not drop_path.training
    return not (idle or is_plain(drop_path, nn.Identity))


def _batch_statistics(norm: nn.Module) -> bool:
    return isinstance(norm, nn.BatchNorm2d) and (norm.training or norm.running_mean is None)


@dataclass(frozen=True)
class _Affine:
    """What a norm amounts to, per channel in float32: scale (x - center) + bias."""

    scale: Tensor
    center: Tensor
    bias: Tensor

    @property
    def shift(self) -> Tensor:
        return self.bias - self.scale * self.center


def _normed(norm: nn.Module, mean: Tensor | None, var: Tensor | None, count: int) -> _Affine | None:
    """`norm` with the statistics of `count` values; in training it updates its own as ever."""
    if not isinstance(norm, nn.BatchNorm2d):
        return None
    if _batch_statistics(norm):
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
    """What `nn.BatchNorm2d` does to its buffers in training."""
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


def _branches(
    mlp: StarMLP, affine: _Affine | None, dtype: torch.dtype
) -> tuple[Tensor | None, ...]:
    """w1, b1, w2, b2 with an affine map of the input folded in."""
    found: list[Tensor | None] = []
    for f in (mlp.f1, mlp.f2):
        w, b = f.weight, f.bias
        if affine is None:
            found += [w.to(dtype), None if b is None else b.to(dtype)]
            continue
        folded = (w.float() * affine.scale).to(dtype)
        # the mean goes through the weight as it was rounded, so that the rounding errors cancel
        moved = w.float() @ affine.bias - folded.float() @ affine.center
        found += [folded, moved if b is None else moved + b]
    return tuple(found)
