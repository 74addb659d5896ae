"""Study of engines: its jobs, ratios within rounds, and what it concludes from them."""

import re
from types import SimpleNamespace

import pytest

from benchmarks.harness.study import DOCS
from benchmarks.vision import engine_tables, engines
from benchmarks.vision.engine_tables import PROMISE
from benchmarks.vision.engines import BASELINE, LIMITS
from starlayers.vision.training import TrainConfig


def label(*key):
    return " | ".join(key)


def rows(batch, times):
    return engines.summarise({"model": "starnet_s1", "batch": batch}, times)


TIMES = {
    label("PyTorch", "float32", "timm"): [6.0, 6.0, 9.0],
    label("PyTorch", "float32", "ours"): [5.0, 5.0, 5.0],
    label(*BASELINE): [2.0, 2.0, 3.0],
    label("onnxruntime", "float32", "ours"): [2.0, 1.0, 3.0],
    label("OpenVINO", "bfloat16", "timm"): [1.0, 1.0, 1.0],
    label("OpenVINO", "bfloat16", "ours"): [1.0, 1.1, 1.2],
}


def test_jobs_state_what_is_timed():
    job, smoke = engines.job(), engines.job(smoke=True)
    assert (job["models"], job["image"]) == (["starnet_s1", "starnet_s4"], 224)
    assert list(job["rounds"]) == ["1", "32"]
    assert (smoke["models"], smoke["rounds"]) == (["starnet_s050"], {"2": 2})
    assert engines.accuracy_job()["recipe"] == engines.DEMO


def test_the_recipe_is_that_of_the_demo():
    """But for the mirrored images that it had when this was measured."""
    demo = SimpleNamespace(train=range(60_000), shape=(1, 28, 28))
    config = TrainConfig.for_data(demo)
    for name, value in (engines.DEMO | {"flip": 0.0}).items():
        assert getattr(config, name) == pytest.approx(value, abs=2e-4), name


def test_ratios_are_taken_within_the_rounds():
    found = {(r["engine"], r["precision"], r["graph"]): r for r in rows(1, TIMES)}
    timm = found["PyTorch", "float32", "timm"]
    assert timm["median_ms"] == 6000
    assert timm["ratio"] == [3, 3, 3]
    assert found[BASELINE]["ratio"] == [1, 1, 1]
    ours = found["onnxruntime", "float32", "ours"]
    assert (ours["ratio"], ours["to_timm"]) == ([0.5, 1.0, 1.0], [0.5, 1.0, 1.0])
    assert found["OpenVINO", "bfloat16", "ours"]["to_timm"] == pytest.approx([1.0, 1.1, 1.2])


def test_gains_are_over_the_fastest_of_pytorch():
    slower = {key: [2 * t for t in times] for key, times in TIMES.items()}
    slower[label("OpenVINO", "bfloat16", "ours")] = [8.0] * 3
    made = [*rows(1, TIMES), *rows(32, slower)]
    assert engine_tables.gains(made) == {
        ("onnxruntime", "float32"): {"S1, batch 1": 2.5, "S1, batch 32": 2.5},
        ("OpenVINO", "bfloat16"): {
            "S1, batch 1": pytest.approx(5 / 1.1),
            "S1, batch 32": pytest.approx(10 / 8),
        },
    }
    assert engines.choice(made) == (
        "In float32 the fastest is onnxruntime float32 (in 2 of 2 cases), 2.5 to 2.5 times as fast "
        "as PyTorch. In any precision the fastest is OpenVINO bfloat16 (in 1 of 2 cases) and "
        "onnxruntime float32 (in 1 of 2 cases), 2.5 to 4.5 times as fast as PyTorch."
    )
    assert engines.promise(made) == (
        "at most 1.02 of its time in 2 of 4 cases of float32 and bfloat16 (1.000 to 4.000); not: "
        "OpenVINO bfloat16 S1, batch 1 (1.100), OpenVINO bfloat16 S1, batch 32 (4.000)."
    )
    assert engines.ratio_table(made).splitlines()[0] == (
        "| engine | precision | graph | S1, batch 1 | S1, batch 32 |"
    )
    assert engines.pair_table(made).count("onnxruntime") == 1


def test_a_wrong_result_is_not_timed():
    import torch

    y = torch.ones(2, 3)
    runs = {("PyTorch", "float32", "timm"): lambda: y, BASELINE: lambda: y * 1.001}
    with pytest.raises(RuntimeError, match=r"onnxruntime, float32, timm differs by 0\.001"):
        engines.check(runs)
    engines.check({**runs, BASELINE: lambda: y * 1.00001})
    assert LIMITS["float32"] == 1e-4


def test_committed_records_hold_what_the_project_promises():
    (record,) = engines.STUDY.records().values()
    for graphs in record.metrics["graphs"].values():
        assert graphs["ours"]["transposes"] == 0
        assert graphs["ours"]["nodes"] <= graphs["timm"]["nodes"]
        assert graphs["ours, not portable"]["transposes"] > 60
    assert "in 12 of 12 cases" in engines.promise(record.metrics["rows"])
    (quantised,) = engines.ACCURACY.records().values()
    assert quantised.metrics["results"].keys() == {"onnx", "openvino"}
    for result in quantised.metrics["results"].values():
        assert result["float32"] > 0.92
        assert abs(result["int8"] - result["float32"]) < 0.005
    assert PROMISE == 1.02


def test_the_readme_says_what_the_records_say():
    (record,) = engines.STUDY.records().values()
    gains = engine_tables.gains(record.metrics["rows"])
    spans = []
    for kinds in (["float32"], ["bfloat16", "int8"]):
        numbers = [
            gain
            for (engine, precision), found in gains.items()
            for gain in found.values()
            if precision in kinds and engine != "AOTInductor"
        ]
        spans.append(f"{min(numbers):.1f} to {max(numbers):.1f} times")
    readme = (DOCS.parent / "README.md").read_text()
    said = re.search(r"Exported, StarNets are (.* times) as fast .*, (.* times) in bf", readme)
    assert said
    assert list(said.groups()) == spans


@pytest.mark.studies
def test_a_smoke_run_times_every_engine(tmp_path):
    job = engines.job(smoke=True)
    metrics = engines.work(job)
    keys = [(r["engine"], r["precision"], r["graph"]) for r in metrics["rows"]]
    assert len(set(keys)) == len(keys) == 14
    assert all(row["median_ms"] > 0 for row in metrics["rows"])
    assert metrics["graphs"]["starnet_s050"]["ours"]["transposes"] == 0
