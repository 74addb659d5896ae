"""Quadratic forms, written-out polynomials and the dimension of the space they lie in."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from starlayers import StarMLP, StarOp
from starlayers.coefficients import (
    CoefficientPenalty,
    Polynomial,
    branch_vectors,
    empirical_rank,
    expand,
    form,
    implicit_dimension,
    iter_quadratic_forms,
    quadratic_form,
    spectrum,
)
from starlayers.coefficients.modules import DynamicStarMLP, DynamicStarOp, SumMLP, SumOp
from tests.coefficients.layers import (
    CLOSE,
    DOUBLE,
    OPTIONS,
    dense_forms,
    filled,
    star_mlp,
    star_op,
)
from tests.helpers import properties, randn

SIZES = st.tuples(st.integers(1, 5), st.integers(1, 4))
LAYERS = {"op": star_op, "mlp": star_mlp}
layers = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def augmented(x):
    return torch.cat([x, torch.ones_like(x[..., :1])], -1)


@properties
@given(options=OPTIONS, size=SIZES, seed=st.integers(0, 99), kind=st.sampled_from(list(LAYERS)))
def test_forms_are_what_the_layer_computes(options, size, seed, kind):
    op = LAYERS[kind](*size, seed=seed, **options)
    q, x = quadratic_form(op), randn(6, size[0], seed=seed, dtype=DOUBLE)
    torch.testing.assert_close(
        torch.einsum("ni,kij,nj->nk", augmented(x), q, augmented(x)), op(x), **CLOSE
    )
    assert torch.equal(q, q.mT)
    assert q.shape == (op.out_features, size[0] + 1, size[0] + 1)


@properties
@given(options=OPTIONS, size=SIZES, seed=st.integers(0, 99), kind=st.sampled_from(list(LAYERS)))
def test_polynomials_are_what_the_layer_computes(options, size, seed, kind):
    op = LAYERS[kind](*size, seed=seed, **options)
    x = randn(6, size[0], seed=seed, dtype=DOUBLE)
    found = torch.stack([p(x) for p in expand(op)], -1)
    torch.testing.assert_close(found, op(x).detach(), **CLOSE)


@properties
@given(options=OPTIONS, size=SIZES, seed=st.integers(0, 99))
def test_branch_vectors_make_the_forms(options, size, seed):
    op = star_op(*size, seed=seed, **options)
    w1, w2 = branch_vectors(op)
    assert w1.shape == w2.shape == (size[1], options.get("rank", 1), size[0] + 1)
    q = torch.einsum("kri,krj->kij", w1, w2)
    torch.testing.assert_close((q + q.mT) / 2, dense_forms(op), **CLOSE)
    torch.testing.assert_close(quadratic_form(op), dense_forms(op), **CLOSE)


@layers
@pytest.mark.parametrize("chunk", [1, 2, 7])
def test_chunks_and_choices_agree(make, chunk):
    op = make(rank=2, out_features=5) if make is star_mlp else make(out=5, rank=2)
    q = quadratic_form(op)
    torch.testing.assert_close(quadratic_form(op, chunk=chunk), q)
    torch.testing.assert_close(quadratic_form(op, [3, 0, -1]), q[[3, 0, 4]])
    torch.testing.assert_close(quadratic_form(op, 2), q[2:3])
    assert quadratic_form(op, []).shape == (0, 5, 5)
    parts = list(iter_quadratic_forms(op, chunk_bytes=chunk * q[0].nbytes))
    assert [where for where, _ in parts] == [
        slice(i, min(i + len(parts[0][1]), 5)) for i in range(0, 5, len(parts[0][1]))
    ]
    for where, part in parts:
        torch.testing.assert_close(part, q[where])
    assert len(parts[0][1]) <= chunk


@layers
@pytest.mark.parametrize("options", [{"rank": 2}, {"scaled": True}, {"packed": True}], ids=str)
def test_forms_have_gradients(make, options):
    op = make(**options)
    x = augmented(randn(6, 4, dtype=DOUBLE))
    parameters = list(op.parameters())
    through_form = torch.einsum("ni,kij,nj->nk", x, quadratic_form(op, chunk=1), x)
    for a, b in zip(
        torch.autograd.grad(through_form.square().sum(), parameters),
        torch.autograd.grad(op(x[:, :-1]).square().sum(), parameters),
    ):
        torch.testing.assert_close(a, b, **CLOSE)


def test_vectors_leave_activation_and_gate_out():
    scaled = star_op(scaled=True, offset=1)
    gated = filled(DynamicStarOp(4, 3, act="gelu", offset=1, dtype=DOUBLE))
    gated.load_state_dict(scaled.state_dict(), strict=False)
    for a, b in zip(branch_vectors(gated), branch_vectors(scaled), strict=True):
        assert torch.equal(a, b)
    plain, gated = star_op(rank=2), star_op(rank=2, act="gelu")
    for a, b in zip(branch_vectors(gated), branch_vectors(plain), strict=True):
        assert torch.equal(a, b)


def test_layers_of_other_classes_bring_their_own_vectors():
    class Packed(nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.weights = nn.Parameter(randn(layers, 2, 5, 1, 4))

        def star_vectors(self):
            return [(w[0], w[1]) for w in self.weights]

    model = nn.Sequential(Packed(1), Packed(2), StarOp(3, 2), SumOp(3, 2))
    found = spectrum(model)
    assert list(found) == ["0", "1.0", "1.1", "2"]
    assert list(spectrum(model[1])) == ["0", "1"]
    products = torch.einsum("lckd,lcke->lcde", *model[1].weights.unbind(1))
    forms = (products + products.mT) / 2
    torch.testing.assert_close(found["1.1"].norm, forms[1].flatten(1).norm(dim=1).detach())
    torch.testing.assert_close(
        CoefficientPenalty(model[1])(), forms.square().sum((2, 3)).mean(1).mean()
    )


def test_half_precision_is_widened_and_autocast_has_no_say():
    op = StarMLP(4, 5, act=None)
    exact = quadratic_form(op)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quadratic_form(op), exact)
    found = quadratic_form(op.to(torch.bfloat16))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.05)


class Wrapped(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight, base.bias


def wrapped():
    op = StarOp(4, 3, act=None)
    op.f2 = Wrapped(op.f2)
    return op


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: StarOp(4, 3), ValueError, "act=None, got 'relu6'"),
        (lambda: SumOp(4, 3, act=None), ValueError, "needs products, which a SumOp has none of"),
        (lambda: SumMLP(4, act=None), ValueError, "needs products, which a SumMLP has none of"),
        (lambda: DynamicStarOp(4, 3, act=None), ValueError, "the input, got a DynamicStarOp"),
        (lambda: DynamicStarMLP(4, act=None), ValueError, "the input, got a DynamicStarMLP"),
        (wrapped, ValueError, "'f2' is a Wrapped.*merge adapters"),
        (lambda: nn.Linear(4, 3), TypeError, "StarOp or StarMLP, got a Linear"),
    ],
)
@pytest.mark.parametrize(
    "call", [quadratic_form, lambda op: list(iter_quadratic_forms(op)), expand]
)
def test_what_is_no_form_says_why(call, make, error, words):
    with pytest.raises(error, match=words):
        call(make())


def test_outputs_that_do_not_exist():
    with pytest.raises(ValueError, match="no output 3 among 3"):
        quadratic_form(star_op(), [0, 3])
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        quadratic_form(star_op(), chunk=0)


@pytest.mark.parametrize("kind", [StarOp, StarMLP])
def test_large_forms_are_refused_before_they_are_made(kind):
    # 16 matrices of 64 MiB; on the meta device nothing could be made by accident
    with torch.device("meta"):
        op = kind(4096, 16, act=None) if kind is StarOp else kind(4096, 8, act=None)
    with pytest.raises(ValueError, match=r"matrices of 4097 x 4097 take .* GiB.*outputs=.*iter_"):
        quadratic_form(op)
    with pytest.raises(ValueError, match="16 outputs on 4096 inputs have 134,316,048 terms"):
        expand(StarOp(4096, 16, act=None, device="meta"))
    assert next(iter_quadratic_forms(op))[1].shape == (1, 4097, 4097)
    assert quadratic_form(op, 5).shape == (1, 4097, 4097)


def test_a_single_matrix_that_is_too_large_is_refused():
    op = StarOp(20_000, 2, act=None, device="meta")
    for call in (quadratic_form, iter_quadratic_forms):
        with pytest.raises(ValueError, match=r"20001 x 20001 take.* 1\.5 GiB|take 3.0 GiB"):
            call(op)


def test_one_form_of_a_large_layer_is_made_at_a_time():
    op = StarOp(4096, 16, act=None)
    with torch.no_grad():
        where, q = next(iter_quadratic_forms(op))
    assert (where, q.nbytes) == (slice(0, 1), 4 * 4097**2)
    w1, w2 = (w[0, 0].detach() for w in branch_vectors(op))
    row = (w1[7] * w2 + w2[7] * w1) / 2
    torch.testing.assert_close(q[0, 7], row)


# polynomials


def test_terms_are_named_and_printed():
    op = star_op(2, 1)
    with torch.no_grad():  # (2 a + b + 1) (a - 3)
        op.f1.weight.copy_(torch.tensor([[2.0, 1.0]]))
        op.f2.weight.copy_(torch.tensor([[1.0, 0.0]]))
        op.f1.bias.fill_(1.0)
        op.f2.bias.fill_(-3.0)
    (p,) = expand(op, ["a", "b"])
    assert p.terms == {
        ("a", "a"): 2.0,
        ("a", "b"): 1.0,
        ("b", "b"): 0.0,
        ("a",): -5.0,
        ("b",): -3.0,
        (): -3.0,
    }
    assert str(p) == "2*a**2 + a*b - 5*a - 3*b - 3"
    assert str(Polynomial(("a",), {("a",): -1.0})) == "-a"
    assert str(Polynomial(("a",), {("a",): 0.0, (): 0.0})) == "0"
    assert list(expand(op)[0].terms)[:2] == [("x0", "x0"), ("x0", "x1")]


def test_sympy_computes_the_same():
    sympy = pytest.importorskip("sympy")
    op = star_op(3, 2, rank=2)
    point = [0.5, -1.25, 2.0]
    for p in expand(op):
        value = p.sympy().subs(dict(zip(map(sympy.Symbol, p.names), point)))
        expected = p(torch.tensor(point, dtype=DOUBLE))
        assert math.isclose(float(value), float(expected), rel_tol=1e-12)
        assert sympy.degree(p.sympy(), sympy.Symbol("x0")) == 2


def test_some_outputs_can_be_expanded():
    op = star_op(3, 4)
    every = expand(op)
    assert expand(op, outputs=[2, 0]) == [every[2], every[0]]
    assert expand(op, outputs=1) == [every[1]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"names": ["a", "b"]}, "4 different names are needed for 4 inputs"),
        ({"names": ["a", "b", "b", "c"]}, "4 different names"),
        ({"max_terms": 44}, "3 outputs on 4 inputs have 45 terms, more than max_terms=44"),
    ],
)
def test_what_cannot_be_expanded(options, words):
    with pytest.raises(ValueError, match=words):
        expand(star_op(), **options)


def test_a_polynomial_wants_its_number_of_variables():
    with pytest.raises(ValueError, match=r"4 variables, got inputs of shape \(2, 3\)"):
        expand(star_op())[0](torch.ones(2, 3))


# dimensions


@properties
@given(d=st.integers(1, 6), n=st.integers(1, 2))
def test_implicit_dimension_counts_monomials(d, n):
    degree = 2**n
    # exponents of the d variables and of the constant coordinate that sum to the degree
    counted = [sum(combination) <= degree for combination in product(range(degree + 1), repeat=d)]
    assert implicit_dimension(d, n) == sum(counted)


def test_approximation_of_the_paper():
    assert implicit_dimension(128, exact=False) == 128**2 / 2
    assert implicit_dimension(1000) / implicit_dimension(1000, exact=False) == pytest.approx(
        1, rel=0.004
    )
    assert implicit_dimension(128, 2, exact=False) == pytest.approx((128 / math.sqrt(2)) ** 4)
    assert implicit_dimension(128, 10, exact=False) == math.inf
    assert implicit_dimension(1, 1) == 3


@pytest.mark.parametrize("bad", [(0, 1), (3, 0)])
def test_sizes_are_checked(bad):
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        implicit_dimension(*bad)


@pytest.mark.parametrize("d", range(2, 9))
def test_rank_of_one_layer_is_the_dimension(d):
    count = implicit_dimension(d)
    assert empirical_rank(StarOp(d, count + 5, act=None)) == count
    assert empirical_rank(StarOp(d, count - 1, act=None)) == count - 1  # no more than outputs
    assert empirical_rank(SumOp(d, count + 5, act=None)) == d + 1
    # without constants there are squares and products alone
    assert empirical_rank(StarOp(d, count + 5, act=None, bias=False)) == d * (d + 1) // 2


@pytest.mark.parametrize("d", [2, 3, 4, 5])
def test_rank_of_two_layers_is_the_dimension(d):
    hidden, count = implicit_dimension(d), implicit_dimension(d, 2)
    model = nn.Sequential(StarOp(d, hidden, act=None), StarOp(hidden, count + 5, act=None))
    assert empirical_rank(model) == count


def test_rank_of_two_sums_is_that_of_one():
    model = nn.Sequential(SumOp(3, 3, act=None), SumOp(3, 20, act=None))
    assert empirical_rank(model) == 4


def test_rank_of_a_function_and_of_a_float32_model_left_as_it_was():
    assert empirical_rank(lambda x: torch.stack([x[:, 0], x[:, 0] * 2, x[:, 1]], 1), 2) == 2
    model = StarOp(3, 12, act=None).half().train()
    assert empirical_rank(model) == 10
    assert model.f1.weight.dtype == torch.float16
    assert model.training


def test_a_loose_tolerance_counts_less():
    op = StarOp(4, 20, act=None)
    assert empirical_rank(op, tol=0.9) < empirical_rank(op) == 15


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: empirical_rank(nn.Linear(3, 2)), "Linear does not start with a star layer"),
        (lambda: empirical_rank(StarOp(3, 9), samples=8), "8 samples are too few for 9 outputs"),
        (lambda: empirical_rank(lambda x: x / 0, 2), "infinite or not a number"),
    ],
)
def test_ranks_that_cannot_be_measured(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_matrix_that_is_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(form, "MAX_BYTES", 8 * 40 * 20 - 1)
    with pytest.raises(ValueError, match="40 samples and 20 outputs"):
        empirical_rank(StarOp(3, 20, act=None))
