"""Graphs of forwards: calls of children, inputs, and forwards that have none."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from starlayers.surgery.graph import trace
from starlayers.surgery.trial_run import MismatchError
from tests.surgery.small import Gated


def test_calls_of_children_are_kept_whole():
    net = nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.GELU(), nn.LayerNorm(6)))
    graph = trace(net, torch.ones(3, 5, 4), ())
    assert [call.name for call in graph.calls] == ["0", "1"]
    assert [str(node.target) for node in graph.calls[1].nodes] == [
        "aten.gelu.default",
        "aten.layer_norm.default",
    ]
    assert graph.inputs(graph.calls[0]) == [graph.x]
    assert graph.inputs(graph.calls[1]) == [graph.calls[0].nodes[-1]]
    assert graph.output is graph.calls[1].nodes[-1]
    assert sorted(graph.tensors.values()) == ["0.bias", "0.weight", "1.1.bias", "1.1.weight"]
    parts = trace(net, torch.ones(3, 5, 4), ("1.0", "1.1"))
    assert [call.name for call in parts.calls] == ["0", "1.0", "1.1"]


def test_a_module_called_twice_has_two_calls():
    class Again(Gated):
        def forward(self, x):
            return self.down(self.act(self.gate(x)) * self.gate(x))

    graph = trace(Again(), torch.ones(3, 8), ())
    assert len(graph.calls_to("gate")) == 2
    assert graph.calls_to("up") == []
    product = graph.inputs(graph.calls_to("down")[0])[0]
    assert graph.call_of(product) is None
    assert graph.call_of(graph.output).name == "down"


class Keeps(Gated):
    def forward(self, x):
        self.kept = x
        return super().forward(x)


class Counts(Gated):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return super().forward(x)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Keeps, "its forward sets 'kept'"),
        (Counts, "its forward changes 'calls' in place"),
        (lambda: Short(Gated()), r"depends on the size of its input: .* <= 512"),
        (lambda: Square(Gated()), "depends on the size of its input"),
        (lambda: Fixed(Gated()), "depends on the size of its input"),
        (lambda: DataDependent(Gated()), "no fixed graph: GuardOnDataDependentSymNode"),
        (lambda: NoGradient(Gated()), "a part of its forward runs under wrap_with_set_grad"),
        (lambda: Pair(Gated()), "does not return one tensor"),
        (lambda: Fails(Gated()), "no fixed graph: KeyError 'no'"),
    ],
)
def test_forwards_without_such_a_graph(make, reason, capsys):
    with pytest.raises(MismatchError, match=reason):
        trace(make(), torch.ones(3, 5, 8), ())
    assert capsys.readouterr() == ("", "")  # an export prints, and its error says the same


class Around(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp


class Short(Around):
    def forward(self, x):
        return self.mlp(x) if x.shape[1] <= 512 else x


class Square(Around):
    def forward(self, x):
        return x if x.shape[0] == x.shape[1] else self.mlp(x)


class Fixed(Around):
    def forward(self, x):
        return self.mlp(x) + torch.ones(5, 1)


class DataDependent(Around):
    def forward(self, x):
        return self.mlp(x) if x.sum() > 0 else x


class NoGradient(Around):
    def forward(self, x):
        with torch.no_grad():
            x = F.silu(x)
        return self.mlp(x)


class Pair(Around):
    def forward(self, x):
        return self.mlp(x), x


class Fails(Around):
    def forward(self, x):
        raise KeyError("no")


def test_the_module_keeps_its_state():
    module = Keeps()
    mode = module.training
    with pytest.raises(MismatchError):
        trace(module, torch.ones(3, 8), ())
    assert module.training is mode
    weight = module.gate.weight
    trace(Gated(), torch.ones(3, 8), ())
    assert module.gate.weight is weight
    assert isinstance(weight, nn.Parameter)
