"""Kernel of a star: Gram matrices, their expectation, and SVMs on them."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.svm import SVC

from starlayers import StarMLP, StarOp
from starlayers.coefficients import star_kernel
from starlayers.coefficients.modules import DynamicStarOp, RankStarOp, SumOp
from tests.coefficients.layers import hidden_formula, star_of
from tests.helpers import properties, randn


def drawn(d, out, std, bias_std, seed=0, kind=StarOp, **options):
    """A star with normal weights."""
    op = kind(d, out, act=None, dtype=torch.float64, **options)
    torch.manual_seed(seed)
    with torch.no_grad():
        for f, s, b in zip((star_of(op).f1, star_of(op).f2), std, bias_std):
            f.weight.normal_(std=s)
            f.bias.normal_(std=b)
    return op


@pytest.mark.parametrize("act", [None, "relu6"])
@pytest.mark.parametrize("kind", [StarOp, RankStarOp, SumOp, DynamicStarOp])
def test_gram_is_the_mean_over_channels(act, kind):
    op = kind(3, 7, act=act, dtype=torch.float64)
    x, y = randn(4, 3, dtype=torch.float64), randn(5, 3, seed=1, dtype=torch.float64)
    a, b = hidden_formula(op, x), hidden_formula(op, y)
    assert torch.allclose(star_kernel(op, x, y), torch.einsum("nk,mk->nm", a, b) / 7)
    assert torch.equal(star_kernel(op, x), star_kernel(op, x, x))


def test_of_a_star_mlp_it_is_the_product():
    mlp = StarMLP(3, 8, act=None)
    op = StarOp(3, 8, act=None)
    op.load_state_dict({k: v for k, v in mlp.state_dict().items() if k[0] == "f"})
    x = randn(4, 3)
    for analytic in (False, True):
        assert torch.equal(
            star_kernel(mlp, x, analytic=analytic), star_kernel(op, x, analytic=analytic)
        )


@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 3), st.booleans())
@properties
def test_gram_matrices_are_positive_semidefinite(d, out, rank, analytic):
    op = RankStarOp(d, out, act=None, rank=rank) if rank else StarOp(d, out, act=None)
    gram = star_kernel(op, randn(12, d), analytic=analytic)
    assert torch.equal(gram, gram.T)
    assert torch.linalg.eigvalsh(gram).min() >= -1e-12 * gram.diagonal().max()


def test_expectation_is_the_polynomial_kernel_of_the_variances():
    """rank (v1 x.y + c1) (v2 x.y + c2), with offset^2 in c2, up to sampling of the weights."""
    x, y = randn(6, 4, dtype=torch.float64), randn(5, 4, seed=1, dtype=torch.float64)
    op = drawn(4, 50_000, std=(0.5, 2.0), bias_std=(1.5, 0.7), kind=RankStarOp, offset=1.2)
    products = x @ y.T
    expected = 2 * (0.25 * products + 2.25) * (4.0 * products + 0.49 + 1.44)
    assert torch.allclose(star_kernel(op, x, y, analytic=True), expected, rtol=0.03, atol=0.05)


def test_branches_alike_are_scikit_learns_polynomial_kernel():
    x = randn(6, 4, dtype=torch.float64)
    op = StarOp(4, 100_000, act=None, dtype=torch.float64)  # both uniform within 1 / sqrt(4)
    variance = 1 / (3 * 4)
    theirs = polynomial_kernel(x.numpy(), degree=2, gamma=variance, coef0=variance)
    kernel = star_kernel(op, x, analytic=True)
    assert torch.allclose(kernel, torch.from_numpy(theirs), rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"kind": RankStarOp, "rank": 3, "offset": 1.0}])
def test_random_stars_converge_to_it(options):
    """The distance falls as one over the root of the channels: here by 10 for 100 times as many."""
    x = randn(20, 5, dtype=torch.float64)

    def distance(out, seed):
        op = drawn(5, out, (0.5, 0.8), (0.3, 0.4), seed, **options)
        expected = star_kernel(op, x, analytic=True)
        return float((star_kernel(op, x) - expected).norm() / expected.norm())

    few, many = (sum(distance(out, seed) for seed in range(8)) / 8 for out in (200, 20_000))
    assert 5 < few / many < 20
    assert many < 0.1


def test_a_sum_of_random_branches_has_a_linear_kernel():
    """What the star's is to be compared with: no products of coordinates in it."""
    op = drawn(4, 200_000, (0.5, 0.8), (0.3, 0.4), kind=SumOp)
    x = randn(6, 4, dtype=torch.float64)
    expected = (0.25 + 0.64) * x @ x.T + 0.09 + 0.16
    assert torch.allclose(star_kernel(op, x), expected, atol=0.05)


def test_an_svm_on_it_separates_what_a_polynomial_does_and_a_line_does_not():
    from sklearn.datasets import make_circles

    (x, labels), (x_new, labels_new) = (
        make_circles(n, noise=0.1, factor=0.5, random_state=n) for n in (100, 500)
    )
    torch.manual_seed(0)
    op = StarOp(2, 2000, act=None)
    kernels = {
        "star": partial(star_kernel, op),
        "expected": partial(star_kernel, op, analytic=True),
        "poly": partial(polynomial_kernel, degree=2),
        "rbf": "rbf",
        "linear": "linear",
    }
    scores = {
        n: SVC(kernel=k, C=100).fit(x, labels).score(x_new, labels_new) for n, k in kernels.items()
    }
    assert scores["linear"] < 0.7
    for name in ("star", "expected"):
        assert scores[name] > 0.95
        assert scores[name] == pytest.approx(scores["poly"], abs=0.02)
        assert scores[name] == pytest.approx(scores["rbf"], abs=0.03)
    # the same SVM with its Gram matrices computed beforehand
    precomputed = SVC(kernel="precomputed", C=100).fit(star_kernel(op, x), labels)
    assert precomputed.score(star_kernel(op, x_new, x), labels_new) == scores["star"]


@pytest.mark.parametrize(
    ("op", "words"),
    [
        (StarOp(3, 2, act="relu"), "needs act=None, got 'relu'"),
        (SumOp(3, 2, act=None), "needs products, which a SumOp has none of"),
        (DynamicStarOp(3, 2, act=None), "needs factors that do not depend on the input"),
    ],
)
def test_expectations_that_are_not_known_are_refused(op, words):
    with pytest.raises(ValueError, match=r"star_kernel\(analytic=True\) " + words):
        star_kernel(op, randn(4, 3), analytic=True)


@pytest.mark.parametrize("shape", [(4, 2), (3,), (2, 4, 3)])
@pytest.mark.parametrize("name", ["x", "y"])
def test_inputs_of_another_size_are_named(shape, name):
    inputs = {"x": randn(4, 3), "y": randn(5, 3), name: randn(*shape)}
    with pytest.raises(ValueError, match=rf"{name} must be \(n, 3\).*got \({shape[0]}"):
        star_kernel(StarOp(3, 2), inputs["x"], inputs["y"])


def test_the_result_is_float64_without_gradients_and_leaves_the_op_alone():
    op = StarOp(3, 2)
    gram = star_kernel(op, randn(4, 3, grad=True).tolist())
    assert (gram.dtype, gram.requires_grad) == (torch.float64, False)
    assert op.f1.weight.dtype == torch.float32
