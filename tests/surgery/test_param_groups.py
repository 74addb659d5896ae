"""Groups of parameters for an optimizer."""

import pytest
import torch
from torch import nn

from starlayers import starify
from starlayers.surgery import gate_parameters, param_groups
from tests.surgery.small import MLP, Gated, Net


class Shapes(nn.Module):
    """Parameters of zero to three dimensions."""

    def __init__(self):
        super().__init__()
        self.scalar = nn.Parameter(torch.ones(()))
        self.vector = nn.Parameter(torch.ones(2))
        self.matrix = nn.Parameter(torch.ones(2, 2))
        self.kernel = nn.Parameter(torch.ones(2, 2, 2))
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)


def numbers(groups):
    return {g["name"]: (g["lr"], g["weight_decay"]) for g in groups}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [(1e-3, 0.01), (1e-3, 0.0), (1e-3, 0.01)]),
        ({"weight_decay": 0.1}, [(1e-3, 0.1), (1e-3, 0.0), (1e-3, 0.1)]),
        ({"gate_lr": 1e-2}, [(1e-3, 0.01), (1e-3, 0.0), (1e-2, 0.01)]),
        ({"gate_lr": 0.0}, [(1e-3, 0.01), (1e-3, 0.0), (0.0, 0.01)]),
        ({"gate_weight_decay": 0.5}, [(1e-3, 0.01), (1e-3, 0.0), (1e-3, 0.5)]),
        ({"gate_weight_decay": 0.0}, [(1e-3, 0.01), (1e-3, 0.0), (1e-3, 0.0)]),
        ({"weight_decay": 0.0}, [(1e-3, 0.0), (1e-3, 0.0), (1e-3, 0.0)]),
    ],
)
def test_rates_and_decays(options, expected):
    groups = param_groups(starify(Net(MLP())), 1e-3, **options)
    names = ("decay", "no_decay", "star_gates")
    assert numbers(groups) == dict(zip(names, expected, strict=True))
    assert [g["name"] for g in groups] == list(names)


def test_every_trainable_parameter_is_in_one_group():
    model = starify(Net(MLP(), Gated()), grow=1)
    groups = {g["name"]: g["params"] for g in param_groups(model, 1e-3)}
    listed = [p for params in groups.values() for p in params]
    assert len(listed) == len(set(listed)) == len(list(model.parameters()))
    assert set(groups["star_gates"]) == set(gate_parameters(model))
    assert sorted(p.ndim for p in groups["no_decay"]) == [1, 1]
    assert [p.ndim for p in groups["decay"]] == [2] * 5


def test_dimensions_decide_about_decay_and_frozen_parameters_are_left_out():
    model = Shapes()
    decay, no_decay = param_groups(model, 0.0)
    assert [id(p) for p in decay["params"]] == [id(model.matrix), id(model.kernel)]
    assert [id(p) for p in no_decay["params"]] == [id(model.scalar), id(model.vector)]
    assert decay["lr"] == 0.0


def test_empty_groups_are_left_out():
    model = starify(Net(MLP()))
    for name, p in model.named_parameters():
        p.requires_grad_("gate" in name)
    assert [g["name"] for g in param_groups(model, 1e-3)] == ["star_gates"]
    for p in gate_parameters(model):
        p.requires_grad_(False)
    model.blocks[0].fc2.weight.requires_grad_(True)
    assert [g["name"] for g in param_groups(model, 1e-3)] == ["decay"]


def test_an_optimizer_takes_the_groups(x):
    model = starify(Net(MLP()))
    optimizer = torch.optim.SGD(param_groups(model, 0.0, gate_lr=1.0, weight_decay=0.0))
    before = [p.detach().clone() for p in model.parameters()]
    model(x).square().sum().backward()
    optimizer.step()
    gates = {id(p) for p in gate_parameters(model)}
    moved = [
        id(p) for p, q in zip(model.parameters(), before, strict=True) if not torch.equal(p, q)
    ]
    assert set(moved) == gates


@pytest.mark.parametrize("name", ["lr", "weight_decay", "gate_lr", "gate_weight_decay"])
def test_negative_numbers(name):
    options = {"lr": 1e-3, name: -0.5}
    with pytest.raises(ValueError, match=f"^param_groups: {name} must be at least 0, got -0.5"):
        param_groups(nn.Linear(2, 2), **options)


def test_nothing_to_train():
    with pytest.raises(ValueError, match="no parameter of this Linear is trainable"):
        param_groups(nn.Linear(2, 2).requires_grad_(False), 1e-3)
