"""The language study's arithmetic, and its short form on real data."""

import json

import pytest
import torch

from benchmarks import nlp_quality as quality
from benchmarks.nlp_speed import cache_bytes, kept_bytes
from benchmarks.nlp_tasks import BASELINE, RECIPES, VARIANTS, build, parameters
from starlayers import StarMLP, use_backend


def record(task, variant, seed, **metrics):
    return {"job": {"task": task, "variant": variant, "seed": seed}, "parameters": 9, **metrics}


@pytest.mark.parametrize("task", RECIPES)
def test_all_variants_have_the_parameters_of_the_plain_one(task):
    with torch.device("meta"):
        sizes = {name: parameters(build(task, options)) for name, options in VARIANTS.items()}
    assert all(abs(size / sizes["plain gelu"] - 1) < 2e-3 for size in sizes.values()), sizes


def test_every_variant_is_its_own_model():
    with torch.device("meta"):
        models = {name: build("prose", options) for name, options in VARIANTS.items()}
    assert len({repr(m) + m.config.attention_gate for m in models.values()}) == len(VARIANTS)
    kinds = [layer.layer_type for layer in models["hybrid"].model.layers]
    assert kinds == ["conv", "full_attention"] * 2
    with torch.device("meta"):
        both = build("translation", VARIANTS["hybrid"])
    assert [layer.layer_type for layer in both.model.encoder.layers] == ["conv", "full_attention"]


def test_jobs_are_whole_seeds_and_enough_of_them():
    jobs = quality.jobs(smoke=False)
    assert len(jobs) == len(VARIANTS) * sum(quality.SEEDS.values()) == 99
    assert quality.SEEDS["sentiment"] >= 5 <= 2 + quality.SEEDS["prose"]
    seeds = [job["seed"] for job in jobs.values()]
    assert seeds == sorted(seeds)
    assert json.loads(json.dumps(jobs)) == jobs  # or a stopped study would not find its runs


def test_probability_of_improvement():
    assert quality.probability_of_improvement([3, 4], [1, 2]) == 1
    assert quality.probability_of_improvement([1, 2], [1, 2]) == 0.5
    assert quality.probability_of_improvement([1, 3], [2, 2]) == 0.5
    assert quality.probability_of_improvement([0], [2, 2, 2, 0]) == 0.125


@pytest.mark.parametrize(("task", "sign"), [("prose", -1), ("sentiment", 1)])
def test_better_is_positive_whichever_way_the_metric_points(task, sign):
    metric = {"prose": "bits_per_byte", "sentiment": "accuracy"}[task]
    records = {}
    for seed in range(3):
        for variant, value in (("plain gelu", 2.0), ("star silu", 2.5), ("star gelu", 1.5)):
            more = {"f1": 1.0} if task == "sentiment" else {}
            records[f"{variant}{seed}"] = record(
                task, variant, seed, **{metric: value + 0.01 * seed * (value == 2.5)}, **more
            )
    rows = {r["variant"]: r for r in quality.summarise(records, task)}
    assert "better by" not in rows["plain gelu"]
    assert rows["star silu"]["better by"][0] == pytest.approx(sign * 0.51)
    assert rows["star gelu"]["better by"] == pytest.approx((sign * -0.5, 0))
    assert rows["star silu"]["P(improvement)"] == (sign + 1) / 2
    assert quality.verdict(rows["star silu"]) == ("better" if sign > 0 else "worse")
    assert quality.verdict(rows["plain gelu"]) == "the baseline"
    assert quality.verdict({"better by": (0.1, 0.2)}) == "not decided"
    text = quality.table(list(rows.values()), task)
    assert text.count("\n") == 2 + len(rows)
    assert BASELINE["hybrid"] == "star silu"


def test_differences_are_paired_by_seed():
    records = {
        f"{variant}{seed}": record("prose", variant, seed, bits_per_byte=float(seed))
        for variant, seeds in (("plain gelu", (1, 2)), ("star silu", (0, 1, 2)))
        for seed in seeds
    }
    rows = {r["variant"]: r for r in quality.summarise(records, "prose")}
    assert rows["star silu"]["better by"] == (0, 0)
    assert rows["star silu"]["P(improvement)"] == 0.5


def test_kept_bytes_counts_what_a_backward_needs():
    mlp = StarMLP(8, 16, act="silu", bias=False)
    x = torch.randn(4, 8, requires_grad=True)
    with use_backend("eager"):
        # the input, f1(x), f2(x), silu(f1(x)), and their product before g
        assert kept_bytes(mlp, lambda: mlp(x)) == 4 * 4 * (8 + 4 * 16)


def test_cache_bytes():
    model = build("prose", VARIANTS["star silu"]).eval()
    tokens = torch.randint(4, 2000, (1, 10))
    assert cache_bytes(model, tokens) == 4 * 2 * 10 * 128 * 4  # layers, k and v, tokens, d, float
    hybrid = build("prose", VARIANTS["hybrid"]).eval()
    assert cache_bytes(hybrid, tokens) == 2 * 2 * 10 * 128 * 4 + 2 * 3 * 128 * 4
