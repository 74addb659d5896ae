"""Mean and variance as outputs of kernels: merging over tiles, and gradients."""

import pytest
import torch

from starlayers.kernels.statistics import (
    empty_statistics,
    merged_statistics,
    statistics_gradient,
    upstream,
    with_statistics,
)
from tests.helpers import converted, pairwise, randn, results
from tests.kernels.cases import conv_pair, conv_tensors, mlp_pair, mlp_tensors


def parts_of(y, rows):
    """Return what kernels write per tile of `rows`: count, mean, squared deviations."""
    tiles = []
    for tile in y.split(rows):
        mean = tile.mean(0)
        count = torch.full_like(mean, len(tile))
        tiles.append(torch.stack((count, mean, (tile - mean).square().sum(0))))
    return torch.stack(tiles)


#: the row for the quick tier cancels most, over several tiles
MERGED = [
    pytest.param(
        rows, *moments, marks=() if (rows, moments) == (32, (1e4, 0.1)) else pytest.mark.slow
    )
    for rows, moments in pairwise(
        [1, 32, 128, 5000], [(0.0, 1.0), (3.0, 2.0), (1e4, 0.1), (-1e4, 0.1)]
    )
]


@pytest.mark.interpret
@pytest.mark.parametrize(("rows", "mean", "std"), MERGED)
def test_merged_statistics_do_not_cancel(mean, std, rows):
    y = (mean + std * randn(5000, 6, dtype=torch.float64)).float()
    found_mean, found_var = merged_statistics(parts_of(y, rows))
    assert found_mean.dtype == found_var.dtype == torch.float32
    true = y.double()
    torch.testing.assert_close(found_mean.double(), true.mean(0), rtol=3e-7, atol=1e-6)
    torch.testing.assert_close(found_var.double(), true.var(0, correction=0), rtol=1e-3, atol=0)


def test_a_sum_of_squares_would_have_cancelled():
    y = (1e4 + 0.1 * randn(5000, 6, dtype=torch.float64)).float()
    naive = y.square().mean(0) - y.mean(0).square()
    true = y.double().var(0, correction=0)
    assert ((naive - true).abs() > 0.5 * true).any()


@pytest.mark.interpret
def test_tiles_of_unequal_length_weigh_by_their_rows():
    parts = torch.tensor([[[3.0], [1.0], [6.0]], [[1.0], [5.0], [0.0]]])
    mean, var = merged_statistics(parts)
    assert mean.item() == 2.0  # of -1, 1, 3 (or any three like them) and 5
    assert var.item() == (6 + 3 * 1 + 1 * 9) / 4


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("shift", [0.0, 1e3])
def test_statistics_of_a_shifted_output(shift):
    """Compare with float64 statistics of the output that the next layer normalises."""
    tensors = mlp_tensors(300, 17, 40, 24)
    image = conv_tensors(3, 9, 5, 18, 3)
    with torch.no_grad():
        tensors[6] += shift
        image[2] += shift
    for pair, inputs in ((mlp_pair("silu", stats=True), tensors), (conv_pair(True), image)):
        y, mean, var = pair[0](*inputs)
        true = y.detach().double().flatten(0, -2)
        torch.testing.assert_close(mean.double(), true.mean(0), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(var.double(), true.var(0, correction=0), rtol=1e-4, atol=0)


def normalised(f):
    """Return `f` followed by a BatchNorm that uses the statistics of `f`."""

    def normalise(*tensors):
        y, mean, var = f(*tensors)
        return (y - mean) * (var + 1e-5).rsqrt()

    return normalise


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("order", [1, 2])
def test_a_batch_norm_after_an_op_is_that_of_torch(order):
    op, definition = mlp_pair("silu", stats=True)

    def torch_norm(*tensors):
        return torch.nn.functional.batch_norm(definition(*tensors)[0], None, None, training=True)

    tensors = mlp_tensors(130, 17, 40, 24)
    actual = results(normalised(op), tensors, order=order)
    exact = results(torch_norm, converted(tensors, torch.float64), order=order)
    for ours, true in zip(actual, exact, strict=True):
        assert (ours - true).norm() <= 1e-4 * true.norm().clamp(min=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_gradient_of_the_statistics_is_an_affine_map_of_the_output(dtype):
    y = randn(4, 3, 5, dtype=dtype, grad=True)
    outputs = with_statistics(y, True)
    dy, dmean, dvar = (randn(*t.shape, seed=i, dtype=t.dtype) for i, t in enumerate(outputs, 1))
    (expected,) = torch.autograd.grad(outputs, y, [dy, dmean, dvar])
    p, q = statistics_gradient(dmean, dvar, 12)
    actual = upstream(dy, y.detach(), outputs[1].detach(), p, q)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, expected)
    assert upstream(dy, None, None, None, None) is dy


def test_statistics_are_empty_and_float32_unless_wanted():
    y = randn(4, 5, dtype=torch.float16)
    same, mean, var = with_statistics(y, False)
    assert same is y
    assert [(t.shape, t.dtype) for t in (mean, var)] == [((0,), torch.float32)] * 2
    assert [(t.shape, t.dtype) for t in empty_statistics(y)] == [((0,), torch.float32)] * 2
