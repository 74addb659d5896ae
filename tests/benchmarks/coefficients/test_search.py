"""The study of searching: fair splits, runs that repeat, tables that say what the runs say."""

import json
import math

import pytest
import torch
from matplotlib.image import imread
from torch.nn import functional as F

from benchmarks import coefficients_search as study
from benchmarks import coefficients_search_runs as runs
from benchmarks.coefficients.search_runs import DEFAULTS, RECIPE, SMOKE, TUNED
from benchmarks.common import write_json
from starlayers.coefficients.scaling import star_layers

SMALL = RECIPE | SMOKE


@pytest.fixture(autouse=True)
def _few_images(monkeypatch):
    """The study is about Fashion-MNIST; how it goes can be seen from random pixels."""
    draw = torch.Generator().manual_seed(0)
    made = {
        name: (torch.randn(n, 784, generator=draw), torch.randint(10, (n,), generator=draw))
        for name, n in (("train", 1000), ("test", 300))
    }
    monkeypatch.setattr(runs, "images", lambda: made)


def test_splits_have_no_image_in_common_and_depend_on_the_seed():
    found = runs.splits(SMALL, 0)
    assert [len(found[s][1]) for s in ("train", "validation", "test")] == [200, 200, 300]
    together = torch.cat([found["train"][0], found["validation"][0]])
    assert len(together.unique(dim=0)) == 400
    assert torch.equal(runs.splits(SMALL, 0)["train"][0], found["train"][0])
    assert not torch.equal(runs.splits(SMALL, 1)["train"][0], found["train"][0])


def test_fit_repeats_and_its_values_matter():
    data = runs.splits(SMALL, 0)["train"]
    values = {"rank": 1, "l2": 1e-3, "balance": 1e-2}
    nets = [runs.fit(v, SMALL, data, 0) for v in (values, values, values | {"l2": 1.0})]
    weights = [net[1].mlp.f1.weight for net in nets]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    sizes = [sum(p.numel() for p in runs.build(v, 0).parameters()) for v in DEFAULTS.values()]
    assert sizes[1] > 1.4 * sizes[0]


def test_gradients_have_the_factors_that_tuning_has():
    data = runs.splits(SMALL, 0)["validation"]
    net = runs.fit(DEFAULTS["defaults"], SMALL, runs.splits(SMALL, 0)["train"], 0)
    kept = {name: p.detach().clone() for name, p in net.named_parameters()}
    groups = {name: p.groups(8) for name, p in star_layers("test", net).items()}
    before = F.cross_entropy(net(data[0]), data[1])
    runs.by_gradients(net, data, 8, {"steps": 15, "lr": 0.03, "width": 2.0})
    assert F.cross_entropy(net(data[0]), data[1]) < before
    for name, p in net.named_parameters():
        layer = name.removesuffix(".f2.bias")
        if layer == name:
            assert torch.equal(p, kept[name]) == (not name.endswith(".f2.weight"))
            continue
        factors = (p / kept[name]).detach()
        for group in groups[layer]:
            assert torch.allclose(factors[group], factors[group[0]], rtol=1e-4)
        assert len(factors.mul(1e4).round().unique()) >= 6
        assert 0.5 - 1e-5 <= factors.min() < 1 < factors.max() <= 2 + 1e-5


def test_a_search_says_what_its_best_trial_is_worth():
    job = runs.search_jobs(smoke=True)["random-seed0"]
    found = runs.search_one(job)
    data = runs.splits(SMALL, 0)
    net = runs.fit(found["best"], SMALL, data["train"], 0)
    assert found["validation"] == runs.accuracy(net, data["validation"]) == found["curve"][-1]
    assert found["test"] == runs.accuracy(net, data["test"])
    assert len(found["trials"]) == SMOKE["trials"]
    assert found["failed"] == 0
    assert set(found["best"]) == set(runs.SEARCHED)


def test_tuning_measures_before_and_after():
    jobs = {j["arm"]: j for j in runs.tune_jobs(smoke=True).values() if j["seed"] == 0}
    assert list(jobs) == list(TUNED)
    found = {arm: runs.tune_one(job) for arm, job in jobs.items()}
    starts = {tuple(run[s][0] for s in ("validation", "test")) for run in found.values()}
    assert len(starts) == 1
    for arm, run in found.items():
        assert run["validation"][1] >= run["validation"][0] or arm.startswith("gradients")


def test_what_there_is_can_be_tabulated(tmp_path, capsys):
    """A study that was stopped has some of its runs."""
    for name, jobs, work in (
        ("search", runs.search_jobs(smoke=True), runs.search_one),
        ("tune", runs.tune_jobs(smoke=True), runs.tune_one),
    ):
        command = getattr(study, name)
        with pytest.raises(FileNotFoundError, match=r"no runs in .*-smoke yet: give --processes"):
            command(processes=0, smoke=True, out=tmp_path)
        some = list(jobs.items())[3 : len(jobs) - 2]
        for file, job in some:
            record = {"job": job, **work(job), "environment": {}}
            write_json(tmp_path / "coefficients" / f"{name}-smoke" / f"{file}.json", record)
        command(processes=0, smoke=True, out=tmp_path)
        printed = capsys.readouterr().out
        report = tmp_path / "coefficients" / f"{name}-smoke.json"
        assert printed.strip() == report.with_suffix(".md").read_text().strip()
        assert imread(report.with_suffix(".png")).std() > 0.01
        rows = json.loads(report.read_text())["arms"]
        kind = "method" if name == "search" else "arm"
        for arm, row in rows.items():
            assert row["seeds"] == sum(job[kind] == arm for _, job in some)
        assert sum(row["seeds"] for row in rows.values()) == len(some)


def test_differences_by_hand():
    records = {
        f"{method}{seed}": {"job": {"method": method, "seed": seed}, "test": value}
        for method, values in {"tpe": [3.0, 5.0, 4.0, 9.0], "random": [2.0, 4.0, 4.0]}.items()
        for seed, value in enumerate(values)
    }
    told = study.difference(records, "tpe", "random", "test")
    mean, half = told["better by"]
    assert mean == pytest.approx(2 / 3)
    assert half == pytest.approx(4.3027 * math.sqrt(1 / 3) / math.sqrt(3), rel=1e-4)
    assert told["P(improvement)"] == pytest.approx((1 + 3 + 2) / 9)


def test_share_that_holds_is_of_the_means():
    records = {
        str(seed): {
            "job": {"arm": next(iter(TUNED)), "seed": seed},
            "train": [90.0, 90.0],
            "validation": [80.0, 80.0 + gain],
            "test": [79.0, 79.0 + held],
            "seconds": 1.0,
        }
        for seed, (gain, held) in enumerate([(2.0, 1.0), (1.0, -0.4), (1.0, 0.4)])
    }
    row = study.tune_rows(records)[next(iter(TUNED))]
    assert row["share that holds"] == pytest.approx(0.25)
    assert row["gain"]["validation"]["better by"][0] == pytest.approx(4 / 3)
    assert "| 0.25 |" in study.tune_table({next(iter(TUNED)): row})
