"""The GPU benchmark without a GPU: its gate, its clock, its budget, its targets and its dry run."""

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import lab as gpu_lab
from benchmarks.gpu import tables as gpu_tables
from benchmarks.gpu.lab import GRAPH, Comparison, Lab, Subject, Trial, compare, gate, measure
from benchmarks.gpu.training import load
from benchmarks.harness.timing import interleave
from tests.helpers import randn

ROOT = Path(__file__).parents[2]
DRY = Lab(torch.device("cpu"), dry=True)


class Bench(Lab):
    """Times like a GPU's, without one."""

    def clock(self, *, ahead):
        def clock(run):
            began = time.perf_counter()
            run()
            return time.perf_counter() - began

        return clock


def toy(fused=lambda x: (x.float() * x.float()).to(x.dtype), dtype=torch.bfloat16, **options):
    """x^2 by eager (rounds once), by us, and as a graph of ours."""
    x = randn(64, 32, dtype=dtype)
    programs = {"eager": lambda: x * x, "fused": lambda: fused(x)}
    return Trial(
        {**programs, "fused" + GRAPH: programs["fused"]},
        {name: lambda run=run: [run()] for name, run in programs.items()},
        lambda: [x.double() * x.double()],
        ["eager"],
        **options,
    )


# ---- the gate


def test_the_gate_lets_what_is_right_through():
    found = gate(toy())
    assert found.keys() == {"eager", "fused"}
    assert not any("failed" in entry for entry in found.values())
    assert 0 < found["fused"]["error"] <= 2 * found["eager"]["error"] < 0.01


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x * x * 1.02,
        lambda x: torch.where(torch.arange(len(x))[:, None] == 63, 0, x * x),  # one row of 64
        lambda x: x * x * torch.nan,
        lambda x: (x * x)[:, :1],
    ],
    ids=["scaled", "one row", "nan", "shape"],
)
def test_the_gate_catches_a_wrong_kernel(wrong):
    row = measure(DRY, toy(wrong))
    assert "failed" in row["programs"]["fused"]
    assert row["programs"]["fused" + GRAPH]["failed"] == row["programs"]["fused"]["failed"]
    assert "failed" not in row["programs"]["eager"]
    assert len(row["failures"]) == 2


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    monkeypatch.setattr(gpu_lab, "_memory", lambda run, forward: {"peak_mb": 1.0})
    row = measure(Bench(torch.device("cpu"), dry=False), toy(lambda x: x * x + 0.1))
    assert row["status"] == "measured"
    assert "median_ms" in row["programs"]["eager"]
    assert row["programs"]["fused"].keys() == {"error", "failed"}


def test_a_library_kernel_that_is_patched_wrong_is_caught(monkeypatch):
    from benchmarks.gpu import kernels as gpu_kernels

    monkeypatch.setattr(gpu_kernels, "star_mlp", lambda x, *_: (x.clone(), None, None))
    (k3,) = (c for c in gpu_kernels.k3() if c.label.startswith("S4 stage 1"))
    row = k3.run(DRY)
    assert row["programs"]["fused"]["failed"] == "more than twice the error of eager"
    assert "failed" not in row["programs"]["torch.compile"]


def test_a_program_that_raises_takes_no_other_with_it():
    def broken(x):
        raise RuntimeError("out of registers\nmore")

    row = measure(DRY, toy(broken))
    assert row["programs"]["fused"]["failed"] == "RuntimeError: out of registers"
    assert row["status"] == "not measured"


def test_others_are_reported_not_judged():
    trial = toy()
    x = randn(64, 32, dtype=torch.bfloat16)
    trial.checks["torch.compile"] = lambda: [x * x * 1.1]
    found = gate(trial)["torch.compile"]
    assert found["error"] == pytest.approx(0.1, rel=0.1)
    assert "failed" not in found


def test_without_a_yardstick_nothing_passes():
    def unavailable():
        raise RuntimeError("no eager here")

    trial = toy()
    trial.checks["eager"] = trial.programs["eager"] = unavailable
    row = measure(DRY, trial)
    assert row["status"] == "failed"
    assert "nothing to hold it to" in row["programs"]["fused"]["failed"]


# ---- timing


def test_measure_times_in_turns_against_the_fastest_baseline(monkeypatch):
    monkeypatch.setattr(gpu_lab, "_memory", lambda run, forward: {"peak_mb": 1.0})
    monkeypatch.setattr(gpu_lab, "SECONDS", 0.01)
    row = measure(Bench(torch.device("cpu"), dry=False), toy(work={"bytes": 8}))
    assert row["status"] == "measured"
    assert row["baseline"] == "eager"
    assert gpu_lab.REPEATS[0] <= row["repeats"] <= gpu_lab.REPEATS[1]
    for name, entry in row["programs"].items():
        assert entry["median_ms"] > 0
        assert entry["ratio"] > 0
        assert ("peak_mb" in entry) is not name.endswith(GRAPH)
    assert row["programs"]["eager"]["ratio"] == 1


def test_variants_are_timed_by_the_clock_given():
    seconds = iter([9.0, 9.0, 1.0, 4.0, 3.0, 6.0])  # the first round warms up
    found = interleave(
        {"a": lambda: 0, "b": lambda: 0}, baselines=["a"], repeats=2, clock=lambda _: next(seconds)
    )
    assert found["a"]["median_ms"] == 2000
    assert found["b"]["ratio"] == 3  # of 4 and 2


@pytest.mark.parametrize("direction", ["forward", "backward", "step"])
def test_compare_runs_each_direction_as_often_as_asked(direction):
    x, w = randn(8, 4, grad=True), randn(4, 4, seed=1, grad=True)
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    trial = compare(
        DRY,
        {
            "eager": Subject(lambda: x @ w, [x, w]),
            "fused": Subject(lambda: torch.einsum("ij,jk->ik", x, w), [x, w]),
        },
        Subject(lambda: wide[0] @ wide[1], wide),
        direction,
        baselines=["eager"],
        graphs=True,
    )
    assert not any("failed" in entry for entry in measure(DRY, trial)["programs"].values())
    for run in trial.programs.values():
        first, second = run(), run()
        assert len(first) == (1 if direction == "forward" else 2)
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


# ---- budget and resumption


@pytest.fixture
def clocked(monkeypatch):
    """Comparisons that take so many seconds on a clock of our own."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def comparison(label, takes, seconds=5, error=None):
        def run(lab):
            now[0] += takes
            if error:
                raise error
            return {"status": "measured", "programs": {}, "failures": []}

        return Comparison("K1", label, run, seconds)

    return comparison


def record(path, budget=20, resume=False):
    return gpu.Record(path, "a GPU", budget, resume=resume)


def test_what_does_not_fit_into_the_budget_is_recorded(clocked, tmp_path):
    file = tmp_path / "gpu-a.json"
    todo = [clocked("a", 14), clocked("b", 1, seconds=7), clocked("c", 1), clocked("d", 1)]
    assert gpu.run(Lab(torch.device("cpu"), dry=False), record(file), todo)
    content = json.loads(file.read_text())
    assert [r["label"] for r in content["rows"]] == ["a", "c", "d"]
    assert content["skipped"] == [
        {"case": "K1", "label": "b", "why": "6 s left of 20, needs about 7"}
    ]
    assert content["elapsed_s"] == 16
    assert content["environment"]["torch"]
    assert {t["measured"] for t in content["targets"]} == {None}


def test_a_run_goes_on_where_it_was_stopped(clocked, tmp_path):
    file = tmp_path / "gpu-a.json"
    lab = Lab(torch.device("cpu"), dry=False)
    gpu.run(lab, record(file, budget=6), [clocked("a", 3), clocked("b", 3)])
    assert len(json.loads(file.read_text())["skipped"]) == 1
    never = clocked("a", 0, error=AssertionError("done before"))
    gpu.run(lab, record(file, resume=True), [never, clocked("b", 3)])
    content = json.loads(file.read_text())
    assert [r["status"] for r in content["rows"]] == ["measured", "measured"]
    assert content["skipped"] == []
    assert content["elapsed_s"] == 6


def test_a_comparison_that_kills_the_process_is_not_tried_again(clocked, tmp_path):
    file = tmp_path / "gpu-a.json"
    lab = Lab(torch.device("cpu"), dry=False)
    killed = clocked("a", 1, error=SystemExit())
    with pytest.raises(SystemExit):
        gpu.run(lab, record(file), [killed, clocked("b", 1)])
    again = record(file, resume=True)
    gpu.run(lab, again, [killed, clocked("b", 1)])
    rows = {r["label"]: r for r in json.loads(file.read_text())["rows"]}
    assert rows["a"]["reason"] == gpu.LOST
    assert rows["b"]["status"] == "measured"
    assert gpu.report(again, [killed]) == 1


def test_a_stopped_comparison_is_tried_again(clocked, tmp_path):
    file = tmp_path / "gpu-a.json"
    with pytest.raises(KeyboardInterrupt):
        gpu.run(DRY, record(file), [clocked("a", 1, error=KeyboardInterrupt())])
    assert json.loads(file.read_text())["rows"] == []


def test_a_gpu_that_stopped_answering_ends_the_process(clocked, monkeypatch):
    def gone():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu_lab, "clean", gone)
    unanswered = record(None)
    assert not gpu.run(DRY, unanswered, [clocked("a", 1), clocked("b", 1)])
    assert [r["label"] for r in unanswered.content["rows"]] == ["a"]


def test_a_new_process_follows_one_that_died(monkeypatch):
    calls, codes = [], iter([gpu.GONE, -11, 1])
    monkeypatch.setattr(subprocess, "call", lambda c: calls.append(c) or next(codes))
    assert gpu.supervise(["--only", "K3"], 100) == 1
    assert [c[-1] == "--resume" for c in calls] == [False, True, True]
    for command in calls:
        args = gpu.arguments(command[3:])
        assert args.worker
        assert args.only == ["K3"]
        assert args.budget <= 100


def test_without_a_gpu_it_says_what_can_be_done(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "--dry-run" in capsys.readouterr().out


# ---- targets and tables


def measured(case, label, baseline="torch.compile", work=None, **programs):
    named = {name.replace("__", ", ").replace("_", " "): p for name, p in programs.items()}
    return {
        "case": case, "label": label, "status": "measured", "baseline": baseline,
        "programs": named, "work": work or {}, "failures": [],
    }  # fmt: skip


def reached(rows):
    index = gpu_tables.index(rows)
    return {t.name: t.row(index) for t in gpu_tables.targets()}


@pytest.mark.parametrize(("ratio", "wanted"), [(0.2, "yes"), (0.25, "yes"), (0.26, "no")])
def test_a_target_is_reached_at_its_goal(ratio, wanted):
    label = "S4 stage 1, 56x56, 32 channels"
    rows = [measured("K3", label, fused={"ratio": ratio, "median_ms": 1.0, "error": 1e-3})]
    found = reached(rows)[f"K3 over torch.compile, {label}"]
    assert found["measured"] == pytest.approx(1 / ratio)
    assert found["reached"] is (wanted == "yes")
    line = f"| K3 over torch.compile, {label} | at least 4 x | {1 / ratio:.3g} | {wanted} |"
    assert line in gpu_tables.target_table(gpu_tables.index(rows))


@pytest.mark.parametrize(("ours", "wanted"), [(0.9, True), (1.0, True), (1.1, False)])
def test_a_target_to_stay_below(ours, wanted):
    label = gpu_tables.wide_label(4096)
    rows = [measured("wide", label, library={"ratio": 1.2}, triton={"ratio": ours})]
    found = reached(rows)["Llama-like MLP, forward and backward, to the time of torch.compile"]
    assert found["measured"] == pytest.approx(ours)
    assert found["reached"] is wanted


def test_against_another_baseline_a_target_is_not_measured():
    label = "S4 stage 1, 56x56, 32 channels"
    rows = [measured("K3", label, baseline="eager", fused={"ratio": 0.1})]
    assert reached(rows)[f"K3 over torch.compile, {label}"]["measured"] is None


def test_a_failed_program_reaches_nothing():
    label = "S4 stage 1, 56x56, 32 channels"
    rows = [measured("K3", label, fused={"ratio": 0.1, "failed": "wrong"})]
    assert reached(rows)[f"K3 over torch.compile, {label}"]["reached"] is None


def test_bandwidth_is_that_of_the_worst_layout():
    copied = measured("copy", "1 GiB", work={"bytes": 3e9}, copy={"median_ms": 1.0})
    work = {"bytes": 3e8}
    k1 = [
        measured("K1", gpu_tables.k1_label(act, layout, "forward"), work=work,
                 fused={"median_ms": 0.125 if layout == "packed" else 0.105})
        for act in ("silu", "relu6") for layout in ("two", "packed")
    ]  # fmt: skip
    name = "K1 forward, of the bandwidth of a copy, worst layout"
    found = reached([copied, *k1])[name]
    assert found["measured"] == pytest.approx(80)
    assert found["reached"] is False
    assert reached([copied, *k1[:3]])[name]["measured"] is None  # one layout is missing


def test_memory_targets():
    wide = measured(
        "wide", gpu_tables.wide_label(4096), torch_compile={}, library__recompute={"held_mb": 35.0}
    )
    wide["programs"]["torch.compile"] = {"held_mb": 390.0}
    training = measured("StarNet", "S4, batch 256, training", fused={"peak_mb": 4.0})
    training["programs"]["timm, torch.compile"] = {"peak_mb": 10.0}
    found = reached([wide, training])
    assert found[
        "Llama-like MLP, recompute: held for the backward, less than torch.compile"
    ] == {
        "target": "Llama-like MLP, recompute: held for the backward, less than torch.compile",
        "goal": "at least 350 MB", "measured": 355.0, "reached": True,
    }  # fmt: skip
    memory = "StarNet-S4 training step, peak memory to that of timm + torch.compile"
    assert found[memory]["measured"] == pytest.approx(0.4)


def test_every_target_has_rows_to_come_from():
    """A label that no comparison has would never be measured."""
    asked = set()

    class Spy(dict):
        def get(self, key, default=None):
            asked.add(key)
            return default

    for target in gpu_tables.targets():
        assert target.value(Spy()) is None
    assert asked <= {(c.case, c.label) for c in gpu.comparisons()}
    assert len(asked) > 20


def test_comparisons_have_names_of_their_own():
    names = [(c.case, c.label) for c in gpu.comparisons()]
    assert len(names) == len(set(names))
    assert {case for case, _ in names} == set(gpu.CASES)


def test_the_page_shows_what_there_is_and_that_the_rest_is_not_measured():
    old, new = (
        {
            "device": "GPU A", "elapsed_s": 9.0, "skipped": [],
            "environment": {
                "date": date, "command": "gpu", "torch": "2", "triton": "3", "timm": "1",
                "cpu": "one", "cores": 1,
            },
            "rows": [measured("copy", "1 GiB", fused={"median_ms": ms, "ratio": 1, "error": 0})],
        }
        for date, ms in (("2026-01-01", 7.25), ("2026-02-02", 8.5))
    )  # fmt: skip
    text = gpu_tables.page([old, new], gpu.comparisons())
    assert "## GPU A" in text
    assert "8.5" in text
    assert "7.25" not in text  # replaced
    assert text.count(gpu_tables.UNKNOWN) > 150
    assert "## No GPU yet" not in text


def test_the_page_in_the_documentation_is_that_of_the_results():
    made = gpu_tables.page(gpu_tables.load(), gpu.comparisons())
    assert gpu_tables.PAGE.read_text() == made, "run python -m benchmarks.gpu --tables"


def test_of_many_tiles_the_fastest_is_shown_beside_the_shipped_one():
    row = measured(
        "tiles", "K3 x", shipped={"ratio": 1.0}, a={"ratio": 0.9}, b={"ratio": 0.8},
        eager={"ratio": 0.1}, c={"failed": "spills"},
    )  # fmt: skip
    table = gpu_tables.case_table("tiles", ["K3 x"], gpu_tables.index([row]))
    assert [line.split("|")[2].strip() for line in table.splitlines()[2:]] == ["shipped", "b"]


# ---- data of the training run


@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist_is_read_from_its_folder(tmp_path, packed):
    images, labels = np.arange(3 * 28 * 28) % 256, np.array([4, 0, 9])
    for name, shape, values in (
        ("train-images-idx3-ubyte", (3, 28, 28), images),
        ("train-labels-idx1-ubyte", (3,), labels),
    ):
        head = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">i4").tobytes()
        content = head + values.astype(np.uint8).tobytes()
        if packed:
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (tmp_path / name).write_bytes(content)
    source, found, classes = load(DRY, tmp_path)
    assert "--data" in source
    assert found.shape == (3, 1, 28, 28)
    assert found.flatten().tolist() == images.tolist()
    assert classes.tolist() == [4, 0, 9]


def test_patterns_stand_in_for_it():
    source, images, labels = load(DRY, None)
    assert "patterns" in source
    assert images.shape == (64, 1, 28, 28)
    assert images.dtype == torch.uint8
    assert labels.unique().numel() > 5
    torch.testing.assert_close(images, load(DRY, None)[1])


# ---- the dry run


def dry_run(*options):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", *options]
    done = subprocess.run(
        command, cwd=ROOT, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.studies
def test_a_dry_run_does_everything_but_the_timing(tmp_path):
    file = tmp_path / "dry.json"
    text = dry_run("--only", "copy", "K1", "K3", "wide", "--out", str(file))
    assert "0 with failures" in text
    content = json.loads(file.read_text())
    assert content["device"] == "none (dry run)"
    assert {r["case"] for r in content["rows"]} == {"copy", "K1", "K3", "wide"}
    for row in content["rows"]:
        assert row["status"] == "not measured"
        for name, program in row["programs"].items():
            assert "median_ms" not in program
            assert name.endswith(GRAPH) or program["error"] < 0.01
    assert {t["reached"] for t in content["targets"]} == {None}
    assert not list((ROOT / "benchmarks/results").glob("gpu-none*"))


@pytest.mark.slow
def test_the_whole_dry_run_and_the_tiles():
    assert "0 with failures" in dry_run()
    assert "0 with failures" in dry_run("--tune")


@pytest.mark.studies
def test_it_imports_without_the_development_packages():
    code = """
import sys
for name in ("scipy", "tqdm", "typer", "torchvision", "torchmetrics", "sklearn", "matplotlib",
             "accelerate", "torchdata", "huggingface_hub", "safetensors"):
    sys.modules[name] = None
from benchmarks.gpu.__main__ import comparisons
import benchmarks.gpu.tables
assert comparisons()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
