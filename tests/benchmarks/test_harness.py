"""Records, runs, times, comparisons and pages of the studies."""

import json
import math
import re
import sys
import time
from dataclasses import replace
from datetime import date
from types import SimpleNamespace

import pytest
import torch
import typer

from benchmarks.harness import environment as conditions_module
from benchmarks.harness import records as records_module
from benchmarks.harness.comparison import (
    Difference,
    cells,
    difference,
    holm,
    mean_interval,
    plot_differences,
    probability_of_improvement,
    with_half,
)
from benchmarks.harness.environment import command, conditions, environment
from benchmarks.harness.records import Record, append, file_of, load
from benchmarks.harness.report import conditions as conditions_text
from benchmarks.harness.report import first_definition, listed, markdown_table
from benchmarks.harness.runner import current, definition, measure_once, of_arms, run_study
from benchmarks.harness.study import Page, Study, chosen_names
from benchmarks.harness.timing import cpu_clock, host_clock, interleave, kept_bytes

# ---- timing


@pytest.fixture
def play(monkeypatch):
    """Functions of given durations on a clock of our own, and the order they ran in."""
    now, order = [100.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def functions(**durations: list[float]):
        def make(name, left):
            def run():
                order.append(name)
                now[0] += left.pop(0)

            return run

        return {name: make(name, list(times)) for name, times in durations.items()}

    functions.order = order
    return functions


def test_variants_take_turns(play):
    interleave(play(a=[1] * 4, b=[2] * 4, c=[3] * 4), baselines=["a"], repeats=3)
    assert play.order == ["a", "b", "c"] * 4


def test_ratios_are_paired_and_the_warmup_does_not_count(play):
    # a drifting machine: b always takes twice as long as a
    drift = [50.0, 1.0, 4.0, 2.0, 8.0, 3.0]
    times = interleave(play(a=drift, b=[2 * d for d in drift]), baselines=["a"], repeats=5)
    assert times["a"]["median_ms"] == pytest.approx(3000)
    assert times["a"]["min_ms"] == pytest.approx(1000)
    assert times["a"]["max_ms"] == pytest.approx(8000)
    assert times["a"]["ratio"] == pytest.approx(1)
    assert times["b"]["ratio"] == pytest.approx(2)
    assert times["b"]["median_ms"] == pytest.approx(6000)


def test_a_ratio_is_the_median_of_ratios_not_the_ratio_of_medians(play):
    a, b = [1.0, 2.0, 10.0], [3.0, 2.0, 5.0]
    times = interleave(play(a=a, b=b), baselines=["a"], repeats=3, warmup=0)
    assert times["b"]["ratio"] == pytest.approx(1.0)  # of 3, 1, 0.5; the medians are 2 and 3


@pytest.mark.parametrize("baselines", [["slow", "fast"], ["fast", "slow"]])
def test_of_several_baselines_the_fastest_counts(play, baselines):
    ours, slow, fast = [3.0] * 4, [4.0] * 4, [0.5, 2.0, 2.0, 2.0]
    times = interleave(play(ours=ours, slow=slow, fast=fast), baselines=baselines, repeats=3)
    assert {k: v["ratio"] for k, v in times.items()} == {"ours": 1.5, "slow": 2.0, "fast": 1.0}


def test_the_fastest_baseline_is_chosen_after_the_warmup(play):
    times = interleave(
        play(ours=[6.0] * 3, x=[0.1, 3.0, 3.0], y=[9.0, 2.0, 2.0]),
        baselines=["x", "y"],
        repeats=2,
        warmup=1,
    )
    assert times["ours"]["ratio"] == pytest.approx(3)


def test_variants_are_timed_by_the_given_clock():
    seconds = iter([9.0, 9.0, 1.0, 4.0, 3.0, 6.0])  # the first round warms up
    times = interleave(
        {"a": lambda: 0, "b": lambda: 0}, baselines=["a"], repeats=2, clock=lambda _: next(seconds)
    )
    assert times["a"]["median_ms"] == 2000
    assert times["b"]["ratio"] == 3  # of 4 and 2


def test_a_pause_costs_wall_time_and_no_cpu_time():
    assert host_clock(lambda: time.sleep(0.05)) >= 0.05
    assert cpu_clock(lambda: time.sleep(0.05)) < 0.05


def test_kept_bytes_counts_each_storage_once_and_no_parameters():
    layer, x = torch.nn.Linear(8, 4), torch.randn(3, 8, requires_grad=True)
    assert kept_bytes(layer, lambda: layer(x)) == 4 * 3 * 8
    # the result of the exponential is kept, and both views of it are one storage
    assert kept_bytes(layer, lambda: (y := x.exp())[0] * y[1]) == 4 * 3 * 8


# ---- comparisons


# the two-sided values of a printed t table, by degrees of freedom
@pytest.mark.parametrize(
    ("n", "confidence", "t"),
    [(2, 0.95, 12.706), (3, 0.95, 4.303), (5, 0.95, 2.776), (5, 0.99, 4.604), (11, 0.9, 1.812)],
)
def test_mean_interval_is_students(n, confidence, t):
    values = [float(i * i) for i in range(n)]
    mean = sum(values) / n
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    got = mean_interval(iter(values), confidence)
    assert got == pytest.approx((mean, t * deviation / math.sqrt(n)), rel=5e-4)


def test_intervals_are_of_95_percent():
    # 1, 2, 3: deviation 1, standard error 1 / sqrt 3, t(2) = 4.3027
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2, 4.3027 / 3**0.5), rel=1e-4)
    d = difference({0: 1.0, 1: 2.0, 2: 3.0}, {0: 0.0, 1: 0.0, 2: 0.0})
    assert (d.mean, d.half) == pytest.approx((2, 4.3027 / 3**0.5), rel=1e-4)


def test_an_interval_of_one_value_is_not_known():
    mean, half = mean_interval([3.5])
    assert mean == 3.5
    assert half == math.inf
    assert mean_interval([2.0, 2.0, 2.0]) == (2.0, 0.0)


def test_probability_of_improvement():
    assert probability_of_improvement([3, 4], [1, 2]) == 1
    assert probability_of_improvement([1, 2], [1, 2]) == 0.5
    assert probability_of_improvement([1, 3], [2, 2]) == 0.5
    assert probability_of_improvement([0], [2, 2, 2, 0]) == 0.125


def test_differences_are_paired_by_seed_and_better_is_positive():
    ours, theirs = {0: 3.0, 1: 5.0, 2: 4.0, 3: 9.0}, {2: 4.0, 1: 4.0, 0: 2.0}
    d = difference(ours, theirs)
    assert d.mean == pytest.approx(2 / 3)
    assert d.half == pytest.approx(4.3027 * math.sqrt(1 / 3) / math.sqrt(3), rel=1e-4)
    assert d.improvement == pytest.approx((1 + 3 + 2) / 9)
    less = difference(ours, theirs, sign=-1, scale=100)
    assert (less.mean, less.half) == pytest.approx((-100 * d.mean, 100 * d.half))
    assert less.improvement == pytest.approx(1 - d.improvement)
    assert difference(ours, {7: 1.0}) is None


def test_p_values_are_of_both_t_tests():
    d = difference({0: 3.0, 1: 5.0, 2: 4.0}, {0: 2.0, 1: 4.5, 2: 3.0})
    # paired: mean 5/6, standard error 1/6, t = 5 on two degrees of freedom
    assert d.paired == pytest.approx(1 - 5 / math.sqrt(25 + 2), rel=1e-9)
    # Welch: variances 1 and 19/12 of three values each, t = 0.8980 on 3.806 degrees of freedom
    assert d.welch == pytest.approx(0.42235, abs=5e-5)
    same = difference({0: 1.0, 1: 1.0}, {0: 1.0, 1: 1.0})
    assert (same.paired, same.welch, same.verdict) == (1, 1, "not decided")
    apart = difference({0: 2.0, 1: 2.0}, {0: 1.0, 1: 1.0})
    assert (apart.paired, apart.welch, apart.verdict) == (0, 0, "better")
    single = difference({0: 2.0}, {0: 1.0})
    assert (single.paired, single.welch, single.half) == (1, 1, math.inf)


@pytest.mark.parametrize(
    ("mean", "half", "verdict"),
    [
        (1.0, 0.5, "better"),
        (-1.0, 0.5, "worse"),
        (1.0, 1.0, "not decided"),
        (-1.0, 1.0, "not decided"),
        (0.1, 0.2, "not decided"),
    ],
)
def test_verdict(mean, half, verdict):
    assert Difference(mean, half, 0.5, 0.5, 0.5).verdict == verdict


def test_holm_by_hand():
    # sorted .01, .03, .04 with factors 3, 2, 1, then never below the one before
    adjusted = holm({"a": 0.04, "b": 0.01, "c": 0.03})
    assert adjusted == pytest.approx({"a": 0.06, "b": 0.03, "c": 0.06})
    assert list(adjusted) == ["a", "b", "c"]
    assert holm({"a": 0.6, "b": 0.9}) == {"a": 1, "b": 1}


def test_numbers_as_text():
    assert with_half((1.234, 0.5), 1) == "1.2 ± 0.5"
    assert with_half((1.234, 0.5), 2, "+") == "+1.23 ± 0.50"
    assert Difference(-0.04, 0.2, 0.5, 0.5, 0.5).text(1) == "-0.0 ± 0.2"
    measures = {"a": ("A, %", 100, 1), "b": ("B", 1, 2)}
    assert cells({"a": (0.5, 0.01)}, measures) == ["50.0 ± 1.0", ""]
    assert listed([]) == "none"
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b and c"
    assert markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"


def test_the_figure_of_differences_is_drawn(tmp_path):
    panels = {"title": {"a": Difference(1, 0.5, 1, 0, 0), "b": Difference(0, 1, 0.5, 1, 1)}}
    plot_differences(panels, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


# ---- conditions


def test_environment_states_the_conditions(monkeypatch):
    flat = environment()
    assert flat["date"] == date.today().isoformat()
    assert flat["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert re.fullmatch(r"\d+\.\d+.*", flat["starlayers"])
    assert flat["threads"] == torch.get_num_threads()
    assert flat["python"] == "{}.{}.{}".format(*sys.version_info)
    assert flat["cpu"]
    assert (flat["gpu"] is None) is not torch.cuda.is_available()
    assert {"torchvision", "triton", "timm", "stable-baselines3"} <= flat.keys()
    grouped = conditions(threads=1)
    assert grouped["hardware"] == {k: flat[k] for k in ("cpu", "cores", "gpu")} | {"threads": 1}
    assert grouped["versions"]["torch"] == flat["torch"]
    assert grouped.keys() == {"hardware", "versions", "command", "date"}
    assert json.loads(json.dumps(grouped)) == grouped


@pytest.mark.parametrize(
    ("module", "arguments", "text"),
    [
        ("benchmarks.nlp.__main__", ["quality", "--smoke"], "-m benchmarks.nlp quality --smoke"),
        ("benchmarks.evidence", [], "-m benchmarks.evidence"),
        ("benchmarks.rl.__main__", ["--out", "/home/me/runs"], "-m benchmarks.rl --out runs"),
        (None, ["a b"], "script.py 'a b'"),
    ],
)  # fmt: skip
def test_command_is_what_one_would_type(monkeypatch, module, arguments, text):
    monkeypatch.setattr(sys, "argv", ["/some/where/script.py", *arguments])
    spec = module and SimpleNamespace(name=module)
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=spec))
    assert command() == f"python {text}"


def test_a_package_that_is_not_there_has_no_version(monkeypatch):
    real = conditions_module.version

    def version(package):
        if package == "timm":
            raise conditions_module.PackageNotFoundError
        return real(package)

    monkeypatch.setattr(conditions_module, "version", version)
    assert environment()["timm"] is None
    assert environment()["torch"]


# ---- records


HARDWARE = {"cpu": "X1", "cores": 2, "threads": 1, "gpu": None}


def record(run="r", arm="a", seed=0, value=1.0, **fields):
    options = {"study": "s", "definition": {"x": 1}, "hardware": HARDWARE, "date": "2026-01-02"}
    options |= {"versions": {"torch": "2"}, "command": "python -m benchmarks.s"}
    options |= {"run": run, "arm": arm, "seed": seed, "metrics": {"v": value}}
    return Record(**options | fields)


def test_records_come_back_in_order(tmp_path):
    written = [record("a"), record("b", value=[1, 2.5, None]), record("c", marks={"note": "é"})]
    for r in written:
        append(r, tmp_path / "new")
    assert load("s", tmp_path / "new") == written
    lines = file_of("s", tmp_path / "new").read_text().splitlines()
    assert json.loads(lines[2])["note"] == "é"
    assert json.loads(lines[0]).keys() == set(records_module.FIELDS)
    assert load("other", tmp_path) == []


def test_numbers_that_json_does_not_have_become_null(tmp_path):
    append(record(value=(math.nan, math.inf, 2)), tmp_path)
    assert load("s", tmp_path)[0].metrics == {"v": [None, None, 2]}
    assert "NaN" not in file_of("s", tmp_path).read_text()


def test_an_incomplete_last_line_is_ignored_and_then_removed(tmp_path):
    append(record("a"), tmp_path)
    append(record("b"), tmp_path)
    file = file_of("s", tmp_path)
    whole = file.read_bytes()
    for cut in (1, 10, len(whole) // 2 - 1):
        file.write_bytes(whole[:-cut])
        assert [r.run for r in load("s", tmp_path)] == ["a"]
    append(record("c"), tmp_path)
    assert [r.run for r in load("s", tmp_path)] == ["a", "c"]


def test_any_other_bad_line_is_an_error(tmp_path):
    append(record("a"), tmp_path)
    file = file_of("s", tmp_path)
    for bad in ("{\n", '{"study": "s"}\n', "[]\n"):
        file.write_text(file.read_text().splitlines(True)[0] + bad)
        with pytest.raises(ValueError, match=r"s\.jsonl, line 2: not a record"):
            load("s", tmp_path)


# ---- runs


def job(x, **more):
    return {"arm": f"arm {x}", "seed": 0, "x": x, **more}


def test_the_definition_is_all_but_arm_and_seed_as_plain_data():
    assert definition({"arm": "a", "seed": 1, "x": (1, 2), "y": None}) == {"x": [1, 2], "y": None}


def test_current_records_are_those_of_the_jobs_definition(tmp_path):
    jobs = {"one": job(1), "two": job(2), "three": job(3)}
    for r in (
        record("one", definition={"x": 1}, value="old"),
        record("one", definition={"x": 1}, value="new"),
        record("two", definition={"x": 1}),  # its definition has changed since
        record("three", definition=None),  # nobody knows
        record("four", definition={"x": 4}),
        record("one", definition={"x": 1}, seed=1),
    ):
        append(r, tmp_path)
    found = current("s", jobs, tmp_path)
    assert list(found) == ["one"]
    assert found["one"].metrics == {"v": "new"}
    assert list(of_arms("s", ["a"], tmp_path)) == ["one", "two", "three", "four"]
    assert of_arms("s", ["b"], tmp_path) == {}


def test_a_measurement_is_appended_and_replaces_an_earlier_one(tmp_path):
    for value in (1, 2):
        measure_once("s", job(1), {"v": value}, run="speed", folder=tmp_path)
    assert [r.metrics["v"] for r in load("s", tmp_path)] == [2]
    assert len(file_of("s", tmp_path).read_text().splitlines()) == 2
    assert current("s", {"speed": job(1)}, tmp_path)["speed"].metrics == {"v": 2}


def work(job):
    """Runs in another process; leaves a mark for every time it is called."""
    if job["x"] < 0:
        raise ArithmeticError(f"x is {job['x']}")
    with open(job["log"], "a") as log:
        log.write(f"{job['x']}\n")
    return {"square": job["x"] ** 2, "threads": torch.get_num_threads()}


@pytest.fixture
def study(tmp_path):
    def run(numbers, processes=1, **more):
        log = str(tmp_path / "log")
        jobs = {f"job{x}": job(x, log=log, **more) for x in numbers}
        return run_study("s", jobs, work, processes=processes, folder=tmp_path)

    run.log = lambda: sorted(map(int, (tmp_path / "log").read_text().split()))
    return run


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.studies)])
def test_a_study_goes_on_where_it_stopped(study, tmp_path, processes):
    threads = torch.get_num_threads()
    first = study([1, 2], processes)
    assert torch.get_num_threads() == threads
    assert {k: r.metrics["square"] for k, r in first.items()} == {"job1": 1, "job2": 4}
    assert sorted(load("s", tmp_path), key=lambda r: r.run) == list(first.values())
    for r in first.values():
        assert r.metrics["threads"] == r.hardware["threads"] == 1
        assert r.date == date.today().isoformat()
    second = study([1, 2, 3], processes)
    assert study.log() == [1, 2, 3]  # each once
    assert second == {**first, "job3": second["job3"]}
    assert study([1, 2, 3]) == second
    assert study([1, 2, 3], processes=0) == second
    assert study.log() == [1, 2, 3]
    # a changed definition is another run; the old record stays in the file
    third = study([1], setting=5)
    assert third["job1"].definition["setting"] == 5
    assert study.log() == [1, 1, 2, 3]
    assert len(load("s", tmp_path)) == 4


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.studies)])
def test_a_run_that_fails_takes_no_other_result_with_it(study, tmp_path, processes):
    with pytest.raises(ArithmeticError, match="x is -1"):
        study([-1, 4, 5, 6], processes)
    assert sorted(r.run for r in load("s", tmp_path)) == [f"job{x}" for x in study.log()]


def test_without_processes_and_records_there_is_nothing_to_show(study):
    with pytest.raises(FileNotFoundError, match=r"no runs in .*s\.jsonl yet: give --processes"):
        study([1], processes=0)


# ---- studies and pages


def toy(tmp_path, jobs):
    return Study(
        "s",
        "python -m benchmarks.s",
        lambda: jobs,
        lambda job: {"v": job["x"]},
        lambda records: f"{len(records)} runs",
        lambda records: f"## Title\n\n{conditions_text(records.values())}",
        lambda records: {"s.png": lambda file: file.write_bytes(b"drawn")},
    )


def test_a_measurement_is_recorded_and_shown(tmp_path, capsys):
    jobs = {"speed": job(3)}
    study = toy(tmp_path, jobs)
    with pytest.raises(FileNotFoundError, match="no current records of s"):
        study.records(tmp_path)
    study.measure(jobs["speed"], out=tmp_path)
    assert capsys.readouterr().out == "1 runs\n"
    assert study.records(tmp_path)["speed"].metrics == {"v": 3}
    assert not list(tmp_path.glob("*.png"))
    # a smoke run has records and figures of its own
    study.measure(jobs["speed"], smoke=True, out=tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"s.jsonl", "s-smoke.jsonl", "s.png"}
    assert len(load("s", tmp_path)) == 1
    (tmp_path / "s.png").unlink()
    capsys.readouterr()
    records = study.run(jobs, processes=0, smoke=True, out=tmp_path)
    assert (tmp_path / "s.png").is_file()
    assert capsys.readouterr().out == "1 runs\n"
    assert [r.study for r in records.values()] == ["s-smoke"]
    (tmp_path / "s.png").unlink()
    assert study.run(jobs, processes=0, out=tmp_path) == study.records(tmp_path)
    assert not (tmp_path / "s.png").is_file()


def test_a_page_is_made_of_records_alone(tmp_path):
    jobs = {"one": job(1), "two": {**job(2), "seed": 1}}
    append(record("one", marks={"command_repaired": True}), tmp_path)
    append(record("two", definition={"x": 2}, seed=1, command=None), tmp_path)
    page = Page("p", "Evidence", (toy(tmp_path, jobs),))
    page.write(tmp_path / "docs", tmp_path)
    text = (tmp_path / "docs" / "evidence" / "p.md").read_text()
    assert text == page.markdown(tmp_path)
    assert text.startswith("# Evidence\n\n<!-- Written by `python -m benchmarks.evidence`")
    for line in (
        "- runs: 2, of seeds 0 to 1",
        "- command: `python -m benchmarks.s`; unknown (completed later in 1 of 2 records)",
        "- date: 2026-01-02",
        "- hardware: X1, 2 cores; threads of a run: 1",
        "- versions: torch 2",
    ):
        assert line in text
    assert (tmp_path / "docs" / "figures" / "s.png").read_bytes() == b"drawn"


def test_conditions_state_what_is_not_known():
    known = record(marks={"definition_from": "repaired", "metrics_from": "a page"})
    text = conditions_text([known, replace(known, definition=None, seed=None, marks={})])
    assert "definition of the arms: filled in later in 1 of 2 records" in text
    assert "definition of the arms: unknown in 1 records" in text
    assert "values: transcribed by hand in 1 of 2 records" in text
    assert "of seeds 0\n" in text
    assert first_definition({"r": known}) == {"x": 1}


def test_names_are_checked():
    assert chosen_names("star, mlp", ["mlp", "star"], "nets") == ["star", "mlp"]
    assert chosen_names("star mlp", ["mlp", "star"], "nets") == ["star", "mlp"]
    assert chosen_names("noise and decay,", ["noise and decay"], "arms") == ["noise and decay"]
    assert chosen_names("", ["a", "b"], "tasks") == ["a", "b"]
    with pytest.raises(typer.BadParameter, match=r"unknown nets \['stat'\], choose from mlp"):
        chosen_names("stat", ["mlp"], "nets")
