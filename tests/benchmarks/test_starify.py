"""The starify study: equal functions at first, equal parameters, paired differences."""

import json

import pytest
import torch

from benchmarks.harness.records import Record
from benchmarks.harness.runner import definition
from benchmarks.starify import quality as study
from benchmarks.starify.arms import ARMS, FROZEN, LORA, PAST, build, optimizer, sizes
from benchmarks.starify.train import batches, encoder, train_one

SETTINGS = {"lr": 1e-3, "times": 10, "place": "attention"}


def made(arm, **settings):
    torch.manual_seed(0)
    return build(arm, encoder(None), {**SETTINGS, **settings}).eval()


@pytest.fixture
def inputs():
    ids = torch.randint(300, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return ids, mask


@pytest.mark.studies
@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_begins_as_the_plain_model(arm, inputs):
    ours, plain = made(arm)(*inputs), made("plain")(*inputs)
    exact = arm != "widened"  # whose sums have more terms
    assert torch.equal(ours, plain) if exact else torch.allclose(ours, plain, atol=1e-6)


@pytest.mark.studies
def test_the_mean_leaves_padding_out(inputs):
    ids, mask = inputs
    model = made("plain")
    alone = model(ids[1:2, :4], mask[1:2, :4])
    assert torch.allclose(model(ids, mask)[1], alone[0], atol=1e-6)


@pytest.mark.studies
def test_parameters_are_matched():
    d, layers, head = 32, 2, 2 * 33
    plain = sizes(made("plain"))["parameters"]
    trained = {arm: sizes(made(arm))["trainable"] for arm in ARMS}
    gates = {"full": 4 * d * (d + 1), "low_rank=16": 16 * 5 * d + 4 * d, "scale": 4 * d}
    for arm, kind in ARMS.items():
        if "gate" in kind:
            rest = head if arm in FROZEN else plain
            assert trained[arm] == layers * gates[kind["gate"]] + rest
    assert trained["head alone"] == head
    assert trained["LoRA"] == trained["low-rank gate alone"]
    assert sizes(made("LoRA", place="mlp"))["trainable"] == pytest.approx(trained["LoRA"], rel=0.02)
    assert trained["IA3"] - head == 1.5 * (trained["scale gate alone"] - head)
    assert trained["widened"] - plain == pytest.approx(layers * gates["full"], rel=0.02)


@pytest.mark.studies
@pytest.mark.parametrize("arm", ["star full", "widened"])
def test_what_is_new_has_its_own_learning_rate(arm):
    model = made(arm)
    groups = optimizer(model, SETTINGS, 0.01).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert len(rates) == sum(len(group["params"]) for group in groups)
    assert rates.keys() == {id(p) for p in model.parameters()}
    for name, parameter in model.named_parameters():
        new = ".gate." in name or ".new." in name
        assert rates[id(parameter)] == pytest.approx(1e-2 if new else 1e-3), name


def test_batches_are_the_seeds_and_hold_every_row_once():
    texts = [([0] * (i % 40), i) for i in range(900)]
    found = batches(texts, 20, 32, seed=1)
    assert [len(batch) for batch in found] == [32] * 20
    assert len({label for batch in found for _, label in batch}) == 640
    assert found == batches(texts, 20, 32, seed=1) != batches(texts, 20, 32, seed=2)
    spread = [max(len(i) for i, _ in b) - min(len(i) for i, _ in b) for b in found]
    assert sum(spread) / 20 < 10


def test_jobs_are_whole_seeds_with_settings_that_were_tried():
    jobs = study.jobs()
    assert len(jobs) == len(ARMS) * study.SEEDS == 55
    seeds = [job["seed"] for job in jobs.values()]
    assert seeds == sorted(seeds)
    assert study.TUNING_SEED not in seeds
    for job in jobs.values():
        assert definition(job) == json.loads(json.dumps(definition(job)))
    assert jobs["LoRA-seed0"]["kind"]["lora"] == LORA["mlp"]
    assert jobs["star-full-seed2"]["kind"] == {"gate": "full", "trained": "all parameters"}
    assert not ARMS.keys() & set(PAST)
    assert study.PICKED.keys() == study.GRIDS.keys() == ARMS.keys()
    assert all(study.PICKED[arm] in study.GRIDS[arm] for arm in study.GRIDS)
    tuning = study.tuning_jobs()
    assert len(tuning) == sum(map(len, study.GRIDS.values()))
    assert {job["seed"] for job in tuning.values()} == {study.TUNING_SEED}
    assert {tuple(job["splits"]) for job in tuning.values()} == {("validation",)}
    assert {settings["place"] for settings in study.GRIDS["LoRA"]} == LORA.keys()


def test_differences_are_paired_and_better_is_positive():
    records = {}
    for seed in range(3):
        for arm, value in (("plain", 80.0), ("star full", 81.0), ("widened", 79.0)):
            test = {"accuracy": value + seed, "log_loss": 1 - value / 100 + seed}
            metrics = {"test": test, "validation": test, "trainable": 1, "parameters": 2}
            metrics["seconds_per_step"] = 0.5
            name = f"{arm}{seed}"
            records[name] = Record("starify", name, arm, seed, {"settings": {"lr": 1e-3}}, metrics)
    by = study.compare(records)
    assert by["star full", "plain", "accuracy"].mean == pytest.approx(1)
    assert by["star full", "widened", "log_loss"].mean == pytest.approx(0.02)
    assert by["widened", "plain", "log_loss"].mean == pytest.approx(-0.01)
    assert all(d.half == pytest.approx(0) for d in by.values())
    assert by["star full", "plain", "accuracy"].improvement == pytest.approx(6 / 9 + 1 / 9)
    assert len(by) == 6
    text = study.tables(records)
    assert "| star full | 3 | 1 | 2 | 82.00 ± 2.48 |" in text
    assert text.count("\n") == 2 + 3 + 1 + 2 + 6
    tuned = study.tuning_table(records).splitlines()
    assert tuned[2:5] == [f"| plain | lr 0.001 | {80 + s}.00 | {0.2 + s:.4f} |" for s in (2, 1, 0)]
    assert (
        study.past_table({"a": records["plain0"]}).splitlines()[2] == "| plain | 0 | 80.0 | 0.200 |"
    )


@pytest.mark.studies
def test_a_run_is_the_same_again():
    job = {"arm": "star low rank", "seed": 3, "settings": SETTINGS, "small": True}
    job |= {"recipe": study.RECIPE | study.SMOKE, "splits": ["validation", "test"]}
    runs = [train_one(job) for _ in range(2)]
    for run in runs:
        assert run.pop("seconds_per_step") > 0
    assert runs[0] == runs[1]
    assert runs[0]["test"]["accuracy"] in [100 * right / 64 for right in range(65)]
