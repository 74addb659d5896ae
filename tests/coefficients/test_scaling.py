"""Factors of products, written into layers and taken back."""

import pytest
import torch
from torch import nn

from starlayers import StarMLP, StarOp
from starlayers.coefficients.scaling import ProductScaler, star_layers
from tests.helpers import randn, star_op_formula

X = randn(5, 4, dtype=torch.float64)


def star(**options):
    return StarOp(4, 3, rank=2, act="tanh", **options).double()


def products(op):
    """Each product on its own, (inputs, rank * channels)."""
    alone = StarOp(4, 6, act="tanh", offset=op.offset).double()
    alone.load_state_dict({k: v for k, v in op.state_dict().items() if k[0] == "f"})
    return star_op_formula(alone, X)


@pytest.mark.parametrize("offset", [0.0, 0.7])
def test_a_factor_scales_its_product_and_is_of_the_start(offset):
    op = star(offset=offset)
    parts, before = products(op), op(X)
    scaler = ProductScaler("test", "", op)
    assert scaler.products == 6
    for seed in range(2):  # the second factors replace the first
        s = randn(6, seed=seed, dtype=torch.float64)
        scaler.write(s)
        assert torch.allclose(op(X), (parts * s).unflatten(-1, (2, 3)).sum(-2))
    scaler.restore()
    assert torch.equal(op(X), before)


def test_layers_without_bias_and_with_a_scale():
    op = star(bias=False)
    before = op(X)
    ProductScaler("test", "", op).write(torch.full((6,), 3.0))
    assert torch.allclose(op(X), 3 * before)
    op = star(coefficients="scale", offset=1.0)
    before, f2 = op(X), op.f2.weight.clone()
    ProductScaler("test", "", op).write(torch.full((6,), 3.0))
    assert torch.allclose(op(X), 3 * before)
    assert torch.equal(op.f2.weight, f2)
    assert torch.equal(op.scale, torch.full_like(op.scale, 3))


@pytest.mark.parametrize(
    ("count", "sizes"), [(1, [6]), (2, [3, 3]), (4, [2, 2, 1, 1]), (9, [1] * 6)]
)
def test_groups(count, sizes):
    op = star()
    norms = op.f1.weight.norm(dim=1) * op.f2.weight.norm(dim=1)
    scaler = ProductScaler("test", "", op)
    assert torch.allclose(scaler.sizes(), norms)
    groups = scaler.groups(count)
    assert [len(g) for g in groups] == sizes
    order = torch.cat(groups)
    assert torch.equal(norms[order], norms.sort(descending=True).values)
    assert [g.tolist() for g in scaler.groups(None)] == [[i] for i in order.tolist()]


def test_layers_by_name_and_pattern():
    model = nn.Sequential(StarOp(4, 4), nn.Sequential(StarMLP(4, 8)), StarOp(4, 4, combine="sum"))
    assert list(star_layers("test", model)) == ["0", "1.0"]
    for patterns, names in (
        ("0", ["0"]),
        ("1", ["1.0"]),
        (["1", "0"], ["0", "1.0"]),
        ("*", ["0", "1.0"]),
    ):
        assert list(star_layers("test", model, patterns)) == names
    with pytest.raises(
        ValueError, match=r"test: layers='2' matches none of the 2 star layers, '0'"
    ):
        star_layers("test", model, ["0", "2"])


def test_a_layer_of_another_class_has_no_factors():
    class Vectors(nn.Module):
        def star_vectors(self):
            return []

    with pytest.raises(ValueError, match=r"test: Vectors has no star layers with factors"):
        star_layers("test", Vectors())
