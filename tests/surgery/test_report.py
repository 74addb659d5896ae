"""Whether the report's numbers are the model's."""

from starlayers import starify
from starlayers.surgery import GatedMLP, StarProjection, report
from tests.surgery.small import MLP, Gated, Net, Twice


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
