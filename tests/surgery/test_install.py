"""Star layers put in, listed, reported and taken out, and their parameter groups."""

import pytest
import torch
from torch import nn

from starlayers import starify
from starlayers.surgery import (
    GatedMLP,
    Report,
    Site,
    StarProjection,
    gate_parameters,
    param_groups,
    report,
)
from starlayers.surgery.install import (
    identity,
    install,
    install_plain,
    installed,
    role_of,
    settle_fast_paths,
    uninstall,
)
from starlayers.surgery.place import Placeholder
from starlayers.surgery.report import Row
from tests.surgery.small import MLP, Gated, Net, Packed, Twice

PLAIN = Site("chain", "plain", "fc1", "act", "fc2")
GATED = Site("gated", "gated", "gate", "act", "down", up="up")


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_install_plain(fused, recompute):
    mlp = MLP()
    fc1, act = mlp.fc1, mlp.act
    star = install_plain(
        mlp, PLAIN, "low_rank=2", act_name="gelu", fused=fused, recompute=recompute
    )
    assert mlp.fc1 is star
    assert (star.inp, star.act, star.site, star.spec) == (fc1, act, PLAIN, "low_rank=2")
    assert (star.act_name, star.fused, star.recompute) == ("gelu", fused, recompute)
    assert type(mlp.act) is Placeholder
    assert [name for name, _ in mlp.named_children()] == ["fc1", "fc2", "act", "drop"]
    assert role_of(star) is star
    uninstall(mlp, star)
    assert (mlp.fc1, mlp.act) == (fc1, act)


def test_install_plain_defaults():
    star = install_plain(MLP(act=nn.Mish()), PLAIN, "full")
    assert (star.fused, star.recompute, star.act_name) == (False, False, None)


def test_a_function_is_replaced_by_a_place(x):
    mlp = MLP(act=nn.functional.silu)
    star = install_plain(mlp, PLAIN, "scale")
    assert mlp.act is star.place
    assert identity(x) is x  # the placeholder of earlier versions
    assert star.act is nn.functional.silu
    uninstall(mlp, star)
    assert mlp.act is nn.functional.silu


def test_install_gated():
    mlp = Gated()
    star = install(mlp, GATED, "silu", between=("drop",), recompute=True, rank=3)
    assert star is mlp
    role = role_of(star)
    assert role is star.star
    assert (role.site, role.original, role.act_name) == (GATED, Gated, "silu")
    assert (role.between, role.fused, role.recompute, role.grown) == (("drop",), False, True, 3)
    uninstall(mlp, star)
    assert type(mlp) is Gated


def test_install_gated_defaults():
    role = install(Gated(act=nn.Mish()), GATED, None, fused=True).star
    assert (role.fused, role.recompute, role.grown, role.act_name) == (True, False, 0, None)


def test_installed_layers_are_listed_with_their_owners():
    net = Net(MLP(), Gated(), nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)), MLP())
    assert list(installed(net)) == []
    starify(net, grow=1, exclude="blocks.3")
    layers = list(installed(net))
    assert [path for path, _, _ in layers] == ["blocks.0", "blocks.1", "blocks.2"]
    assert [owner for _, owner, _ in layers] == list(net.blocks[:3])
    assert [star for _, _, star in layers] == [net.blocks[0].fc1, net.blocks[1], net.blocks[2][0]]
    assert [path for path, _, _ in installed(starify(MLP()))] == [""]
    assert [path for path, _, _ in installed(starify(Packed(), mode="fuse"))] == [""]


def test_a_second_name_that_ends_alike_is_not_the_owners():
    mlp = starify(MLP())
    net = nn.ModuleDict({"other_fc1": mlp.fc1, "mlp": mlp})
    assert [(path, owner) for path, owner, _ in installed(net)] == [("mlp", mlp)]


def test_names_of_several_parts_belong_to_the_site():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleDict({"a": nn.Linear(8, 16), "b": nn.Linear(16, 8)})
            self.act = nn.ReLU()

        def forward(self, x):
            return self.parts["b"](self.act(self.parts["a"](x)))

    net = Net(Parts())
    site = Site("mine", "plain", "parts.a", "act", "parts.b")
    star = install_plain(net.blocks[0], site, "full")
    assert [(path, owner) for path, owner, _ in installed(net)] == [("blocks.0", net.blocks[0])]
    uninstall(net.blocks[0], star)
    assert type(net.blocks[0].parts["a"]) is nn.Linear


def test_a_shared_layer_is_listed_once():
    mlp = starify(MLP())
    assert [path for path, _, _ in installed(Net(mlp, mlp))] == ["blocks.0"]


def test_a_layer_is_listed_under_the_name_that_its_site_gives_it():
    class Twice(nn.Module):
        """Holds the star projection under a second name, first."""

        def __init__(self, mlp):
            super().__init__()
            self.alias, self.mlp = mlp.fc1, mlp

    net = Twice(starify(MLP()))
    assert [(path, owner) for path, owner, _ in installed(net)] == [("mlp", net.mlp)]


def test_the_inference_path_of_torch_is_switched_off_and_on():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu").eval()
    before = layer.activation_relu_or_gelu
    assert before == 2
    starify(layer)
    assert layer.activation_relu_or_gelu == 0
    assert layer.linear1.undo == {"activation_relu_or_gelu": 2}
    uninstall(layer, layer.linear1)
    assert layer.activation_relu_or_gelu == before


def test_nested_tensors_follow_the_layers():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    for wanted in (True, False):
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=wanted)
        settle_fast_paths(model)
        assert model.use_nested_tensor is wanted
        assert not hasattr(model, "star_use_nested_tensor")
        star = install_plain(
            model.layers[1], Site("chain", "plain", "linear1", "activation", "linear2"), "full"
        )
        for _ in range(2):
            settle_fast_paths(model)
            assert model.use_nested_tensor is False
            assert hasattr(model, "star_use_nested_tensor") is wanted
        uninstall(model.layers[1], star)
        settle_fast_paths(model)
        assert model.use_nested_tensor is wanted
        assert not hasattr(model, "star_use_nested_tensor")


def test_star_projections_inside_star_projections_are_none():
    star = starify(MLP()).fc1
    assert sum(isinstance(m, StarProjection) for m in star.modules()) == 1
    assert torch.is_tensor(star.weight)


# --- groups of parameters for an optimizer


class Shapes(nn.Module):
    """Parameters of zero to three dimensions."""

    def __init__(self):
        super().__init__()
        self.scalar = nn.Parameter(torch.ones(()))
        self.vector = nn.Parameter(torch.ones(2))
        self.matrix = nn.Parameter(torch.ones(2, 2))
        self.kernel = nn.Parameter(torch.ones(2, 2, 2))
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)


def numbers(groups):
    return {g["name"]: (g["lr"], g["weight_decay"]) for g in groups}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [(1e-3, 0.01), (1e-3, 0.0), (1e-3, 0.01)]),
        ({"weight_decay": 0.1}, [(1e-3, 0.1), (1e-3, 0.0), (1e-3, 0.1)]),
        ({"gate_lr": 1e-2}, [(1e-3, 0.01), (1e-3, 0.0), (1e-2, 0.01)]),
        ({"gate_lr": 0.0}, [(1e-3, 0.01), (1e-3, 0.0), (0.0, 0.01)]),
        ({"gate_weight_decay": 0.5}, [(1e-3, 0.01), (1e-3, 0.0), (1e-3, 0.5)]),
        ({"gate_weight_decay": 0.0}, [(1e-3, 0.01), (1e-3, 0.0), (1e-3, 0.0)]),
        ({"weight_decay": 0.0}, [(1e-3, 0.0), (1e-3, 0.0), (1e-3, 0.0)]),
    ],
)
def test_rates_and_decays(options, expected):
    groups = param_groups(starify(Net(MLP())), 1e-3, **options)
    names = ("decay", "no_decay", "star_gates")
    assert numbers(groups) == dict(zip(names, expected, strict=True))
    assert [g["name"] for g in groups] == list(names)


def test_every_trainable_parameter_is_in_one_group():
    model = starify(Net(MLP(), Gated()), grow=1)
    groups = {g["name"]: g["params"] for g in param_groups(model, 1e-3)}
    listed = [p for params in groups.values() for p in params]
    assert len(listed) == len(set(listed)) == len(list(model.parameters()))
    assert set(groups["star_gates"]) == set(gate_parameters(model))
    assert sorted(p.ndim for p in groups["no_decay"]) == [1, 1]
    assert [p.ndim for p in groups["decay"]] == [2] * 5


def test_dimensions_decide_about_decay_and_frozen_parameters_are_left_out():
    model = Shapes()
    decay, no_decay = param_groups(model, 0.0)
    assert [id(p) for p in decay["params"]] == [id(model.matrix), id(model.kernel)]
    assert [id(p) for p in no_decay["params"]] == [id(model.scalar), id(model.vector)]
    assert decay["lr"] == 0.0


def test_empty_groups_are_left_out():
    model = starify(Net(MLP()))
    for name, p in model.named_parameters():
        p.requires_grad_("gate" in name)
    assert [g["name"] for g in param_groups(model, 1e-3)] == ["star_gates"]
    for p in gate_parameters(model):
        p.requires_grad_(False)
    model.blocks[0].fc2.weight.requires_grad_(True)
    assert [g["name"] for g in param_groups(model, 1e-3)] == ["decay"]


def test_an_optimizer_takes_the_groups(x):
    model = starify(Net(MLP()))
    optimizer = torch.optim.SGD(param_groups(model, 0.0, gate_lr=1.0, weight_decay=0.0))
    before = [p.detach().clone() for p in model.parameters()]
    model(x).square().sum().backward()
    optimizer.step()
    gates = {id(p) for p in gate_parameters(model)}
    moved = [
        id(p) for p, q in zip(model.parameters(), before, strict=True) if not torch.equal(p, q)
    ]
    assert set(moved) == gates


@pytest.mark.parametrize("name", ["lr", "weight_decay", "gate_lr", "gate_weight_decay"])
def test_negative_numbers(name):
    options = {"lr": 1e-3, name: -0.5}
    with pytest.raises(ValueError, match=f"^param_groups: {name} must be at least 0, got -0.5"):
        param_groups(nn.Linear(2, 2), **options)


def test_nothing_to_train():
    with pytest.raises(ValueError, match="no parameter of this Linear is trainable"):
        param_groups(nn.Linear(2, 2).requires_grad_(False), 1e-3)


# --- report: states, details, and numbers that are those of the model


def flops(model, x):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() // len(x)


def test_the_report_counts(x):
    net = Net(MLP(), Gated(), Twice())
    own, base = sum(p.numel() for p in net.parameters()), flops(net, x)
    starify(net, gate="low_rank=3", grow=2)
    table = report(net)
    assert table.parameters == own
    assert own + table.parameters_added == sum(p.numel() for p in net.parameters())
    # the counter sees matrix products only; per hidden channel there are 3 and 2 * 4 more
    assert table.flops_added == flops(net, x) - base + (3 + 8) * 16
    assert [r.state for r in table.rows] == ["star", "star", "skipped"]
    lines = str(table).splitlines()
    assert lines[0].split() == ["MLP", "recipe", "form", "state", "detail", "parameters", "FLOPs"]
    assert "calls 'act' 2 times" in lines[3]
    assert lines[-1].startswith("2 replaced, 0 ready, 1 skipped; +")
    assert isinstance(net.blocks[0].fc1, StarProjection)
    assert isinstance(net.blocks[1], GatedMLP)


@pytest.mark.parametrize(
    ("gate", "parameters", "added"),
    [
        ("full", 16 * 8 + 16, 2 * 8 * 16 + 3 * 16),
        ("low_rank=3", 3 * 8 + 16 * 3 + 16, 2 * 3 * (8 + 16) + 3 * 16),
        ("scale", 16, 2 * 16),
    ],
)
def test_numbers_of_each_gate(gate, parameters, added):
    (row,) = report(starify(MLP(), gate=gate)).rows
    assert (row.parameters, row.flops) == (parameters, added)


def test_numbers_of_grown_and_fused_mlps():
    (row,) = report(starify(Packed(), grow=3)).rows  # of its packed layer with a bias
    assert row.parameters == 3 * 2 * (16 * 8 + 16)
    assert row.flops == 3 * (2 * 2 * 8 * 16 + 4 * 16)
    (row,) = report(starify(Packed(), mode="fuse")).rows
    assert (row.parameters, row.flops) == (0, 0)


def test_states_and_details():
    make = [MLP, MLP, Gated, Gated, Gated, Gated, Twice, MLP]
    net = Net(*(kind() for kind in make))
    starify(net, include="blocks.0")
    starify(net, mode="fuse", include="blocks.0")
    starify(net, include="blocks.1", gate="scale")
    starify(net, include=["blocks.2", "blocks.3"], grow=2)
    starify(net, include=["blocks.3", "blocks.4"], mode="fuse")
    table = report(net)
    assert [(r.name, r.recipe, r.form, r.state, r.detail) for r in table.rows] == [
        ("blocks.0.fc1", "chain", "plain", "star", "full, no Triton kernel for device 'cpu'"),
        ("blocks.1.fc1", "chain", "plain", "star", "scale"),
        ("blocks.2.gate", "gated", "gated", "star", "silu, grown by 2"),
        (
            "blocks.3.gate",
            "gated",
            "gated",
            "star",
            "silu, grown by 2, it has grown products: no op for these",
        ),
        ("blocks.4.gate", "gated", "gated", "fused", "silu"),
        ("blocks.5.gate", "gated", "gated", "is a star", ""),
        ("blocks.6.fc1", "chain", "plain", "skipped", "one run calls 'act' 2 times, not once"),
        ("blocks.7.fc1", "chain", "plain", "ready", ""),
    ]
    assert [r.name for r in table.replaced] == [
        f"blocks.{i}.{n}"
        for i, n in ((0, "fc1"), (1, "fc1"), (2, "gate"), (3, "gate"), (4, "gate"))
    ]
    assert [r.name for r in table.ready] == ["blocks.5.gate", "blocks.7.fc1"]
    assert [r.name for r in table.skipped] == ["blocks.6.fc1"]
    (mish,) = report(starify(Gated(act=nn.Mish()), grow=1)).rows
    assert mish.detail == "grown by 1"


def test_patterns():
    net = starify(Net(MLP(), MLP(), Gated()), include=["blocks.0", "blocks.1"])
    assert [r.name for r in report(net, include="blocks.1").rows] == ["blocks.1.fc1"]
    names = [r.name for r in report(net, exclude="blocks.1").rows]
    assert names == ["blocks.0.fc1", "blocks.2.gate"]
    with pytest.raises(ValueError, match="exclude pattern 'no' matches none of the 3 MLPs"):
        report(net, exclude="no")


def test_the_table():
    rows = [
        Row("a", "chain", "plain", "star", "full", 12345, 7),
        Row("longer", "r", "gated", "skipped", "why"),
    ]
    table = Report(rows, 50_000)
    assert (
        str(table)
        == repr(table)
        == (
            "MLP     recipe  form   state    detail  parameters  FLOPs\n"
            "a       chain   plain  star     full       +12,345     +7\n"
            "longer  r       gated  skipped  why\n"
            "1 replaced, 0 ready, 1 skipped; +12,345 parameters (25 %), +7 FLOPs per position"
        )
    )
    empty = str(Report([], 0)).splitlines()
    assert empty[1] == "0 replaced, 0 ready, 0 skipped; +0 parameters (0 %), +0 FLOPs per position"


def test_defaults_of_a_row():
    row = Row("a", "chain", "plain", "ready")
    assert (row.detail, row.parameters, row.flops) == ("", 0, 0)


def test_lazy_parameters_are_not_counted():
    net = nn.ModuleDict({"mlp": MLP(), "lazy": nn.LazyLinear(4)})
    assert report(net).parameters == sum(p.numel() for p in MLP().parameters())


def test_a_report_changes_nothing(x):
    net = Net(MLP(), Gated())
    kinds = [type(m) for m in net.modules()]
    y = net(x)
    report(net)
    assert [type(m) for m in net.modules()] == kinds
    assert torch.equal(net(x), y)
    assert gate_parameters(net) == []
