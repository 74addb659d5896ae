"""Tuning on metrics without gradients, and the ready-made space."""

import copy
from functools import partial

import gymnasium
import numpy as np
import pytest
import torch
from sacrebleu import corpus_bleu
from torch import nn

from starlayers import StarBlock, StarMLP, StarOp
from starlayers.coefficients.modules import (
    DynamicStarMLP,
    DynamicStarOp,
    RankStarMLP,
    RankStarOp,
    ScaledStarMLP,
    ScaledStarOp,
    SumOp,
)
from starlayers.coefficients.search import search
from starlayers.coefficients.space import METHODS, apply_initialisation, coefficient_space
from starlayers.coefficients.tune import tune_coefficients
from starlayers.datasets.images import load_images
from tests.coefficients.layers import star_of
from tests.helpers import FORMULAS, branch_parameters, randn

#: class of an op and of an MLP by the name in `coefficient_space`
KINDS = {
    "fixed": (StarOp, StarMLP),
    "scale": (ScaledStarOp, ScaledStarMLP),
    "dynamic": (DynamicStarOp, DynamicStarMLP),
}


def net(kind="fixed", **options):
    torch.manual_seed(0)
    op, mlp = KINDS[kind]
    return nn.Sequential(op(6, 12, **options), nn.Linear(12, 5), mlp(5, 10, **options))


X, Y = randn(64, 6, seed=1), randn(64, 5, seed=2)


def fit(model):
    """Larger is better."""
    with torch.no_grad():
        return -(model(X) - Y).square().mean().item()


def loss(model):
    return -fit(model)


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a | b)


def tune(model, metric, **options):
    return tune_coefficients(model, metric, **({"progress": False, "trials": 40} | options))


slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("method", "metric", "direction"),
    [
        ("cma", fit, "maximize"),
        ("tpe", loss, "minimize"),
        *(slow(m, fit, "maximize") for m in METHODS if m != "cma"),
        *(slow(m, loss, "minimize") for m in METHODS if m != "tpe"),
    ],
)
def test_it_is_better_and_nothing_but_scales_changed(method, metric, direction):
    model = net()
    before = weights(model)
    result = tune(model, metric, method=method, direction=direction)
    assert result.start == metric(net())
    assert metric(model) == result.value
    assert (result.value > result.start) == (direction == "maximize")
    assert result.gain == abs(result.value - result.start) > 0
    after = weights(model)
    assert after.keys() == before.keys()
    changed = {k for k in after if not torch.equal(after[k], before[k])}
    assert changed == {"0.f2.weight", "0.f2.bias", "2.f2.weight", "2.f2.bias"}
    for layer, s in result.scales.items():
        assert s.shape == (after[f"{layer}.f2.bias"].shape[0],)
        assert 0.5 <= s.min() < s.max() <= 2
        assert 1 < len(s.unique()) <= 8  # "gp" goes to the borders
        s = s.float()
        assert torch.equal(after[f"{layer}.f2.bias"], before[f"{layer}.f2.bias"] * s)
        assert torch.equal(after[f"{layer}.f2.weight"], before[f"{layer}.f2.weight"] * s[:, None])
    assert len(result.search.trials) == 40
    assert result.search.trials[0].value == result.start
    assert set(result.search.trials[0].params.values()) == {1.0}


def test_with_an_offset_the_whole_product_is_scaled():
    op = RankStarOp(6, 4, offset=0.7, act="gelu", rank=3).double()
    before = copy.deepcopy(op)
    x = randn(9, 6, dtype=torch.float64)
    wanted = randn(9, 4, seed=5, dtype=torch.float64)
    result = tune(op, lambda m: -(m(x) - wanted).square().mean().item(), groups=None)
    s = result.scales[""]
    assert s.shape == (12,)
    assert len(s.unique()) > 6
    (w1, b1), (w2, b2) = branch_parameters(before.star)
    products = FORMULAS["gelu"](x @ w1.T + b1) * (0.7 + x @ w2.T + b2) * s
    assert torch.allclose(op(x), products.unflatten(-1, (4, 3)).sum(-1), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(op(x), before(x))


def test_groups_are_neighbours_in_size():
    op = StarOp(6, 12)
    sizes = op.f1.weight.norm(dim=1) * op.f2.weight.norm(dim=1)
    s = tune(op, lambda m: m.f2.weight.sum().item(), groups=3).scales[""]
    by_size = s[sizes.argsort(descending=True)].view(3, 4)
    assert torch.equal(by_size, by_size[:, :1].expand(3, 4))
    assert len(s.unique()) == 3
    assert len(tune(op, fit_sum, groups=50, trials=3).search.trials[0].params) == 12


def fit_sum(model):
    return model.f2.weight.sum().item()


@pytest.mark.parametrize(
    ("layers", "tuned"),
    [
        (None, ["a", "b.0.mlp", "b.1"]),
        ("a", ["a"]),
        (["b"], ["b.0.mlp", "b.1"]),
        ("*.mlp", ["b.0.mlp"]),
    ],
)
def test_layers_are_chosen_by_name(layers, tuned):
    model = nn.Module()
    model.a, model.c = StarOp(4, 4), SumOp(4, 4)
    model.b = nn.Sequential(StarBlock(4), StarOp(4, 4))
    assert list(tune(model, lambda m: 0.0, layers=layers, trials=2).scales) == tuned


@pytest.mark.parametrize("method", ["cma", "random"])
def test_it_never_ends_worse(method):
    """Here every change is one for the worse."""
    model = net()
    before = weights(model)
    for sign, direction in ((1.0, "maximize"), (-1.0, "minimize")):

        def metric(m, sign=sign):
            return sign * same(before, weights(m))

        result = tune(model, metric, method=method, direction=direction, trials=12)
        assert (result.start, result.value, result.gain) == (sign, sign, 0.0)
        assert {t.value for t in result.search.trials} == {sign, 0.0}
        assert same(before, weights(model))
        assert all((s == 1).all() for s in result.scales.values())


def test_what_luck_gave_is_not_kept():
    """A metric that does not say the same twice: the result is asked once more."""
    said = iter([1.0, 5.0, 0.5, 0.2, 0.3])  # the start, three trials, the best of them again
    model = net()
    before = weights(model)
    result = tune(model, lambda m: next(said), trials=4)
    assert (result.start, result.value) == (1.0, 1.0)
    assert result.search.value == 5.0
    assert same(before, weights(model))


# Metrics without gradients -----------------------------------------------------------------------


def test_accuracy():
    data = load_images("digits")
    images, labels = (torch.stack(t) for t in zip(*data.train))
    images = images.float().flatten(1) / 255
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), StarMLP(16, 24, out_features=10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(18):
        nn.functional.cross_entropy(model(images[:700]), labels[:700]).backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def accuracy(m):
        return (m(images[700:]).argmax(1) == labels[700:]).float().mean().item()

    result = tune(model, accuracy, trials=60)
    assert 0.5 < result.start < result.value <= 1
    assert accuracy(model) == result.value


class Point(gymnasium.Env):
    """Push a point to 0: reward is minus its distance."""

    observation_space = gymnasium.spaces.Box(-10, 10, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-1, 1, 2)
        return self.state.astype(np.float32), {}

    def step(self, action):
        push = float(np.clip(action, -1, 1)[0])
        self.state = self.state + 0.2 * np.array([self.state[1], push])
        return self.state.astype(np.float32), -abs(self.state[0]), False, False, {}


@torch.no_grad()
def mean_return(policy):
    env = gymnasium.wrappers.TimeLimit(Point(), 30)
    total = 0.0
    for seed in range(4):
        seen, _ = env.reset(seed=seed)
        ended = False
        while not ended:
            action = policy(torch.as_tensor(seen))
            seen, reward, _, ended, _ = env.step(action.numpy())
            total += reward
    return total / 4


def test_return_of_an_agent():
    torch.manual_seed(1)
    policy = nn.Sequential(StarMLP(2, 16, act="tanh", offset=1, out_features=1), nn.Tanh())
    result = tune(policy, mean_return, trials=60)
    assert result.value > result.start + 1
    assert mean_return(policy) == result.value


WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree"]


def test_bleu():
    torch.manual_seed(0)
    source = torch.randint(10, (20, 6))
    target = (source * 3 + 1) % 10
    references = [" ".join(WORDS[i] for i in row) for row in target]
    model = nn.Sequential(nn.Embedding(10, 8), StarMLP(8, 16, out_features=10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(8):
        nn.functional.cross_entropy(model(source).flatten(0, 1), target.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def bleu(m):
        said = [" ".join(WORDS[i] for i in row) for row in m(source).argmax(-1)]
        return corpus_bleu(said, [references]).score

    result = tune(model, bleu, trials=80)
    assert 1 < result.start < result.value
    assert bleu(model) == result.value


# What goes wrong ---------------------------------------------------------------------------------


def test_a_metric_that_fails_in_a_trial_fails_that_trial():
    model, calls = net(), []

    def metric(m):
        calls.append(1)
        if len(calls) in (3, 5):
            raise OSError("disk full")
        return fit(m)

    result = tune(model, metric, trials=20)
    assert [t.number for t in result.search.failed] == [2, 4]
    assert result.search.failed[0].user_attrs["error"] == "OSError: disk full"
    assert fit(model) == result.value > result.start


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", [1, 2, 7, 12])
def test_the_model_has_its_weights_back(error, call):
    """At the start, in the first trial, in another, and when the result is asked once more."""
    model, calls = net(), []
    before = weights(model)

    def metric(m):
        calls.append(1)
        if len(calls) == call:
            raise error
        return fit(m)

    ends = call in (1, 12) or isinstance(error, KeyboardInterrupt)
    if ends:
        with pytest.raises(type(error)):
            tune(model, metric, trials=11)
        assert same(before, weights(model))
    else:
        assert tune(model, metric, trials=11).gain > 0
    assert len(calls) == (call if ends else 12)


def test_stopped_and_called_again_is_as_if_never_stopped(tmp_path):
    options = {"trials": 16, "method": "tpe", "storage": tmp_path / "tune.db"}
    whole = net()
    wanted = tune(whole, fit, trials=16, method="tpe")
    model, calls = net(), []

    def stopped(m):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return fit(m)

    with pytest.raises(KeyboardInterrupt):
        tune(model, stopped, **options)
    result = tune(model, stopped, **options)
    assert (
        len(calls) == 9 + 1 + 8 + 1
    )  # the start again, the trials from the one cut off, the result
    assert len(result.search.trials) == 16
    assert same(weights(model), weights(whole))
    assert result.value == wanted.value

    # what was tuned is another model, and is told so
    with pytest.raises(ValueError, match=r"tune_coefficients: .*begun with weights='\w+', and now"):
        tune(model, fit, **options)
    again = net()
    assert tune(again, fit, **options).value == wanted.value
    with pytest.raises(ValueError, match="begun with space="):
        tune(net(), fit, groups=4, **options)


WRONG = [
    (net(), {"method": "adam"}, "unknown method 'adam', choose one of tpe, gp, cma"),
    (net(), {"direction": "up"}, "unknown direction 'up'"),
    (net(), {"layers": "1"}, r"layers='1' matches none of the 2 star layers, '0', '2'"),
    (net(), {"width": 1.0}, "width must be above 1.* got 1.0"),
    (net(), {"width": float("nan")}, "width must be above 1.* got nan"),
    (net(), {"groups": 0}, "groups must be at least 1, got 0"),
    (net(), {"trials": 0}, "trials must be at least 1, got 0"),
    (net(), {"seed": -1}, "seed must be at least 0, got -1"),
    (StarOp(6, 4), {"groups": 1}, r"at least two numbers .* has 1 \(star:0\): use 'tpe'"),
    (nn.Linear(6, 4), {}, "Linear has no star layers"),
    (SumOp(6, 4), {}, "SumOp has no star layers"),
    (net(offset=1.0, bias=False), {}, r"layer '0' has offset=1.0 and no bias to hold a factor"),
]


@pytest.mark.parametrize(("model", "options", "words"), WRONG, ids=[w for *_, w in WRONG])
def test_wrong_arguments_are_named(model, options, words):
    before = weights(model)
    with pytest.raises(ValueError, match=f"^tune_coefficients: .*{words}"):
        tune(model, lambda m: 1.0, **options)
    assert same(before, weights(model))


def test_second_branches_that_cannot_be_scaled_are_named():
    model = net()
    model[2].f2 = nn.Sequential(nn.Linear(5, 10))
    with pytest.raises(ValueError, match="layer '2' has a second branch of type Sequential"):
        tune(model, fit)
    parametrised = net()
    nn.utils.parametrizations.weight_norm(parametrised[0].f2)
    with pytest.raises(ValueError, match="layer '0' has a second branch of type Parametrized"):
        tune(parametrised, fit)
    with pytest.raises(
        ValueError, match="the metric of the model is nan, which cannot be compared"
    ):
        tune(net(), lambda m: float("nan"))


def test_layers_with_a_scale_of_their_own_are_tuned_there():
    for kind in ("scale", "dynamic"):
        model = net(kind)
        before = weights(model)
        result = tune(model, fit)
        changed = {k for k, v in weights(model).items() if not torch.equal(v, before[k])}
        assert changed == {"0.scale", "2.scale"}
        assert torch.equal(model[0].scale, before["0.scale"] * result.scales["0"].float())
        assert fit(model) == result.value > result.start


# --- the ready-made space, and what values of it do to a model


INPUTS = randn(7, 6, dtype=torch.float64)


def branches(op, x=INPUTS):
    return tuple(x @ w.T + (0 if b is None else b) for w, b in branch_parameters(star_of(op)))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_draws_from_it_and_models_can_be_built(method):
    def objective(trial):
        v = trial.params
        op, mlp = KINDS[v["coefficients"]]
        model = nn.Sequential(op(6, 4), mlp(4))
        if v["rank"] > 1:
            model[1] = RankStarMLP(4, rank=v["rank"])
        apply_initialisation(model, v)
        return model(INPUTS.float()).std().item()

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
@pytest.mark.parametrize("kind", [StarOp, RankStarOp, ScaledStarOp])
@pytest.mark.parametrize("packed", [False, True])
def test_branches_become_what_the_formula_says(own_offset, kind, packed):
    values = {"gain1": 2.0, "gain2": 0.5, "offset": 0.3, "layer_scale_0": 3.0, "l2": 0.1, "rank": 2}
    options = {"offset": own_offset, "packed": packed, "bias": kind is not ScaledStarOp}
    op = kind(6, 4, act="gelu", **options).double()
    h1, h2 = branches(copy.deepcopy(op))
    assert apply_initialisation(op, values) is op
    new1, new2 = branches(op.fold() if kind is ScaledStarOp else op)
    assert torch.allclose(new1, 2 * h1)
    assert torch.allclose(own_offset + new2, 3 * (own_offset + 0.3 + 0.5 * h2))
    y = FORMULAS["gelu"](2 * h1) * 3 * (own_offset + 0.3 + 0.5 * h2)
    assert torch.allclose(op(INPUTS), y.unflatten(-1, (4, -1)).sum(-1))


def test_each_layer_has_its_scale_and_what_is_missing_changes_nothing():
    model = nn.Sequential(StarOp(6, 4), nn.Linear(4, 4), StarMLP(4, 8, act=None)).double()
    before = copy.deepcopy(model)
    apply_initialisation(model, {"l1": 1.0})
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters()))
    apply_initialisation(model, {"layer_scale_1": 2.0})
    assert torch.equal(model[0](INPUTS), before[0](INPUTS))
    h = before[1](before[0](INPUTS))
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
