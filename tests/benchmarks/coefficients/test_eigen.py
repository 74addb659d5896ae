"""The study of eigenfeatures: its measures by hand, and runs that repeat."""

import json

import pytest
import torch
from torch import nn

from benchmarks import coefficients_eigen as study
from benchmarks.common import write_json
from starlayers import StarMLP
from starlayers.coefficients import Eigenfeatures, eigenfeatures


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


def test_jobs_are_whole_seeds():
    jobs = study.jobs(5, list(study.ARMS), smoke=False)
    assert len(jobs) == 5 * len(study.ARMS)
    seeds = [job["seed"] for job in jobs.values()]
    assert seeds == sorted(seeds)
    assert json.loads(json.dumps(jobs)) == jobs  # or a stopped study would not find its runs
    assert jobs["noise_and_decay-seed3"]["settings"] == {"noise": 0.4, "weight_decay": 1.0}


def test_penalties_are_tuned_on_images_and_a_seed_that_the_study_does_not_have():
    tuning = study.tuning_jobs(smoke=False)
    penalised = [arm for arm, settings in study.ARMS.items() if "penalty" in settings]
    assert len(tuning) == len(study.STRENGTHS) * len(penalised) == 6
    assert {job["seed"] for job in tuning.values()} == {study.TUNING_SEED}
    assert study.TUNING_SEED not in range(5)
    assert json.loads(json.dumps(tuning)) == tuning
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


@pytest.mark.parametrize("arm", ["plain", "noise and L2 penalty"])
def test_a_run_is_the_same_again(images, arm):
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


def test_penalties_make_coefficients_smaller(images):
    x, labels = images
    job = study.jobs(1, ["plain"], smoke=True).popitem()[1]
    norms = []
    for settings in ({}, {"penalty": [10.0, {"p": 2}]}):
        model = study.trained({**job, "settings": settings}, x, labels)
        norms.append(sum(float(f.weight.detach().norm()) for f in (model.f1, model.f2)))
    assert norms[1] < 0.9 * norms[0]


def test_tables_and_figures_are_made_from_the_records_alone(tmp_path, monkeypatch, capsys):
    jobs = study.jobs(3, ["plain", "noise"], smoke=True)
    for name, job in jobs.items():
        value = 0.8 + 0.01 * job["seed"]
        curve = {"k": [*job["kept"], 33]} | dict.fromkeys(
            ("accuracy", "agreement", "explained"), [value] * 5
        )
        record = dict.fromkeys(study.MEASURES, value) | {"curve": curve, "products": [value] * 4}
        if job["seed"] == 0:
            record["pictures"] = [[n - 50 for n in range(100)] * 7 + [0] * 84] * 10
        write_json(tmp_path / "eigen" / f"{name}.json", {"job": job, **record, "environment": {}})
    monkeypatch.setattr(study, "train_one", None)
    study.run(jobs, tmp_path / "eigen", tmp_path / "eigen", processes=0)
    text = (tmp_path / "eigen.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    assert "| plain | 81.00 ± 2.48 | 81.00 ± 2.48 |" in text
    assert "| eigenvectors kept | 1 | 2 | 3 | 5 |" in text
    assert json.loads((tmp_path / "eigen.json").read_text())["arms"]["noise"]["seeds"] == 3
    for figure in ("eigen.png", "eigen-pictures.png"):
        assert (tmp_path / figure).stat().st_size > 10_000
    with pytest.raises(FileNotFoundError, match="no runs"):
        study.run(jobs, tmp_path / "none", tmp_path / "none", processes=0)


def test_pictures_are_the_largest_positive_vector():
    torch.manual_seed(0)
    vectors = nn.functional.normalize(torch.randn(3, 785).double())
    features = Eigenfeatures(0, torch.tensor([-3.0, 2.0, 1.0]), vectors, (784,), True)
    expected = vectors[1, :-1] / vectors[1, :-1].abs().max()
    found = torch.tensor(study._picture(features)).double() / 100
    assert torch.allclose(found, expected, atol=0.006)
