"""Stars as kernels: Gram matrices, their expectation, and what they separate."""

import sys
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.svm import SVC

from starlayers import StarMLP, StarOp
from starlayers.coefficients import decision_boundary, plot_boundaries, star_kernel
from tests.helpers import properties, randn, star_op_formula


def drawn(d, out, std, bias_std, seed=0, **options):
    """A star with normal weights."""
    op = StarOp(d, out, act=None, dtype=torch.float64, **options)
    torch.manual_seed(seed)
    with torch.no_grad():
        for f, s, b in zip((op.f1, op.f2), std, bias_std):
            f.weight.normal_(std=s)
            f.bias.normal_(std=b)
    return op


@pytest.mark.parametrize("act", [None, "relu6"])
@pytest.mark.parametrize("combine", ["mul", "sum"])
def test_gram_is_the_mean_over_channels(act, combine):
    op = StarOp(3, 7, act=act, combine=combine, rank=2, dtype=torch.float64)
    x, y = randn(4, 3, dtype=torch.float64), randn(5, 3, seed=1, dtype=torch.float64)
    a, b = star_op_formula(op, x), star_op_formula(op, y)
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


@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 3), st.booleans())
@properties
def test_gram_matrices_are_positive_semidefinite(d, out, rank, analytic):
    gram = star_kernel(StarOp(d, out, act=None, rank=rank), randn(12, d), analytic=analytic)
    assert torch.equal(gram, gram.T)
    assert torch.linalg.eigvalsh(gram).min() >= -1e-12 * gram.diagonal().max()


def test_expectation_is_the_polynomial_kernel_of_the_variances():
    """rank (v1 x.y + c1) (v2 x.y + c2), with offset^2 in c2, up to sampling of the weights."""
    x, y = randn(6, 4, dtype=torch.float64), randn(5, 4, seed=1, dtype=torch.float64)
    op = drawn(4, 50_000, std=(0.5, 2.0), bias_std=(1.5, 0.7), rank=2, offset=1.2)
    products = x @ y.T
    expected = 2 * (0.25 * products + 2.25) * (4.0 * products + 0.49 + 1.44)
    assert torch.allclose(star_kernel(op, x, y, analytic=True), expected, rtol=0.03, atol=0.05)


def test_branches_alike_are_scikit_learns_polynomial_kernel():
    x = randn(6, 4, dtype=torch.float64)
    op = StarOp(4, 100_000, act=None, dtype=torch.float64)  # both uniform within 1 / sqrt(4)
    variance = 1 / (3 * 4)
    theirs = polynomial_kernel(x.numpy(), degree=2, gamma=variance, coef0=variance)
    found = star_kernel(op, x, analytic=True)
    assert torch.allclose(found, torch.from_numpy(theirs), rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"rank": 3, "offset": 1.0}], ids=str)
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
    op = drawn(4, 200_000, (0.5, 0.8), (0.3, 0.4), combine="sum")
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
    ("options", "words"),
    [
        ({"act": "relu"}, "needs act=None, got 'relu'"),
        ({"act": None, "combine": "sum"}, "needs combine='mul', got 'sum'"),
        ({"act": None, "coefficients": "dynamic"}, "needs coefficients that do not depend"),
    ],
)
def test_expectations_that_are_not_known_are_refused(options, words):
    with pytest.raises(ValueError, match=r"star_kernel\(analytic=True\) " + words):
        star_kernel(StarOp(3, 2, **options), randn(4, 3), analytic=True)


@pytest.mark.parametrize("shape", [(4, 2), (3,), (2, 4, 3)])
def test_inputs_of_another_size_are_named(shape):
    with pytest.raises(ValueError, match=rf"y must be \(n, 3\).*got \({shape[0]}"):
        star_kernel(StarOp(3, 2), randn(4, 3), randn(*shape))


@pytest.fixture(scope="module")
def moons():
    return decision_boundary("moons", models=("star", "sum", "poly"), steps=200, grid=40)


class TestBoundary:
    def test_stars_bend_and_sums_do_not(self, moons):
        assert moons.accuracy["star"] > moons.accuracy["sum"] + 0.04
        assert moons.accuracy["poly"] > moons.accuracy["sum"] + 0.04
        # the score of a sum is affine: its second differences along the grid vanish
        for axis in (0, 1):
            bend = moons.scores["sum"].diff(2, dim=axis).abs().max()
            assert bend < 1e-4 * moons.scores["sum"].abs().max()
            bend = moons.scores["star"].diff(2, dim=axis).abs().max()
            assert bend > 1e-3 * moons.scores["star"].abs().max()

    def test_degree_is_two_to_the_layers(self, moons):
        """On a grid line a polynomial of degree 4 has no fifth differences."""
        line = moons.scores["star"][20, ::8].double()  # wide steps against float32 noise
        few = decision_boundary("moons", models=["star"], layers=1, steps=20, grid=40)
        short = few.scores["star"][20, ::8].double()
        assert short.diff(3).abs().max() < 1e-4 * short.abs().max()
        assert line.diff(3).abs().max() > 1e-2 * line.abs().max()

    def test_scores_lie_where_the_points_are(self):
        found = decision_boundary("circles", models=["rbf"], grid=60)
        assert found.scores["rbf"].shape == (60, 60)
        left, right, bottom, top = found.extent
        share = (found.points - torch.tensor([left, bottom])) / torch.tensor(
            [right - left, top - bottom]
        )
        columns, rows = (share * 59).round().long().T
        says = found.scores["rbf"][rows, columns] > 0
        assert (says == found.labels).float().mean() > 0.9
        # not the same when transposed by mistake: moons are not symmetric
        moons = decision_boundary("moons", models=["rbf"], grid=60)
        left, right, bottom, top = moons.extent
        share = (moons.points - torch.tensor([left, bottom])) / torch.tensor(
            [right - left, top - bottom]
        )
        columns, rows = (share * 59).round().long().T
        assert ((moons.scores["rbf"][rows, columns] > 0) == moons.labels).float().mean() > 0.9
        assert ((moons.scores["rbf"][columns, rows] > 0) == moons.labels).float().mean() < 0.9

    def test_a_seed_is_the_same_again_and_leaves_the_generator_alone(self, moons):
        before = torch.get_rng_state()
        again = decision_boundary("moons", models=("star", "sum"), steps=200, grid=40)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(again.scores["star"], moons.scores["star"])
        other = decision_boundary("moons", models=["sum"], steps=200, grid=40, seed=1)
        assert not torch.equal(other.points, moons.points)

    def test_figure(self, moons, tmp_path):
        circles = decision_boundary("circles", models=moons.scores, steps=20, grid=30)
        figure = plot_boundaries([moons, circles])
        assert [ax.get_title() for ax in figure.axes[:3]] == ["star", "sum", "SVM, polynomial"]
        figure.savefig(tmp_path / "b.png")
        assert (tmp_path / "b.png").stat().st_size > 20_000
        with pytest.raises(ValueError, match="of the same models"):
            plot_boundaries([moons, decision_boundary("circles", models=["rbf"], grid=5)])

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"data": "spirals"}, "unknown data 'spirals', choose one of moons, circles"),
            ({"models": ["star", "tree"]}, r"unknown models \['tree'\], choose from star"),
            ({"layers": 0}, "layers must be at least 1, got 0"),
        ],
    )
    def test_refused(self, options, words):
        with pytest.raises(ValueError, match=words):
            decision_boundary(**options)

    @pytest.mark.parametrize(
        ("missing", "call"),
        [
            ("sklearn", lambda found: decision_boundary("moons", models=["sum"])),
            ("matplotlib.figure", lambda found: plot_boundaries([found])),
        ],
    )
    def test_what_is_not_installed_is_named(self, moons, monkeypatch, missing, call):
        monkeypatch.setitem(sys.modules, missing, None)
        with pytest.raises(ImportError, match=r"pip install 'starlayers\[coefficients\]'"):
            call(moons)
