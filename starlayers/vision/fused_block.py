"""The star block of StarNet on the fused kernels: three ops for a whole block, in both directions.

BatchNorm never runs by itself. The op before it yields mean and variance of what it writes; the
norm is then an affine map per channel, folded into the weights of the star MLP's branches (they are
pointwise, so this is exact) or applied by the second convolution on its way in, where the zeros
around the image must come after it. Gradients follow by autograd through these small tensors.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from starlayers.backend import (
    backend_name,
    checked_reason,
    compute_dtype,
    definition_blocker,
    is_plain,
    kernel_blocker,
)
from starlayers.modules import DropPath, StarMLP

if TYPE_CHECKING:
    from starlayers.vision.blocks import StarBlock2d

__all__ = ["fused_block", "fused_block_blocker"]

# Up to 14 x 14 pixels a row tile of the star MLP finds most of its neighbours in cache, and one
# kernel for convolution and MLP saves a launch and a trip through memory. Not measured yet.
MAX_PIXELS_ONE_KERNEL = 196


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
    mlp = block.mlp
    for side in (block.pre, block.post):
        conv, norm = side.conv, side.bn
        if not (is_plain(side, type(side)) and is_plain(conv, nn.Conv2d) and _depthwise(conv)):
            return "a convolution is hooked, changed or not depthwise with odd kernel and stride 1"
        if not (is_plain(norm, nn.Identity) or is_plain(norm, nn.BatchNorm2d)):
            return f"a norm is hooked or a {type(norm).__name__} (needs BatchNorm2d or Identity)"
    reason = definition_blocker(mlp) or kernel_blocker((x, *block.parameters()), mlp.act)
    if reason is not None:
        return reason
    from starlayers.kernels.layer import too_wide

    training = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *block.parameters()))
    return too_wide(x.device, compute_dtype(x), mlp, training=training)


def _depthwise(conv: nn.Conv2d) -> bool:
    size = conv.kernel_size[0]
    wanted = ((size, size), (1, 1), (1, 1), (size // 2, size // 2), conv.in_channels, "zeros")
    return (
        size % 2 == 1
        and type(conv.weight) is nn.Parameter
        and wanted
        == (
            conv.kernel_size,
            conv.stride,
            conv.dilation,
            conv.padding,
            conv.groups,
            conv.padding_mode,
        )
    )


def fused_block(block: "StarBlock2d", x: Tensor) -> Tensor:
    """`block` on x (N, height, width, C), where `fused_block_blocker` found no obstacle."""
    from starlayers.kernels._op import cast, no_autocast
    from starlayers.kernels.dw_star_mlp import dw_star_mlp
    from starlayers.kernels.dwconv import dwconv
    from starlayers.kernels.star_mlp import star_mlp

    dtype = compute_dtype(x)
    mlp, first, last = block.mlp, block.pre.conv, block.post.conv
    rest = (cast(mlp.g.weight, dtype), cast(mlp.g.bias, dtype), None, mlp.act, mlp.offset)
    with no_autocast(x):
        v = cast(x, dtype)
        mean: Tensor | None
        var: Tensor | None
        if _one_kernel(block, x):
            k, kb = _folded_convolution(first, block.pre.bn)
            w3, b3, _, *options = rest
            y = dw_star_mlp(v, k, kb, *_branches(mlp, None, None, dtype), w3, b3, *options)
            mean = var = None
        else:
            y, mean, var = dwconv(
                v, first.weight, first.bias, None, None, None, _batch_statistics(block.pre.bn)
            )
            affine = _affine(block.pre.bn, mean, var, x[..., 0].numel())
            rows, mean, var = star_mlp(
                y.view(-1, mlp.in_features), *_branches(mlp, *affine, dtype), *rest,
                _batch_statistics(block.post.bn),
            )  # fmt: skip
            y = rows.view(x.shape)
        scale, shift = _affine(block.post.bn, mean, var, x[..., 0].numel())
        k, kb = last.weight, last.bias  # type: ignore[assignment]
        if block.gamma is not None:
            k = k * block.gamma[:, None, None, None]
            kb = None if kb is None else kb * block.gamma
        direct = x.dtype == dtype and not _drops(block.drop_path)
        y = dwconv(y, k, kb, scale, shift, v if direct else None, False)[0]
    out: Tensor = y if direct else x + block.drop_path(y)
    return out


def _drops(drop_path: nn.Module) -> bool:
    """Whether anything happens between the block and the sum with its input."""
    idle = is_plain(drop_path, DropPath) and not drop_path.training
    return not (idle or is_plain(drop_path, nn.Identity))


def _one_kernel(block: "StarBlock2d", x: Tensor) -> bool:
    """Whether convolution and MLP run as one kernel: inference on a small feature map."""
    grads = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *block.parameters()))
    norms = (block.pre.bn, block.post.bn)
    small = x.shape[1] * x.shape[2] <= MAX_PIXELS_ONE_KERNEL
    return small and not grads and not any(_batch_statistics(norm) for norm in norms)


def _batch_statistics(norm: nn.Module) -> bool:
    return isinstance(norm, nn.BatchNorm2d) and (norm.training or norm.running_mean is None)


def _affine(
    norm: nn.Module, mean: Tensor | None, var: Tensor | None, count: int
) -> tuple[Tensor | None, Tensor | None]:
    """Scale and shift that `norm` amounts to, in float32; updates its running statistics."""
    if not isinstance(norm, nn.BatchNorm2d):
        return None, None
    if _batch_statistics(norm):
        assert mean is not None and var is not None  # noqa: PT018
        _update(norm, mean, var, count)
    else:
        mean, var = norm.running_mean, norm.running_var
        assert mean is not None and var is not None  # noqa: PT018
    scale = torch.rsqrt(var.float() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -mean.float() * scale
    return scale, shift if norm.bias is None else shift + norm.bias


@torch.no_grad()
def _update(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """What `nn.BatchNorm2d` does to its buffers in training."""
    if not norm.training or norm.running_mean is None or norm.running_var is None:
        return
    if count < 2:
        raise ValueError(f"BatchNorm in training needs more than 1 value per channel, got {count}")
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    cumulative = 1.0 / norm.num_batches_tracked.float()
    momentum = cumulative if norm.momentum is None else norm.momentum
    unbiased = var * (count / (count - 1))
    for running, now in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        running.add_((now.to(running.dtype) - running) * momentum)


def _branches(
    mlp: StarMLP, scale: Tensor | None, shift: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, ...]:
    """w1, b1, w2, b2 with an affine map of the input folded in."""
    from starlayers.kernels._op import cast

    folded: list[Tensor | None] = []
    for f in (mlp.f1, mlp.f2):
        w, b = f.weight, f.bias
        if scale is None or shift is None:
            folded += [cast(w, dtype), cast(b, dtype)]
            continue
        moved = w.float() @ shift
        folded += [cast(w.float() * scale, dtype), moved if b is None else moved + b]
    return tuple(folded)


def _folded_convolution(conv: nn.Conv2d, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Kernel and bias of a convolution with the norm behind it folded in, in float32."""
    k = conv.weight.float()
    b = k.new_zeros(k.shape[0]) if conv.bias is None else conv.bias.float()
    scale, shift = _affine(norm, None, None, 0)
    if scale is None or shift is None:
        return k, b
    return k * scale[:, None, None, None], b * scale + shift
