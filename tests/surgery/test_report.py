"""Report: states, details, and numbers that are those of the model."""

import pytest
import torch
from torch import nn

from starlayers import starify
from starlayers.surgery import GatedMLP, Report, StarProjection, gate_parameters, report
from starlayers.surgery.report import Row
from tests.surgery.small import MLP, Gated, Net, Packed, Twice


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
        ("blocks.0.fc1", "chain", "plain", "star", "full, fused"),
        ("blocks.1.fc1", "chain", "plain", "star", "scale"),
        ("blocks.2.gate", "gated", "gated", "star", "silu, grown by 2"),
        ("blocks.3.gate", "gated", "gated", "star", "silu, grown by 2"),
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
    assert mish.detail == ", grown by 1"


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
