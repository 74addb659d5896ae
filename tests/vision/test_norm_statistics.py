"""Statistics of BatchNorm estimated anew, against averages written out."""

import copy

import pytest
import torch
from torch import nn

from starlayers.vision import StarNet, reestimate_norms
from starlayers.vision.norm_statistics import frozen_norms


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
    )


def batches(*sizes):
    return [torch.randn(n, 2, 5, 5) * (i + 1) + i for i, n in enumerate(sizes)]


def statistics(model):
    return {k: v.clone() for k, v in model.state_dict().items() if "running" in k or "num_" in k}


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=0, msg=name)


def test_statistics_are_the_averages_over_the_batches():
    model, xs = net().double(), [x.double() for x in batches(4, 3, 5)]
    reestimate_norms(model, xs)
    first = [model[0](x).transpose(0, 1).flatten(1) for x in xs]
    for i, values in ((1, first),):
        mean = torch.stack([v.mean(1) for v in values]).mean(0)
        var = torch.stack([v.var(1) for v in values]).mean(0)
        torch.testing.assert_close(model[i].running_mean, mean)
        torch.testing.assert_close(model[i].running_var, var)
    # the second norm sees what the first makes of the batch itself
    model.train()
    inner = [nn.Sequential(*copy.deepcopy(model)[:4])(x).transpose(0, 1).flatten(1) for x in xs]
    torch.testing.assert_close(
        model[4].running_mean, torch.stack([v.mean(1) for v in inner]).mean(0)
    )
    assert model[4].num_batches_tracked == 3


@pytest.mark.parametrize("training", [False, True])
def test_modes_momenta_gradients_and_weights_stay(training):
    model = net().train(training)
    model[1].momentum, model[4].momentum = 0.3, None
    model[2].train(not training)  # an odd one
    modes = [m.training for m in model.modules()]
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    reestimate_norms(model, batches(4))
    assert [m.training for m in model.modules()] == modes
    assert (model[1].momentum, model[4].momentum) == (0.3, None)
    assert_equal(dict(model.named_parameters()), weights)
    assert all(p.grad is None for p in model.parameters())


def test_an_estimate_does_not_depend_on_earlier_statistics():
    one, other, xs = net(), net(), batches(4, 6)
    other[1].running_mean.fill_(9.0)
    other[4].num_batches_tracked.fill_(70)
    for model in (one, other):
        reestimate_norms(model, iter(xs))
    assert_equal(statistics(one), statistics(other))


def test_frozen_norms_keep_their_statistics_and_stay_in_eval():
    model = net().train()
    model[:2].requires_grad_(False)
    before, other = model[1].running_mean.clone(), model[4].running_mean.clone()
    assert frozen_norms(model) == [model[1]]
    reestimate_norms(model, batches(4, 4))
    assert torch.equal(model[1].running_mean, before)
    assert model[1].num_batches_tracked == 0
    assert not torch.equal(model[4].running_mean, other)


def test_a_norm_in_eval_mode_of_a_model_in_training_is_frozen():
    model = net().train()
    model[4].eval()
    assert frozen_norms(model) == [model[4]]
    model.eval()
    assert frozen_norms(model) == []  # it is validated as a whole


def test_an_average_whose_parameters_need_no_gradient_is_estimated():
    model = net().requires_grad_(False).eval()
    assert frozen_norms(model) == []
    before = statistics(model)
    reestimate_norms(model, batches(4))
    assert not torch.equal(model[1].running_mean, before["1.running_mean"])


def test_norms_without_statistics_and_other_networks_are_left():
    model = nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False), nn.Linear(5, 5))
    reestimate_norms(model, [])  # nothing to estimate, nothing asked for
    assert model[0].running_mean is None


@pytest.mark.parametrize("case", ["empty", "fails", "one value"])
def test_statistics_are_as_before_where_it_fails(case):
    model = net().eval()
    before = statistics(model)
    wrong = {
        "empty": [],
        "fails": [*batches(4), torch.ones(1, 7, 2, 2)],
        "one value": [torch.ones(1, 2, 1, 1)],
    }[case]
    expected = {"empty": "batches is empty", "fails": "channels", "one value": "more than 1 value"}
    with pytest.raises((ValueError, RuntimeError), match=expected[case]):
        reestimate_norms(model, wrong)
    assert_equal(statistics(model), before)
    assert not any(m.training for m in model.modules())
    assert model[1].momentum == 0.1


def test_weights_that_stood_still_have_the_same_statistics():
    """A StarNet whose statistics are estimated from its own batch normalises as in training."""
    torch.manual_seed(0)
    model = StarNet(8, (1, 1), num_classes=5, stage_strides=(2, 2))
    x = torch.randn(16, 3, 32, 32)
    reestimate_norms(model, [x])
    want = model.train()(x)
    reestimate_norms(model, [x])
    torch.testing.assert_close(model.eval()(x), want, rtol=0.02, atol=0.02)
