"""Groups of parameters."""

import pytest
from torch import nn

from starlayers import starify
from starlayers.surgery import gate_parameters, param_groups
from tests.surgery.small import MLP, Net


def test_param_groups(x):
    model = starify(Net(MLP()))
    groups = {g["name"]: g for g in param_groups(model, 1e-3, gate_lr=1e-2, weight_decay=0.1)}
    assert {name: (g["lr"], g["weight_decay"]) for name, g in groups.items()} == {
        "decay": (1e-3, 0.1),
        "no_decay": (1e-3, 0.0),
        "star_gates": (1e-2, 0.1),
    }
    assert sorted(p.ndim for p in groups["no_decay"]["params"]) == [1, 1]
    assert groups["star_gates"]["params"] == gate_parameters(model)
    for name, p in model.named_parameters():
        p.requires_grad_("gate" in name)
    assert [g["name"] for g in param_groups(model, 1e-3)] == ["star_gates"]
    with pytest.raises(ValueError, match="gate_lr must be at least 0, got -1"):
        param_groups(model, 1e-3, gate_lr=-1)
    with pytest.raises(ValueError, match="no parameter of this Linear is trainable"):
        param_groups(nn.Linear(2, 2).requires_grad_(False), 1e-3)
