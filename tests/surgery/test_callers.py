"""Methods that call the first layer of an MLP past its activation."""

import pytest
import torch
from torch import nn

from starlayers import starify
from starlayers.surgery import Site
from starlayers.surgery.callers import call_in_forward, other_caller
from starlayers.surgery.find import find_mlps
from tests.surgery.small import MLP

SITE = Site("chain", "plain", "fc1", "act", "fc2")


class Features(MLP):
    def features(self, x):
        return self.fc1(x)


class InALoop(MLP):
    def features(self, x):
        return [self.fc1(y) for y in x]


class ByHelpers(MLP):
    """Its forward reaches all of its methods, so that they were verified."""

    def forward(self, x):
        return self.last(self.first(x))

    def first(self, x):
        return self.act(self.fc1(x))

    def last(self, x):
        return self.fc2(x)


class ReadsWeights(MLP):
    def init_weights(self):
        self.fc1(torch.zeros(1, 8))

    def penalty(self):
        return self.fc1.weight.square().sum()

    def describe(self):
        return f"{self.fc1.in_features} channels"


def assigned(self, x):
    return self.fc2(self.act(self.fc1(x)))


class Assigned(MLP):
    """Its forward has another name."""

    forward = assigned


class Block(nn.Module):
    def __init__(self, mlp=MLP):
        super().__init__()
        self.mlp = mlp()

    def forward(self, x):
        return x + self.mlp(x)


class Bypass(Block):
    def forward(self, x):
        return x + self.mlp(x) + self.mlp.fc1(x).mean()


class Other(Block):
    """Calls a first layer of its own, of the same name."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc1(self.mlp(x))


class Sequence(nn.Module):
    """Takes a dict, so that it cannot be tried by itself."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, batch):
        return self.net(batch["x"]) + batch["y"]

    def weight(self):
        return self.net[0].weight


class SequenceBypass(Sequence):
    def forward(self, batch):
        return self.net(batch["x"]) + self.net[0](batch["y"]).mean()


class SequenceFeatures(Sequence):
    def features(self, x):
        return self.net[0](x)


@pytest.mark.parametrize(
    ("model", "owner", "expected"),
    [
        (MLP(), "", ""),
        (Features(), "", "Features.features"),
        (InALoop(), "", "InALoop.features"),
        (ByHelpers(), "", ""),
        (ReadsWeights(), "", ""),
        (Assigned(), "", ""),
        (Block(), "mlp", ""),
        (Block(Features), "mlp", "Features.features"),
        (Bypass(), "mlp", "Bypass.forward"),
        (nn.ModuleList([Bypass()]), "0.mlp", "Bypass.forward"),
        (Other(), "mlp", ""),
    ],
)
def test_other_callers(model, owner, expected):
    assert other_caller(model, owner, SITE) == expected
    (finding,) = (f for f in find_mlps(model) if f.path.endswith("fc1"))
    assert finding.reason == (f"{expected} calls it past its activation" if expected else None)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Sequence, None),
        (SequenceFeatures, "SequenceFeatures.features calls it past its activation"),
        (SequenceBypass, "SequenceBypass.forward calls 'net.0' by itself, and cannot be tried"),
    ],
)
def test_sequences(kind, reason):
    (finding,) = find_mlps(kind())
    assert finding.reason == reason


def test_calls_in_a_forward():
    assert call_in_forward(Bypass(), "mlp.fc1") == "Bypass.forward"
    assert call_in_forward(Features(), "fc1") == "MLP.forward"
    assert call_in_forward(Features(), "fc3") == ""
    assert call_in_forward(Sequence(), "net.0") == ""


def test_starify_refuses_and_names_the_method():
    with pytest.raises(ValueError, match=r"mlp\.fc1: Bypass\.forward calls it past its activation"):
        starify(Bypass())
