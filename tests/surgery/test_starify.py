"""`starify` and `revert`: what changes in a model, and what stays."""

import copy
import inspect
import io
import warnings

import pytest
import torch
from torch import nn

from starlayers import starify
from starlayers.surgery import gate_parameters, gate_sizes, report, revert
from tests.surgery.small import MLP, Gated, Net, Packed, Twice, train_gates


@pytest.mark.parametrize("gate", ["full", "low_rank=2", "scale"])
def test_the_formula(x, gate):
    mlp = starify(MLP(), gate=gate)
    train_gates(mlp)
    star = mlp.fc1
    a = nn.functional.gelu(star.inp(x))
    g = {
        "full": lambda: x @ star.gate.weight.T + star.gate.bias,
        "low_rank=2": lambda: (
            x @ star.gate.down.weight.T @ star.gate.up.weight.T + star.gate.up.bias
        ),
        "scale": lambda: star.gate.weight,
    }[gate]()
    torch.testing.assert_close(mlp(x), mlp.fc2(a * (1 + g)))


def test_second_derivatives(x):
    mlp = starify(MLP(act=nn.Tanh())).double()
    train_gates(mlp)
    assert torch.autograd.gradcheck(mlp, (x.double().requires_grad_(),))
    assert torch.autograd.gradgradcheck(mlp, (x.double().requires_grad_(),))


def test_small_gates_count_in_bfloat16():
    mlp = starify(MLP()).to(torch.bfloat16)
    x = torch.ones(1, 8, dtype=torch.bfloat16)
    before = mlp.act(mlp.fc1(x))
    nn.init.constant_(mlp.fc1.gate.bias, 2**-8)  # 1 + 2**-8 rounds to 1 in bfloat16
    # one unit in the last place for every product above a power of two
    assert (mlp.act(mlp.fc1(x)) != before).float().mean() > 0.3


def test_recompute_saves_the_input_alone(x):
    def saved(model):
        total = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: total.append(t.numel()) or t, lambda t: t
        ):
            y = model(x)
        return sum(total), torch.autograd.grad(y.square().sum(), gate_parameters(model))

    model = starify(MLP(dropout=0.5)).eval()
    much, want = saved(model)
    starify(model, recompute=True)  # a second call changes how, not what
    little, got = saved(model)
    assert little < much
    assert all(torch.equal(a, b) for a, b in zip(want, got))


def test_starified_plain_mlps_can_be_fused(x):
    net = starify(Net(MLP(), MLP()))
    train_gates(net)
    y = net(x)
    starify(net, mode="fuse")
    assert [row.detail for row in report(net).rows] == [
        "full, no Triton kernel for device 'cpu'"
    ] * 2
    torch.testing.assert_close(net(x), y)


def test_starifying_twice_changes_nothing(x):
    net = starify(Net(MLP(), MLP()))
    train_gates(net)
    gates, y = gate_parameters(net), net(x)
    assert starify(net, gate="scale") is net
    assert all(p is q for p, q in zip(gates, gate_parameters(net), strict=True))
    assert torch.equal(net(x), y)


def test_starifying_what_is_fused_leaves_or_grows_it(x):
    net = starify(Net(Gated(), MLP()), mode="fuse")
    y = net(x)
    starify(net)
    assert [(r.state, r.detail) for r in report(net).rows] == [("fused", "silu"), ("star", "full")]
    starify(net, grow=1)
    assert [r.state for r in report(net).rows] == ["star", "star"]
    assert torch.equal(net(x), y)


def test_include_and_exclude():
    def names(**patterns):
        return [
            row.name
            for row in report(starify(Net(*[MLP() for _ in range(4)]), **patterns)).replaced
        ]

    assert names(include="blocks.1") == ["blocks.1.fc1"]
    assert names(include=["blocks.[01].*", "blocks.3.fc1"]) == [
        "blocks.0.fc1",
        "blocks.1.fc1",
        "blocks.3.fc1",
    ]
    assert names(exclude="blocks.[12]") == ["blocks.0.fc1", "blocks.3.fc1"]
    with pytest.raises(
        ValueError, match=r"'layers\.\*' matches none of the 1 MLPs.*blocks\.0\.fc1"
    ):
        starify(Net(MLP()), include="layers.*")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mode": "stars"}, ValueError, "unknown mode 'stars'"),
        ({"gate": "half"}, ValueError, "unknown gate 'half'"),
        ({"gate": "low_rank"}, ValueError, "low_rank=8"),
        ({"gate": "low_rank=0"}, ValueError, "at least 1"),
        ({"gate": 8}, TypeError, "got 8"),
        ({"grow": -1}, ValueError, "at least 1, got -1"),
        ({"mode": "fuse", "grow": 1}, ValueError, "needs mode='star'"),
        ({"mode": "fuse", "gate": "scale"}, ValueError, "needs mode='star'"),
        ({"mode": "fuse"}, ValueError, "1 MLPs are plain"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        starify(MLP(), **arguments)


def test_what_holds_no_mlp():
    with pytest.raises(TypeError, match=r"expects a torch\.nn\.Module, got dict"):
        starify({})
    with pytest.raises(ValueError, match="no module has the structure"):
        starify(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="already are stars; grow=1"):
        starify(Gated())
    with pytest.raises(ValueError, match="no star layer"):
        revert(MLP())


def test_parameters_hooks_and_modes_stay(x):
    mlp = MLP().eval()
    mlp.fc1.weight.requires_grad_(False)
    own = dict(mlp.named_parameters())
    optimizer = torch.optim.AdamW([p for p in own.values() if p.requires_grad])
    seen = []
    mlp.fc1.register_forward_hook(lambda _, args, y: seen.append(y.shape))
    starify(mlp)
    after = {name.replace("fc1.inp", "fc1"): p for name, p in mlp.named_parameters()}
    assert all(after[name] is p for name, p in own.items())
    assert not mlp.fc1.training
    mlp(x).sum().backward()
    assert seen == [(5, 16)]
    optimizer.add_param_group({"params": gate_parameters(mlp), "name": "star_gates"})
    optimizer.step()
    assert gate_sizes(mlp)["fc1"] > 0
    assert mlp.fc1.inp.weight.grad is None


def test_tied_and_shared_layers_stay_so(x):
    shared = MLP()
    tied = MLP()
    tied.fc1.weight = shared.fc1.weight
    net = Net(shared, shared, tied)
    y = net(x)
    starify(net)
    assert torch.equal(net(x), y)
    assert net.blocks[0].fc1 is net.blocks[1].fc1
    assert net.blocks[2].fc1.weight is net.blocks[0].fc1.weight
    assert len(report(net).replaced) == 2


def test_one_projection_in_two_mlps_gets_a_gate_for_each(x):
    first, second = MLP(), MLP()
    second.fc1 = first.fc1
    net = Net(first, second)
    y = net(x)
    starify(net)
    assert first.fc1.inp is second.fc1.inp
    assert torch.equal(net(x), y)
    assert len(gate_parameters(net)) == 4
    revert(net)
    assert first.fc1 is second.fc1
    assert isinstance(second.act, nn.GELU)
    assert torch.equal(net(x), y)


def test_a_starified_model_leaves_the_next_one_plain(x):
    starify(MLP())
    starify(Gated(), mode="fuse")
    assert type(MLP().fc1) is nn.Linear
    assert type(Gated()) is Gated
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    starify(layer)
    assert type(nn.TransformerEncoderLayer(8, 2, 16).linear1) is nn.Linear


def test_revert_says_what_is_lost(x):
    net = Net(MLP(), MLP())
    y = net(x)
    starify(net)
    nn.init.constant_(net.blocks[1].fc1.gate.bias, 0.5)
    with pytest.warns(UserWarning, match=r"1 of 2 gates.*0\.5 \(blocks\.1\.fc1\)"):
        revert(net)
    assert torch.equal(net(x), y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        revert(starify(net))


def test_grown_products_are_lost_on_revert_too():
    net = starify(Net(Gated()), grow=1)
    train_gates(net)
    with pytest.warns(UserWarning, match=r"1 of 1 gates were not zero"):
        revert(net)
    assert type(net.blocks[0]) is Gated
    assert not hasattr(net.blocks[0], "star_grown")


@pytest.mark.parametrize("make", [lambda: Net(MLP(), MLP()), lambda: Net(Gated(), Packed())])
def test_copies_and_pickles(x, make):
    net = make()
    starify(net, grow=1)
    train_gates(net)
    y = net(x)
    other = copy.deepcopy(net)
    assert torch.equal(other(x), y)
    train_gates(other)
    assert torch.equal(net(x), y)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(x), y)
    with pytest.warns(UserWarning, match="gates were not zero"):
        revert(loaded)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in make().modules()]


def test_torch_encoder_with_padding_and_its_fast_path():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation="gelu")
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 5, 16)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        want = model(x, src_key_padding_mask=padding)
        starify(model)
        got = model(x, src_key_padding_mask=padding)
        torch.testing.assert_close(got[~padding], want[~padding], rtol=1e-5, atol=1e-6)
        train_gates(model)
        assert not torch.allclose(model(x, src_key_padding_mask=padding)[~padding], got[~padding])
    with pytest.warns(UserWarning, match="2 of 2 gates"):
        revert(model)
    with torch.no_grad():
        assert torch.equal(model(x, src_key_padding_mask=padding), want)
    assert model.use_nested_tensor


def test_layers_that_two_owners_share_are_one(x):
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense, self.act = nn.Linear(8, 16), nn.GELU()

        def forward(self, x):
            return self.act(self.dense(x))

    class Layer(nn.Module):
        def __init__(self, half):
            super().__init__()
            self.first, self.output = half, nn.ModuleDict({"dense": nn.Linear(16, 8)})

        def forward(self, x):
            return self.output["dense"](self.first(x))

    half = Half()
    net = Net(Layer(half), Layer(half))
    y = net(x)
    starify(net)
    assert torch.equal(net(x), y)
    table = report(net)
    assert len(table.replaced) == 1
    assert table.parameters_added == 9 * 16
    revert(net)
    assert torch.equal(net(x), y)


def test_layers_of_any_name_can_grow(x):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.sizes = nn.Linear(8, 16), nn.Linear(8, 16)
            self.release, self.grow = nn.Linear(16, 8), nn.Mish()

        def forward(self, x):
            return self.release(self.grow(self.hidden(x)) * self.sizes(x))

    model = Odd()
    y = model(x)
    starify(model, grow=2)  # no row of ACTIVATIONS is needed
    assert torch.equal(model(x), y)
    train_gates(model)
    grown, mish = model.star_grown, nn.functional.mish
    pairs = mish(grown.f1(x)) * grown.f2(x)
    product = mish(model.hidden(x)) * model.sizes(x) + pairs[:, ::2] + pairs[:, 1::2]
    torch.testing.assert_close(model(x), model.release(product))


def test_wrapped_for_distributed_training(monkeypatch):
    model = object.__new__(nn.parallel.DistributedDataParallel)
    with pytest.raises(ValueError, match="wrap afterwards"):
        starify(model)


def test_patterns_that_match_nothing():
    with pytest.raises(ValueError, match="exclude pattern 'nonsense' matches none of the 1 MLPs"):
        starify(MLP(), exclude="nonsense")
    with pytest.raises(ValueError, match="found no MLP to replace"):
        starify(MLP(), include=[])


def test_defaults():
    parameters = inspect.signature(starify).parameters
    assert {name: p.default for name, p in parameters.items() if p.default is not p.empty} == {
        "mode": "star",
        "gate": "full",
        "include": None,
        "exclude": None,
        "grow": 0,
        "recompute": False,
    }
    mlp = starify(MLP())
    assert (mlp.fc1.spec, mlp.fc1.fused, mlp.fc1.recompute) == ("full", False, False)


@pytest.mark.parametrize("gate", ["full", "low_rank=3", "scale"])
def test_the_gate_is_the_one_asked_for(gate):
    assert starify(MLP(), gate=gate).fc1.spec == gate


@pytest.mark.parametrize("recompute", [False, True])
def test_options_of_new_star_layers(recompute):
    net = starify(Net(MLP(), Gated()), grow=2, recompute=recompute)
    plain, gated = net.blocks[0].fc1, net.blocks[1].star
    assert (plain.fused, plain.recompute) == (False, recompute)
    assert (gated.fused, gated.recompute, gated.grown) == (False, recompute, 2)
    fused = starify(Net(MLP(), Gated()), mode="fuse", recompute=recompute)
    assert type(fused.blocks[0].fc1) is nn.Linear
    role = fused.blocks[1].star
    assert (role.fused, role.recompute, role.grown) == (True, recompute, 0)


def test_options_are_added_to_the_star_layers_that_are_selected():
    net = starify(Net(MLP(), Gated(), MLP(), Gated()), grow=1)
    starify(net, include=["blocks.0", "blocks.1"], recompute=True)
    starify(net, mode="fuse", exclude=["blocks.0", "blocks.1"])
    plain, gated = (net.blocks[0].fc1, net.blocks[2].fc1), (net.blocks[1].star, net.blocks[3].star)
    for first, second in (plain, gated):
        assert (first.recompute, first.fused) == (True, False)
        assert (second.recompute, second.fused) == (False, True)
    starify(net, mode="star")  # takes nothing away
    assert (plain[0].recompute, plain[1].fused) == (True, True)


def test_what_has_grown_does_not_grow_again():
    net = starify(Net(Gated()), grow=2)
    grown = net.blocks[0].star_grown
    starify(net, grow=3)
    assert net.blocks[0].star.grown == 2
    assert net.blocks[0].star_grown is grown
    starify(net)
    assert net.blocks[0].star.grown == 2


def test_mode_star_leaves_stars_and_mode_fuse_leaves_plain_mlps():
    net = Net(MLP(), Gated())
    starify(net)
    assert [r.state for r in report(net).rows] == ["star", "is a star"]
    net = starify(Net(MLP(), Gated()), mode="fuse")
    assert [r.state for r in report(net).rows] == ["ready", "fused"]


def test_a_model_of_star_layers_alone_may_be_starified_again():
    net = starify(Net(MLP()))
    assert starify(net, mode="fuse") is net
    assert net.blocks[0].fc1.fused


def test_agents_are_sent_to_their_own_function():
    class Agent:
        policy = nn.Linear(2, 2)

    with pytest.raises(TypeError, match=r"got Agent; it has a policy: use starlayers\.rl\.starify"):
        starify(Agent())
    Agent.policy = "MlpPolicy"
    with pytest.raises(TypeError, match=r"got Agent$"):
        starify(Agent())


def test_adapters_warn_when_gates_are_new_only():
    def adapted(*blocks):
        net = Net(*blocks)
        net.peft_config = {"default": object()}
        return net

    with pytest.warns(UserWarning, match=r"its adapters only.*modules_to_save=gate_names\(model\)"):
        net = starify(adapted(MLP()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        starify(net)  # no gate is new
        starify(adapted(Gated()), mode="fuse")
        plain = Net(MLP())
        plain.peft_config = {}
        starify(plain)


def test_the_reasons_of_three_are_told():
    with pytest.raises(ValueError, match=r"4 looked like one, but") as error:
        starify(Net(*(Twice() for _ in range(4))))
    assert str(error.value).count("calls 'act' 2 times") == 3
    assert "blocks.0.fc1: " in str(error.value)
    assert "in this Net: 4" in str(error.value)


def test_the_numbers_of_plain_and_star_mlps_are_told():
    with pytest.raises(ValueError, match=r"its 2 MLPs are plain; mode='star' gives them gates"):
        starify(Net(MLP(), MLP(), Twice()), mode="fuse")
    with pytest.raises(ValueError, match=r"its 2 MLPs already are stars; grow=1 adds"):
        starify(Net(Gated(), Packed(), Twice()))


def test_revert_names_the_largest_gate(x):
    net = starify(Net(MLP(), MLP(), MLP()))
    nn.init.constant_(net.blocks[0].fc1.gate.bias, 0.25)
    nn.init.constant_(net.blocks[2].fc1.gate.bias, -0.75)
    with pytest.warns(UserWarning, match=r"2 of 3 gates .* up to 0\.75 \(blocks\.2\.fc1\)"):
        assert revert(net) is net
    assert report(net).replaced == []


def test_an_activation_with_buffers_is_not_recomputed():
    class Counts(nn.GELU):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

    mlp = MLP()
    mlp.act = Counts()
    with pytest.raises(ValueError, match="'act' has buffers, which recompute may change twice"):
        starify(mlp, recompute=True)
    starify(mlp)
    assert not mlp.fc1.recompute


def test_weights_of_the_plain_model_are_loaded_into_a_starified_one(x):
    own, other = MLP(), MLP()
    star = starify(copy.deepcopy(other))
    with pytest.raises(
        RuntimeError, match=r'Missing key\(s\).*"fc1.gate.weight", "fc1.gate.bias"\.'
    ):
        star.load_state_dict(own.state_dict())
    incompatible = star.load_state_dict(own.state_dict(), strict=False)
    assert not incompatible.unexpected_keys
    assert torch.equal(star(x), own(x))
    again = starify(MLP())
    again.load_state_dict(star.state_dict())
    assert torch.equal(again(x), own(x))
