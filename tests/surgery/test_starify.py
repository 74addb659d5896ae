import copy
import io
import warnings

import pytest
import torch
from torch import nn

from starlayers import starify
from starlayers.surgery import (
    RECIPES,
    GatedMLP,
    Site,
    StarProjection,
    find_mlps,
    gate_parameters,
    gate_sizes,
    param_groups,
    register_recipe,
    report,
    reset_gates,
    revert,
)


class MLP(nn.Module):
    def __init__(self, n=8, f=16, act=None, dropout=0.0):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(n, f), nn.Linear(f, n)
        self.act = nn.GELU() if act is None else act
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        return self.fc2(self.drop(self.act(self.fc1(x))))


class Gated(nn.Module):
    """Which branch is activated, and in which order they stand, is for the probe to find out."""

    def __init__(self, first="gate", act=None, scale=1.0):
        super().__init__()
        for name in ("gate", "up") if first == "gate" else ("up", "gate"):
            setattr(self, name, nn.Linear(8, 16, bias=False))
        self.down = nn.Linear(16, 8, bias=False)
        self.act = nn.SiLU() if act is None else act
        self.scale = scale

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x) * self.scale)


class Packed(nn.Module):
    def __init__(self, gate_last=False):
        super().__init__()
        self.both, self.down, self.act = nn.Linear(8, 32), nn.Linear(16, 8), nn.SiLU()
        self.gate_last = gate_last

    def forward(self, x):
        a, b = self.both(x).chunk(2, -1)
        return self.down(a * self.act(b) if self.gate_last else self.act(a) * b)


class Net(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def train_gates(model, size=0.1):
    for parameter in gate_parameters(model):
        nn.init.normal_(parameter, std=size)


@pytest.fixture
def x():
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


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
    before = mlp.fc1(x)
    nn.init.constant_(mlp.fc1.gate.bias, 2**-8)  # 1 + 2**-8 rounds to 1 in bfloat16
    # one unit in the last place for every product above a power of two
    assert (mlp.fc1(x) != before).float().mean() > 0.3


@pytest.mark.parametrize("first", ["gate", "up"])
def test_the_probe_finds_the_activated_branch(x, first):
    mlp = Gated(first)
    y = mlp(x)
    (finding,) = find_mlps(mlp)
    assert (finding.site.inp, finding.site.up) == ("gate", "up")
    assert torch.equal(starify(mlp, mode="fuse")(x), y)


@pytest.mark.parametrize("gate_last", [False, True])
def test_the_probe_finds_the_activated_half(x, gate_last):
    mlp = Packed(gate_last)
    y = mlp(x)
    starify(mlp, grow=2)
    assert mlp.star.site.gate_last is gate_last
    assert torch.equal(mlp(x), y)
    train_gates(mlp)
    a, b = mlp.both(x).chunk(2, -1)
    a, b = (b, a) if gate_last else (a, b)
    silu = nn.functional.silu
    grown = mlp.star_grown
    pairs = zip(grown.f1(x).chunk(2, -1), grown.f2(x).chunk(2, -1))
    product = silu(a) * b + sum(silu(p) * q for p, q in pairs)
    torch.testing.assert_close(mlp(x), mlp.down(product))


@pytest.mark.parametrize("recompute", [False, True])
def test_fused_gradients_are_the_models_own(x, recompute):
    mlp, other = Net(Gated(), Packed()), None
    other = starify(copy.deepcopy(mlp), mode="fuse", recompute=recompute)
    for net in (mlp, other):
        net(x).square().sum().backward()
    for a, b in zip(mlp.parameters(), other.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-6)


def test_fuse_takes_the_cores_kernel_for_large_inputs(monkeypatch):
    from starlayers.kernels import layer

    calls = []
    fused = layer.fused_star_mlp
    monkeypatch.setattr(layer, "fused_star_mlp", lambda *args: calls.append(args) or fused(*args))
    mlp = Gated()
    x = torch.randn(40_000, 8)
    with torch.no_grad():
        y = mlp(x)
        torch.testing.assert_close(starify(mlp, mode="fuse")(x), y, rtol=1e-6, atol=1e-6)
    assert len(calls) == 1


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
    assert [row.detail for row in report(net).rows] == ["full, fused"] * 2
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
        ({"mode": "fuse", "grow": 1}, ValueError, "need mode='star'"),
        ({"mode": "fuse", "gate": "scale"}, ValueError, "need mode='star'"),
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


class Twice(MLP):
    def forward(self, x):
        return self.fc2(self.act(self.act(self.fc1(x))))


class Skips(MLP):
    def forward(self, x):
        h = self.fc1(x)
        return self.fc2(self.act(h) + h)


class Elsewhere(MLP):
    def forward(self, x):
        return self.fc2(self.fc1(self.act(x)))


class Unused(MLP):
    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)) * 0)


class Reads(MLP):
    def forward(self, x):
        return self.fc2(self.act(nn.functional.linear(x, self.fc1.weight)))


class NeedsMore(MLP):
    def forward(self, x, mask):
        return self.fc2(self.act(self.fc1(x))) * mask.squeeze(7)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Twice(), "calls 'act' 2 times, not once"),
        (Skips(), "with a zero gate, its output differs by"),
        (Elsewhere(), "'act' is not applied to the output of 'fc1'"),
        (Unused(), "no effect on what follows"),
        (Reads(), "calls 'fc1' 0 times"),
        (NeedsMore(), "NeedsMore does not run by itself"),
        (Gated(scale=0.5), "does not take act"),
    ],
)
def test_what_does_not_compute_its_formula_is_left_alone(model, reason):
    before = copy.deepcopy(model.state_dict())
    kinds = [type(m) for m in model.modules()]
    (row,) = report(model).skipped
    assert reason in row.detail
    with pytest.raises(ValueError, match=r"1 looked like one, but"):
        starify(model)
    assert kinds == [type(m) for m in model.modules()]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_probe_touches_nothing():
    class Counts(MLP):
        def __init__(self):
            super().__init__(act=nn.ReLU(inplace=True), dropout=0.5)
            self.norm = nn.BatchNorm1d(8)
            self.register_buffer("runs", torch.zeros(()))

        def forward(self, x):
            self.runs += 1
            x = self.norm(x.flatten(0, -2)).view(x.shape)
            return super().forward(x)

    model = Counts()
    model.fc1.register_forward_hook(lambda *_: pytest.fail("a user's hook was called"))
    model.act.register_forward_hook(lambda *_: pytest.fail("a user's hook was called"))
    model.register_forward_pre_hook(lambda *_: pytest.fail("a user's hook was called"))
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    want = torch.rand(1)
    torch.manual_seed(5)
    assert [f.reason for f in find_mlps(model)] == [None]
    starify(copy.deepcopy(model))  # installing calls no hook either
    torch.manual_seed(5)
    find_mlps(model)
    assert torch.equal(torch.rand(1), want)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.training


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


class Int8Linear(nn.Linear):
    """What quantisers put in the place of a linear layer."""

    def __init__(self, n, f):
        super().__init__(n, f)
        self.weight = nn.Parameter((self.weight * 100).to(torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.float() / 100, self.bias)


def test_quantised_layers_are_refused():
    model = MLP()
    model.fc1 = Int8Linear(8, 16)
    (row,) = report(model).skipped
    assert row.detail == ("Int8Linear holds torch.int8 weights: starify before quantising")
    dynamic = torch.ao.quantization.quantize_dynamic(MLP(), {nn.Linear})
    (row,) = report(dynamic).skipped
    assert "starify before quantising" in row.detail


def test_a_quantised_last_projection_is_safe(x):
    model = MLP()
    model.fc2 = Int8Linear(16, 8)
    y = model(x)
    assert torch.equal(starify(model)(x), y)


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


def test_meta_device_then_real_weights(x):
    real = Net(MLP(), Gated())
    with torch.device("meta"):
        net = starify(Net(MLP(), Gated()), gate="low_rank=2", grow=1)
    assert all(p.is_meta for p in net.parameters())
    net.to_empty(device="cpu")
    names = {k.replace(".inp.", "."): k for k in net.state_dict()}
    net.load_state_dict({names[k]: v for k, v in real.state_dict().items()}, strict=False)
    reset_gates(net)
    net.blocks[1].star_grown.f1.reset_parameters()
    assert torch.equal(net(x), real(x))


def test_a_recipe_of_ones_own(x):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleDict({"squeeze": nn.Linear(8, 4), "expand": nn.Linear(4, 8)})
            self.inner["bend"] = nn.Softplus()

        def forward(self, x):
            return self.inner["expand"](self.inner["bend"](self.inner["squeeze"](x)))

    with pytest.raises(ValueError, match="no module has the structure"):
        starify(Odd())

    @register_recipe
    def odd(owner):
        if isinstance(owner, Odd):
            names = {part: f"inner.{name}" for part, name in (("inp", "squeeze"), ("act", "bend"))}
            yield Site("odd", "plain", **names, out="inner.expand")

    try:
        model = Odd()
        y = model(x)
        assert torch.equal(starify(model)(x), y)
        assert report(model).rows[0].recipe == "odd"
        train_gates(model)
        assert not torch.equal(model(x), y)
    finally:
        RECIPES.remove(odd)


def test_functions_serve_as_activations(x):
    mlp = MLP(act=nn.functional.silu)
    y = mlp(x)
    starify(mlp)
    assert torch.equal(mlp(x), y)
    assert torch.equal(copy.deepcopy(mlp)(x), y)
    revert(mlp)
    assert mlp.act is nn.functional.silu


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


def test_squeeze_and_excitation_adapters_and_heads_are_no_mlps():
    import timm

    model = timm.create_model("mobilenetv3_small_050", num_classes=10)
    assert find_mlps(model) == []
    poolers = nn.Sequential(nn.Linear(8, 2), nn.ReLU(), nn.Linear(2, 8))
    assert find_mlps(poolers) == []


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


def test_the_report_counts(x):
    from torch.utils.flop_counter import FlopCounterMode

    def flops(model):
        with FlopCounterMode(display=False) as counter:
            model(x)
        return counter.get_total_flops() // len(x)

    net = Net(MLP(), Gated(), Twice())
    own, base = sum(p.numel() for p in net.parameters()), flops(net)
    starify(net, gate="low_rank=3", grow=2)
    table = report(net)
    assert table.parameters == own
    assert own + table.parameters_added == sum(p.numel() for p in net.parameters())
    # the counter sees matrix products only; per hidden channel there are 3 and 2 * 4 more
    assert table.flops_added == flops(net) - base + (3 + 8) * 16
    assert [r.state for r in table.rows] == ["star", "star", "skipped"]
    lines = str(table).splitlines()
    assert lines[0].split() == ["MLP", "recipe", "form", "state", "detail", "parameters", "FLOPs"]
    assert "calls 'act' 2 times" in lines[3]
    assert lines[-1].startswith("2 replaced, 0 ready, 1 skipped; +")
    assert isinstance(net.blocks[0].fc1, StarProjection)
    assert isinstance(net.blocks[1], GatedMLP)


# --- what a trial must see


class Clamped(Gated):
    def forward(self, x):
        return self.down(self.act(self.gate(x).clamp(max=5)) * self.up(x))


class ClampedPlain(MLP):
    def forward(self, x):
        return self.fc2(self.act(self.fc1(x).clamp(-5, 5)))


class Limited(MLP):
    """Clamps behind a norm, which no size of input gets at."""

    def forward(self, x):
        h = self.act(self.fc1(nn.functional.layer_norm(x, x.shape[-1:])))
        return self.fc2(h.clamp(max=20.0))


def test_clamps_that_rest_at_ordinary_sizes_are_seen():
    (row,) = report(Clamped()).skipped
    assert "written as a star, its output differs" in row.detail
    (row,) = report(ClampedPlain()).skipped
    assert "with a zero gate, its output differs" in row.detail
    assert len(report(Limited()).ready) == 1  # the clamp follows the star and stays where it is


def test_clamped_experts_of_transformers_are_left_alone():
    from transformers import DeepseekV4Config
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4MLP

    config = DeepseekV4Config(hidden_size=32, intermediate_size=64, moe_intermediate_size=64)
    assert config.swiglu_limit
    (row,) = report(DeepseekV4MLP(config)).skipped
    assert "differs" in row.detail


class Peeks(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x):
        before = self.net[0](x)
        return self.net[2](self.net[1](before)) + before.mean(-1, keepdim=True)


class Collects(Peeks):
    def forward(self, x):
        seen = []
        for layer in self.net:
            x = layer(x)
            seen.append(x)
        return seen


class Whole(Peeks):
    def forward(self, x):
        return self.net(x)


def test_rows_whose_caller_looks_inside_are_left_alone():
    for model in (Peeks(), Collects()):
        (row,) = report(model).skipped
        assert "differs" in row.detail
    assert [row.name for row in report(Whole()).ready] == ["net.0"]


def test_a_zero_last_projection_is_no_obstacle(x):
    mlp = MLP()
    nn.init.zeros_(mlp.fc2.weight)
    assert [row.state for row in report(mlp).rows] == ["ready"]


def test_arguments_that_cannot_be_left_out_do_not_confuse():
    class Residual(MLP):
        """As BLOOM and MPT write it."""

        def forward(self, x, residual):
            return residual + self.fc2(self.act(self.fc1(x)))

    assert [row.state for row in report(Residual()).rows] == ["ready"]


def test_a_trial_leaves_no_trace_anywhere():
    import random

    import numpy

    class Busy(MLP):
        def __init__(self):
            super().__init__()
            self.generator = torch.Generator().manual_seed(3)
            self.count, self.log = torch.zeros(()), []
            self.state = nn.Parameter(torch.zeros(8), requires_grad=False)

        def forward(self, x):
            self.count += 1
            self.log.append(len(x))
            self.state += 1
            torch.rand(1, generator=self.generator)
            numpy.random.rand()
            random.random()
            return super().forward(x)

    model = Busy()

    def numbers():
        held = model.generator.clone_state()
        drawn = torch.rand(1, generator=held).item()
        return [drawn, numpy.random.get_state()[2], random.getstate(), torch.get_rng_state().sum()]

    before = numbers()
    assert [row.state for row in report(model).rows] == ["ready"]
    report(copy.deepcopy(model).to("meta"))
    starify(model)  # a full gate draws no number either
    assert numbers() == before
    assert (model.count, model.log) == (0, [])
    assert model.state.sum() == 0


def test_other_gpus_are_not_seeded(monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "manual_seed_all", lambda seed: pytest.fail("every GPU was seeded")
    )
    report(MLP())


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


def test_mlps_that_are_called_by_keyword(x):
    class ByName(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = Gated()

        def forward(self, x):
            return self.mlp(x=x)

    model = ByName()
    y = model(x)
    assert torch.equal(starify(model, mode="fuse")(x), y)


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
    product = mish(model.hidden(x)) * model.sizes(x) + pairs[:, :16] + pairs[:, 16:]
    torch.testing.assert_close(model(x), model.release(product))


@pytest.mark.parametrize("wrap", ["weight_norm", "spectral_norm"])
@pytest.mark.parametrize("layer", ["fc1", "fc2"])
def test_parametrised_weights(x, wrap, layer):
    mlp = MLP()
    getattr(torch.nn.utils.parametrizations, wrap)(getattr(mlp, layer))
    mlp.eval()
    state, y = copy.deepcopy(mlp.state_dict()), mlp(x)
    mlp.train()
    report(mlp)
    assert all(torch.equal(state[k], v) for k, v in mlp.state_dict().items())
    starify(mlp)
    assert torch.equal(mlp.eval()(x), y)


def test_what_cannot_be_tried_is_skipped(x):
    net = nn.ModuleDict({"a": MLP(), "b": MLP(), "lazy": nn.LazyBatchNorm1d()})
    net["b"].act = torch.jit.script(nn.GELU())
    net["c"] = MLP()
    net["c"].fc1 = nn.LazyLinear(16)
    assert [row.name for row in report(net).ready] == ["a.fc1"]


def test_wrapped_for_distributed_training(monkeypatch):
    model = object.__new__(nn.parallel.DistributedDataParallel)
    with pytest.raises(ValueError, match="wrap afterwards"):
        starify(model)


def test_patterns_that_match_nothing():
    with pytest.raises(ValueError, match="exclude pattern 'nonsense' matches none of the 1 MLPs"):
        starify(MLP(), exclude="nonsense")
    with pytest.raises(ValueError, match="found no MLP to replace"):
        starify(MLP(), include=[])


def test_another_default_device(x):
    with torch.device("meta"):
        net = starify(MLP().to_empty(device="cpu"))
        assert gate_sizes(net) == {"fc1": 0.0}
