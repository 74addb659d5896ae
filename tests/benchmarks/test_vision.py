"""Vision studies: which runs they have, and what they conclude from them."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.utils.data import Subset, TensorDataset

from benchmarks.harness import images
from benchmarks.harness.images import FIXED, benchmark_images, recipe
from benchmarks.harness.records import Record
from benchmarks.harness.runner import definition
from benchmarks.vision import demonet as study
from benchmarks.vision import peers
from starlayers.datasets.images import load_images
from starlayers.vision import DemoNet
from starlayers.vision.training import TrainConfig

SHAPES = [(16, 4), (32, 2), (32, 4), (32, 8), (64, 4)]


def test_jobs_are_every_shape_arm_and_seed():
    jobs = study.jobs(3)
    linear = [job for job in jobs.values() if job["arm"] == study.LINEAR]
    nets = {name: job for name, job in jobs.items() if job["arm"] != study.LINEAR}
    assert (len(nets), len(linear)) == (5 * 4 * 3, 3)
    keys = ("width", "depth", "combine", "act", "seed")
    variants = [tuple(job[k] for k in keys) for job in nets.values()]
    assert len(set(variants)) == 60
    assert {v[:2] for v in variants} == set(SHAPES)
    assert {v[2:4] for v in variants} == {(c, a) for c in ("mul", "sum") for a in ("gelu", None)}
    for name, v in zip(nets, variants, strict=True):
        assert name == "w{}-d{}-{}-{}-seed{}".format(*v)
    # one recipe and all the data for everyone
    assert len({json.dumps(job["recipe"]) for job in jobs.values()}) == 1
    assert {(job["train"], job["test"]) for job in jobs.values()} == {(None, None)}


def test_the_recipe_states_every_setting_that_decides_a_run():
    assert recipe(False, epochs=2) == {"epochs": 2, **FIXED}
    assert recipe(True, epochs=2) == {**FIXED, "epochs": 1, "batch_size": 64}
    stated = {*study.RECIPE, *FIXED}
    # these change no number: where a run is saved, by how many processes it loads, its seed;
    # DemoNet has no BatchNorm, and the classes of CIFAR-10 are of equal size
    idle = {"compile", "seed", "save_every", "workers", "norm_batches", "balance", "log_with"}
    # newer than the records, in which they are off
    off = {
        "accumulate": 1, "optimizer": "adamw", "layer_decay": 1.0, "freeze": 0,
        "resized_crop": 0.0, "erase": 0.0, "amp_dtype": "bfloat16", "sync_bn": False,
    }  # fmt: skip
    assert set(TrainConfig.__dataclass_fields__) - stated == {*idle, *off}
    assert {name: getattr(TrainConfig(), name) for name in off} == off


def test_the_sweeps_share_their_centre():
    widths = {s["width"] for s in study.SHAPES if s["depth"] == study.CENTRE["depth"]}
    depths = {s["depth"] for s in study.SHAPES if s["width"] == study.CENTRE["width"]}
    assert (len(widths), len(depths), len(study.SHAPES)) == (3, 3, 5)
    assert study.SHAPES.count(study.CENTRE) == 1


def test_whole_seeds_come_first():
    seeds = [job["seed"] for job in study.jobs(3).values()]
    assert seeds == [0] * 21 + [1] * 21 + [2] * 21


def test_smoke_jobs_are_small():
    jobs = study.jobs(2, smoke=True)
    assert len(jobs) == 10
    sizes = {(j["train"], j["test"], j["recipe"]["epochs"]) for j in jobs.values()}
    assert sizes == {(512, 256, 1)}
    assert all(definition(job) == json.loads(json.dumps(definition(job))) for job in jobs.values())


@pytest.mark.parametrize(("width", "depth"), SHAPES)
def test_the_variants_of_a_shape_have_equal_parameters(width, depth):
    def count(combine, act):
        net = DemoNet(
            depth, width, combine=combine, act=act, num_classes=10, in_chans=1, **study.MODEL
        )
        return sum(p.numel() for p in net.parameters())

    counts = {count(**variant) for variant in study.ARMS.values()}
    # embedding; norm, 7x7 depthwise, f1, f2, g with biases, layer scale; norm and head
    block = 2 * width + 50 * width + 2 * (3 * width) * (width + 1) + width * (3 * width + 1) + width
    assert counts == {17 * width + depth * block + 2 * width + 10 * (width + 1)}


def records(*accuracies, shape=(16, 4)):
    """Of one shape, accuracies 0 to 1 of each arm by seed, out of order."""
    made = {}
    for arm, values in zip(study.ARMS, accuracies, strict=True):
        for seed, accuracy in reversed(list(enumerate(values))):
            name = f"{shape}{arm}{seed}"
            what = {"width": shape[0], "depth": shape[1], **study.ARMS[arm]}
            made[name] = Record("s", name, arm, seed, what, {"test_accuracy": accuracy})
    return made


def test_accuracies_are_percent_by_seed():
    made = records([0.5, 0.6, 0.7], [0.1] * 3, [0.2] * 3, [0.3] * 3)
    values = study.accuracies(made, {"width": 16, "depth": 4}, "star gelu")
    assert list(values) == [0, 1, 2]
    assert list(values.values()) == pytest.approx([50, 60, 70])
    assert study.accuracies(made, {"width": 32, "depth": 4}, "star gelu") == {}


def test_summary_by_hand():
    made = records([0.90, 0.92, 0.94], [0.89, 0.90, 0.94], [0.80, 0.84, 0.85], [0.5, 0.51, 0.58])
    made |= records([0.5, 0.7], [0.4, 0.4], [0.3, 0.3], [0.2, 0.2], shape=(32, 8))
    first, second = study.summarise(made)
    assert (first["width"], first["depth"], first["seeds"]) == (16, 4, 3)
    assert (second["width"], second["depth"], second["seeds"]) == (32, 8, 2)
    t = 4.3027  # two degrees of freedom, 95 %
    arms = {
        "star gelu": [90, 92, 94],
        "star no act": [89, 90, 94],
        "sum gelu": [80, 84, 85],
        "sum no act": [50, 51, 58],
    }
    differences = {
        "star - sum, gelu": [10, 8, 9],
        "star - sum, no act": [39, 39, 36],
        "star loses without act": [1, 2, 0],
        "sum loses without act": [30, 33, 27],
        study.MORE: [29, 31, 27],
    }
    assert first["arms"].keys() == arms.keys()
    assert first["differences"].keys() == differences.keys()
    intervals = first["arms"] | {k: (d.mean, d.half) for k, d in first["differences"].items()}
    for name, values in (arms | differences).items():
        mean = sum(values) / 3
        half = t * math.sqrt(sum((v - mean) ** 2 for v in values) / 2 / 3)
        assert intervals[name] == pytest.approx((mean, half), rel=1e-4), name
    d = second["differences"]["star - sum, gelu"]
    assert (d.mean, d.half) == pytest.approx((30, 12.7062 * 10), rel=1e-4)
    lines = study.accuracy_table([first, second]).splitlines()
    assert len(lines) == 4
    assert lines[0] == "| width | depth | star gelu | star no act | sum gelu | sum no act |"
    assert lines[2].startswith("| 16 | 4 | 92.00 ± 4.97 | 91.00 ± ")
    row = study.difference_table([first, second]).splitlines()[2]
    assert row.startswith("| 16 | 4 | 9.00 ± 2.48 * | 38.00 ± 4.30 * | 1.00 ± 2.48 |")
    assert study.tables(made).count("\n") == 2 * 5 + 5


def test_verdicts_say_yes_no_or_not_decided():
    made = records([0.9, 0.92], [0.5, 0.501], [0.8, 0.82], [0.6, 0.601])
    made |= records([0.9, 0.8], [0.9, 0.8], [0.85, 0.85], [0.75, 0.7499], shape=(32, 2))
    verdicts = dict(study.verdicts(study.summarise(made)))
    yes, no, open_ = "yes, ", "NO, the opposite, ", "not decided (the interval holds 0), "
    gelu, free = "star beats sum with GELU", "star beats sum without activation"
    more = "removing the activation costs sum more than star"
    assert verdicts == {
        f"{gelu}, width 16 depth 4": yes + "+10.00 ± 0.00 points",
        f"{free}, width 16 depth 4": no + "-10.00 ± 0.00 points",
        f"{more}, width 16 depth 4": no + "-20.00 ± 0.00 points",
        f"{gelu}, width 32 depth 2": open_ + "+0.00 ± 63.53 points",
        f"{free}, width 32 depth 2": open_ + "+10.01 ± 63.47 points",
        f"{more}, width 32 depth 2": yes + "+10.01 ± 0.06 points",
    }


def test_one_seed_decides_nothing():
    rows = study.summarise(records([0.9], [0.8], [0.1], [0.05]))
    assert all("not decided" in text for _, text in study.verdicts(rows))


def test_the_plot_is_drawn(tmp_path):
    made = {}
    for i, shape in enumerate(SHAPES):
        made |= records([0.9, 0.8], [0.7, 0.6], [0.5, 0.4 + i / 100], [0.3, 0.2], shape=shape)
    study.plot(study.summarise(made), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_networks_of_a_single_seed_have_no_interval():
    made = {
        f"{name}{seed}": Record("s", f"{name}{seed}", name, seed, {}, {"test_accuracy": accuracy})
        for name, seeds in (("starnet_s050", [0.9]), ("timm lcnet_050", [0.8, 0.82]))
        for seed, accuracy in enumerate(seeds)
    }
    lines = peers.accuracy_table(made).splitlines()
    assert lines[2:] == ["| starnet_s050 | 1 | 90.00 |", "| timm lcnet_050 | 2 | 81.00 ± 12.71 |"]


def test_multiply_adds_are_compared_with_the_next_larger_network():
    def cost(parameters, macs):
        return {"parameters": parameters, "multiply_adds": macs}

    costs = {"starnet_a": cost(5, 60), "starnet_b": cost(9, 99), "timm x": cost(6, 20)}
    costs |= {"timm y": cost(8, 6)}
    assert peers._most_macs(costs) == 3  # of 60 and 20; no network is as large as starnet_b


@pytest.fixture
def fashion(monkeypatch):
    """Digits under the name of Fashion-MNIST, padded to its size."""
    digits = load_images("digits")

    def grow(part, n):
        pixels, labels = part.tensors
        return TensorDataset(torch.nn.functional.pad(pixels[:n], [10] * 4), labels[:n])

    made = replace(
        digits,
        name="fashion-mnist",
        train=grow(digits.train, 160),
        test=grow(digits.test, 60),
        shape=(1, 28, 28),
    )
    monkeypatch.setattr(images, "load_images", lambda name: made)
    return made


def test_benchmark_data_are_whole_or_the_first_images(fashion):
    whole = benchmark_images()
    assert (len(whole.train), len(whole.test)) == (160, 60)
    part = benchmark_images(train=7, test=5)
    assert isinstance(part.train, Subset)
    assert (len(part.train), len(part.test)) == (7, 5)
    assert all(torch.equal(part.train[i][0], fashion.train[i][0]) for i in range(7))
    assert (part.mean, part.classes) == (whole.mean, whole.classes)


def test_benchmarks_refuse_a_stand_in(monkeypatch):
    monkeypatch.setattr(images, "load_images", lambda name: load_images("digits"))
    with pytest.raises(FileNotFoundError, match="Fashion-MNIST is not in reach"):
        benchmark_images()


@pytest.mark.studies
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
    linear = study.train_one(job | {"arm": study.LINEAR})
    assert linear["parameters"] == 10 * (784 + 1)
