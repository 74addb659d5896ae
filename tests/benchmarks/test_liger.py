"""The study beside Liger: what is counted is what the libraries keep, and losses are told."""

import json
import subprocess
import sys

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from benchmarks.harness.records import Record
from benchmarks.harness.runner import definition
from benchmarks.starify import liger as study
from benchmarks.starify import variants

TOKENS, HIDDEN, INNER = 64, 64, 172
JOB = {"part": "MLP", "hidden": HIDDEN, "inner": INNER, "tokens": TOKENS, "dtype": "float32"}
JOB |= {"device": "cpu", "rounds": 1, "arm": None, "seed": None}


def test_jobs_are_plain_data_one_for_each_device():
    jobs = study.jobs()
    assert len(jobs) == 2 * (3 * 2 + 2)
    assert study.jobs(devices=("cpu",)).keys() == {n for n in jobs if n.endswith("-cpu")}
    for job in jobs.values():
        assert definition(job) == json.loads(json.dumps(definition(job)))
        assert variants.BASELINE in job["variants"]
    smoke = study.jobs(smoke=True, devices=("cpu",))
    assert len(smoke) == 3
    assert not any(variants.COMPILED in job["variants"] for job in smoke.values())
    assert study.here()[0] == "cpu"
    assert set(variants.NATIVE) < set(variants.MLPS)


def test_variants_have_the_same_parameters_and_agree():
    native = [name for name in variants.NATIVE if name != variants.COMPILED]
    job = JOB | {"variants": native}
    base, calls, x = variants.mlp_calls(job)
    variants.check(base, calls, x)
    for call in calls.values():
        variants.step(call)
    weights = [p.grad.clone() for p in base.parameters()]
    base.zero_grad()
    variants.step(calls[variants.BASELINE])
    for got, one in zip(weights, base.parameters(), strict=True):
        torch.testing.assert_close(got, len(calls) * one.grad, rtol=1e-4, atol=1e-4)
    calls[variants.FUSED] = lambda: 1.01 * calls[variants.BASELINE]()
    with pytest.raises(AssertionError, match="fused: relative difference"):
        variants.check(base, calls, x)


def test_peaks_and_kept_bytes_are_those_of_the_tensors():
    x = torch.ones(1024, requires_grad=True)
    layer = torch.nn.Identity()

    def call():
        return (x * 2).exp().sin()  # keeps exp's result, which is the sine's input

    rows = variants.memory(layer, call, "cpu")
    assert rows["kept_bytes"] == 4096
    # result, its gradient, what was kept, and the cosine with the product of both
    assert 4 * 4096 <= rows["peak_bytes"] <= 5 * 4096 + 64


@pytest.mark.studies
def test_liger_keeps_what_its_source_says():
    """Counted in a process of its own, in which kernels are compiled and not launched."""
    names = [name for name in variants.MLPS if name != variants.COMPILED]
    rows = study.work(JOB | {"variants": names, "tokens": 8192, "inner": 256})
    x, h = 4 * 8192 * HIDDEN, 4 * 8192 * 256
    kept = {name: row["kept_bytes"] for name, row in rows.items()}
    assert kept == {
        variants.BASELINE: x + 4 * h,
        variants.LIGER: x + 3 * h,
        variants.TILED: x,
        variants.FUSED: x + 3 * h,
        variants.RECOMPUTED: x,
        variants.CHECKPOINTED: x,
    }
    assert rows[variants.TILED]["peak_bytes"] < rows[variants.CHECKPOINTED]["peak_bytes"] / 4
    assert {name for name, row in rows.items() if "train" in row} == set(names) & set(
        variants.NATIVE
    )


@pytest.mark.studies
def test_a_failed_count_shows_its_error():
    with pytest.raises(RuntimeError, match=r"benchmarks\.starify\.variants failed:\n(.|\n)*KeyErr"):
        study.work({"part": "MLP", "device": "cpu"})


def test_a_missing_liger_is_named():
    program = (
        "import sys; sys.modules['liger_kernel'] = None; "
        "from benchmarks.starify import variants; variants.liger()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "ImportError: the study beside Liger needs it: pip install liger-kernel" in done.stderr


def records():
    made = {}
    for name, job in study.jobs(devices=("cpu",)).items():
        metrics = {}
        for i, variant in enumerate(job["variants"], 1):
            metrics[variant] = {"kept_bytes": i * 2**20, "peak_bytes": 2 * i * 2**20}
            if job["part"] == "MLP" and variant in variants.NATIVE:
                metrics[variant]["train"] = {"ratio": 1 + i / 10}
        hardware = {"cpu": "c", "cores": 2, "threads": 1, "gpu": None}
        versions = {"liger-kernel": "0.8"}
        made[name] = Record(
            "starify-liger",
            name,
            None,
            None,
            definition(job),
            metrics,
            hardware,
            versions,
            "x",
            "d",
        )
    return made


def test_tables_have_a_row_a_width_and_say_what_was_not_timed():
    made = study.mlp_tables(records())
    head, _, *rows = made["kept"].splitlines()
    assert head == "| channels | dtype | device | " + " | ".join(variants.MLPS) + " |"
    assert len(rows) == 6
    assert rows[0] == (
        "| 1,024 x 2,816 | bfloat16 | CPU | 1.0 | 2.0 | 3.0 | 4.0 | 5.0 | 6.0 | 7.0 |"
    )
    assert made["time"].splitlines()[2].endswith("| 1.10 | 1.20 | - | - | 1.50 | 1.60 | 1.70 |")
    assert "| 1,024 | CPU | definition | 1.0 | 2.0 |" in study.model_table(records())
    text = study.text(records())
    assert '1. Liger\'s SwiGLU and `mode="fuse"` keep the same' in text
    assert "Liger's SwiGLU keeps 3.00 of the definition, fused 5.00" in text
    assert "were not measured" in text


def test_a_gpu_has_its_name_in_the_tables():
    (name, record), *_ = records().items()
    job = record.definition | {"device": "cuda"}
    hardware = record.hardware | {"gpu": "H200"}
    there = Record("starify-liger", name, None, None, job, record.metrics, hardware)
    assert study.device_of(there) == "H200"
    assert "were not measured" not in study.answer({**records(), "gpu": there})


def test_a_twin_shares_parameters_only():
    base = LlamaMLP(variants.config(JOB))
    other = variants.twin(base)
    assert all(a is b for a, b in zip(base.parameters(), other.parameters(), strict=True))
    assert other is not base
    assert other.gate_proj is not base.gate_proj
