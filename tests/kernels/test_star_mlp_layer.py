"""StarMLP on the fused op, its blocks of rows on a CPU, and the wide star MLP."""

import copy

import pytest
import torch

from starlayers import ACTIVATIONS, StarBlock, StarMLP, register_activation, use_backend
from starlayers.functional import star_mlp_reference
from starlayers.kernels import star_linear as star_linear_module
from starlayers.kernels import star_mlp_cpu
from starlayers.kernels.registration import MLPWeights
from starlayers.kernels.star_linear import Branches, dgated, product_dgated, star_linear
from starlayers.kernels.star_mlp_cpu import blocked_forward
from starlayers.kernels.star_mlp_wide import PROGRAMS, star_mlp_wide
from tests.helpers import (
    FORMULAS,
    RecordOps,
    assert_as_exact_as_eager,
    converted,
    gradients,
    pairwise,
    randn,
    results,
)
from tests.kernels.cases import mlp_tensors

OP, BACKWARD = "starlayers::star_mlp", "starlayers::star_mlp_backward"


def twins(**options):
    fused = StarMLP(5, 11, out_features=3, **options)
    return fused, copy.deepcopy(fused)


def eagerly(f):
    with use_backend("eager"):
        return f()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("eligible")
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


@pytest.mark.usefixtures("eligible")
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


@pytest.mark.usefixtures("eligible")
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


@pytest.mark.usefixtures("eligible")
def test_block_and_inference_take_the_op():
    block, x = StarBlock(5, StarMLP(5, 10)), randn(70, 5)
    with RecordOps() as ops, torch.inference_mode():
        y = block(x)
    assert ops.counts[OP] == 1
    close(y, eagerly(lambda: block(x)).detach())


@pytest.mark.usefixtures("eligible")
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


@pytest.mark.usefixtures("eligible")
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


@pytest.mark.usefixtures("eligible")
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


@pytest.mark.usefixtures("eligible")
def test_weights_left_on_meta_raise_as_eager_does():
    mlp, x = StarMLP(5, device="meta"), randn(70, 5)
    for backend in ("eager", "auto"):
        with use_backend(backend), pytest.raises(RuntimeError, match="meta"):
            mlp(x)


@pytest.mark.usefixtures("eligible")
def test_nan_in_one_row_stays_in_that_row():
    fused, _ = twins(act="relu6")
    x = randn(133, 5)
    x[70] = torch.nan
    y = fused(x)
    assert y[70].isnan().all()
    assert y.isnan().any(-1).sum() == 1


@pytest.mark.usefixtures("eligible")
def test_gradient_hooks_of_parameters_run():
    fused, plain = twins()
    for mlp in (fused, plain):
        mlp.f1.weight.register_hook(lambda g: 2 * g)
    x = randn(70, 5)
    close(gradients(fused, x), eagerly(lambda: gradients(plain, x)))


# --- division of the star MLP into blocks of rows on a CPU


# hidden channels, bytes of an element, rows of 2 MiB, but at least 64
@pytest.mark.parametrize(
    ("hidden", "element_size", "rows"),
    [(1024, 4, 512), (1024, 8, 256), (1000, 4, 524), (8192, 4, 64), (8064, 4, 65), (10**6, 4, 64)],
)
def test_rows_of_a_block(hidden, element_size, rows):
    assert star_mlp_cpu._block_rows(hidden, element_size) == rows


@pytest.mark.parametrize("rows", [64, 65, 200])
def test_every_block_is_computed_in_the_same_buffers(rows, monkeypatch):
    monkeypatch.setattr(star_mlp_cpu, "BLOCK_BYTES", 1)  # 64 rows
    x, w1, w2, w3 = randn(rows, 3), randn(5, 3, seed=1), randn(5, 3, seed=2), randn(2, 5, seed=3)
    buffers = set()
    linear = star_mlp_cpu._linear

    def recorded(x, w, b, *, out):
        buffers.add((out.data_ptr(), out.shape[1]))
        linear(x, w, b, out=out)

    monkeypatch.setattr(star_mlp_cpu, "_linear", recorded)
    y = blocked_forward(x, MLPWeights(w1, None, w2, None, w3, None), "silu", 1.0)
    expected = star_mlp_reference(x, w1, None, w2, None, w3, None, "silu", offset=1.0)
    torch.testing.assert_close(y, expected)
    assert len({address for address, width in buffers if width == 5}) == 2


# --- wide star MLP against its definition, with both programs for its products


BIASES = [(), ("b1",), ("b2",), ("b3",), ("b1", "b2", "b3")]
SIZES = (6, 5, 9, 3)


def tensors_without(missing, dtype=torch.float32):
    return mlp_tensors(*SIZES, missing=missing, dtype=dtype)[:-1]


def test_programs_are_the_library_with_k1_or_k2_with_k5():
    assert PROGRAMS["library"] == (star_linear.plain, product_dgated)
    assert PROGRAMS["triton"] == (star_linear, dgated)
    assert list(PROGRAMS) == ["library", "triton"]


@pytest.mark.parametrize(
    ("missing", "recompute", "gemm", "order"),
    pairwise(BIASES, [False, True], list(PROGRAMS), [1, 2]),
    ids=str,
)
def test_value_and_gradients(missing, recompute, gemm, order):
    def op(*tensors):
        return star_mlp_wide(*tensors, "silu", 0.5, recompute, gemm)[0]

    def definition(*tensors):
        return star_mlp_reference(*tensors, "silu", offset=0.5)

    tensors = tensors_without(missing)
    actual, eager = results(op, tensors, order=order), results(definition, tensors, order=order)
    exact = results(definition, converted(tensors, torch.float64), order=order)
    assert_as_exact_as_eager(actual, eager, exact, sums=True)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("missing", BIASES, ids=str)
def test_ops_are_well_formed(missing, recompute):
    tensors = [None if t is None else t.detach() for t in tensors_without(missing)]
    options = ("silu", 0.5, recompute, "library")
    utils = ("test_schema", "test_faketensor", "test_autograd_registration")
    _, h1, h2 = star_mlp_wide(*tensors, *options)
    assert h1.shape == h2.shape == ((0,) if recompute else (6, 9))
    checked = torch.library.opcheck(star_mlp_wide, (*tensors, *options), test_utils=utils)
    assert set(checked.values()) == {"SUCCESS"}


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_fused_products_are_well_formed(save, bias):
    x, w1, b1, w2, b2, w3, _ = (t.detach() for t in tensors_without(()))
    b1, b2 = (b1, b2) if bias else (None, None)
    utils = ("test_schema", "test_faketensor")
    arguments = (x, w1, b1, w2, b2, "gelu", 1.0, save)
    s, h1, h2 = star_linear(*arguments)
    assert h1.shape == h2.shape == ((6, 9) if save else (0,))
    assert set(torch.library.opcheck(star_linear, arguments, test_utils=utils).values()) == {
        "SUCCESS"
    }
    if save:
        arguments = (randn(6, 3), w3, h1, h2, "gelu", 1.0)
        torch.testing.assert_close(dgated(*arguments)[2], s)
        assert set(torch.library.opcheck(dgated, arguments, test_utils=utils).values()) == {
            "SUCCESS"
        }


@pytest.fixture
def grids(monkeypatch):
    """Return the list of grids that the wide products launch, which then launch nothing."""
    launched = []

    def launch(kernel, grid, *arguments, **constants):
        launched.append(grid)

    monkeypatch.setattr(star_linear_module, "launch", launch)
    return launched


@pytest.mark.parametrize(
    ("rows", "channels", "tiles"),
    [
        (1, 64, 1),
        (star_linear_module.BM, star_linear_module.BN, 1),
        (star_linear_module.BM + 1, star_linear_module.BN, 2),
        (2 * star_linear_module.BM + 1, 4 * star_linear_module.BN, 12),
    ],
)
def test_wide_products_launch_one_program_a_tile(grids, rows, channels, tiles):
    x, weight = randn(rows, 64), randn(channels, 64)
    star_linear_module._kernel(x, Branches(weight, None, weight, None), "silu", 0.0, True)
    assert grids == [(tiles,)]


def test_wide_products_of_no_rows_launch_nothing(grids):
    weight = randn(64, 64)
    s, _, _ = star_linear_module._kernel(
        randn(0, 64), Branches(weight, None, weight, None), "silu", 0.0, False
    )
    assert (grids, s.shape) == ([], (0, 64))


@pytest.fixture
def bell():
    """Activation of a name that a test registers again; the table is as before afterwards."""
    register_activation("bell", torch.cos, lambda x: -torch.sin(x), aliases=("bells",))
    yield "bell"
    for name in ("bell", "bells"):
        ACTIVATIONS.pop(name, None)


def test_an_activation_that_was_registered_again_does_not_take_over_a_backward(bell):
    mlp, x = StarMLP(5, act=bell), randn(70, 5, grad=True)
    with use_backend("cpu"):
        y = mlp(x).sum()
    del ACTIVATIONS["bell"], ACTIVATIONS["bells"]
    register_activation("bell", torch.tanh, lambda x: 1 - torch.tanh(x) ** 2)
    with pytest.raises(RuntimeError, match="'bell' was registered again between forward"):
        y.backward()


def test_a_row_under_another_name_alone_runs_its_own_definition(bell):
    x, mlp = randn(20_000, 8), StarMLP(8, 64)
    row = ACTIVATIONS.pop(bell)
    register_activation("bell", torch.tanh, lambda x: 1 - torch.tanh(x) ** 2)
    mlp.act = "bells"  # still the cosine
    expected = mlp.g(row.fn(mlp.f1(x)) * mlp.f2(x))
    torch.testing.assert_close(mlp(x), expected)
    assert mlp.plan(x).reason.endswith("not in ACTIVATIONS under its own name 'bell'")
    with use_backend("cpu"), pytest.raises(RuntimeError, match="under its own name 'bell'"):
        mlp(x)
