"""Studies of the layers: what they compare, and pages that say what was measured."""

import pytest
import torch
from torch import nn

from benchmarks.core import host, overhead, start, sweep
from benchmarks.core.__main__ import PAGE
from benchmarks.harness.records import Record
from starlayers import StarOp, plans
from tests.helpers import randn


def records(jobs, work):
    return {
        name: Record("study", name, job["arm"], job["seed"], job, work(job))
        for name, job in jobs.items()
    }


@pytest.mark.parametrize("name", ["StarMLP", "StarOp"])
def test_a_small_layer_races_the_same_products_with_the_same_weights(name):
    ours, plain = overhead.pairs(8)[name]
    x = randn(3, 8)
    torch.testing.assert_close(ours(x), plain(x))
    assert [*ours.state_dict()] == [*plain.state_dict()]


def test_a_step_makes_gradients_and_inference_none():
    layer, x = nn.Linear(3, 2), randn(4, 3)
    overhead.repeated(layer, x, 2, training=False)()
    assert layer.weight.grad is None
    overhead.repeated(layer, x, 2, training=True)()
    torch.testing.assert_close(layer.bias.grad, torch.full((2,), 8.0))  # twice four rows


def test_the_formula_of_the_start_study():
    x, y = start.points(7, seed=3)
    m, omega, omega0, length = x.T
    torch.testing.assert_close(y[:, 0], 0.25 * m * (omega**2 + omega0**2) * length**2)
    assert x.min() >= 1
    assert x.max() <= 3
    assert torch.equal(start.points(7, seed=3)[0], x)


def test_arms_of_the_start_study_have_about_the_same_size():
    sizes = {arm: sum(p.numel() for p in start.network(arm).parameters()) for arm in start.ARMS}
    assert max(sizes.values()) < 1.02 * min(sizes.values())
    assert sum(isinstance(m, StarOp) for m in start.network("star")) == start.LAYERS
    near = start.network("star, near-linear")[0]
    assert (near.init, near.offset, near.act) == ("near_linear", 1.0, "identity")


@pytest.mark.studies
def test_smoke_runs_of_every_study_make_a_page():
    for study, jobs in (
        (overhead.STUDY, {"overhead": overhead.job(smoke=True)}),
        (sweep.STUDY, {"sweep": sweep.job(smoke=True)}),
    ):
        made = records(jobs, study.work)
        assert "| --- |" in study.tables(made)
    (cell,) = {c["path"] for c in made["sweep"].metrics["cells"].values()}
    assert cell == "eager"
    made = records(start.jobs(smoke=True), start.work)
    assert len(made) == len(start.ARMS)
    assert all(0 < r.metrics["test_nmse"] < 10 for r in made.values())
    assert start.table(made).count("\n") == 2 + len(start.ARMS)


@pytest.mark.slow
def test_near_linear_stacks_reach_the_mlp_where_the_default_is_far_behind():
    def accuracy(arm):
        metrics = [
            start.work({**job, "steps": 1500})
            for job in start.jobs(smoke=True, seeds=1).values()
            if job["arm"] == arm
        ]
        return start.accuracy(metrics[0]["test_nmse"])

    usual, near, mlp = map(accuracy, ("star", "star, near-linear", "GELU MLP"))
    assert near > mlp - 0.1
    assert near > usual + 1


def test_thresholds_are_those_of_the_committed_sweep():
    (record,) = sweep.STUDY.records().values()
    cells = record.metrics["cells"]
    mib = 2**20
    for cell, ratios in cells.items():
        task, dim, megabytes = cell.split(", ")
        least, most = plans.MIN_HIDDEN_BYTES_INFERENCE, 10**9
        if task == "training":
            most = plans.MAX_CHANNELS_TRAINING
            least = plans.MIN_HIDDEN_BYTES_TRAINING
            least = max(least, int(dim) * plans.HIDDEN_BYTES_A_CHANNEL)
        row = 4 * 4 * int(dim)  # bytes
        fused = int(megabytes) * mib // row * row >= least
        assert ratios["path"] == ("cpu" if fused and int(dim) <= most else "eager"), cell
        if ratios["path"] == "cpu":
            assert ratios["cpu"] < 1.05, cell


def test_the_page_names_its_commands():
    assert [study.command for study in PAGE.studies] == [
        f"python -m benchmarks.core {name}" for name in ("overhead", "host", "sweep", "start")
    ]


@pytest.mark.slow
def test_launches_of_a_fused_block_stay_within_their_budget():
    """Without a GPU: the whole path to a launch runs, and the driver below Triton does nothing."""
    rows = host.work(host.job(smoke=True))["rows"]
    assert rows.keys() == {"inference", "folded", "training step", host.REPLAYED, host.TRACED}
    for name in ("inference", "folded"):
        assert (rows[name]["launches"], rows[name]["operations"]) == (3, 0)
    assert rows["training step"]["launches"] <= 16
    assert rows["training step"]["operations"] == 0
