"""Sites, and access to parts by dotted name."""

import copy

import pytest
from torch import nn

from starlayers.surgery import Site
from starlayers.surgery.site import attribute, join, parent_of, put


def test_variants_swap_the_branches():
    plain = Site("r", "plain", "a", "b", "c")
    assert list(plain.variants()) == [plain]
    gated = Site("r", "gated", "a", "b", "c", up="d")
    assert list(gated.variants()) == [gated, Site("r", "gated", "d", "b", "c", up="a")]
    half = Site("r", "gated", "a", "b", "c")
    assert list(half.variants()) == [half]
    packed = Site("r", "packed", "a", "b", "c")
    assert packed.gate_last is False
    assert list(packed.variants()) == [packed, Site("r", "packed", "a", "b", "c", gate_last=True)]
    last = Site("r", "packed", "a", "b", "c", gate_last=True)
    assert [s.gate_last for s in last.variants()] == [True, False]


def test_dotted_names():
    net = nn.Sequential(nn.Sequential(nn.ReLU(), nn.GELU()))
    assert parent_of(net, "0.1") == (net[0], "1")
    assert parent_of(net, "0") == (net, "0")
    assert attribute(net, "0.1") is net[0][1]
    with pytest.raises(AttributeError):
        attribute(net, "0.7")
    assert join("a.b", "c") == "a.b.c"
    assert join("", "c") == "c"


def test_put_keeps_the_place_among_the_children():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    gelu = nn.GELU()
    put(net, "1", gelu)
    assert net[1] is gelu
    assert [type(m) for m in net] == [nn.Linear, nn.GELU, nn.Linear]


def test_put_replaces_a_function_and_not_the_module_it_hides():
    layer = nn.ReLU()
    net = nn.Module()
    net.act = layer
    vars(net)["act"] = nn.functional.gelu  # as deepcopy leaves nn.TransformerDecoderLayer
    put(net, "act", nn.functional.silu)
    assert net.act is nn.functional.silu
    assert net._modules["act"] is layer


def test_sites_compare_and_copy_by_value():
    site = Site("r", "plain", "a", "b", None)
    assert copy.deepcopy(site) == site == Site(recipe="r", form="plain", inp="a", act="b", out=None)
