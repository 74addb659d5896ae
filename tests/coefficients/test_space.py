"""The ready-made space, and what values of it do to a model."""

import copy

import pytest
import torch
from torch import nn

from starlayers import StarMLP, StarOp
from starlayers.coefficients.samplers import METHODS
from starlayers.coefficients.search import search
from starlayers.coefficients.space import apply_initialisation, coefficient_space
from tests.helpers import FORMULAS, randn

X = randn(7, 6, dtype=torch.float64)


def branches(op, x=X):
    return op.f1(x), op.f2(x)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_draws_from_it_and_models_can_be_built(method):
    def objective(trial):
        v = trial.params
        options = {"rank": v["rank"], "coefficients": v["coefficients"]}
        model = nn.Sequential(StarOp(6, 4, **options), StarMLP(4, **options))
        apply_initialisation(model, v)
        return model(X.float()).std().item()

    result = search(objective, coefficient_space(2), method=method, trials=14, progress=False)
    assert result.failed == []
    for trial in result.trials:
        assert set(trial.params) == set(coefficient_space(2))
        for name in ("l1", "l2", "balance"):
            assert 1e-6 <= trial.params[name] <= 1
    assert {t.params["coefficients"] for t in result.trials} <= {"fixed", "scale", "dynamic"}


def test_without_layers_there_are_no_layer_scales():
    assert not any(name.startswith("layer_scale") for name in coefficient_space())
    assert [n for n in coefficient_space(2) if n.startswith("layer")] == [
        "layer_scale_0",
        "layer_scale_1",
    ]
    with pytest.raises(ValueError, match=r"coefficient_space: layers .* got -1"):
        coefficient_space(-1)


@pytest.mark.parametrize("own_offset", [0.0, 0.7])
@pytest.mark.parametrize("kind", ["fixed", "scale"])
def test_branches_become_what_the_formula_says(own_offset, kind):
    values = {"gain1": 2.0, "gain2": 0.5, "offset": 0.3, "layer_scale_0": 3.0, "l2": 0.1, "rank": 2}
    options = {"offset": own_offset, "coefficients": kind, "bias": kind == "fixed"}
    op = StarOp(6, 4, rank=2, act="gelu", **options).double()
    h1, h2 = branches(copy.deepcopy(op))
    assert apply_initialisation(op, values) is op
    op.fold()
    new1, new2 = branches(op)
    assert torch.allclose(new1, 2 * h1)
    assert torch.allclose(own_offset + new2, 3 * (own_offset + 0.3 + 0.5 * h2))
    y = FORMULAS["gelu"](2 * h1) * 3 * (own_offset + 0.3 + 0.5 * h2)
    assert torch.allclose(op(X), y.unflatten(-1, (2, 4)).sum(-2))


def test_each_layer_has_its_scale_and_what_is_missing_changes_nothing():
    model = nn.Sequential(StarOp(6, 4), nn.Linear(4, 4), StarMLP(4, 8, act=None)).double()
    before = copy.deepcopy(model)
    apply_initialisation(model, {"l1": 1.0})
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters()))
    apply_initialisation(model, {"layer_scale_1": 2.0})
    assert torch.equal(model[0](X), before[0](X))
    h = before[1](before[0](X))
    assert torch.allclose(model[2](h) - model[2].g.bias, 2 * (before[2](h) - before[2].g.bias))
    for p, q in zip(model[2].g.parameters(), before[2].g.parameters()):
        assert torch.equal(p, q)


def test_what_cannot_be_is_named():
    with pytest.raises(ValueError, match=r"layer_scale_2=1.5; the model has 1 star layers"):
        apply_initialisation(StarOp(6, 4), {"layer_scale_2": 1.5})
    with pytest.raises(ValueError, match=r"offset=0.5 .* layer '1' has none"):
        apply_initialisation(
            nn.Sequential(nn.Flatten(), StarOp(6, 4, bias=False)), {"offset": 0.5, "gain1": 2.0}
        )
    with pytest.raises(ValueError, match="Linear has no star layers"):
        apply_initialisation(nn.Linear(2, 2), {})
