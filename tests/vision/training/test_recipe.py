"""Parameter groups, learning rates and averages of a recipe."""

import math

import pytest
import torch
from torch import nn

from starlayers.vision import StarNet
from starlayers.vision.training import TrainConfig
from starlayers.vision.training.recipe import ema_model, lr_scheduler, param_groups


def test_param_groups_decay_only_matrices_and_kernels():
    model = StarNet(8, (1, 1), num_classes=3, in_chans=1, stage_strides=(2, 2))
    model.head.bias.requires_grad_(False)
    decay, rest = param_groups(model, 0.3)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    groups = {id(p): "decay" for p in decay["params"]} | {id(p): "rest" for p in rest["params"]}
    want = {}
    for m in model.modules():
        for name, p in m.named_parameters(recurse=False):
            is_kernel = isinstance(m, nn.Linear | nn.Conv2d) and name == "weight"
            want[id(p)] = "decay" if is_kernel else "rest"
    del want[id(model.head.bias)]
    assert groups == want
    assert len(decay["params"]) + len(rest["params"]) == len(want)


def rates(total, steps=None, **recipe):
    """Return the rate of each step, and after the last one, for a peak of 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = lr_scheduler(optimizer, TrainConfig(lr=1.0, **recipe), total)
    values = []
    for _ in range(steps or total):
        values += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    return values + schedule.get_last_lr()


def half_cosine(start, end, fraction):
    return end + (start - end) * (1 + math.cos(math.pi * fraction)) / 2


@pytest.mark.parametrize(
    ("total", "warmup", "want"),
    [
        (1, 0.0, [1, 1]),
        (2, 0.0, [1, 1, 0]),
        (4, 0.5, [0.5, 1, 1, 0.5, 0]),
        (6, 0.25, [0.5, 1, 1, *(half_cosine(1, 0, i / 4) for i in (1, 2, 3, 4))]),
        (4, 0.9, [0.25, 0.5, 0.75, 1, 1]),
    ],
)
def test_cosine(total, warmup, want):
    assert rates(total, warmup=warmup) == pytest.approx(want, abs=1e-7)


LOW, LAST = 1 / 25, 1 / 25 / 1e4


@pytest.mark.parametrize(
    ("total", "warmup", "want"),
    [
        (1, 0.1, [LOW, 1]),
        (2, 0.1, [LOW, 1, LAST]),
        (3, 0.1, [LOW, 1, LAST]),
        (4, 0.0, [LOW, 1, half_cosine(1, LAST, 0.5), LAST]),
        (4, 0.75, [LOW, half_cosine(LOW, 1, 0.5), 1, LAST]),
        (5, 0.4, [LOW, 1, half_cosine(1, LAST, 1 / 3), half_cosine(1, LAST, 2 / 3), LAST]),
    ],
)
def test_onecycle(total, warmup, want):
    values = rates(total, len(want) - 1, schedule="onecycle", warmup=warmup)
    assert values == pytest.approx(want, rel=1e-5, abs=1e-9)


def test_an_average_of_parameters_and_buffers_and_a_copy_of_counters():
    model = nn.BatchNorm1d(2)
    ema = ema_model(model, 0.6)
    want = {}
    # min(0.6, (1 + n) / (10 + n)): the decay is smaller than 0.6 up to n = 12
    for n, value in enumerate([1.0, 2.0, 5.0, 3.0]):
        with torch.no_grad():
            for t in (model.weight, model.running_mean):
                t.fill_(value)
            model.num_batches_tracked.fill_(int(value))
        ema.update_parameters(model)
        decay = (1 + n) / (10 + n) if n else 0.0
        for name in ("weight", "running_mean"):
            want[name] = decay * want.get(name, 0.0) + (1 - decay) * value
    for name, value in want.items():
        assert ema.module.state_dict()[name].tolist() == pytest.approx([value] * 2)
    assert int(ema.module.num_batches_tracked) == 3
    assert model.weight.tolist() == [3.0, 3.0]


@pytest.mark.parametrize("decay", [0.05, 0.6])
def test_the_decay_of_the_average_is_limited(decay):
    model = nn.Linear(1, 1, bias=False)
    ema = ema_model(model, decay)
    for value in (0.0, 1.0):
        nn.init.constant_(model.weight, value)
        ema.update_parameters(model)
    assert ema.module.weight.item() == pytest.approx(1 - min(decay, 2 / 11))
