"""The DemoNet study: which runs it has, and what it concludes from them."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.utils.data import Subset, TensorDataset

from benchmarks import data as data_module
from benchmarks import vision_demonet as study
from starlayers.datasets.images import load_images
from starlayers.vision import DemoNet

SHAPES = [(16, 4), (32, 2), (32, 4), (32, 8), (64, 4)]


def test_jobs_are_every_shape_variant_and_seed():
    jobs = study.jobs(3, smoke=False)
    assert len(jobs) == 5 * 4 * 3
    keys = ("width", "depth", "combine", "act", "seed")
    found = [tuple(job[k] for k in keys) for job in jobs.values()]
    assert len(set(found)) == 60
    assert {f[:2] for f in found} == set(SHAPES)
    assert {f[2:4] for f in found} == {(c, a) for c in ("mul", "sum") for a in ("gelu", None)}
    for name, f in zip(jobs, found, strict=True):
        assert name == "w{}-d{}-{}-{}-seed{}".format(*f)
    # one recipe and all the data for everyone
    assert len({json.dumps(job["recipe"]) for job in jobs.values()}) == 1
    assert {(job["train"], job["test"]) for job in jobs.values()} == {(None, None)}


def test_the_sweeps_share_their_centre():
    widths = {s["width"] for s in study.SHAPES if s["depth"] == study.CENTRE["depth"]}
    depths = {s["depth"] for s in study.SHAPES if s["width"] == study.CENTRE["width"]}
    assert (len(widths), len(depths), len(study.SHAPES)) == (3, 3, 5)
    assert study.SHAPES.count(study.CENTRE) == 1


def test_whole_seeds_come_first():
    seeds = [job["seed"] for job in study.jobs(3, smoke=False).values()]
    assert seeds == [0] * 20 + [1] * 20 + [2] * 20


def test_jobs_are_stored_as_they_are():
    jobs = study.jobs(2, smoke=True)
    assert json.loads(json.dumps(jobs)) == jobs
    assert len(jobs) == 8
    assert {(j["train"], j["test"], j["recipe"]["epochs"]) for j in jobs.values()} == {
        (512, 256, 1)
    }


@pytest.mark.parametrize(("width", "depth"), SHAPES)
def test_the_variants_of_a_shape_have_equal_parameters(width, depth):
    def count(combine, act):
        net = DemoNet(
            depth, width, combine=combine, act=act, num_classes=10, in_chans=1, patch_size=4
        )
        return sum(p.numel() for p in net.parameters())

    counts = {count(**variant) for variant in study.VARIANTS}
    assert len(counts) == 1
    # embedding; norm, 7x7 depthwise, f1, f2, g with biases, layer scale; norm and head
    block = 2 * width + 50 * width + 2 * (3 * width) * (width + 1) + width * (3 * width + 1) + width
    assert counts == {17 * width + depth * block + 2 * width + 10 * (width + 1)}


def records(star, star_free, plain, plain_free, shape=(16, 4)):
    """Of one shape, accuracies 0 to 1 of each variant by seed, out of order."""
    made = {}
    values = (star, star_free, plain, plain_free)
    for variant, accuracies in zip(study.VARIANTS, values, strict=True):
        for seed, accuracy in reversed(list(enumerate(accuracies))):
            job = {"width": shape[0], "depth": shape[1], **variant, "seed": seed}
            made[f"{shape}{variant}{seed}"] = {"job": job, "test_accuracy": accuracy}
    return made


def test_variants_are_in_the_order_the_summary_reads_them():
    assert [(v["combine"], v["act"]) for v in study.VARIANTS] == [
        ("mul", "gelu"),
        ("mul", None),
        ("sum", "gelu"),
        ("sum", None),
    ]


def test_accuracies_are_percent_by_seed():
    made = records([0.5, 0.6, 0.7], [0.1] * 3, [0.2] * 3, [0.3] * 3)
    found = study.accuracies(made, {"width": 16, "depth": 4}, study.VARIANTS[0])
    assert found == pytest.approx([50, 60, 70])
    assert study.accuracies(made, {"width": 32, "depth": 4}, study.VARIANTS[0]) == []


def test_summary_by_hand():
    made = records([0.90, 0.92, 0.94], [0.89, 0.90, 0.94], [0.80, 0.84, 0.85], [0.5, 0.51, 0.58])
    made |= records([0.5, 0.7], [0.4, 0.4], [0.3, 0.3], [0.2, 0.2], shape=(32, 8))
    first, second = study.summarise(made)
    assert (first["width"], first["depth"], first["seeds"]) == (16, 4, 3)
    assert (second["width"], second["depth"], second["seeds"]) == (32, 8, 2)
    t = 4.3027  # two degrees of freedom, 95 %
    expected = {
        "star gelu": [90, 92, 94],
        "star no act": [89, 90, 94],
        "sum gelu": [80, 84, 85],
        "sum no act": [50, 51, 58],
        "star - sum, gelu": [10, 8, 9],
        "star - sum, no act": [39, 39, 36],
        "star loses without act": [1, 2, 0],
        "sum loses without act": [30, 33, 27],
        "sum loses more than star by": [29, 31, 27],
    }
    assert first.keys() - {"width", "depth", "seeds"} == expected.keys()
    for column, values in expected.items():
        mean = sum(values) / 3
        half = t * math.sqrt(sum((v - mean) ** 2 for v in values) / 2 / 3)
        assert first[column] == pytest.approx((mean, half), rel=1e-4), column
    assert second["star - sum, gelu"] == pytest.approx((30, 12.7062 * 10), rel=1e-4)
    lines = study.table([first, second]).splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("| width | depth | star gelu | star no act | sum gelu |")
    assert lines[2].startswith("| 16 | 4 | 92.00 ± 4.97 | 91.00 ± ")


def test_verdicts_say_yes_no_or_not_decided():
    made = records([0.9, 0.92], [0.5, 0.501], [0.8, 0.82], [0.6, 0.601])
    made |= records([0.9, 0.8], [0.9, 0.8], [0.85, 0.85], [0.75, 0.7499], shape=(32, 2))
    verdicts = study.verdicts(study.summarise(made))
    assert len(verdicts) == 6  # three claims, two shapes
    by_claim = {tuple(line.split(":")[0].split(", width ")): line for line in verdicts}
    yes, no, open_ = "yes, ", "NO, the opposite, ", "not decided (the interval holds 0), "
    gelu, free = "star beats sum with GELU", "star beats sum without activation"
    more = "removing the activation costs sum more than star"
    wanted = {
        (gelu, "16 depth 4"): yes + "+10.00 ± 0.00 points",
        (free, "16 depth 4"): no + "-10.00 ± 0.00 points",
        (more, "16 depth 4"): no + "-20.00 ± 0.00 points",
        (gelu, "32 depth 2"): open_ + "+0.00 ± 63.53 points",
        (free, "32 depth 2"): open_ + "+10.01 ± 63.47 points",
        (more, "32 depth 2"): yes + "+10.01 ± 0.06 points",
    }
    assert by_claim.keys() == wanted.keys()
    for key, text in wanted.items():
        assert text in by_claim[key], key


def test_one_seed_decides_nothing():
    rows = study.summarise(records([0.9], [0.8], [0.1], [0.05]))
    assert all("not decided" in line for line in study.verdicts(rows))


def test_the_plot_is_drawn(tmp_path):
    made = {}
    for i, shape in enumerate(SHAPES):
        made |= records([0.9, 0.8], [0.7, 0.6], [0.5, 0.4 + i / 100], [0.3, 0.2], shape=shape)
    study.plot(study.summarise(made), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def fashion(monkeypatch):
    """Digits under the name of Fashion-MNIST, padded to its size."""
    digits = load_images("digits")

    def grow(part, n):
        images, labels = part.tensors
        return TensorDataset(torch.nn.functional.pad(images[:n], [10] * 4), labels[:n])

    made = replace(
        digits,
        name="fashion-mnist",
        train=grow(digits.train, 160),
        test=grow(digits.test, 60),
        shape=(1, 28, 28),
    )
    monkeypatch.setattr(data_module, "load_images", lambda name: made)
    return made


def test_benchmark_data_are_whole_or_the_first_images(fashion):
    whole = data_module.benchmark_images()
    assert (len(whole.train), len(whole.test)) == (160, 60)
    part = data_module.benchmark_images(train=7, test=5)
    assert isinstance(part.train, Subset)
    assert (len(part.train), len(part.test)) == (7, 5)
    assert all(torch.equal(part.train[i][0], fashion.train[i][0]) for i in range(7))
    assert (part.mean, part.classes) == (whole.mean, whole.classes)


def test_benchmarks_refuse_a_stand_in(monkeypatch):
    monkeypatch.setattr(data_module, "load_images", lambda name: load_images("digits"))
    with pytest.raises(FileNotFoundError, match="Fashion-MNIST is not in reach"):
        data_module.benchmark_images()


def test_one_run_reports_its_accuracy_and_is_repeatable(fashion):
    job = next(iter(study.jobs(1, smoke=True).values())) | {"train": 128, "test": 50}
    first, second = study.train_one(job), study.train_one(job)
    assert first["test_accuracy"] == first["history"][-1]["test_accuracy"]
    assert first["test_accuracy"] * 50 == pytest.approx(round(first["test_accuracy"] * 50))
    assert first["history"][-1]["step"] == 2
    assert first["history"][-1]["train_loss"] == second["history"][-1]["train_loss"]
    other = study.train_one(job | {"seed": 1})
    assert other["history"][-1]["train_loss"] != first["history"][-1]["train_loss"]
    assert first["parameters"] == sum(
        p.numel() for p in DemoNet(4, 16, num_classes=10, in_chans=1, patch_size=4).parameters()
    )
