"""Star formulas read from graphs, and names of activations."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from starlayers.activations import ACTIVATIONS
from starlayers.surgery.formula import activation_name, read_chain, read_formula
from starlayers.surgery.graph import trace
from starlayers.surgery.site import Site
from starlayers.surgery.trial_run import MismatchError
from tests.surgery.small import Gated, Packed

GATED = Site("gated", "gated", "up", None, "down", up="gate")
PACKED = Site("packed", "packed", "both", None, "down")


def read(module, site):
    parts = tuple(name for name in (site.inp, site.up, site.out) if name)
    return read_formula(trace(module, torch.ones(3, 5, 8), parts), site)


def test_a_gated_mlp():
    formula, chain = read(Gated(), GATED)
    assert formula.site == Site("gated", "gated", "gate", "act", "down", up="up")
    assert (formula.act, formula.between) == ("silu(x)", ())
    x = torch.randn(7, dtype=torch.float64)
    assert torch.equal(chain(x), F.silu(x))
    assert not chain.trivial


@pytest.mark.parametrize("gate_last", [False, True])
def test_a_packed_mlp(gate_last):
    formula, _ = read(Packed(gate_last), PACKED)
    assert formula.site == Site("packed", "packed", "both", "act", "down", gate_last=gate_last)


class Split(Packed):
    def __init__(self, split):
        super().__init__()
        self.split = split

    def forward(self, x):
        a, b = self.split(self.both(x))
        return self.down(self.act(a) * b)


@pytest.mark.parametrize(
    ("split", "gate_last"),
    [
        (lambda h: h.chunk(2, dim=-1), False),
        (lambda h: h.split(16, -1), False),
        (lambda h: h.split([16, 16], dim=2), False),
        (lambda h: h.tensor_split(2, -1), False),
        (lambda h: (h[..., :16], h[..., 16:]), False),
        (lambda h: (h[..., 16:], h[..., :16]), True),
        (lambda h: h.chunk(2, -1)[::-1], True),
    ],
)
def test_halves(split, gate_last):
    assert read(Split(split), PACKED)[0].site.gate_last is gate_last


@pytest.mark.parametrize(
    "split",
    [
        lambda h: (h[..., ::2], h[..., 1::2]),
        lambda h: (h[..., :16], h[..., :16]),
        lambda h: (h[..., 8:24], h[..., 16:]),
        lambda h: h.unflatten(-1, (16, 2)).unbind(-1),
    ],
)
def test_what_are_no_halves(split):
    with pytest.raises(MismatchError, match=r"does not split 'both'|both factors"):
        read(Split(split), PACKED)


class Bilinear(Gated):
    def forward(self, x):
        return self.down(self.gate(x) * self.up(x))


def test_without_an_activation_the_order_is_that_of_the_site():
    formula, chain = read(Bilinear(), GATED)
    assert (formula.site.inp, formula.site.up, formula.act) == ("up", "gate", "x")
    assert chain.trivial
    assert activation_name(chain) == "identity"


class Casts(Gated):
    def forward(self, x):
        a = self.act(self.gate(x).float()).to(x.dtype)
        return self.down((a * self.up(x)).to(self.down.weight.dtype))


def test_conversions_that_lose_nothing_are_no_part():
    assert read(Casts(), GATED)[0].act == "silu(x)"


def test_a_site_may_name_its_activation():
    site = Site("mine", "gated", "gate", "act", "down", up="up")
    assert read(Gated(), site)[0].site == site
    wrong = Site("mine", "gated", "gate", "down", "down", up="up")
    with pytest.raises(MismatchError, match="'down' is not applied to the output of 'gate'"):
        read(Gated(), wrong)


def test_a_chain_is_element_wise():
    class Net(nn.Module):
        def forward(self, x):
            return F.silu(2 * x.clamp(max=3.0) + 1) / 4

    graph = trace(Net(), torch.ones(3, 5), ())
    chain = read_chain(graph, graph.output, [graph.x])
    assert chain.text == "div(silu(add(mul(clamp(x, None, 3.0), 2), 1)), 4)"
    x = torch.tensor([-1.0, 10.0], dtype=torch.float64)
    assert torch.equal(chain(x), F.silu(2 * x.clamp(max=3.0) + 1) / 4)
    assert activation_name(chain) is None

    class Soft(nn.Module):
        def forward(self, x):
            return x.softmax(-1)

    graph = trace(Soft(), torch.ones(3, 5), ())
    with pytest.raises(MismatchError, match="depends on softmax"):
        read_chain(graph, graph.output, [graph.x])


def test_names_of_functions():
    for row in ACTIVATIONS.values():
        assert activation_name(row.fn) == row.name
    assert activation_name(lambda x: F.silu(x) + 1e-7) is None
    assert activation_name(lambda x: F.silu(x).detach()) is None
    assert activation_name(lambda x: x.new_zeros(3)) is None
    assert activation_name(lambda x: [][0]) is None
