"""Wide star MLP against its definition, with both programs for its products."""

import pytest
import torch

from starlayers.functional import star_mlp_reference
from starlayers.kernels.star_linear import dgated, star_linear
from starlayers.kernels.star_mlp_wide import PROGRAMS, star_mlp_wide, star_mlp_wide_backward
from tests.helpers import assert_as_exact_as_eager, converted, pairwise, randn, results
from tests.kernels.cases import mlp_tensors

BIASES = [(), ("b1",), ("b2",), ("b3",), ("b1", "b2", "b3")]
SIZES = (6, 5, 9, 3)


def tensors_without(missing, dtype=torch.float32):
    return mlp_tensors(*SIZES, missing=missing, dtype=dtype)[:-1]


def test_programs_are_the_library_with_k1_or_k2_with_k5():
    assert PROGRAMS["library"] == (star_linear.plain, dgated.plain)
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
    y, h1, h2 = star_mlp_wide(*tensors, *options)
    assert h1.shape == h2.shape == ((0,) if recompute else (6, 9))
    checked = torch.library.opcheck(star_mlp_wide, (*tensors, *options), test_utils=utils)
    assert set(checked.values()) == {"SUCCESS"}
    arguments = (randn(*y.shape), *tensors, h1, h2, *options)
    checked = torch.library.opcheck(star_mlp_wide_backward, arguments, test_utils=utils)
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
