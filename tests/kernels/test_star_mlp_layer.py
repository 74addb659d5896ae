"""StarMLP on the fused op against StarMLP on the definition."""

import copy

import pytest
import torch

from starlayers import ACTIVATIONS, StarBlock, StarMLP, register_activation, use_backend
from tests.helpers import FORMULAS, RecordOps, gradients, randn

pytestmark = pytest.mark.usefixtures("eligible")
OP, BACKWARD = "starlayers::star_mlp", "starlayers::star_mlp_backward"


def twins(**options):
    fused = StarMLP(5, 11, out_features=3, **options)
    return fused, copy.deepcopy(fused)


def eagerly(f):
    with use_backend("eager"):
        return f()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("act", FORMULAS)
def test_second_order_is_that_of_the_definition(act):
    fused, plain = twins(act=act, offset=1)

    def second(mlp):
        x = randn(70, 5, grad=True)
        (dx,) = torch.autograd.grad(mlp(x).square().sum(), x, create_graph=True)
        dx.square().sum().backward()
        return [dx, x.grad, *(p.grad for p in mlp.parameters())]

    with RecordOps() as ops:
        actual = second(fused)
    assert ops.counts[OP] == 1
    expected = eagerly(lambda: second(plain))
    for ours, theirs in zip(actual, expected, strict=True):  # sums of squares: sizes differ widely
        close(ours / theirs.abs().max(), theirs / theirs.abs().max())


@pytest.mark.parametrize("order", [1, 2])
def test_tied_branches_get_the_sum_of_both_gradients(order):
    fused, plain = twins(act="tanh")

    def tied_gradients(mlp):
        mlp.f2.weight = mlp.f1.weight
        assert mlp.f1.weight is mlp.f2.weight
        x, parameters = randn(70, 5, grad=True), list(mlp.parameters())
        loss = mlp(x).square().mean()
        first = torch.autograd.grad(loss, [x, *parameters], create_graph=order > 1)
        if order == 1:
            return first
        return torch.autograd.grad(sum(g.square().sum() for g in first), [x, *parameters])

    close(tied_gradients(fused), eagerly(lambda: tied_gradients(plain)))


@pytest.mark.parametrize("shape", [(5,), (1, 5), (133, 5), (2, 70, 5), (0, 5), (2, 0, 5)], ids=str)
def test_layer_of_any_rank_takes_the_op(shape):
    fused, plain = twins(act="gelu", offset=1)
    x = randn(*shape)
    with RecordOps() as ops:
        actual = gradients(fused, x)
    with RecordOps() as eager_ops, use_backend("eager"):
        expected = gradients(plain, x)
    close(actual, expected)
    assert (ops.counts[OP], ops.counts[BACKWARD]) == (1, 1)
    assert OP not in eager_ops.counts


def test_block_and_inference_take_the_op():
    block, x = StarBlock(5, expansion=2), randn(70, 5)
    with RecordOps() as ops, torch.inference_mode():
        y = block(x)
    assert ops.counts[OP] == 1
    close(y, eagerly(lambda: block(x)).detach())


@pytest.mark.parametrize(
    "x",
    [randn(5, 133).t(), randn(133, 10)[:, ::2], randn(1, 5).expand(133, 5), randn(2, 133, 5).mT.mT],
    ids=["transposed", "strided", "expanded", "batched"],
)
def test_any_layout_of_x_and_of_the_gradient(x):
    fused, plain = twins()
    kept = x.clone()

    def summed(mlp):  # the gradient of a sum is an expanded scalar
        inputs = x.detach().requires_grad_()
        return torch.autograd.grad(mlp(inputs).sum(), [inputs, *mlp.parameters()])

    close(summed(fused), eagerly(lambda: summed(plain)))
    close(gradients(fused, x), eagerly(lambda: gradients(plain, x)))
    assert torch.equal(x, kept)


@pytest.mark.parametrize("frozen", ["f1", "f2", "g", "f1.bias", "x", "all-but-x"])
def test_frozen_parts_get_no_gradient(frozen):
    def trained(mlp):
        x = randn(70, 5, grad=frozen != "x")
        for name, p in mlp.named_parameters():
            p.requires_grad_(frozen != "all-but-x" and not name.startswith(frozen))
        mlp(x).square().sum().backward()
        return [t.grad for t in (x, *mlp.parameters())]

    fused, plain = twins(act="silu")
    actual, expected = trained(fused), eagerly(lambda: trained(plain))
    assert [g is None for g in actual] == [g is None for g in expected]
    assert any(g is None for g in actual)
    close([g for g in actual if g is not None], [g for g in expected if g is not None])


@pytest.mark.parametrize(("derivative", "fused_runs"), [(None, 0), (torch.cos, 1)])
def test_registered_activation_runs_fused_where_it_has_a_derivative(derivative, fused_runs):
    register_activation("sine", torch.sin, derivative)
    try:
        fused, plain = twins(act="sine")
        x = randn(70, 5)
        with RecordOps() as ops:
            actual = gradients(fused, x)
        assert ops.counts.get(OP, 0) == fused_runs
        close(actual, eagerly(lambda: gradients(plain, x)))
    finally:
        del ACTIVATIONS["sine"]


def test_weights_left_on_meta_raise_as_eager_does():
    mlp, x = StarMLP(5, device="meta"), randn(70, 5)
    for backend in ("eager", "auto"):
        with use_backend(backend), pytest.raises(RuntimeError, match="meta"):
            mlp(x)


def test_nan_in_one_row_stays_in_that_row():
    fused, _ = twins(act="relu6")
    x = randn(133, 5)
    x[70] = torch.nan
    y = fused(x)
    assert y[70].isnan().all()
    assert y.isnan().any(-1).sum() == 1


def test_gradient_hooks_of_parameters_run():
    fused, plain = twins()
    for mlp in (fused, plain):
        mlp.f1.weight.register_hook(lambda g: 2 * g)
    x = randn(70, 5)
    close(gradients(fused, x), eagerly(lambda: gradients(plain, x)))
