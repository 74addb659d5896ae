"""The examples of stars taken apart, in their short form."""

import re
import runpy
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"
STORIES = ("star_boundary", "star_eigenfeatures")


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def example(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def assert_drawn(folder, *names):
    for name in names:
        low, high = Image.open(folder / name).convert("L").getextrema()
        assert high - low > 100


def test_boundary(tmp_path, capsys):
    accuracy = example("star_boundary")["main"](seeds=1, samples=100, out=tmp_path / "run")
    printed = capsys.readouterr().out
    models = ["star", "sum", "poly", "rbf", "star_kernel"]
    assert {data: list(rows) for data, rows in accuracy.items()} == dict.fromkeys(
        ("moons", "circles"), models
    )
    means = {(d, m): sum(v) / len(v) for d, rows in accuracy.items() for m, v in rows.items()}
    assert all(means[d, "star"] > means[d, "sum"] + 0.03 for d in ("moons", "circles"))
    assert means["circles", "star_kernel"] > 0.85 > 0.6 > means["circles", "sum"]
    for (data, name), value in means.items():
        assert re.search(rf"^{data} +{name} +{value:.1%} ", printed, re.M)
    few, many = re.search(r"are (\d+)% and ([\d.]+)% from the polynomial", printed).groups()
    assert float(many) < 5 < float(few)
    assert_drawn(tmp_path / "run", "boundaries.png", "kernel.png")


def test_eigenfeatures(tmp_path, capsys):
    main = example("star_eigenfeatures")["main"]
    options = {"data": "digits", "hidden": 32, "epochs": 15, "noise": 0.2}
    curve = main(**options, out=tmp_path / "run")
    printed = capsys.readouterr().out
    assert curve.k[-1] == 65  # 64 pixels and the constant
    assert curve.accuracy[-1] > 0.8
    assert curve.explained[-1] == pytest.approx(1)
    assert f"{curve.smallest(0.01)} of 65 are enough for all but a point" in printed
    assert float(re.search(r"terms sum to the logits to (\S+)", printed)[1]) < 1e-10
    for k, accuracy in zip(curve.k, curve.accuracy):
        assert re.search(rf"^ +{k} +{accuracy:.1%} ", printed, re.M)
    assert_drawn(tmp_path / "run", "eigenfeatures.png", "truncation.png", "attribution.png")
    assert main(**options, out=tmp_path / "again") == curve
