"""The GPU benchmark without a GPU: gate, clocks, budget, resumption, goals and dry run."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import goals, kernels, session, tables, trial, workers
from benchmarks.gpu import lab as gpu_lab
from benchmarks.gpu.lab import DryLab, counted
from benchmarks.gpu.rows import rows
from benchmarks.gpu.session import Session, finished
from benchmarks.gpu.trial import COLUMNS, GRAPH, TIMED, Row, Subject, Trial, compare, gate, measure
from benchmarks.harness.records import Record, load
from benchmarks.harness.timing import interleave
from tests.helpers import randn

ROOT = Path(__file__).parents[2]
DRY = DryLab()


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


def test_a_wrong_kernel_is_not_timed():
    row = measure(DRY, toy(lambda x: x * x + 0.1))
    assert row["status"] == "measured"
    assert row["programs"]["eager"]["gpu_ms"] > 0
    assert row["programs"]["fused"]["failed"]
    assert all(row["programs"]["fused"][column] is None for column in TIMED)


def test_a_library_kernel_that_is_patched_wrong_is_caught(monkeypatch):
    monkeypatch.setattr(kernels, "star_mlp", lambda x, *_: (x.clone(), None, None))
    row = measure(DRY, kernels.star_mlps("mlp-forward", "S4")[0].build(DRY))
    assert row["programs"]["fused"]["failed"] == "more than twice the error of eager"
    assert "failed" not in row["programs"]["torch.compile"]


def test_a_program_that_raises_takes_no_other_with_it():
    def broken(x):
        raise RuntimeError("out of registers\nmore")

    row = measure(DRY, toy(broken))
    assert row["programs"]["fused"]["failed"] == "RuntimeError: out of registers"
    assert row["status"] == "measured"
    assert not finished(row)


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
    assert "nothing to compare to" in row["programs"]["fused"]["failed"]


# ---- timing


class ScriptedGpu(DryLab):
    """GPU whose programs take the (host, GPU, call) seconds that are attributes of them."""

    dry = False

    def __init__(self):
        self.slept = []

    def clock(self, run, sleep):
        self.slept.append(sleep)
        host, gpu, call = run.takes
        return host, gpu if sleep else call

    def captured(self, run):
        return run

    def count(self, run):
        return {"launches": 3, "kernels": 7}


def program(*takes):
    def run():
        return [torch.ones(2)]

    run.takes = takes
    return run


def scripted(clock="gpu", **programs):
    return Trial(
        programs, {"eager": programs["eager"]}, lambda: [torch.ones(2).double()], ["eager"],
        clock=clock,
    )  # fmt: skip


@pytest.mark.parametrize(("clock", "ratio"), [("host", 4), ("gpu", 0.5), ("call", 2)])
def test_every_program_has_three_times_and_a_ratio_of_one(clock, ratio):
    programs = {"eager": program(1e-5, 4e-3, 5e-3), "fused": program(4e-5, 2e-3, 1e-2)}
    row = measure(ScriptedGpu(), scripted(clock, **programs))
    assert finished(row)
    assert row["baseline"] == "eager"
    assert trial.REPEATS[0] <= row["repeats"] <= trial.REPEATS[1]
    fused = row["programs"]["fused"]
    assert fused.keys() == set(COLUMNS)
    assert fused["host_us"] == pytest.approx(40)
    assert fused["sleep_us"] == pytest.approx(60)
    assert fused["gpu_ms"] == pytest.approx(2)
    assert fused["call_ms"] == pytest.approx(10)
    assert (fused["launches"], fused["kernels"]) == (3, 7)
    assert fused["ratio"] == pytest.approx(ratio)


def test_the_sleep_is_that_of_the_enqueue():
    gpu = ScriptedGpu()
    assert trial.enqueue(gpu, program(0.2, 1, 1)) == pytest.approx(0.3)
    assert gpu.slept == [0] * 3 + [pytest.approx(0.3)] * 3


class ShortQueue(ScriptedGpu):
    """GPU that has to wake up before the last tenth of a run can be queued."""

    def clock(self, run, sleep):
        host, total = super().clock(run, sleep)
        return max(host, sleep + host / 10), total


def test_a_gpu_does_not_sleep_over_more_launches_than_its_queue_holds():
    gpu = ShortQueue()
    row = measure(gpu, scripted(eager=program(0.2, 1.0, 3.0)))
    entry = row["programs"]["eager"]
    assert entry["sleep_us"] == 0
    assert entry["host_us"] == pytest.approx(2e5)
    assert entry["gpu_ms"] == entry["call_ms"] == 3000


def test_a_slow_start_of_the_host_is_no_short_queue():
    gpu, hosts = ScriptedGpu(), iter([1.0] * 3 + [1.6] * 3 + [1.7] * 3)
    gpu.clock = lambda run, sleep: (next(hosts), 1.0)
    assert trial.enqueue(gpu, program(0, 0, 0)) == pytest.approx(2.4)


@pytest.mark.parametrize("sleep", [0, 0.25])
def test_the_clock_of_a_gpu_starts_after_its_sleep(monkeypatch, sleep):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return 5.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("idle"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append(cycles))
    monkeypatch.setattr(gpu_lab, "FLUSH_BYTES", 4)
    gpu = gpu_lab.Lab()
    gpu.device, gpu._cycles = torch.device("cpu"), 1e9
    host, total = gpu.clock(lambda: (time.sleep(0.02), log.append("run")), sleep)
    assert log == [250_000_000 if sleep else "idle", "record", "run", "record", "wait"]
    assert 0.02 <= host < 1
    assert total == pytest.approx(0.005)


def test_launches_and_kernels_are_counted_apart():
    def event(name, on=DeviceType.CPU, annotation=False):
        return SimpleNamespace(name=name, device_type=on, is_user_annotation=annotation)

    host = ["cudaLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch", "cudaMemsetAsync"]
    others = ["aten::add", "cudaStreamSynchronize", "cudaEventRecord", "launch"]
    found = counted(
        [
            *(event(name) for name in host + others),
            *(event(name, DeviceType.CUDA) for name in ("star_mlp", "Memset (Device)")),
            event("Optimizer.step", DeviceType.CUDA, annotation=True),
        ]
    )
    assert found == {"launches": 4, "kernels": 2}


def test_only_what_compiles_is_run_before_and_no_search_by_timing():
    ran = Counter()
    names = ["eager", "fused", "torch.compile", "cuDNN NCHW", "timm", "timm, torch.compile"]
    names += ["fused" + GRAPH, "torch.compile max-autotune"]
    made = Trial({n: lambda n=n: ran.update([n]) for n in names}, {}, list, ["eager"])
    made.checks["fused"] = lambda: ran.update(["check"])
    trial.warm(made)
    assert ran == {"fused": 1, "check": 1, "torch.compile": 2, "timm, torch.compile": 2}
    ran.clear()
    trial.warm(made, ("timm, torch.compile",))
    assert ran.keys() == {"timm, torch.compile"}


def test_choices_made_on_a_shared_gpu_are_forgotten(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "cache_dir", lambda: str(tmp_path))
    old, new, code = (tmp_path / n for n in ("a.best_config", "b.best_config", "c.py"))
    for file in (old, new, code):
        file.touch()
    os.utime(old, (100, 100))
    workers.forget_choices(since=time.time() - 60)
    assert old.exists()
    assert not new.exists()
    assert code.exists()


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


class FakeWorker:
    """Takes a second a row on a clock of its own, and gives the scripted metrics."""

    now = 0.0
    script = None
    asked = None
    started = 0

    def __init__(self, *, dry):
        FakeWorker.started += 1
        self.alive = True

    def ask(self, job, seconds):
        name = job[1].removeprefix("case: ")
        FakeWorker.asked.append(name)
        metrics = {"took_s": 1.0} | FakeWorker.script.get(name, MEASURED)
        FakeWorker.now += min(metrics["took_s"], seconds)
        self.alive = metrics["status"] != "lost"
        return metrics

    def end(self):
        self.alive = False


MEASURED = {
    "status": "measured", "failures": [],
    "programs": {"fused": dict.fromkeys(COLUMNS, 1.0)},
}  # fmt: skip
LOST = {"status": "lost", "reason": "the process died with exit code -11"}
CONDITIONS = {
    "hardware": {"cpu": "c", "cores": 1, "threads": 1, "gpu": "GPU A", "driver": "5"},
    "versions": {"torch": "2", "triton": "3", "timm": "1"},
    "command": "python -m benchmarks.gpu", "date": "2026-01-01", "marks": {},
}  # fmt: skip


@pytest.fixture
def call(tmp_path, monkeypatch):
    """One call of the benchmark over rows a, b, c, ... of five seconds; returns who was asked."""
    monkeypatch.setattr(session, "Worker", FakeWorker)
    monkeypatch.setattr(time, "monotonic", lambda: FakeWorker.now)

    def run(names, script=None, budget=100.0, again=False, commit="abc"):
        FakeWorker.script, FakeWorker.asked, FakeWorker.started = script or {}, [], 0
        todo = [Row("case", name, None, seconds=5) for name in names]
        made = Session("GPU A", tmp_path, FakeWorker.now, budget, False, commit, CONDITIONS)
        made.run(made.todo(todo, again=again))
        return FakeWorker.asked

    run.statuses = lambda: {r.run[-1]: r.metrics["status"] for r in load("gpu-gpu-a", tmp_path)}
    run.records = lambda: load("gpu-gpu-a", tmp_path)
    return run


def test_finished_rows_are_kept_and_others_measured_on_the_next_call(call):
    assert call("abc", {"b": LOST}) == ["a", "b", "c"]
    assert call.statuses() == {"a": "measured", "b": "lost", "c": "measured"}
    assert call("abc") == ["b"]
    assert call("abc") == []
    assert set(call.statuses().values()) == {"measured"}


def test_a_row_that_was_not_reached_is_recorded_and_comes_first(call):
    # with 7 seconds a third row of 5 does not fit
    assert call("abcd", {"a": LOST}, budget=7) == ["a", "b", "c"]
    assert call.statuses()["d"] == "not run"
    assert "4 s left of 7" in call.records()[-1].metrics["reason"]
    assert call("abcd", {"a": LOST}) == ["d", "a"]


def test_what_is_not_reached_again_is_not_recorded_again(call, tmp_path):
    call("abc", budget=5)
    written = (tmp_path / "gpu-gpu-a.jsonl").read_text()
    call("bc", budget=0)
    assert (tmp_path / "gpu-gpu-a.jsonl").read_text() == written


def test_a_measurement_of_another_commit_stays_beside_the_new_one(call):
    call("a")
    call("a", {"a": LOST}, again=True, commit="def")
    assert [r.metrics["status"] for r in call.records()] == ["measured", "lost"]
    assert tables.results(call.records())["case: a"]["status"] == "measured"
    assert call("a") == ["a"]


def test_measuring_again_goes_on_after_a_cut(call):
    call("abc")
    assert call("abc", again=True, budget=6) == ["a", "b"]
    assert call("abc") == ["c"]


@pytest.mark.parametrize(
    "metrics",
    [
        {"status": "failed", "reason": "LOST"},
        MEASURED | {"failures": ["fused: wrong"]},
        MEASURED | {"programs": {"fused": dict.fromkeys(COLUMNS, 1.0) | {"host_us": None}}},
    ],
    ids=["failed", "a program failed", "no host time"],
)
def test_a_row_with_a_gap_is_measured_again(call, metrics):
    call("a", {"a": metrics})
    assert call("a") == ["a"]


def test_a_row_that_dies_takes_no_other_with_it(call):
    call("abc", {"a": LOST})
    assert FakeWorker.started == 2
    assert call.statuses() == {"a": "lost", "b": "measured", "c": "measured"}


def test_the_budget_cuts_a_row_off_and_it_was_not_run(call):
    began = FakeWorker.now
    call("ab", {"a": LOST | {"took_s": 1000.0}}, budget=60)
    assert FakeWorker.now - began == 60
    assert call.statuses() == {"a": "not run", "b": "not run"}


def test_a_row_that_hangs_is_given_up(call):
    began = FakeWorker.now
    call("a", {"a": LOST | {"took_s": 1000.0}}, budget=1000)
    assert FakeWorker.now - began == session.START + 50
    assert call.statuses() == {"a": "lost"}


def test_records_have_the_conditions(call):
    call("a")
    (record,) = call.records()
    assert record.definition == {"case": "case", "label": "a", "commit": "abc"}
    assert record.hardware["driver"] == "5"
    here = command.measured_under(None)
    assert {"gpu", "driver"} <= here["hardware"].keys()
    assert {"torch", "triton", "cuda", "cudnn"} <= here["versions"].keys()
    assert here["marks"]["commit_unknown"]
    assert command.measured_under("abc")["marks"] == {}


def answers(pipe, dry):
    """What a worker's process runs in the next test: it echoes, hangs, or dies."""
    while True:
        what = pipe.recv()[0]
        if what == "die":
            os._exit(3)
        if what == "hang":
            time.sleep(60)
        pipe.send(({"status": what}, True))


@pytest.mark.studies
def test_a_worker_that_dies_or_hangs_says_so(monkeypatch):
    monkeypatch.setattr(workers, "serve", answers)
    worker = workers.Worker(dry=True)
    assert worker.ask(("measured", "", ()), 60)["status"] == "measured"
    died = worker.ask(("die", "", ()), 60)
    assert (died["status"], died["reason"]) == ("lost", "the process died with exit code 3")
    assert not worker.alive
    hung = workers.Worker(dry=True).ask(("hang", "", ()), 0.1)
    assert hung["status"] == "lost"
    assert 0.1 <= hung["took_s"] < 30


def test_without_a_gpu_it_says_what_can_be_done(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([]) == 2
    assert "--dry-run" in capsys.readouterr().out


# ---- goals and the page


def table(**changes):
    """Results in which every row has a program of every name that goals ask for, all 1."""
    entry = {"call_ms": 1.0, "gpu_ms": 1.0, "host_us": 1.0, "peak_mb": 1.0, "held_mb": 1.0}
    found = {}

    class Spy(dict):
        def get(self, name, default=None):
            found.setdefault(name, {"programs": {}})
            return SpyRow(found[name])

    class SpyRow(dict):
        def get(self, key, default=None):
            return SpyPrograms(self["programs"])

    class SpyPrograms(dict):
        def __init__(self, into):
            self.into = into

        def get(self, name, default=None):
            return self.into.setdefault(name, dict(entry))

    for goal in goals.GOALS:
        goal.value(Spy())
    return found


def test_every_goal_has_rows_to_come_from():
    """A row or a program that nothing measures would never be measured."""
    asked = table()
    known = {row.name: row for row in rows()}
    assert asked.keys() <= known.keys()
    assert len(asked) > 20
    for name, row in asked.items():
        programs = known[name].build(DRY).programs
        assert row["programs"].keys() <= programs.keys(), name


@pytest.mark.parametrize(
    ("start", "row", "changes", "wanted"),
    [
        ("StarNet-S4, batch 256, inference from Python", "starnet: S4, batch 256, inference",
         {"fused": 12.0, "timm, torch.compile": 11.9}, ["at most 1 x", "1.01", "missed"]),
        ("StarNet-S4, batch 256, inference, fuse() in a graph: speed",
         "starnet: S4, batch 256, inference",
         {"fused, fuse(), CUDA graph": 4.0, "fused, fuse(graph=True)": 3.0,
          "timm, torch.compile, CUDA graph": 10.0},
         ["at least 3 x", "3.33", "met"]),
        ("StarNet-S4, batch 256, training step: speed", "starnet: S4, batch 256, training",
         {"fused": 190.0, "fused, graph_training()": 26.0, "fused, CUDA graph": 25.0,
          "timm, torch.compile": 60.0,
          "timm, torch.compile, CUDA graph": 55.0}, ["at least 2 x", "2.2", "met"]),
        ("StarNet-S4, batch 256, inference, fuse() in a graph: time to that of the definition",
         "starnet: S4, batch 256, inference", {"fused, fuse(graph=True)": 3.0, "eager": 15.0},
         ["at most 1 x", "0.2", "met"]),
        ("StarNet-S4, batch 1, inference: ", "starnet: S4, batch 1, inference",
         {"fused": 9.0, "fused, CUDA graph": 0.7, "fused, fuse()": 8.0,
          "fused, fuse(), CUDA graph": 0.6, "fused, fuse(graph=True)": 0.5,
          "timm, torch.compile": 3.0,
          "timm, torch.compile, CUDA graph": 1.0}, ["at most 0.6 x", "0.5", "met"]),
    ],
)  # fmt: skip
def test_goals_of_whole_networks(start, row, changes, wanted):
    results = table()
    (goal,) = (g for g in goals.GOALS if g.name.startswith(start))
    for name, ms in changes.items():
        results[row]["programs"][name]["call_ms"] = ms
    assert goal.cells(results)[1:] == wanted


def test_a_goal_over_stages_is_that_of_the_worst_and_needs_them_all():
    results = table()
    (goal,) = (g for g in goals.GOALS if g.name.startswith("depthwise 7x7, dw"))
    stages = [name for name in results if name.startswith("depthwise") and name.endswith("dw")]
    assert len(stages) == 4
    for i, name in enumerate(stages):
        results[name]["programs"]["fused"]["gpu_ms"] = 0.25 * (i + 1)
        results[name]["programs"]["cuDNN NCHW"]["gpu_ms"] = 5.0
    assert goal.cells(results)[1:] == ["at least 1.5 x", "1", "missed"]
    del results[stages[0]]
    assert goal.cells(results)[1:] == ["at least 1.5 x", "not measured", "not measured"]


def test_a_goal_is_met_at_its_limit_and_a_failed_program_meets_nothing():
    results = table()
    (goal,) = (g for g in goals.GOALS if "peak memory to that of timm" in g.name)
    programs = results["starnet: S4, batch 256, training"]["programs"]
    programs["fused"]["peak_mb"], programs["timm, torch.compile"]["peak_mb"] = 4.0, 8.0
    assert goal.cells(results)[2:] == ["0.5", "met"]
    programs["fused"]["peak_mb"] = 4.1
    assert goal.cells(results)[3] == "missed"
    programs["fused"]["failed"] = "wrong"
    assert goal.cells(results)[2:] == ["not measured", "not measured"]


def test_rows_have_names_of_their_own():
    names = [row.name for row in [*rows(), *rows(tune=True)]]
    assert len(names) == len(set(names))


def test_the_order_is_that_of_the_questions():
    cases = [row.case for row in rows()]
    assert list(dict.fromkeys(cases))[:6] == [
        "host",
        "starnet",
        "depthwise",
        "convolution",
        "mlp-backward",
        "wide",
    ]
    first = [row.label for row in rows() if row.case == "starnet"]
    assert first[:3] == [
        f"S4, batch {b}" for b in ("256, training", "1, inference", "256, inference")
    ]


def record(metrics, name="copy: 1 GiB", commit=None):
    return Record("gpu", name, None, 0, {"commit": commit}, metrics, **CONDITIONS)


def copied(ms):
    entry = dict.fromkeys(COLUMNS) | {"gpu_ms": ms, "ratio": 1.0, "launches": 2}
    return {"status": "measured", "programs": {"copy": entry}, "work": {"bytes": 3e9}}


def test_the_page_shows_the_last_measurement_and_what_is_missing():
    found = [
        record(copied(7.25), commit="one"),
        record(copied(8.5), commit="two"),
        record(LOST),
        record(LOST, "product: silu, two, forward"),
    ]
    text = tables.page({"GPU A": found})
    assert "## GPU A" in text
    assert "commit one" in text
    assert "| 1 GiB | copy | 1.000 |  | 8.5 |  |  | 2 |  |  |  |  | 353 GB/s |" in text
    assert "7.25" not in text
    assert "not measured (lost: the process died with exit code -11)" in text
    assert text.count(goals.UNKNOWN) > 100
    assert "## No GPU yet" in tables.page({})


def test_the_page_in_the_documentation_is_that_of_the_records():
    made = tables.page(tables.devices())
    assert made == tables.PAGE.read_text(), "run python -m benchmarks.gpu --tables"


def test_committed_records_are_of_rows_and_say_under_what_they_were_made():
    known = {row.name for row in [*rows(), *rows(tune=True)]}
    for gpu, records in tables.devices().items():
        for r in records:
            assert r.hardware["gpu"] == gpu
            assert r.run == f"{r.definition['case']}: {r.definition['label']}"
            assert r.run in known
            assert r.definition["commit"] or r.marks["commit_unknown"]
            assert r.hardware["cpu"]
            assert r.versions["torch"]
            assert str(Path.home()) not in r.line()


def test_of_many_tiles_the_fastest_is_shown_beside_the_shipped_one():
    programs = {n: {"ratio": r} for n, r in (("shipped", 1.0), ("a", 0.9), ("b", 0.8))}
    programs |= {"eager": {"ratio": 0.1}, "c": {"failed": "spills"}}
    row = Row("tiles", "x", None)
    shown = tables.case_table([row], {row.name: {"programs": programs, "work": {}}})
    assert [line.split("|")[2].strip() for line in shown.splitlines()[2:]] == ["shipped", "b"]


# ---- the dry run

#: cases that run without the interpreter: their operators have a form in PyTorch
PLAIN = (
    "starnet",
    "mlp-backward",
    "wide",
    "mlp-forward",
    "copy",
    "product",
    "compiled",
    "autotune",
)


@pytest.mark.parametrize("case", PLAIN)
def test_every_row_yields_all_columns(case):
    for row in rows():
        if row.case == case:
            metrics = measure(DRY, row.build(DRY))
            assert finished(metrics), row.name
            for entry in metrics["programs"].values():
                assert entry.keys() == set(COLUMNS)


def dry_run(*options):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--dry-run", *options], cwd=ROOT,
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.studies
def test_a_dry_run_goes_the_whole_way(tmp_path):
    text = dry_run("--only", "host", "copy", "wide", "--out", str(tmp_path))
    assert "14 rows, 0 failed, 0 not run" in text
    (file,) = tmp_path.iterdir()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert Counter(r["definition"]["case"] for r in lines) == {"host": 11, "copy": 1, "wide": 2}
    assert all(finished(r["metrics"]) for r in lines)
    assert lines[0]["hardware"]["gpu"] is None
    assert "0 rows to measure" in dry_run("--only", "copy", "--out", str(tmp_path))
    assert "unknown case" in subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--only", "nothing"], cwd=ROOT,
        capture_output=True, text=True,
    ).stdout  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--tune",)])
def test_the_whole_dry_run(options):
    assert " 0 failed, 0 not run" in dry_run(*options)


@pytest.mark.studies
def test_it_imports_without_the_development_packages():
    code = """
import sys
for name in ("scipy", "tqdm", "typer", "torchvision", "torchmetrics", "sklearn", "matplotlib",
             "accelerate", "torchdata", "huggingface_hub", "safetensors"):
    sys.modules[name] = None
from benchmarks.gpu.rows import rows
import benchmarks.gpu.tables
assert rows()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
