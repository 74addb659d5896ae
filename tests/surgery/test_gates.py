"""Gates in a model, and gated MLPs on the core."""

import copy

import pytest
import torch
from torch import nn

from starlayers import starify, use_backend
from starlayers.dispatch import Plan
from starlayers.surgery import (
    GatedMLP,
    Site,
    gate_parameters,
    gate_sizes,
    gated,
    reset_gates,
    revert,
)
from starlayers.surgery.adopted import adopt, release
from starlayers.surgery.gated import Role, split_packed
from starlayers.surgery.gates import gate_of, gate_size, name_of
from starlayers.surgery.grown import grow
from starlayers.surgery.linear_layers import recompute_blocker
from tests.surgery.small import MLP, Gated, Net, Packed, train_gates


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
        net = MLP().to_empty(device="cpu")
        for parameter in net.parameters():  # not what the memory held
            nn.init.normal_(parameter)
        assert gate_sizes(starify(net)) == {"fc1": 0.0}


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


# --- gated MLPs on the core: which of them one fused op computes, and products that were added


SITE = Site("gated", "gated", "gate", "act", "down", up="up")


class Drops(Gated):
    """A gated MLP with something between its product and its last layer."""

    def __init__(self, between):
        super().__init__()
        self.drop = between

    def forward(self, x):
        return self.down(self.drop(self.act(self.gate(x)) * self.up(x)))


def fused(model=None, **options):
    return starify(model or Gated(), mode="fuse", **options)


def test_defaults_of_a_role():
    role = Role(SITE, Gated, "silu")
    assert (role.between, role.fused, role.recompute, role.grown) == ((), True, False, 0)


def test_state_of_earlier_versions():
    role = Role(SITE, Gated, "silu", recompute=True)
    state = dict(vars(role))
    state["row"] = state.pop("act_name")
    old = Role.__new__(Role)
    old.__setstate__(state)
    assert old == role == copy.deepcopy(role)
    assert not hasattr(old, "row")
    assert "row" in state


@pytest.mark.parametrize("gate_last", [False, True])
def test_split_packed(gate_last):
    first, second = torch.ones(2, 3), torch.zeros(2, 3)
    a, b = split_packed(torch.cat([first, second], -1), gate_last=gate_last)
    assert torch.equal(a, second if gate_last else first)
    assert torch.equal(b, first if gate_last else second)


@pytest.mark.parametrize(
    ("model", "training", "one_op"),
    [
        (lambda: fused(), True, True),
        (lambda: starify(Gated(), grow=1), True, False),  # not fused
        (lambda: fused(starify(Gated(), grow=1)), False, False),
        (lambda: fused(Gated(act=nn.Mish()), recompute=True), False, False),  # none of ACTIVATIONS
        (lambda: fused(Packed()), False, False),
        (lambda: fused(Drops(nn.Dropout(0.5))), False, True),
        (lambda: fused(Drops(nn.Dropout(0.5))), True, False),
        (lambda: fused(Drops(nn.Dropout(0.0))), True, True),
        (lambda: fused(Drops(nn.Identity())), True, True),
    ],
)
def test_what_one_fused_op_computes(model, training, one_op):
    mlp = model().train(training)
    mlp.requires_grad_(False)
    plan = mlp.star_plan(torch.zeros(80_000, 8))
    assert (plan.weights is not None) is one_op
    if one_op:
        assert plan.path == "cpu"
        expected = [p for m in (mlp.gate, mlp.up, mlp.down) for p in (m.weight, m.bias)]
        assert [id(w) for w in plan.weights] == [id(p) for p in expected]


def test_a_module_that_acts_before_the_last_layer_is_called():
    mlp = fused(Drops(nn.LayerNorm(16)))
    assert mlp.star.between == ("drop",)
    x = torch.zeros(80_000, 8)
    with torch.no_grad():
        assert mlp.star_plan(x).reason == "a module acts between the product and its last layer"
        mlp.drop = nn.Identity()
        assert mlp.star_plan(x).reason == "drop is an Identity, was a LayerNorm"
        assert torch.equal(mlp(x), mlp.down(mlp.act(mlp.gate(x)) * mlp.up(x)))


def test_the_view_has_the_layers_of_now():
    mlp = fused(recompute=True)
    mlp.up = nn.Linear(8, 16)
    plan = mlp.requires_grad_(False).star_plan(torch.zeros(80_000, 8))
    assert plan.weights.w2 is mlp.up.weight
    assert plan.path == "cpu"


def test_the_fused_op_serves_large_inputs_in_both_modes(monkeypatch):
    calls, op = [], gated.run_mlp
    monkeypatch.setattr(gated, "run_mlp", lambda *a, **k: calls.append(a) or op(*a, **k))
    mlp = Gated()
    x = torch.randn(80_000, 8)
    with torch.no_grad():
        y = mlp(x)
        torch.testing.assert_close(fused(mlp)(x), y, rtol=1e-6, atol=1e-6)
        assert len(calls) == 1
        mlp(x[:5])  # too small for the op
        with use_backend("eager"):
            assert torch.equal(mlp(x), y)
    assert len(calls) == 1


@pytest.mark.parametrize("make", [Gated, Packed, lambda: Packed(gate_last=True)])
@pytest.mark.parametrize("recompute", [False, True])
def test_values_and_gradients_are_the_models_own(x, make, recompute):
    mlp = make()
    other = fused(copy.deepcopy(mlp), recompute=recompute)
    outputs = []
    for net in (mlp, other):
        y = net(x)
        y.square().sum().backward()
        outputs.append(y)
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)
    for a, b in zip(mlp.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("recompute", [False, True])
def test_recompute_runs_the_layers_again_in_the_backward(x, recompute):
    mlp, calls = starify(Gated(), grow=1, recompute=recompute), []
    mlp.gate.register_forward_hook(lambda *_: calls.append(1))
    mlp(x).sum().backward()
    assert len(calls) == 1 + recompute
    with torch.no_grad():
        mlp(x)
    assert len(calls) == 2 + recompute


def test_kernels_are_asked_for_when_fused_only(x, monkeypatch):
    models = {
        "gated": starify(Gated(), grow=1),
        "fused": fused(starify(Gated(), grow=1)),
        "packed": fused(Packed()),
        "gate last": fused(Packed(gate_last=True)),
        "mish": fused(starify(Gated(act=nn.Mish()), grow=1)),
    }
    asked = []
    monkeypatch.setattr(gated, "plan_early", lambda x: None)
    monkeypatch.setattr(gated, "plan_star", lambda a, b, act: asked.append(act) or Plan("star"))
    monkeypatch.setattr(gated, "star_product", lambda a, b, act: nn.functional.silu(a) * b)
    monkeypatch.setattr(
        gated, "star_packed", lambda h, act: nn.functional.silu(h[..., :16]) * h[..., 16:]
    )
    products = {}
    for name, model in models.items():
        asked.clear()
        model(x)
        products[name] = list(asked)
    assert products == {
        "gated": [],
        "fused": ["silu"],
        "packed": ["silu"],
        "gate last": ["silu"],
        "mish": [],
    }


def test_a_packed_product_that_no_kernel_takes_is_made_of_its_halves(x, monkeypatch):
    monkeypatch.setattr(gated, "star_packed", lambda *_: pytest.fail("no kernel applies"))
    monkeypatch.setattr(gated, "star_product", lambda *_: pytest.fail("no kernel applies"))
    mlp = Packed()
    y = mlp(x)
    assert torch.equal(fused(mlp)(x), y)


def test_the_last_layer_may_be_of_another_dtype(x):
    class Half(Gated):
        """As T5, which keeps its last layer in float32."""

        def forward(self, x):
            h = self.act(self.gate(x)) * self.up(x)
            return self.down(h.to(self.down.weight.dtype))

    mlp = Half().to(torch.bfloat16)
    mlp.down.float()
    x = x.to(torch.bfloat16)
    y = mlp(x)
    assert y.dtype == torch.float32
    assert torch.equal(starify(mlp, grow=1)(x), y)


def test_sizes():
    assert fused(Packed()).star_sizes() == (8, 16, 8)


def test_adopt_and_release():
    mlp = Gated()
    weights = dict(mlp.named_parameters())
    assert adopt(mlp, GatedMLP, Role(SITE, Gated, "silu")) is mlp
    assert isinstance(mlp, GatedMLP)
    grow(mlp, 1)
    assert release(mlp) is mlp
    assert type(mlp) is Gated
    assert not hasattr(mlp, "star")
    assert not hasattr(mlp, "star_grown")
    assert all(p is weights[k] for k, p in mlp.named_parameters())


def test_repr():
    first = repr(fused(starify(Gated(), grow=2), recompute=True)).splitlines()[1]
    assert first.strip() == "act=silu, fused=True, recompute=True, grown=2"
    mish = repr(starify(Gated(act=nn.Mish()), grow=1)).splitlines()[1]
    assert mish.strip() == "grown=1"


def test_keyword_input(x):
    class ByName(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = Gated()

        def forward(self, x):
            return self.mlp(x=x)

    model = ByName()
    y = model(x)
    assert torch.equal(fused(model)(x), y)
    revert(model)
    assert type(model.mlp) is Gated


# --- layers that must not run twice


def spectral(layer):
    return nn.utils.parametrizations.spectral_norm(layer)


def spectral_by_hook(layer):
    return nn.utils.spectral_norm(layer)


@pytest.mark.parametrize("norm", [spectral, spectral_by_hook])
@pytest.mark.parametrize("name", ["gate", "down"])
def test_recompute_is_refused_where_a_forward_changes_state(norm, name):
    mlp = Gated()
    setattr(mlp, name, norm(getattr(mlp, name)))
    with pytest.raises(ValueError, match=f"'{name}' has a parametrisation with state"):
        starify(mlp, mode="fuse", recompute=True)
    x = torch.randn(2, 8)
    own = copy.deepcopy(mlp)
    starify(mlp, mode="fuse")
    for _ in range(2):
        torch.testing.assert_close(mlp(x), own(x))
    for ours, theirs in zip(mlp.buffers(), own.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_recompute_blockers():
    assert recompute_blocker(nn.Linear(2, 2)) is None
    assert recompute_blocker(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))) is None
    assert recompute_blocker(nn.BatchNorm1d(2, track_running_stats=False)) is None
    norm = nn.Sequential(nn.BatchNorm1d(2))
    assert recompute_blocker(norm) == (
        "'0' has running statistics, which recompute would change twice"
    )
    reason = "it has a parametrisation with state, which recompute would change twice"
    assert recompute_blocker(spectral(nn.Linear(2, 2))) == reason
    net = MLP()
    net.fc1 = spectral(net.fc1)
    with pytest.raises(ValueError, match=f"fc1: {reason}; leave recompute out"):
        starify(net, recompute=True)
    starify(net.eval())
    with pytest.raises(ValueError, match=f"fc1: {reason}; it stays as it is"):
        starify(net, recompute=True)
    assert not net.fc1.recompute
