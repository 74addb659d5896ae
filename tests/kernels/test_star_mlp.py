"""The fused star MLP against its definition, in value and gradient, over several blocks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from starlayers.functional import star_mlp_reference
from starlayers.kernels.star_mlp import star_mlp, star_mlp_backward
from tests.helpers import FORMULAS, properties, randn

pytestmark = pytest.mark.usefixtures("eligible")
OP, BACKWARD = "starlayers::star_mlp", "starlayers::star_mlp_backward"
# blocks have 64 rows here: one short, one full, one full and a single row, three with an odd last
SIZES = [(7, 5, 11, 3), (64, 4, 8, 4), (65, 1, 1, 1), (177, 5, 11, 3)]


def sample(rows=133, width=5, hidden=11, out=3, bias=True):
    """x, w1, b1, w2, b2, w3, b3 with weights scaled by 1/sqrt(fan_in)."""
    shapes = [(hidden, width), (hidden,), (hidden, width), (hidden,), (out, hidden), (out,)]
    tensors = [3 * randn(rows, width)]
    for seed, shape in enumerate(shapes, start=1):
        if len(shape) == 1:
            tensors.append(randn(*shape, seed=seed) if bias else None)
        else:
            tensors.append(randn(*shape, seed=seed) / shape[1] ** 0.5)
    return [None if t is None else t.requires_grad_() for t in tensors]


def value_and_gradients(f, tensors, act, offset):
    y = f(*tensors, act, offset)
    present = [t for t in tensors if t is not None]
    return [y, *torch.autograd.grad(y, present, randn(*y.shape, seed=9, dtype=y.dtype))]


def reference(*arguments):
    return star_mlp_reference(*arguments[:-1], offset=arguments[-1])


def assert_as_exact_as_eager(found, eager, exact):
    """The error is at most twice that of eager PyTorch, or some roundings of a long sum."""
    for ours, theirs, true in zip(found, eager, exact, strict=True):
        floor = 16 * torch.finfo(torch.float32).eps * true.norm().clamp(min=1)
        bound = 2 * (theirs.double() - true).norm() + floor
        assert ours.shape == true.shape
        assert (ours.double() - true).norm() <= bound


def doubled(tensors):
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def against_reference(sizes, act, offset, bias):
    tensors = sample(*sizes, bias=bias)
    exact = value_and_gradients(reference, doubled(tensors), act, offset)
    eager = value_and_gradients(reference, tensors, act, offset)
    assert_as_exact_as_eager(value_and_gradients(star_mlp, tensors, act, offset), eager, exact)


@pytest.mark.parametrize("act", FORMULAS)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_value_and_gradients(sizes, act, offset, bias):
    against_reference(sizes, act, offset, bias)


@properties
@given(
    sizes=st.tuples(st.integers(0, 200), *[st.integers(1, 9)] * 3),
    act=st.sampled_from(list(FORMULAS)),
    offset=st.sampled_from([0.0, 1.0, -0.5]),
    bias=st.booleans(),
)
def test_any_size(sizes, act, offset, bias):
    against_reference(sizes, act, offset, bias)


@pytest.fixture
def nan_memory():
    """Fresh memory holds NaN, so that whatever is read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(2).isnan().all()
        assert torch.ones(2).new_empty(2).isnan().all()
        assert torch.empty_like(torch.ones(2)).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("rows", [0, 1, 64, 133])
def test_nothing_uninitialised_leaks(rows, bias):
    against_reference((rows, 5, 11, 3), "gelu", 1.0, bias)


@pytest.mark.parametrize("missing", [(2,), (4,), (6,), (2, 6)], ids=str)
def test_some_branches_without_bias(missing):
    tensors = [None if i in missing else t for i, t in enumerate(sample())]
    found = value_and_gradients(star_mlp, tensors, "silu", 1.0)
    expected = value_and_gradients(reference, tensors, "silu", 1.0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("act", ["relu6", "identity"])
def test_op_is_well_formed(act, bias):
    tensors = sample(rows=70, bias=bias)
    torch.library.opcheck(star_mlp, (*tensors, act, 1.0))
    x, *weights = (None if t is None else t.detach() for t in tensors)
    torch.library.opcheck(star_mlp_backward, (randn(70, 3), x, *weights[:-1], act, 1.0))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_backward_repeats_and_writes_to_no_input():
    tensors = sample()
    kept = [t.clone() for t in tensors]
    y = star_mlp(*tensors, "gelu", 1.0)
    dy = randn(*y.shape, seed=9)
    seed = dy.clone()
    first = torch.autograd.grad(y, tensors, dy, retain_graph=True)
    again = torch.autograd.grad(y, tensors, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors, kept, strict=True))
    assert torch.equal(dy, seed)


@pytest.mark.parametrize("create_graph", [False, True], ids=["first", "create-graph"])
def test_backward_called_under_autocast(create_graph):
    def under_autocast(f, tensors):
        y = f(*tensors, "silu", 0.0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            dy = randn(*y.shape, seed=9)
            grads = torch.autograd.grad(y, tensors, dy, create_graph=create_graph)
        return [g.detach() for g in grads]

    tensors = sample()
    found, eager = under_autocast(star_mlp, tensors), under_autocast(reference, tensors)
    _, *exact = value_and_gradients(reference, doubled(tensors), "silu", 0.0)
    assert {g.dtype for g in found} == {torch.float32}
    assert_as_exact_as_eager(found, eager, exact)


def test_only_x_and_parameters_are_saved():
    tensors, saved = sample(rows=200, hidden=64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = star_mlp(*tensors, "gelu", 1.0)
    known = {t.data_ptr() for t in tensors}
    assert saved
    assert {t.data_ptr() for t in saved} <= known
    found = torch.autograd.grad(y.sum(), tensors)
    close(found, torch.autograd.grad(reference(*tensors, "gelu", 1.0).sum(), tensors))


def test_changing_a_saved_tensor_is_noticed():
    tensors = sample()
    y = star_mlp(*tensors, "gelu", 1.0)
    with torch.no_grad():
        tensors[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
