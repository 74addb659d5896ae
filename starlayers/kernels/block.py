"""StarBlock2d in training as one step of autograd: a few launches in each direction.

Forward: the convolutions and the star MLP, with one launch after each of the first two that merges
the statistics of what was written, updates the running ones and folds the norm into what comes
next. Backward: the same kernels' gradients, with one launch after each that sums them over programs
and takes the fold apart. Nothing else is launched up to 64 channels; wider star MLPs take matrix
products of the library in their backward.
"""

from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import increment_version

from starlayers.kernels.dwconv import Affine, convolve, input_gradient, kernel_sums
from starlayers.kernels.fold import (
    BranchGradients,
    Folded,
    Norm,
    Scaled,
    affine_norm,
    finish_depthwise,
    finish_norm,
    fold_branches,
    prepare_weights,
    unfold_branches,
)
from starlayers.kernels.registration import MLPWeights, library_gradients, no_autocast
from starlayers.kernels.star_mlp_launch import ProgramSums, backward, forward
from starlayers.kernels.statistics import Upstream
from starlayers.reference import star_mlp_reference

__all__ = ["BlockWeights", "train_block"]

#: shape of what a norm has two of: weight and bias
NORM_PARAMETERS = 2


class BlockWeights(NamedTuple):
    """Parameters of a StarBlock2d: convolution, norm, star MLP, norm, convolution."""

    k1: Tensor
    kb1: Tensor | None
    norm1: Norm
    mlp: MLPWeights
    norm2: Norm
    k2: Tensor
    kb2: Tensor | None


class _Kept(NamedTuple):
    """Tensors that the backward needs beside the parameters."""

    x: Tensor
    #: after the first convolution, and after the star MLP
    y: Tensor
    z: Tensor
    taps1: Tensor
    taps2: Tensor
    #: weight of the last linear layer in the dtype of `x`
    w3: Tensor
    folded: Folded
    scaled: Scaled


#: tensors of `_Kept` in front of its groups
SINGLES = len(_Kept._fields) - 2


def train_block(x: Tensor, weights: BlockWeights, act: str, offset: float) -> Tensor:
    """Compute a StarBlock2d on `x` (N, H, W, C) with statistics of the batch.

    The running statistics are updated. `x` has the dtype in which the block is computed, and the
    parameters have that or float32.

    Raises:
        ValueError: there is 1 value per channel, of which no variance can be estimated.
    """
    if x[..., 0].numel() == 1:
        raise ValueError("BatchNorm in training needs more than 1 value per channel, got 1")
    norm1, norm2 = weights.norm1, weights.norm2
    parameters = (
        weights.k1, weights.kb1, *norm1[:NORM_PARAMETERS], *weights.mlp, *norm2[:NORM_PARAMETERS],
        weights.k2, weights.kb2,
    )  # fmt: skip
    rest = norm1[NORM_PARAMETERS:], norm2[NORM_PARAMETERS:]
    return _Block.apply(rest, act, offset, x, *parameters)  # type: ignore[no-any-return, no-untyped-call]


def _grouped(rest: Any, parameters: Any) -> BlockWeights:
    """Return parameters and the rest of both norms as `train_block` was given them."""
    k1, kb1, weight1, bias1, *mlp, weight2, bias2, k2, kb2 = parameters
    norm1, norm2 = Norm(weight1, bias1, *rest[0]), Norm(weight2, bias2, *rest[1])
    return BlockWeights(k1, kb1, norm1, MLPWeights(*mlp), norm2, k2, kb2)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rest: Any, act: str, offset: float, x: Tensor, *parameters: Any) -> Any:
        weights = _grouped(rest, parameters)
        out, kept = _forward(x, weights, act, offset)
        ctx.rest, ctx.act, ctx.offset = rest, act, offset
        ctx.save_for_backward(*kept[:SINGLES], *kept.folded, *kept.scaled, *parameters)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        saved = iter(ctx.saved_tensors)  # read once: a checkpoint unpacks each only once
        singles, folded, scaled = (
            list(islice(saved, n)) for n in (SINGLES, len(Folded._fields), len(Scaled._fields))
        )
        x, parameters = singles[0], list(saved)
        needs = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled():

            def definition(x: Tensor, *parameters: Any) -> Tensor:
                return _definition(x, _grouped(ctx.rest, parameters), ctx.act, ctx.offset)

            grads = library_gradients(definition, [x, *parameters], needs, [dy])
        else:
            kept = _Kept(*singles, Folded(*folded), Scaled(*scaled))  # type: ignore[call-arg]
            weights = _grouped(ctx.rest, parameters)
            with no_autocast(dy):
                computed = _backward(dy, kept, weights, ctx.act, ctx.offset)
            pairs = zip(computed, [x, *parameters], needs, strict=True)
            grads = tuple(g if need and t is not None else None for g, t, need in pairs)
        return None, None, None, *grads


def _definition(x: Tensor, weights: BlockWeights, act: str, offset: float) -> Tensor:
    """Compute the block in PyTorch, without an effect on the running statistics."""
    dtype, channels = x.dtype, x.shape[-1]

    def normed(y: Tensor, norm: Norm) -> Tensor:
        y = F.batch_norm(y, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)
        return y.to(dtype)

    def convolved(y: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.to(dtype)
        return F.conv2d(y, k.to(dtype), bias, padding=k.shape[-1] // 2, groups=channels)

    y = normed(convolved(x.permute(0, 3, 1, 2), weights.k1, weights.kb1), weights.norm1)
    w1, b1, w2, b2, w3, b3 = weights.mlp.cast(dtype)
    y = star_mlp_reference(y.permute(0, 2, 3, 1), w1, b1, w2, b2, w3, b3, act, offset=offset)
    y = convolved(normed(y.permute(0, 3, 1, 2), weights.norm2), weights.k2, weights.kb2)
    return x + y.permute(0, 2, 3, 1)


def _forward(x: Tensor, weights: BlockWeights, act: str, offset: float) -> tuple[Tensor, _Kept]:
    k1, kb1, norm1, mlp, norm2, k2, kb2 = weights
    taps1, taps2, w3 = prepare_weights(k1, k2, mlp.w3, x.dtype)
    y, parts = convolve(x, k1, taps=taps1, b=kb1, reduce="statistics")
    folded = fold_branches(parts, mlp, norm1, x.dtype)
    inside = MLPWeights(*folded[:4], w3, mlp.b3)
    pixels, parts = forward(y.view(-1, y.shape[-1]), inside, None, act, offset, True)
    z = pixels.view(x.shape)
    scaled = affine_norm(parts, norm2)
    out, _ = convolve(z, k2, taps=taps2, b=kb2, scale=scaled.scale, shift=scaled.shift, residual=x)
    # the launches have changed the running statistics, and what was folded from them must see it.
    # As in PyTorch the counters alone tell: means and variances may be saved for a backward.
    increment_version([norm1.tracked, norm2.tracked])
    return out, _Kept(x, y, z, taps1, taps2, w3, folded, scaled)


def _backward(
    dy: Tensor, kept: _Kept, weights: BlockWeights, act: str, offset: float
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x and of all parameters, in the order of `train_block`."""
    k1, kb1, norm1, mlp, norm2, k2, kb2 = weights
    x, y, z, taps1, taps2, w3, folded, scaled = kept
    dy, count = dy.contiguous(), x[..., 0].numel()
    affine, upstream = Affine(scaled.scale, scaled.shift), Upstream(dy)
    dz, dots = input_gradient(upstream, z, k2, affine, taps=taps2)
    sums = kernel_sums(upstream, z, k2, affine)
    dk2, dkb2, last = finish_depthwise(sums, k2, kb2, dots, norm2, scaled, count)
    assert last is not None

    rows = (-1, x.shape[-1])
    inside = MLPWeights(*folded[:4], w3, mlp.b3)
    upstream = Upstream(dz.view(rows), z.view(rows), scaled.mean, last.p, last.q)
    computed = backward(upstream, y.view(rows), inside, act, offset)
    dw3, db3 = None, None
    if isinstance(computed, ProgramSums):
        found = _sums_of(computed, mlp)
        parts3: Tensor | None = computed.parts3
        dpixels = computed.dx
    else:
        dpixels, dw1, db1, dw2, db2, dw3, db3 = computed
        found = BranchGradients(dw1, db1, dw2, db2, None, 1, (0, mlp.w1.shape[1], 1))
        dw3, parts3 = dw3.to(mlp.w3.dtype), None
        db3 = None if mlp.b3 is None else db3.to(mlp.b3.dtype)
    branches, parts = unfold_branches(found, mlp, folded, norm1)
    first, bias3 = finish_norm(parts, norm1, folded.rstd, count, mlp.b3, parts3)

    upstream = Upstream(dpixels.view(x.shape), y, folded.mean, first.p, first.q)
    none = Affine(None, None)
    dx, _ = input_gradient(upstream, x, k1, none, taps=taps1, residual=dy)
    dk1, dkb1, _ = finish_depthwise(kernel_sums(upstream, x, k1, none), k1, kb1)
    return (
        dx, dk1, dkb1, first.weight, first.bias, *branches[:4],
        branches.w3 if dw3 is None else dw3, bias3 if dw3 is None else db3,
        last.weight, last.bias, dk2, dkb2,
    )  # fmt: skip


def _sums_of(computed: ProgramSums, mlp: MLPWeights) -> BranchGradients:
    """Return where the gradients of the weights lie among the sums of the programs."""
    channels, parts = mlp.w1.shape[1], computed.parts
    _, hidden, width = parts.shape
    return BranchGradients(
        parts, parts[..., width - 2 :], parts[..., channels:], parts[..., width - 1 :],
        parts[..., 2 * channels :], len(parts), (hidden * width, width, width),
    )  # fmt: skip
