"""What the benchmarks share: who is timed when, what an interval is, which runs are done again."""

import json
import math
import os
import re
import sys
import time
from datetime import date

import pytest
import torch

from benchmarks import common
from benchmarks.common import (
    environment,
    interleave,
    markdown_table,
    mean_interval,
    run_study,
    write_json,
)


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
    found = interleave(play(a=drift, b=[2 * d for d in drift]), baselines=["a"], repeats=5)
    assert found["a"]["median_ms"] == pytest.approx(3000)
    assert found["a"]["min_ms"] == pytest.approx(1000)
    assert found["a"]["max_ms"] == pytest.approx(8000)
    assert found["a"]["ratio"] == pytest.approx(1)
    assert found["b"]["ratio"] == pytest.approx(2)
    assert found["b"]["median_ms"] == pytest.approx(6000)


def test_a_ratio_is_the_median_of_ratios_not_the_ratio_of_medians(play):
    a, b = [1.0, 2.0, 10.0], [3.0, 2.0, 5.0]
    found = interleave(play(a=a, b=b), baselines=["a"], repeats=3, warmup=0)
    assert found["b"]["ratio"] == pytest.approx(1.0)  # of 3, 1, 0.5; the medians are 2 and 3


@pytest.mark.parametrize("baselines", [["slow", "fast"], ["fast", "slow"]])
def test_of_several_baselines_the_fastest_counts(play, baselines):
    ours, slow, fast = [3.0] * 4, [4.0] * 4, [0.5, 2.0, 2.0, 2.0]
    found = interleave(play(ours=ours, slow=slow, fast=fast), baselines=baselines, repeats=3)
    assert {k: v["ratio"] for k, v in found.items()} == {"ours": 1.5, "slow": 2.0, "fast": 1.0}


def test_the_fastest_baseline_is_chosen_after_the_warmup(play):
    found = interleave(
        play(ours=[6.0] * 3, x=[0.1, 3.0, 3.0], y=[9.0, 2.0, 2.0]),
        baselines=["x", "y"],
        repeats=2,
        warmup=1,
    )
    assert found["ours"]["ratio"] == pytest.approx(3)


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


def test_an_interval_of_one_value_is_not_known():
    mean, half = mean_interval([3.5])
    assert mean == 3.5
    assert half == math.inf
    assert mean_interval([2.0, 2.0, 2.0]) == (2.0, 0.0)


def test_write_json_makes_folders_and_replaces(tmp_path):
    file = tmp_path / "a" / "b" / "result.json"
    for content in ({"x": [1, 2.5, None]}, {"y": "z"}):
        write_json(file, content)
        assert json.loads(file.read_text()) == content
        assert [p.name for p in file.parent.iterdir()] == ["result.json"]


def test_write_json_leaves_the_old_file_when_stopped(tmp_path, monkeypatch):
    file = tmp_path / "result.json"
    write_json(file, {"old": 1})
    with pytest.raises(TypeError):
        write_json(file, {"new": object()})
    assert json.loads(file.read_text()) == {"old": 1}
    path = type(file)
    write = path.write_text

    def killed_half_way(self, text):
        write(self, text[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(path, "write_text", killed_half_way)
    with pytest.raises(KeyboardInterrupt):
        write_json(file, {"new": 2})
    assert json.loads(file.read_text()) == {"old": 1}


def test_environment_states_the_conditions(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/where/vision.py", "speed", "--smoke"])
    found = environment()
    assert found["date"] == date.today().isoformat()
    assert found["command"] == "vision speed --smoke"
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert re.fullmatch(r"\d+\.\d+.*", found["starlayers"])
    assert found["threads"] == torch.get_num_threads()
    assert found["cores"] == os.cpu_count()
    assert found["python"] == "{}.{}.{}".format(*sys.version_info)
    assert found["cpu"]
    assert (found["gpu"] is None) is not torch.cuda.is_available()
    assert {"torchvision", "triton", "timm"} <= found.keys()
    assert json.loads(json.dumps(found)) == found


def test_a_package_that_is_not_there_has_no_version(monkeypatch):
    real = common.version

    def version(package):
        if package == "timm":
            raise common.PackageNotFoundError
        return real(package)

    monkeypatch.setattr(common, "version", version)
    assert environment()["timm"] is None
    assert environment()["torch"]


def test_markdown_table():
    assert markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"


def work(job):
    """Runs in another process; leaves a mark for every time it is called."""
    if job["x"] < 0:
        raise ArithmeticError(f"x is {job['x']}")
    with open(job["log"], "a") as log:
        log.write(f"{job['x']}\n")
    return {"square": job["x"] ** 2, "threads": torch.get_num_threads()}


@pytest.fixture
def study(tmp_path):
    def run(numbers, processes=1):
        log = str(tmp_path / "log")
        jobs = {f"job{x}": {"x": x, "log": log} for x in numbers}
        return run_study(tmp_path / "results", jobs, work, processes=processes)

    run.log = lambda: sorted(map(int, (tmp_path / "log").read_text().split()))
    run.files = lambda: sorted(p.name for p in (tmp_path / "results").glob("*"))
    return run


def test_a_study_goes_on_where_it_stopped(study, tmp_path):
    first = study([1, 2])
    assert {k: v["square"] for k, v in first.items()} == {"job1": 1, "job2": 4}
    assert study.files() == ["job1.json", "job2.json"]
    for name, record in first.items():
        assert record["job"] == {"x": int(name[3:]), "log": str(tmp_path / "log")}
        assert record["threads"] == 1
        assert record["environment"]["date"] == date.today().isoformat()
        assert json.loads((tmp_path / "results" / f"{name}.json").read_text()) == record
    second = study([1, 2, 3], processes=2)
    assert study.log() == [1, 2, 3]  # each once
    assert second == {**first, "job3": second["job3"]}
    assert second["job3"]["square"] == 9
    assert study([1, 2, 3]) == second
    assert study.log() == [1, 2, 3]


def test_a_result_of_another_job_is_refused(study, tmp_path):
    write_json(tmp_path / "results" / "job2.json", {"job": {"x": 5}, "square": 25})
    with pytest.raises(
        ValueError, match=r"job2\.json is of another job \(\{'x': 5\}, now .*'x': 2"
    ):
        study([2])
    assert not (tmp_path / "log").exists()
    assert json.loads((tmp_path / "results" / "job2.json").read_text())["square"] == 25


def test_a_run_that_fails_takes_no_other_result_with_it(study):
    with pytest.raises(ArithmeticError, match="x is -1"):
        study([-1, 4, 5, 6])
    assert study.files() == [f"job{x}.json" for x in study.log()]  # whatever ran is kept
    assert "job-1.json" not in study.files()
