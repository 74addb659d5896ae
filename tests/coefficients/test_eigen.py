"""Eigenfeatures, truncated stars and attributions against dense forms and the models themselves."""

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from starlayers import StarBlock, StarMLP, StarOp
from starlayers.coefficients import (
    Eigenfeatures,
    TruncationCurve,
    attribute,
    compose,
    eigenfeatures,
    form,
    plot_eigenfeatures,
    quadratic_form,
    truncate,
    truncation,
    truncation_curve,
)
from starlayers.coefficients.modules import (
    DynamicStarMLP,
    RankStarMLP,
    RankStarOp,
    ScaledStarMLP,
    SumOp,
)
from tests.coefficients.layers import layer_formula, star_of
from tests.helpers import branch_parameters, properties, randn

stars = st.fixed_dictionaries(
    {
        "d": st.integers(1, 12),
        "hidden": st.integers(1, 7),
        "out": st.integers(1, 3),
        "rank": st.integers(1, 3),
        "offset": st.sampled_from([0.0, 1.0]),
        "bias": st.booleans(),
        "packed": st.booleans(),
    }
)


class Normalise(nn.Module):
    """A fixed normalisation, with numbers instead of modules."""

    def forward(self, x):
        return (x - 0.3) / 0.4


def mlp(d, hidden, out, rank=1, offset=0.0, bias=True, packed=False):
    torch.manual_seed(d + 100 * hidden)
    options = {"out_features": out, "offset": offset, "bias": bias, "dtype": torch.float64}
    if rank > 1:
        return RankStarMLP(d, hidden, act=None, rank=rank, packed=packed, **options)
    return StarMLP(d, hidden, act=None, **options)


def pipeline():
    """Images (2, 3, 3) through everything that is affine, to 3 outputs."""
    torch.manual_seed(3)
    model = nn.Sequential(
        Normalise(),
        nn.BatchNorm2d(2),
        nn.Conv2d(2, 4, 2, bias=False),
        nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 6), nn.BatchNorm1d(6)),
        RankStarMLP(6, 4, out_features=5, act=None, rank=2),
        nn.Linear(5, 3),
    )
    model(torch.randn(64, 2, 3, 3) * 2 + 1)  # running statistics that are not 0 and 1
    return model.double().eval()


def dense_form(weights1, weights2, mix, constant):
    """An output's symmetric form by sums over products of coordinates."""
    d1 = len(weights1[0])
    form = torch.zeros(d1, d1, dtype=torch.float64)
    for i in range(d1):
        for j in range(d1):
            form[i, j] = sum(
                m * (u[i] * v[j] + u[j] * v[i]) / 2 for u, v, m in zip(weights1, weights2, mix)
            )
    form[-1, -1] += constant
    return form


@given(stars)
@properties
def test_terms_of_a_star_mlp_sum_to_its_logits(case):
    model = mlp(**case)
    x = randn(7, case["d"], seed=1, dtype=torch.float64)
    logits = layer_formula(model, x).detach()
    for o in range(case["out"]):
        found = attribute(model, x, o)
        scale = 1 + found.terms.abs().sum(1).max()
        assert found.terms.shape[1] == min(case["d"] + 1, 2 * case["hidden"] * case["rank"] + 1)
        assert (found.terms.sum(1) - logits[:, o]).abs().max() <= 1e-10 * scale
        assert (found.logit - logits[:, o]).abs().max() <= 1e-10 * scale
        by_input = found.inputs.sum(1) + found.constant
        assert (by_input - logits[:, o]).abs().max() <= 1e-10 * scale


@given(stars)
@properties
def test_terms_of_a_star_op_sum_to_its_channels(case):
    options = {name: case[name] for name in ("offset", "bias", "packed")}
    options |= {"act": None, "dtype": torch.float64}
    rank = case["rank"]
    kind, options = (RankStarOp, options | {"rank": rank}) if rank > 1 else (StarOp, options)
    op = kind(case["d"], case["out"], **options)
    x = randn(2, 3, case["d"], seed=2, dtype=torch.float64)
    expected = layer_formula(op, x)
    for f in eigenfeatures(op):
        assert torch.allclose(f.terms(x).sum(-1), expected[..., f.output], atol=1e-10)


@given(stars)
@properties
def test_vectors_are_those_of_the_dense_form(case):
    model = mlp(**case)
    ones = torch.ones(case["hidden"] * case["rank"], 1, dtype=torch.float64)
    w1, w2 = (
        torch.cat([w, 0 * ones if b is None else b[:, None]], 1).detach()
        for w, b in branch_parameters(star_of(model))
    )
    w2[:, -1] += case["offset"]
    for f in eigenfeatures(model):
        bias = 0.0 if model.g.bias is None else float(model.g.bias[f.output].detach())
        mix = model.g.weight[f.output].detach().repeat_interleave(case["rank"])
        form = dense_form(w1, w2, mix, bias)
        # as many as there are, in order of size, of length one, orthogonal
        dense = torch.linalg.eigvalsh(form)
        padded = torch.cat([f.values, f.values.new_zeros(max(0, len(dense) - len(f.values)))])
        assert torch.allclose(padded.sort().values, dense, atol=1e-12)
        assert (f.values.abs().diff() <= 0).all()
        assert torch.allclose(f.vectors @ f.vectors.T, torch.eye(len(f.values)).double())
        assert torch.allclose(f.vectors @ form, f.values[:, None] * f.vectors, atol=1e-12)
        assert (f.vectors[:, :-1].sum(1) >= 0).all()
        rebuilt = f.vectors.T @ (f.values[:, None] * f.vectors)
        assert torch.allclose(rebuilt, form, atol=1e-12)


@pytest.mark.parametrize("star", [mlp(6, 2, 3), mlp(3, 5, 2, rank=2, offset=1.0)], ids=str)
def test_forms_are_those_of_quadratic_form(star):
    forms = quadratic_form(star).detach()
    for f in eigenfeatures(star):
        rebuilt = f.vectors.T @ (f.values[:, None] * f.vectors)
        assert torch.allclose(rebuilt, forms[f.output], atol=1e-12)


def test_layers_around_the_star_are_folded_in():
    model = pipeline()
    x = randn(50, 2, 3, 3, seed=4, dtype=torch.float64)
    expected = model(x).detach()
    features = eigenfeatures(model, shape=(2, 3, 3))
    assert [f.output for f in features] == [0, 1, 2]
    for f in features:
        assert f.images.shape == (len(f.values), 2, 3, 3)
        assert torch.allclose(f.terms(x).sum(1), expected[:, f.output], rtol=0, atol=1e-10)
    assert next(model.parameters()).requires_grad  # the model itself is left alone
    found = attribute(model, x[0], 1, shape=(2, 3, 3))
    assert found.inputs.shape == (2, 3, 3)
    assert torch.allclose(found.inputs.sum() + found.constant, expected[0, 1])


def test_learned_coefficients_are_inside_and_dynamic_ones_refused():
    options = {"out_features": 2, "act": None, "dtype": torch.float64}
    model, x = ScaledStarMLP(5, 7, **options), randn(4, 5, dtype=torch.float64)
    with torch.no_grad():
        model.scale.copy_(randn(7, seed=1))
        model.shift.copy_(randn(7, seed=2))
    assert torch.allclose(attribute(model, x, 1).logit, model(x)[:, 1], atol=1e-10)
    with pytest.raises(ValueError, match="do not depend on the input, got a DynamicStarMLP"):
        eigenfeatures(DynamicStarMLP(5, 7, **options))


def test_a_direction_asks_why_one_and_not_the_other():
    model, x = mlp(5, 8, 3), randn(4, 5, dtype=torch.float64)
    direction = torch.tensor([1.0, 0.0, -1.0])
    found = attribute(model, x, direction)
    expected = model(x)[:, 0] - model(x)[:, 2]
    assert torch.allclose(found.logit, expected, atol=1e-10)
    assert found.features.output is None
    with pytest.raises(ValueError, match="each of 3 outputs, got 2"):
        attribute(model, x, direction[:2])


def test_float32_models_are_taken_at_their_weights():
    model = mlp(6, 9, 2).float()
    x = randn(3, 6)
    found = attribute(model, x, 1)
    assert found.terms.dtype == torch.float64
    assert torch.allclose(found.logit, model.double()(x.double())[:, 1], atol=1e-12, rtol=0)


def test_top_terms_and_eigenfeatures_given_ready():
    features = eigenfeatures(mlp(6, 9, 2), 1)
    x = randn(6, seed=3)
    found = attribute(features, x)
    assert found.features is features
    top = found.top(2)
    first, second = found.terms.abs().sort(descending=True).values[:2].tolist()
    assert [abs(term) for _, term in top] == [first, second]
    assert all(found.terms[i] == term for i, term in top)
    with pytest.raises(ValueError, match=r"of one input, these are \(1,\)"):
        attribute(features, x[None]).top()


def test_kept_vectors_are_the_largest():
    model = mlp(9, 3, 2)
    whole, kept = eigenfeatures(model, 0), eigenfeatures(model, 0, k=2)
    assert torch.equal(kept.values, whole.values[:2])
    assert torch.equal(kept.vectors, whole.vectors[:2])
    assert (whole.complete, kept.complete) == (True, False)
    assert eigenfeatures(model, 0, k=1000).complete
    x = randn(4, 9)
    for call in (
        kept.explained,
        lambda x: attribute(kept, x),
        lambda x: truncation_curve([kept], x, x),
    ):
        with pytest.raises(ValueError, match="needs all eigenvectors, and 2 were kept"):
            call(x)


def test_shares_are_covariances_with_the_logit():
    model, x = mlp(5, 8, 3), randn(200, 5, dtype=torch.float64)
    f = eigenfeatures(model, 2)
    both = torch.cat([f.terms(x), model(x)[:, 2:].detach()], 1)
    covariance = both.T.cov()
    assert torch.allclose(f.explained(x), covariance[:-1, -1] / covariance[-1, -1])
    assert f.explained(x).sum() == pytest.approx(1)
    with pytest.raises(ValueError, match="on which the logit varies, got 1 of one logit"):
        f.explained(x[:1])


@pytest.mark.parametrize("k", [1, 3, 6])
def test_truncated_models_are_stars_of_the_kept_terms(k):
    model, x = mlp(5, 8, 3), randn(4, 2, 5, dtype=torch.float64)
    features = eigenfeatures(model)
    small = truncate(features, k)
    assert type(small[1]) is RankStarOp
    assert (small[1].rank, small[1].out_features) == (k, 3)
    expected = torch.stack([f.terms(x)[..., :k].sum(-1) for f in features], -1)
    assert torch.allclose(small(x), expected, atol=1e-12)
    if k == 6:
        assert torch.allclose(small(x), model(x), atol=1e-10)
    # what is a star has eigenfeatures, here the same
    again = eigenfeatures(small, 1)
    assert torch.allclose(again.values[:k], features[1].values[:k], atol=1e-12)


def test_truncated_models_take_images():
    model = pipeline()
    x = randn(5, 2, 3, 3, seed=4, dtype=torch.float64)
    features = eigenfeatures(model, shape=(2, 3, 3))
    small = truncate(features, len(features[0].values))
    assert torch.allclose(small(x), model(x), atol=1e-10)


@pytest.mark.parametrize("chunk", [1, 1 << 26])
def test_curve_is_that_of_truncated_models(monkeypatch, chunk):
    monkeypatch.setattr(truncation, "CHUNK_BYTES", chunk)
    model, x = mlp(5, 8, 3), randn(60, 5, dtype=torch.float64)
    labels = torch.arange(60) % 3
    features = eigenfeatures(model)
    curve = truncation_curve(features, x, labels)
    assert curve.k == (1, 2, 3, 5, 6)
    logits = model(x).detach()
    for k, accuracy, agreement, explained in zip(
        curve.k, curve.accuracy, curve.agreement, curve.explained
    ):
        found = truncate(features, k)(x).detach()
        assert accuracy == pytest.approx(float((found.argmax(1) == labels).double().mean()))
        same = (found.argmax(1) == logits.argmax(1)).double().mean()
        assert agreement == pytest.approx(float(same))
        left = ((logits - found).var(0) / logits.var(0)).mean()
        assert explained == pytest.approx(1 - float(left), abs=1e-9)
    assert curve.agreement[-1] == 1
    assert truncation_curve(features, x, labels, k=[4]).k == (4,)


def test_default_numbers_of_eigenvectors():
    model, x = mlp(24, 16, 2), randn(3, 24, dtype=torch.float64)
    curve = truncation_curve(eigenfeatures(model), x, torch.zeros(3))
    assert curve.k == (1, 2, 3, 5, 7, 10, 20, 25)


def test_smallest_k_within_a_loss():
    # that 1 is as good by chance, and 2 is not, makes 1 not enough
    curve = TruncationCurve((1, 2, 3, 5), (0.9, 0.5, 0.85, 0.9), (0,) * 4, (0,) * 4)
    assert [curve.smallest(loss) for loss in (0.0, 0.06, 0.3, 0.5)] == [5, 3, 3, 1]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Linear(3, 3), "exactly one of them; Linear has 0"),
        (StarBlock(3, StarMLP(3, act=None)), "StarBlock has 0"),
        (nn.Sequential(*[StarOp(3, 3, act=None)] * 2), "Sequential has 2"),
        (StarMLP(3, act="relu"), "needs act=None, got 'relu'"),
        (SumOp(3, 3, act=None), "needs products, which a SumOp has none of"),
        (nn.Sequential(nn.Linear(3, 3), nn.ReLU6(), StarOp(3, 3, act=None)), r"ReLU6 \(1\) is not"),
        (nn.Sequential(nn.LayerNorm(3), StarOp(3, 3, act=None)), r"LayerNorm \(0\) takes inputs"),
        (nn.Sequential(StarOp(3, 4, act=None), nn.Softmax(1)), r"Softmax \(1\) is not affine"),
        (
            nn.Sequential(StarOp(3, 4, act=None), nn.Hardtanh(-1e5, 1e5)),
            r"Hardtanh \(1\) is not affine",
        ),
        (nn.Sequential(nn.BatchNorm1d(3), StarOp(3, 3, act=None)), "is in training mode"),
        (nn.Sequential(StarOp(3, 3, act=None), nn.Dropout()), r"Dropout \(1\) is in training"),
    ],
)
def test_what_is_no_quadratic_form_is_refused(model, words):
    with pytest.raises(ValueError, match=words):
        eigenfeatures(model)


def test_shapes_are_named():
    model = nn.Sequential(nn.Flatten(), StarOp(8, 2, act=None))
    x = randn(5, 2, 4)
    assert eigenfeatures(model, 0, shape=(2, 4)).terms(x).shape == (5, 3)
    with pytest.raises(ValueError, match=r"inputs of shape \(8,\), got \(5, 2, 4\)"):
        eigenfeatures(model, 0).terms(x)
    with pytest.raises(ValueError, match=r"reaches the star as \(9,\), where one vector of 8"):
        eigenfeatures(model, 0, shape=(3, 3))
    rows = nn.Sequential(nn.Linear(4, 8), StarOp(8, 2, act=None))
    with pytest.raises(ValueError, match=r"\(2, 4\) reaches the star as \(2, 8\)"):
        eigenfeatures(rows, 0, shape=(2, 4))
    with pytest.raises(ValueError, match=r"Linear \(0\) fails on inputs of shape \(5,\)"):
        eigenfeatures(rows, 0, shape=(5,))


def test_numbers_out_of_range_are_named():
    model = mlp(5, 8, 3)
    features = eigenfeatures(model)
    x, labels = randn(4, 5), torch.zeros(4)
    with pytest.raises(ValueError, match="no output 3, they are 0 to 2"):
        eigenfeatures(model, 3)
    with pytest.raises(TypeError):
        eigenfeatures(model, 1.5)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        eigenfeatures(model, 1, k=0)
    with pytest.raises(ValueError, match="k=7 is more than the 6"):
        truncate(features, 7)
    with pytest.raises(ValueError, match=r"from 1 to 6, got \[0, 2\]"):
        truncation_curve(features, x, labels, k=[0, 2])
    with pytest.raises(ValueError, match=r"\(3,\) labels for inputs \(4, 5\)"):
        truncation_curve(features, x, labels[:3])
    with pytest.raises(ValueError, match="needs a list"):
        truncate(features[0], 1)
    with pytest.raises(ValueError, match="differ in shape and number"):
        truncate([*features, eigenfeatures(mlp(4, 8, 3), 0)], 1)
    with pytest.raises(ValueError, match="output= is needed"):
        attribute(model, x)


def test_what_is_too_large_is_refused_before_anything_is_computed(monkeypatch):
    large = StarMLP(8192, 8192, act=None, device="meta")
    with pytest.raises(ValueError, match="8,193 x 8,193 matrices, the most is 4,097"):
        eigenfeatures(large, 0)
    monkeypatch.setattr(form, "MAX_BYTES", 8 * 3 * 6 * 6 - 1)
    with pytest.raises(ValueError, match="eigenfeatures of 3 outputs with 6 eigenvectors of 6 "):
        eigenfeatures(mlp(5, 8, 3))
    assert len(eigenfeatures(mlp(5, 8, 3), k=5)) == 3


def test_few_products_of_a_large_input_are_found_in_their_span():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), StarMLP(30_000, 3, out_features=2, act=None))
    x = randn(4, 3, 100, 100)
    f = eigenfeatures(model, 1, shape=(3, 100, 100))
    assert f.vectors.shape == (7, 30_001)
    expected = model.double()(x.double())[:, 1]
    assert torch.allclose(f.terms(x).sum(1), expected, atol=1e-10)


def test_an_output_of_a_star_op_has_only_its_own_products():
    op, x = RankStarOp(5000, 300, act=None, rank=2), randn(3, 5000)
    expected = op.double()(x.double())
    f = eigenfeatures(op, 7)
    assert f.vectors.shape == (5, 5001)
    assert torch.allclose(f.terms(x).sum(1), expected[:, 7], atol=1e-10)
    both = torch.zeros(300)
    both[[7, 8]] = torch.tensor([1.0, -1.0])
    found = attribute(StarOp(50, 300, act=None), randn(50), both)
    assert found.terms.shape == (51,)


def test_rows_are_pulled_back_in_parts(monkeypatch):
    x = randn(3, 2, 3, 3, dtype=torch.float64)
    model = pipeline()
    whole = eigenfeatures(model, 0, shape=(2, 3, 3))
    monkeypatch.setattr(compose, "CHUNK_BYTES", 1)
    parts = eigenfeatures(model, 0, shape=(2, 3, 3))
    assert torch.allclose(parts.terms(x), whole.terms(x), atol=1e-12)


class TestPictures:
    def features(self, shape=(4, 4)):
        d = torch.Size(shape).numel()
        return [
            Eigenfeatures(o, randn(5, seed=o), randn(5, d + 1, seed=9 + o).double(), shape, True)
            for o in range(2)
        ]

    def test_a_row_for_each_output(self):
        figure = plot_eigenfeatures(self.features(), top=2, names=["cat", "dog"])
        assert len(figure.axes) == 2 * (1 + 2 + 1 + 2)
        assert [ax.get_ylabel() for ax in figure.axes[::6]] == ["cat", "dog"]

    def test_pictures_are_the_vectors_on_a_scale_centred_at_zero(self):
        (f, _) = self.features()
        figure = plot_eigenfeatures(f, top=2)
        shown = [ax.images[0] for ax in figure.axes if ax.images]
        order = [*(f.values > 0).nonzero()[:2, 0], *(f.values < 0).nonzero()[:2, 0]]
        assert len(shown) == len(order)
        for image, i in zip(shown, order):
            assert torch.equal(torch.as_tensor(image.get_array()), f.images[i])
            low, high = image.get_clim()
            assert low == -high
        constants = [ax.child_axes[0].images[0] for ax in figure.axes if ax.images]
        for image, i in zip(constants, order):
            assert float(image.get_array()[0, 0]) == float(f.constants[i])

    def test_shares_are_written(self):
        model, x = mlp(4, 8, 1), randn(50, 4)
        f = eigenfeatures(model, 0)
        figure = plot_eigenfeatures(f, top=1, x=x, shape=(2, 2))
        first = int((f.values > 0).nonzero()[0])
        expected = f"{100 * float(f.explained(x)[first]):z.0f} %"
        assert figure.axes[1].get_title().endswith(f", {expected}")

    @pytest.mark.parametrize("shape", [(16,), (1, 4, 4), (3, 2, 2)])
    def test_other_shapes(self, shape, tmp_path):
        figure = plot_eigenfeatures(self.features(shape))
        figure.savefig(tmp_path / "x.png")
        assert (tmp_path / "x.png").stat().st_size > 5000

    def test_refused(self, monkeypatch):
        with pytest.raises(ValueError, match=r"shape \(3, 3\) have 9 numbers, the inputs 16"):
            plot_eigenfeatures(self.features(), shape=(3, 3))
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ImportError, match=r"pip install 'starlayers\[plots\]'"):
            plot_eigenfeatures(self.features())
        monkeypatch.undo()
        with pytest.raises(ValueError, match="1 names for 2 outputs"):
            plot_eigenfeatures(self.features(), names=["cat"])
