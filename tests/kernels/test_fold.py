"""Folds of BatchNorms in training and their gradients, in Triton's interpreter."""

import copy

import pytest
import torch
from torch import nn

from starlayers.kernels.fold import (
    BranchGradients,
    Norm,
    affine_norm,
    finish_depthwise,
    finish_norm,
    fold_branches,
    prepare_weights,
    unfold_branches,
)
from starlayers.kernels.registration import MLPWeights
from tests.helpers import randn

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("nan_memory")]


def norm_of(channels):
    norm = nn.BatchNorm2d(channels, eps=1e-3, momentum=0.3)
    with torch.no_grad():
        norm.weight.copy_(randn(channels, seed=1).abs() + 0.5)
        norm.bias.copy_(randn(channels, seed=2))
        norm.running_mean.copy_(randn(channels, seed=3))
    return norm


def tiles_of(y, rows):
    """Return the statistics of tiles of so many rows, as kernels store them."""
    parts = [
        torch.stack([torch.full_like(t[0], len(t)), t.mean(0), (t - t.mean(0)).square().sum(0)])
        for t in y.split(rows)
    ]
    return torch.stack(parts)


def close(actual, expected, tolerance=2e-5):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def weights_of(channels, hidden, out, missing=()):
    shapes = {
        "w1": (hidden, channels), "b1": (hidden,), "w2": (hidden, channels), "b2": (hidden,),
        "w3": (out, hidden), "b3": (out,),
    }  # fmt: skip
    tensors = [randn(*shape, seed=i) for i, shape in enumerate(shapes.values())]
    return MLPWeights(*(None if n in missing else t for n, t in zip(shapes, tensors, strict=True)))


def statistics_after(norm, y):
    """Return running statistics after a training step of PyTorch's own norm."""
    norm = copy.deepcopy(norm).train()
    norm(y.t()[None, :, :, None])
    return norm.running_mean, norm.running_var, norm.num_batches_tracked


@pytest.mark.parametrize("channels", [3, 16, 24, 130])
@pytest.mark.parametrize("missing", [(), ("b1",), ("b1", "b2")])
def test_folded_branches_are_the_norm_and_the_branches(channels, missing):
    norm, y = norm_of(channels), 3 + randn(37, channels)
    weights = weights_of(channels, 19, 5, missing)
    expected = statistics_after(norm, y)
    folded = fold_branches(tiles_of(y, 10), weights, Norm.of(norm), torch.float32)
    normed = copy.deepcopy(norm).train()(y.t()[None, :, :, None])[0, :, :, 0].t()
    for v, c, w, b in ((*folded[:2], *weights[:2]), (*folded[2:4], *weights[2:4])):
        close(y @ v.t() + c, normed @ w.t() + (0 if b is None else b), 1e-4)
    close(folded.mean, y.mean(0))
    close(folded.rstd, (y.var(0, correction=0) + norm.eps).rsqrt())
    close(norm.running_mean, expected[0])
    close(norm.running_var, expected[1])
    assert norm.num_batches_tracked == expected[2] == 1


@pytest.mark.parametrize("channels", [3, 8, 24])
def test_an_affine_norm_is_the_norm(channels):
    norm, y = norm_of(channels), randn(23, channels) - 2
    expected = statistics_after(norm, y)
    scaled = affine_norm(tiles_of(y, 8), Norm.of(norm))
    normed = copy.deepcopy(norm).train()(y.t()[None, :, :, None])[0, :, :, 0].t()
    close(scaled.scale * y + scaled.shift, normed)
    close(scaled.mean, y.mean(0))
    close(norm.running_var, expected[1])
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize(("programs", "missing"), [(1, ()), (5, ("b2",)), (70, ("b1", "b3"))])
def test_gradients_of_a_folded_norm_are_autograds(programs, missing):
    channels, hidden, out, count = 12, 7, 5, 31
    norm, y = norm_of(channels), 1 + randn(count, channels)
    weights = weights_of(channels, hidden, out, missing)
    folded = fold_branches(tiles_of(y, 9), weights, Norm.of(copy.deepcopy(norm)), torch.float32)
    width = 2 * channels + out + 2
    sums = randn(programs, hidden, width, seed=7)
    sums3 = randn(programs, out, seed=8)
    found = BranchGradients(
        sums, sums[..., width - 2 :], sums[..., channels:], sums[..., width - 1 :],
        sums[..., 2 * channels :], programs, (hidden * width, width, width),
    )  # fmt: skip
    grads, parts = unfold_branches(found, weights, folded, Norm.of(norm))
    of_norm, db3 = finish_norm(parts, Norm.of(norm), folded.rstd, count, weights.b3, sums3)
    assert (db3 is None) == (weights.b3 is None)

    # autograd through the fold as it is written in PyTorch, in float64
    leaves = [t.detach().double().requires_grad_() for t in (y, norm.weight, norm.bias)]
    w1, b1, w2, b2 = (None if t is None else t.double().requires_grad_() for t in weights[:4])
    yy, weight, bias = leaves
    mean, var = yy.mean(0), yy.var(0, correction=0)
    scale = weight * (var + norm.eps).rsqrt()
    total = sums.double().sum(0)
    d1, d2, d3, db = total.split((channels, channels, out, 2), 1)
    loss = 0
    for w, b, dw, dc in ((w1, b1, d1, db[:, 0]), (w2, b2, d2, db[:, 1])):
        v = w * scale
        c = w @ bias - v @ mean + (0 if b is None else b)
        loss = loss + (v * dw).sum() + (c * dc).sum()
    loss.backward()
    close(grads.w1, w1.grad, 1e-4)
    close(grads.w2, w2.grad, 1e-4)
    close(grads.w3, d3.t(), 1e-4)
    for ours, b in ((grads.b1, b1), (grads.b2, b2)):
        assert (ours is None) == (b is None)
        if b is not None:
            close(ours, b.grad, 1e-4)
    if db3 is not None:
        close(db3, sums3.double().sum(0), 1e-4)
    close(of_norm.weight, weight.grad, 1e-3)
    close(of_norm.bias, bias.grad, 1e-4)
    close(of_norm.q + of_norm.p * (y - folded.mean), yy.grad, 1e-4)


@pytest.mark.parametrize(("channels", "taps", "programs"), [(5, 9, 1), (40, 25, 7)])
def test_gradients_of_a_depthwise_convolution_and_the_norm_in_front_of_it(channels, taps, programs):
    count, norm = 29, norm_of(channels)
    z = randn(count, channels) - 1
    scaled = affine_norm(tiles_of(z, 10), Norm.of(copy.deepcopy(norm)))
    size = int(taps**0.5)
    k, b = randn(channels, 1, size, size), randn(channels)
    sums, dots = randn(programs, taps + 1, channels), randn(3, 2, channels, seed=4)
    dk, db, grads = finish_depthwise(sums, k, b, dots, Norm.of(norm), scaled, count)
    close(dk, sums.double().sum(0)[:-1].t().reshape(k.shape), 1e-4)
    close(db, sums.double().sum(0)[-1], 1e-4)
    zz, weight, bias = (t.detach().double().requires_grad_() for t in (z, norm.weight, norm.bias))
    scale = weight * (zz.var(0, correction=0) + norm.eps).rsqrt()
    shift = bias - scale * zz.mean(0)
    dshift, dscale = dots.double().sum(0)
    ((scale * dscale).sum() + (shift * dshift).sum()).backward()
    close(grads.weight, weight.grad, 1e-4)
    close(grads.bias, bias.grad, 1e-4)
    close(grads.q + grads.p * (z - scaled.mean), zz.grad, 1e-4)
    alone = finish_depthwise(sums, k, None)
    close(alone[0], dk)
    assert alone[2] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_prepared_weights_are_laid_out_and_cast(dtype):
    k1, k2, w3 = randn(6, 1, 3, 3), randn(6, 1, 3, 3, seed=1), randn(40, 50)
    taps1, taps2, last = prepare_weights(k1, k2, w3, dtype)
    assert torch.equal(taps1, k1.reshape(6, 9).t())
    assert torch.equal(taps2, k2.reshape(6, 9).t())
    assert torch.equal(last, w3.to(dtype))
    assert (last is w3) == (dtype == torch.float32)


def test_norms_that_normalise_in_another_way_are_none_of_these():
    for norm in (
        nn.BatchNorm2d(3).eval(),
        nn.BatchNorm2d(3, affine=False),
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.BatchNorm2d(3, momentum=None),
    ):
        assert Norm.of(norm) is None
    assert Norm.of(nn.BatchNorm2d(3)).momentum == 0.1
    untracked = nn.BatchNorm2d(3)
    untracked.track_running_stats = False  # its statistics stay as they are
    assert Norm.of(untracked) is None
