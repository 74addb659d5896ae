"""Studies of coefficients: fair splits, measures by hand, runs that repeat."""

import json
import math

import pytest
import torch
from matplotlib.image import imread
from torch import nn
from torch.nn import functional as F

from benchmarks.coefficients import cost, dimension, penalties
from benchmarks.coefficients import eigen as study
from benchmarks.coefficients import search as searches
from benchmarks.coefficients import search_runs as runs
from benchmarks.coefficients.cost import ARMS, BASELINE, memory
from benchmarks.coefficients.search_runs import DEFAULTS, RECIPE, SMOKE, TUNED
from benchmarks.harness.records import Record
from benchmarks.harness.runner import current, definition
from starlayers import StarMLP, StarOp
from starlayers.coefficients import CoefficientPenalty, Eigenfeatures, eigenfeatures
from starlayers.coefficients.modules import (
    DynamicStarMLP,
    RankStarMLP,
    RankStarOp,
    ScaledStarMLP,
)
from starlayers.coefficients.scaling import star_layers
from starlayers.vision import StarNet

# ---- searches

SMALL = RECIPE | SMOKE


@pytest.fixture
def few_images(monkeypatch):
    """The study is about Fashion-MNIST; how it goes can be seen from random pixels."""
    draw = torch.Generator().manual_seed(0)
    made = {
        name: (torch.randn(n, 784, generator=draw), torch.randint(10, (n,), generator=draw))
        for name, n in (("train", 1000), ("test", 300))
    }
    monkeypatch.setattr(runs, "images", lambda: made)


def test_splits_have_no_image_in_common_and_depend_on_the_seed(few_images):
    found = runs.splits(SMALL, 0)
    assert [len(found[s][1]) for s in ("train", "validation", "test")] == [200, 200, 300]
    together = torch.cat([found["train"][0], found["validation"][0]])
    assert len(together.unique(dim=0)) == 400
    assert torch.equal(runs.splits(SMALL, 0)["train"][0], found["train"][0])
    assert not torch.equal(runs.splits(SMALL, 1)["train"][0], found["train"][0])


@pytest.mark.studies
def test_fit_repeats_and_its_values_matter(few_images):
    data = runs.splits(SMALL, 0)["train"]
    values = {"rank": 1, "l2": 1e-3, "balance": 1e-2}
    nets = [runs.fit(v, SMALL, data, 0) for v in (values, values, values | {"l2": 1.0})]
    weights = [net[1].mlp.f1.weight for net in nets]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    sizes = [sum(p.numel() for p in runs.build(v, 0).parameters()) for v in DEFAULTS.values()]
    assert sizes[1] > 1.4 * sizes[0]


@pytest.mark.studies
def test_gradients_have_the_factors_that_tuning_has(few_images):
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


@pytest.mark.studies
def test_a_search_says_what_its_best_trial_is_worth(few_images):
    job = runs.search_jobs(smoke=True)["random-seed0"]
    found = runs.search_one(job)
    data = runs.splits(SMALL, 0)
    net = runs.fit(found["best"], SMALL, data["train"], 0)
    assert found["validation"] == runs.accuracy(net, data["validation"]) == found["curve"][-1]
    assert found["test"] == runs.accuracy(net, data["test"])
    assert len(found["trials"]) == SMOKE["trials"]
    assert found["failed"] == 0
    assert set(found["best"]) == set(runs.SEARCHED)


@pytest.mark.studies
def test_tuning_measures_before_and_after(few_images):
    jobs = {j["arm"]: j for j in runs.tune_jobs(smoke=True).values() if j["seed"] == 0}
    assert list(jobs) == list(TUNED)
    found = {arm: runs.tune_one(job) for arm, job in jobs.items()}
    starts = {tuple(run[s][0] for s in ("validation", "test")) for run in found.values()}
    assert len(starts) == 1
    for arm, run in found.items():
        assert run["validation"][1] >= run["validation"][0] or arm.startswith("gradients")


@pytest.mark.studies
def test_what_there_is_can_be_tabulated(few_images, tmp_path):
    """A study that was stopped has some of its runs."""
    for jobs, work, table, draw in (
        (runs.search_jobs(True), runs.search_one, searches.search_table, searches.plot_search),
        (runs.tune_jobs(True), runs.tune_one, searches.tune_table, searches.plot_tune),
    ):
        some = list(jobs.items())[3 : len(jobs) - 2]
        records = {
            name: Record("s", name, job["arm"], job["seed"], {}, work(job)) for name, job in some
        }
        lines = table(records).splitlines()[2:]
        assert sum(int(line.split("|")[2]) for line in lines) == len(some)
        draw(records, tmp_path / "plot.png")
        assert imread(tmp_path / "plot.png").std() > 0.01


def test_differences_by_hand():
    records = {}
    for method, values in {"tpe": [3.0, 5.0, 4.0, 9.0], "random": [2.0, 4.0, 4.0]}.items():
        for seed, value in enumerate(values):
            metrics = {"test": value, "validation": value, "seconds": 1.0}
            name = f"{method}{seed}"
            records[name] = Record("search", name, method, seed, {}, metrics)
    rows = searches.search_summary(records)
    assert rows["tpe"]["differences"].keys() == {("test", "random"), ("validation", "random")}
    assert rows["random"]["differences"] == {}
    d = rows["tpe"]["differences"]["test", "random"]
    assert d.mean == pytest.approx(2 / 3)
    assert d.half == pytest.approx(4.3027 * math.sqrt(1 / 3) / math.sqrt(3), rel=1e-4)
    assert "| TPE | 4 |" in searches.search_table(records)


def test_share_that_holds_is_of_the_means():
    arm = next(iter(TUNED))
    records = {}
    for seed, (gain, held) in enumerate([(2.0, 1.0), (1.0, -0.4), (1.0, 0.4)]):
        metrics = {
            "train": [90.0, 90.0],
            "validation": [80.0, 80.0 + gain],
            "test": [79.0, 79.0 + held],
            "seconds": 1.0,
        }
        records[str(seed)] = Record("tune", str(seed), arm, seed, {}, metrics)
    row = searches.tune_summary(records)[arm]
    assert row["share that holds"] == pytest.approx(0.25)
    assert row["gain"]["validation"].mean == pytest.approx(4 / 3)
    assert "| 0.25 |" in searches.tune_table(records)


# ---- eigenfeatures


@pytest.fixture
def images(monkeypatch):
    """Ten classes of a blob each, under noise."""
    torch.manual_seed(0)
    labels = torch.arange(400) % 10
    x = 0.3 * torch.rand(400, 784)
    for row, label in zip(x.reshape(400, 28, 28), labels):
        row[2 * label + 3 : 2 * label + 8, 5:20] += 0.7
    monkeypatch.setattr(
        study, "data", lambda **sizes: (x[:300], labels[:300], x[300:], labels[300:])
    )
    return x, labels


def test_eigen_jobs_are_whole_seeds():
    jobs = study.jobs()
    assert len(jobs) == 5 * len(study.ARMS)
    seeds = [job["seed"] for job in jobs.values()]
    assert seeds == sorted(seeds)
    for job in jobs.values():
        assert definition(job) == json.loads(json.dumps(definition(job)))
    assert jobs["noise_and_decay-seed3"]["settings"] == {"noise": 0.4, "weight_decay": 1.0}


def test_penalties_are_tuned_on_images_and_a_seed_that_the_study_does_not_have():
    tuning = study.tuning_jobs()
    penalised = [arm for arm, settings in study.ARMS.items() if "penalty" in settings]
    assert len(tuning) == len(study.STRENGTHS) * len(penalised) == 6
    assert {job["seed"] for job in tuning.values()} == {study.TUNING_SEED}
    assert study.TUNING_SEED not in range(5)
    for arm in penalised:
        chosen, _ = study.ARMS[arm]["penalty"]
        assert chosen in study.STRENGTHS
        job = tuning[f"{arm.replace(' ', '_')}-{chosen}"]
        assert job["settings"] == study.ARMS[arm]
    assert study.TUNING_SIZES == {"train": 50_000, "set_aside": 10_000}  # of 60,000


def test_effective_rank_counts_what_is_of_one_size():
    assert study.effective_rank(torch.tensor([2.0, -2.0, 2.0, 0.0])) == pytest.approx(3)
    assert study.effective_rank(torch.tensor([5.0, 0.0])) == pytest.approx(1)


def test_roughness_is_one_for_noise_and_little_for_a_gradient():
    torch.manual_seed(0)

    def of(picture):
        vectors = torch.nn.functional.pad(picture.reshape(-1, 784), (0, 1))
        return study.roughness(Eigenfeatures(0, torch.ones(len(vectors)), vectors, (784,), True))

    assert of(torch.randn(5, 28, 28)) == pytest.approx(1, abs=0.05)
    assert of(torch.linspace(-1, 1, 28).expand(5, 28, 28)) < 0.01
    checks = (-1.0) ** (torch.arange(28)[:, None] + torch.arange(28))
    assert of(checks.expand(5, 28, 28)) == pytest.approx(2)  # as rough as can be


@pytest.mark.studies
def test_products_kept_are_the_largest_of_each_class():
    torch.manual_seed(0)
    model, x = StarMLP(4, 6, out_features=3, act=None), torch.randn(50, 4)
    labels = torch.arange(50) % 3
    found = study.products_kept(model, x, labels, [2, 6])
    small = StarMLP(4, 6, out_features=3, act=None)
    small.load_state_dict(model.state_dict())
    alone = StarMLP(4, 6, out_features=6, act=None)  # one product an output
    alone.load_state_dict(model.state_dict() | {"g.weight": torch.eye(6), "g.bias": torch.zeros(6)})
    norms = torch.stack([f.values.norm() for f in eigenfeatures(alone)]).float()
    with torch.no_grad():
        for weights in small.g.weight:
            weights[(weights.abs() * norms).argsort()[:4]] = 0
    assert found == pytest.approx(
        [study.accuracy(small, x, labels), study.accuracy(model, x, labels)]
    )


@pytest.mark.studies
@pytest.mark.parametrize("arm", ["plain", "noise and L2 penalty"])
def test_an_eigen_run_is_the_same_again(images, arm):
    job = study.jobs(1, [arm], smoke=True).popitem()[1]
    job["recipe"] = {**job["recipe"], "epochs": 20, "lr": 1e-2}
    runs = [study.train_one(job) for _ in range(2)]
    for run in runs:
        assert run.pop("seconds") > 0
    assert runs[0] == runs[1]
    run = runs[0]
    assert json.loads(json.dumps(run)) == run
    assert run["test_accuracy"] > 0.5
    assert run["curve"]["accuracy"][-1] == pytest.approx(run["test_accuracy"], abs=0.02)
    assert run["curve"]["explained"][-1] == pytest.approx(1)
    assert len(run["curve"]["k"]) == len(job["kept"]) + 1 == len(run["products"]) + 1
    assert [max(map(abs, picture)) for picture in run["pictures"]] == [100] * 10


@pytest.mark.studies
def test_penalties_make_coefficients_smaller(images):
    x, labels = images
    job = study.jobs(1, ["plain"], smoke=True).popitem()[1]
    norms = []
    for settings in ({}, {"penalty": [10.0, {"p": 2}]}):
        model = study.trained({**job, "settings": settings}, x, labels)
        norms.append(sum(float(f.weight.detach().norm()) for f in (model.f1, model.f2)))
    assert norms[1] < 0.9 * norms[0]


def test_tables_and_figures_are_made_from_the_records_alone(tmp_path):
    records = {}
    for name, job in study.jobs(3, ["plain", "noise"], smoke=True).items():
        value = 0.8 + 0.01 * job["seed"]
        curve = {"k": [*job["kept"], 33]} | dict.fromkeys(
            ("accuracy", "agreement", "explained"), [value] * 5
        )
        metrics = dict.fromkeys(study.MEASURES, value) | {"curve": curve, "products": [value] * 4}
        if job["seed"] == 0:
            metrics["pictures"] = [[n - 50 for n in range(100)] * 7 + [0] * 84] * 10
        records[name] = Record("eigen", name, job["arm"], job["seed"], definition(job), metrics)
    text = study.tables(records)
    assert "| plain | 81.00 ± 2.48 | 81.00 ± 2.48 |" in text
    assert "| eigenvectors kept | 1 | 2 | 3 | 5 |" in text
    assert study.summarise(records)["noise"]["seeds"] == 3
    study.plot_curves(records, tmp_path / "curves.png")
    study.plot_pictures(records, tmp_path / "pictures.png")
    for figure in ("curves.png", "pictures.png"):
        assert (tmp_path / figure).stat().st_size > 10_000


def test_pictures_are_the_largest_positive_vector():
    torch.manual_seed(0)
    vectors = nn.functional.normalize(torch.randn(3, 785).double())
    features = Eigenfeatures(0, torch.tensor([-3.0, 2.0, 1.0]), vectors, (784,), True)
    expected = vectors[1, :-1] / vectors[1, :-1].abs().max()
    found = torch.tensor(study._picture(features)).double() / 100
    assert torch.allclose(found, expected, atol=0.006)


# ---- cost


@pytest.mark.studies
def test_memory_counts_what_is_kept_and_the_largest_tensor():
    op = StarOp(99, 50, act=None)
    found = memory(CoefficientPenalty(op, 2))
    vectors = 50 * 100 * 4
    assert found["largest"] == vectors
    assert 2 * vectors <= found["kept"] < 3 * vectors
    dense = memory(CoefficientPenalty(RankStarOp(99, 50, act=None, rank=2), 1))
    assert dense["largest"] == 50 * 100 * 100 * 4


@pytest.mark.studies
def test_the_cost_has_a_row_for_every_penalty(monkeypatch):
    small = StarNet(8, (1, 1), stage_strides=(2, 2))
    monkeypatch.setattr(cost, "starnet_s4", lambda: small)
    before = [p.detach().clone() for p in small.parameters()]
    result = cost.work(cost.job(smoke=True))
    rows = result["rows"]
    assert list(rows) == [BASELINE, *ARMS]
    assert rows[BASELINE]["ratio"] == 1
    for name in ARMS:
        assert rows[name]["penalty_share"] == rows[name]["penalty_ms"] / rows[BASELINE]["median_ms"]
        assert rows[name]["kept"] > 0
    assert all(torch.equal(a, b) for a, b in zip(before, small.parameters()))
    lines = cost.table(result).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:7]] == [BASELINE, *ARMS]


# ---- dimensions and penalties


def test_dimension_jobs_and_their_expected_ranks():
    jobs = dimension.jobs()
    assert len(jobs) == 5 * (23 + 13 + 23) == 295
    assert jobs["star-two-layers-14-seed4"]["d"] == 14
    counts = {kind: dimension.count(kind, 3) for kind in dimension.KINDS}
    assert counts == {"star": 10, "star, two layers": 35, "sum": 4}
    assert {kind: dimension.outputs(kind, 3) for kind in counts} == {
        "star": 12, "star, two layers": 39, "sum": 5,
    }  # fmt: skip
    for kind in counts:
        result = dimension.measure({"arm": kind, "seed": 0, "d": 3})
        assert result["rank"] == result["count"] == counts[kind]


def test_a_rank_that_differs_is_named():
    records = {
        name: Record("d", name, "star", 0, {"d": 2}, {"rank": rank, "count": 6})
        for name, rank in (("good", 6), ("bad", 5))
    }
    assert dimension.wrong(records) == ["bad"]
    text = dimension.tables(records)
    assert text.endswith("2 ranks, 1 differ from the count bad")
    assert "| star | 2 | 5, 6 | 6 | 2 |" in text


def test_penalty_jobs_are_whole_seeds_and_their_strengths_were_tried():
    jobs, tuning = penalties.jobs(), penalties.tuning_jobs()
    assert (len(jobs), len(tuning)) == (5 * 2 * 8, 2 * 4 * 4)
    assert {job["seed"] for job in tuning.values()} == {penalties.TUNING_SEED}
    assert {job["data"]["set_aside"] for job in tuning.values()} == {True}
    assert {job["data"]["set_aside"] for job in jobs.values()} == {False}
    for arms in penalties.CHOSEN.values():
        assert set(arms.values()) <= set(penalties.STRENGTHS)
    for job in (jobs | tuning).values():
        assert definition(job) == json.loads(json.dumps(definition(job)))


@pytest.mark.parametrize(
    ("task", "features", "classes"), [("fashion", 784, 10), ("reviews", 1000, 2)]
)
def test_every_arm_has_the_net_of_its_records(task, features, classes):
    assert {arm: s["model"] for arm, s in penalties.ARMS.items() if "model" in s} == {
        "scale": {"coefficients": "scale"},
        "dynamic": {"coefficients": "dynamic"},
        "rank 2": {"rank": 2},
    }
    jobs = penalties.jobs(seeds=1, tasks=[task])
    nets = {job["arm"]: penalties.model(job, features, classes) for job in jobs.values()}
    others = {"scale": ScaledStarMLP, "dynamic": DynamicStarMLP, "rank 2": RankStarMLP}
    expected = dict.fromkeys(penalties.ARMS, StarMLP) | others
    assert {arm: type(net) for arm, net in nets.items()} == expected
    assert nets["rank 2"].rank == 2
    sizes = {arm: sum(p.numel() for p in net.parameters()) for arm, net in nets.items()}
    recorded = current("coefficients-penalties", jobs)
    assert recorded.keys() == jobs.keys()
    assert sizes == {r.arm: r.metrics["parameters"] for r in recorded.values()}
    for job in jobs.values():
        again = penalties.model(job, features, classes).state_dict()
        assert all(torch.equal(p, again[n]) for n, p in nets[job["arm"]].state_dict().items())


def test_differences_to_fixed_are_in_points():
    records = {}
    for arm, accuracy in (("fixed", 0.80), ("L1", 0.82)):
        for seed in range(3):
            value = accuracy + 0.01 * seed
            metrics = {"accuracy": value, "log_loss": 0.5, "disturbed": 0.7, "parameters": 9}
            metrics |= {"calibration_error": 0.1, "train_accuracy": 0.9, "seconds": 1.0}
            metrics["pruned"] = [value] * len(penalties.KEPT)
            name = f"{arm}{seed}"
            records[name] = Record("p", name, arm, seed, {"task": "fashion"}, metrics)
    summary = penalties.summarise(records)
    (d,) = penalties.against_fixed(summary).values()
    assert (d.mean, d.half) == pytest.approx((2, 0), abs=1e-9)
    lines = penalties.tables(records).splitlines()
    assert lines[4].endswith("| the baseline |")
    assert lines[5].endswith("| +2.00 ± 0.00 better |")
    assert "| 83.0 ± 2.5 |" in lines[5]
