"""Snapshots: what changed since a verification, and keys of what decides about a graph."""

import copy
import pickle

import pytest
import torch
from torch import nn

from starlayers.surgery.entries import names_in_code
from starlayers.surgery.snapshot import Snapshot, signature
from tests.surgery.small import MLP, Gated


def snapshot_of(module, apart=()):
    return Snapshot(module, type(module).forward, apart)


def test_nothing_changes_by_use():
    mlp = MLP(dropout=0.1)
    snapshot = snapshot_of(mlp, ["fc1", "fc2"])
    mlp(torch.ones(2, 8)).sum().backward()
    mlp.eval().requires_grad_(False).double()
    mlp.load_state_dict({k: 2 * v for k, v in mlp.state_dict().items()})
    mlp.fc1.register_forward_hook(lambda *_: None)  # left out: it is called, whatever it is
    mlp.fc2 = nn.Identity()
    assert snapshot.change(mlp) == ""


def test_changes_in_words():
    mlp = MLP(act=nn.LeakyReLU(0.1), dropout=0.1)
    snapshot = snapshot_of(mlp)
    mlp.act.negative_slope = 0.2
    assert snapshot.change(mlp) == "act.negative_slope is 0.2, was 0.1"
    mlp.act.negative_slope = 0.1
    assert snapshot.change(mlp) == ""
    del mlp.act.negative_slope
    assert snapshot.change(mlp) == "act.negative_slope is gone, was 0.1"
    mlp.act.negative_slope = 0.1
    handle = mlp.drop.register_full_backward_hook(lambda *_: None)
    assert snapshot.change(mlp) == "drop has hooks"
    assert snapshot.change(mlp, hooks_of=["drop"]) == ""
    handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert snapshot.change(mlp) == "a global hook is registered"
    handle.remove()
    mlp.act.forward = torch.relu
    assert snapshot.change(mlp) == "forward was set on act, over its own"
    del mlp.act.forward
    mlp.act.__class__ = nn.ReLU
    assert snapshot.change(mlp) == "the class of act is ReLU, was LeakyReLU"
    mlp.act = nn.ReLU()
    assert snapshot.change(mlp) == "act is a ReLU, was a ReLU"  # of another class by now


def test_a_copy_watches_the_copy():
    mlp = MLP()
    mlp.watched = snapshot_of(mlp)
    for again in (copy.deepcopy(mlp), pickle.loads(pickle.dumps(mlp))):
        assert again.watched.change(again) == ""
        again.act.approximate = "tanh"
        assert again.watched.change(again) == "act.approximate is 'tanh', was 'none'"
    assert mlp.watched.change(mlp) == ""


class Holds(MLP):
    def __init__(self):
        super().__init__()
        self.limits, self.fn, self.config = [], torch.sigmoid, Config(1.0, 2)

    def forward(self, x):
        return super().forward(self.product(x)) + len(self.limits) + self.config.limit

    def product(self, x):
        return self.fn(x)


CHANGES = {
    "a list filled": (lambda m: m.limits.append(0.5), "limits is (0.5,), was ()"),
    "a builtin": (lambda m: setattr(m, "fn", torch.relu), "fn is relu, was sigmoid"),
    "a method": (lambda m: setattr(m, "product", torch.relu), "product was set on it"),
    "in an object": (lambda m: setattr(m.config, "limit", 2), "config.limit is 2, was 1.0"),
    "an object": (lambda m: setattr(m, "config", Config(1.0, 2)), "config is a Config, was a"),
    "an object of another class": (lambda m: setattr(m, "config", MLP), "config is MLP, was a"),
    "an activation": (lambda m: setattr(m, "act", nn.GELU()), "act is a GELU, was a GELU"),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_made_after_a_change_knows_of_it(name, how):
    change, words = CHANGES[name]
    mlp = Holds()
    mlp.watched = snapshot_of(mlp)
    before = how(mlp)
    change(mlp)
    assert mlp.watched.change(mlp).startswith(words)
    words = words.replace("product was set on it", "product is new")
    for again in (how(mlp), how(how(mlp))):
        assert again.watched.change(again).startswith(words)
    assert before.watched.change(before) == ""
    change(before)
    assert before.watched.change(before) != ""


def test_a_pickle_is_compared_with_what_is_there_when_it_is_read(monkeypatch):
    mlp = Holds()
    mlp.watched = snapshot_of(mlp)
    data = pickle.dumps(mlp)
    monkeypatch.setattr(Holds, "product", lambda self, x: x)
    again = pickle.loads(data)
    assert again.watched.change(again).endswith("<lambda>, was another function")


def test_equal_modules_have_equal_signatures():
    a, b = signature(Gated())[0], signature(Gated())[0]
    assert a == b
    assert hash(a) == hash(b)
    assert signature(Gated("up"))[0] != a  # another order of children
    assert signature(Gated(scale=2.0))[0] != a
    assert signature(Gated(act=nn.GELU()))[0] != a
    assert signature(Gated().double())[0] != a


class Config:
    def __init__(self, limit, unread):
        self.limit, self.unread = limit, unread


class Reads(MLP):
    def __init__(self, config):
        super().__init__()
        self.config = config

    def forward(self, x):
        return super().forward(x).clamp(max=self.config.limit)


def test_a_config_that_a_forward_reads_counts_by_its_values():
    key = signature(Reads(Config(1.0, 2)))[0]
    assert signature(Reads(Config(1.0, 2)))[0] == key
    assert signature(Reads(Config(1.0, 3)))[0] != key  # helpers may read the others
    assert signature(Reads(Config(5.0, 2)))[0] != key
    assert {"limit", "config", "forward"} <= names_in_code(Reads)
    assert "unread" not in names_in_code(Reads)
