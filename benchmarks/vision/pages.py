"""Pages of the vision studies: every number in them comes from the records."""

from typing import Any

from benchmarks.harness.comparison import Difference, mean_interval, with_half
from benchmarks.harness.records import Record
from benchmarks.harness.report import conditions, listed, template
from benchmarks.harness.runner import Records, current
from benchmarks.harness.study import Study
from benchmarks.vision import demonet, peers, speed


def demonet_text(records: Records) -> str:
    """Make the page of the DemoNet study."""
    summary = demonet.summarise(records)
    names = ("star - sum, gelu", "star - sum, no act")
    gaps: list[tuple[dict[str, Any], str, Difference]] = [
        (row, name, row["differences"][name]) for row in summary for name in names
    ]
    undecided = [
        f"width {row['width']} depth {row['depth']} {'with GELU' if 'gelu' in name else 'without'}"
        for row, name, d in gaps
        if d.verdict == "not decided"
    ]
    means = [d.mean for _, _, d in gaps]
    losses = [row["differences"][demonet.MORE] for row in summary]
    nets = [mean for row in summary for mean, _ in row["arms"].values()]
    linear = mean_interval(
        100 * r.metrics["test_accuracy"] for r in records.values() if r.arm == demonet.LINEAR
    )
    first = next(iter(records.values()))
    assert first.definition is not None
    return template(__file__, "demonet").format(
        linear=with_half(linear, 2),
        below=sum(mean < linear[0] for mean in nets),
        nets=len(nets),
        patch=first.definition["model"]["patch_size"],
        layer_scale=first.definition["model"]["layer_scale"],
        epochs=first.definition["recipe"]["epochs"],
        lr=first.definition["recipe"]["lr"],
        seeds=summary[0]["seeds"],
        accuracies=demonet.accuracy_table(summary),
        differences=demonet.difference_table(summary),
        ahead=sum(mean > 0 for mean in means),
        comparisons=len(gaps),
        decided=sum(d.verdict == "better" for _, _, d in gaps),
        open=listed(undecided),
        least=min(means),
        most=max(means),
        undecided=sum(d.verdict == "not decided" for d in losses),
        shapes=len(losses),
        low=min(d.mean for d in losses),
        high=max(d.mean for d in losses),
        paper_gap=demonet.PAPER["star - sum"],
        paper_sum=demonet.PAPER["sum loses without activation"],
        paper_star=demonet.PAPER["star loses"],
        conditions=conditions(records.values()),
    )


DEMONET = Study(
    "vision-demonet",
    "python -m benchmarks.vision demonet",
    demonet.jobs,
    demonet.train_one,
    demonet.tables,
    demonet_text,
    lambda records: {
        "vision-demonet.png": lambda file: demonet.plot(demonet.summarise(records), file)
    },
)

COST = "vision-peers-cost"


def peers_text(records: Records) -> str:
    """Make the page of the networks of similar size."""
    summary = peers.summarise(records)
    cost = cost_record(records)
    accuracy = {name: mean for name, (_, (mean, _)) in summary.items()}
    star, other = (
        [value for name, value in accuracy.items() if name.startswith("starnet") is ours]
        for ours in (True, False)
    )
    counts = sorted({seeds for seeds, _ in summary.values()})
    first = next(iter(records.values()))
    assert first.definition is not None
    return template(__file__, "peers").format(
        epochs=first.definition["recipe"]["epochs"],
        lr=first.definition["recipe"]["lr"],
        smoothing=first.definition["recipe"]["label_smoothing"],
        accuracies=peers.accuracy_table(records),
        costs=peers.cost_table(cost.metrics),
        seeds="One seed" if counts == [1] else f"{listed(map(str, counts))} seeds",
        star_low=min(star),
        star_high=max(star),
        peer_low=min(other),
        peer_high=max(other),
        macs=_most_macs(cost.metrics),
        missing=listed(name for name in peers.MODELS if name not in summary),
        conditions=conditions(records.values()),
        cost_conditions=conditions([cost]),
    )


def _most_macs(costs: dict[str, dict[str, float]]) -> float:
    """Return the largest ratio of a StarNet's MACs to those of the next larger other network."""
    others = [c for name, c in costs.items() if not name.startswith("starnet")]
    ratios = []
    for name, ours in costs.items():
        larger = [c for c in others if c["parameters"] >= ours["parameters"]]
        if name.startswith("starnet") and larger:
            nearest = min(larger, key=lambda c: c["parameters"])
            ratios.append(ours["multiply_adds"] / nearest["multiply_adds"])
    return max(ratios)


def cost_record(records: Records) -> Record:
    """Return the measured costs of the networks that have runs."""
    job = peers.cost_job(list(peers.summarise(records)), smoke=False)
    return current(COST, {COST: job})[COST]


PEERS = Study(
    "vision-peers",
    "python -m benchmarks.vision peers",
    peers.jobs,
    peers.train_one,
    peers.accuracy_table,
    peers_text,
    sources=(COST,),
)

PEERS_COST = Study(
    COST,
    "python -m benchmarks.vision peers",
    dict,
    peers.cost,
    lambda records: peers.cost_table(next(iter(records.values())).metrics),
    lambda _: "",
)


def speed_text(records: Records) -> str:
    """Make the page of StarNet's speed."""
    (record,) = records.values()
    assert record.definition is not None
    rows = record.metrics["rows"]
    ratio = {(row["task"], row["batch"], row["variant"]): row["ratio"] for row in rows}
    large = max(record.definition["batches"])
    ours = "ours channels_last"
    return template(__file__, "speed").format(
        model=record.definition["model"],
        image=record.definition["image"],
        table=speed.table(rows),
        large=large,
        fused=ratio["inference", large, ours],
        eager=ratio["inference", large, f"{ours}, eager backend"],
        training=ratio["training", large, ours],
        one=ratio["inference", 1, ours],
        compiled=ratio["inference", 1, "timm channels_last, torch.compile"],
        conditions=conditions([record]),
    )


SPEED = Study(
    "vision-speed",
    "python -m benchmarks.vision speed",
    lambda: {"vision-speed": speed.job()},
    speed.work,
    lambda records: speed.table(next(iter(records.values())).metrics["rows"]),
    speed_text,
)
STUDIES = (DEMONET, PEERS, SPEED)
