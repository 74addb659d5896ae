"""The language study's arithmetic, and its models."""

import json

import pytest
import torch

from benchmarks.harness.records import Record
from benchmarks.harness.runner import definition
from benchmarks.nlp import quality
from benchmarks.nlp.tasks import BASELINE, MODEL, RECIPES, VARIANTS
from starlayers import StarMLP, use_backend

studies = pytest.mark.studies


def record(task, variant, seed, **metrics):
    name = f"{task}{variant}{seed}"
    return {name: Record("s", name, variant, seed, {"task": task}, {"parameters": 9, **metrics})}


@studies
@pytest.mark.parametrize("task", RECIPES)
def test_all_variants_have_the_parameters_of_the_plain_one(task):
    from benchmarks.nlp.tasks import build, parameters

    with torch.device("meta"):
        sizes = {name: parameters(build(task, options)) for name, options in VARIANTS.items()}
    assert all(abs(size / sizes["plain gelu"] - 1) < 2e-3 for size in sizes.values()), sizes


@studies
def test_every_variant_is_its_own_model():
    from benchmarks.nlp.tasks import build

    with torch.device("meta"):
        models = {name: build("prose", options) for name, options in VARIANTS.items()}
    assert len({repr(m) + m.config.attention_gate for m in models.values()}) == len(VARIANTS)
    kinds = [layer.layer_type for layer in models["hybrid"].model.layers]
    assert kinds == ["conv", "full_attention"] * 2
    with torch.device("meta"):
        both = build("translation", VARIANTS["hybrid"])
    assert [layer.layer_type for layer in both.model.encoder.layers] == ["conv", "full_attention"]


@studies
def test_models_are_what_the_definition_says():
    from benchmarks.nlp.tasks import build

    for name, options in VARIANTS.items():
        with torch.device("meta"):
            config = build("prose", options).config
        stated = {**MODEL, **options}
        for key, value in stated.items():
            expected = ["conv", "full_attention"] * 2 if key == "layer_types" else value
            assert getattr(config, key) == expected, (name, key)


def test_jobs_are_whole_seeds_and_enough_of_them():
    jobs = quality.jobs()
    assert len(jobs) == len(VARIANTS) * sum(quality.SEEDS.values()) == 99
    assert quality.SEEDS["sentiment"] >= 5 <= 2 + quality.SEEDS["prose"]
    seeds = [job["seed"] for job in jobs.values()]
    assert seeds == sorted(seeds)
    assert jobs["prose-star-silu-seed1"]["arm"] == "star silu"
    assert jobs["prose-hybrid-seed0"]["options"]["hidden_act"] == "silu"
    for job in jobs.values():
        what = definition(job)
        assert what == json.loads(json.dumps(what))
        assert what["recipe"] == RECIPES[job["task"]]
        assert what["model"]["initializer_range"] == 128**-0.5


@pytest.mark.parametrize(("task", "sign"), [("prose", -1), ("sentiment", 1)])
def test_better_is_positive_whichever_way_the_metric_points(task, sign):
    metric = {"prose": "bits_per_byte", "sentiment": "accuracy"}[task]
    records = {}
    for seed in range(3):
        for variant, value in (("plain gelu", 2.0), ("star silu", 2.5), ("star gelu", 1.5)):
            more = {"f1": 1.0} if task == "sentiment" else {}
            moved = value + 0.01 * seed * (value == 2.5)
            records |= record(task, variant, seed, **{metric: moved}, **more)
    summary = quality.summarise(records)
    assert list(summary) == [task]
    rows = {r["variant"]: r for r in summary[task]}
    assert "difference" not in rows["plain gelu"]
    silu, gelu = (rows[name]["difference"] for name in ("star silu", "star gelu"))
    assert silu.mean == pytest.approx(sign * 0.51)
    assert (gelu.mean, gelu.half) == pytest.approx((sign * -0.5, 0))
    assert silu.improvement == (sign + 1) / 2
    assert silu.verdict == ("better" if sign > 0 else "worse")
    lines = quality.table(summary[task], task).splitlines()
    assert len(lines) == 2 + len(rows)
    assert lines[2].endswith("| - | - | the baseline |")
    assert BASELINE["hybrid"] == "star silu"
    family = quality.comparisons(summary)
    assert list(family) == [f"star gelu on {task}", f"star silu on {task}"]


def test_differences_are_paired_by_seed():
    records = {}
    for variant, seeds in (("plain gelu", (1, 2)), ("star silu", (0, 1, 2))):
        for seed in seeds:
            records |= record("prose", variant, seed, bits_per_byte=float(seed))
    rows = {r["variant"]: r for r in quality.summarise(records)["prose"]}
    d = rows["star silu"]["difference"]
    assert (d.mean, d.half, d.improvement) == (0, 0, 0.5)
    assert rows["star silu"]["seeds"] == 3


def test_kept_bytes_counts_what_a_backward_needs():
    from benchmarks.harness.timing import kept_bytes

    mlp = StarMLP(8, 16, act="silu", bias=False)
    x = torch.randn(4, 8, requires_grad=True)
    with use_backend("eager"):
        # the input, f1(x), f2(x), silu(f1(x)), and their product before g
        assert kept_bytes(mlp, lambda: mlp(x)) == 4 * 4 * (8 + 4 * 16)


@studies
def test_cache_bytes():
    from benchmarks.nlp.speed import cache_bytes
    from benchmarks.nlp.tasks import build

    model = build("prose", VARIANTS["star silu"]).eval()
    tokens = torch.randint(4, 2000, (1, 10))
    assert cache_bytes(model, tokens) == 4 * 2 * 10 * 128 * 4  # layers, k and v, tokens, d, float
    hybrid = build("prose", VARIANTS["hybrid"]).eval()
    assert cache_bytes(hybrid, tokens) == 2 * 2 * 10 * 128 * 4 + 2 * 3 * 128 * 4
