"""Sizes, parameters and names of the gates in a model."""

import pytest
import torch
from torch import nn

from starlayers import starify
from starlayers.surgery import gate_parameters, gate_sizes, reset_gates
from starlayers.surgery.gates import gate_of, gate_size, name_of
from tests.surgery.small import MLP, Gated, Net, train_gates


def probe(n=8):
    return torch.randn(16, n, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("gate", ["full", "low_rank=2", "scale"])
def test_the_size_is_the_mean_absolute_gate_on_normal_input(gate):
    net = train_gates(starify(Net(MLP(), MLP()), gate=gate))
    net.blocks[0].fc1.reset_gate()
    size = float(net.blocks[1].fc1.gate(probe()).abs().mean())
    assert gate_sizes(net) == {"blocks.0.fc1": 0.0, "blocks.1.fc1": pytest.approx(size)}
    assert size > 0


def test_the_size_of_grown_products_is_that_of_their_second_factor():
    net = train_gates(starify(Net(Gated()), grow=2))
    expected = float(net.blocks[0].star_grown.f2(probe()).abs().mean())
    assert gate_sizes(net) == {"blocks.0.gate": pytest.approx(expected)}


def test_maps_and_other_dtypes():
    net = nn.Sequential(nn.Conv2d(8, 16, 1), nn.GELU(), nn.Conv2d(16, 8, 1)).to(torch.bfloat16)
    train_gates(starify(net))
    x = probe()[..., None, None].to(torch.bfloat16)
    expected = float(net[0].gate(x).abs().float().mean())
    assert gate_sizes(net)["0"] == pytest.approx(expected)


def test_no_gate_and_meta_have_size_zero():
    fused = starify(Gated(), mode="fuse")
    assert gate_sizes(fused) == {"gate": 0.0}
    assert gate_of(fused) is None
    assert gate_parameters(fused) == []
    meta = train_gates(starify(MLP())).to("meta")
    assert gate_sizes(meta) == {"fc1": 0.0}


def test_sizes_draw_no_random_numbers_and_keep_no_graph():
    net = train_gates(starify(MLP()))
    state = torch.get_rng_state()
    assert isinstance(gate_size(net.fc1), float)
    assert torch.equal(torch.get_rng_state(), state)


def test_another_default_device():
    with torch.device("meta"):
        net = starify(MLP().to_empty(device="cpu"))
        assert gate_sizes(net) == {"fc1": 0.0}


def test_gate_parameters_are_those_that_were_added():
    net = Net(MLP(), Gated())
    own = set(net.parameters())
    starify(net, gate="low_rank=2", grow=1)
    gates = gate_parameters(net)
    assert set(gates) == set(net.parameters()) - own
    star, grown = net.blocks[0].fc1, net.blocks[1].star_grown
    assert gate_of(star) is star.gate
    assert gate_of(net.blocks[1]) is grown
    assert [id(p) for p in gates] == [id(p) for m in (star.gate, grown) for p in m.parameters()]


def test_shared_gates_are_listed_once():
    mlp = starify(MLP())
    assert len(gate_parameters(Net(mlp, mlp))) == 2


def test_names():
    net = starify(Net(MLP(), Gated()), grow=1)
    assert name_of("blocks.0", net.blocks[0].fc1) == "blocks.0.fc1"
    assert name_of("", net.blocks[1]) == "gate"


def test_reset_gates(x):
    net = Net(MLP(), Gated(), MLP())
    y = net(x)
    starify(net, grow=1, gate="low_rank=2")
    starify(net, mode="fuse", include="blocks.2")
    train_gates(net)
    assert not torch.allclose(net(x), y)
    assert reset_gates(net) is net
    torch.testing.assert_close(net(x), y)
    assert set(gate_sizes(net).values()) == {0.0}
    only_fused = starify(Gated(), mode="fuse")
    assert reset_gates(only_fused) is only_fused


def test_meta_device_then_real_weights(x):
    real = Net(MLP(), Gated())
    with torch.device("meta"):
        net = starify(Net(MLP(), Gated()), gate="low_rank=2", grow=1)
    assert all(p.is_meta for p in net.parameters())
    net.to_empty(device="cpu")
    for p in net.parameters():
        nn.init.constant_(p, float("nan"))
    names = {k.replace(".inp.", "."): k for k in net.state_dict()}
    net.load_state_dict({names[k]: v for k, v in real.state_dict().items()}, strict=False)
    reset_gates(net)
    assert torch.equal(net(x), real(x))
