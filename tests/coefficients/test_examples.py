"""Examples of boundaries, eigenfeatures and searching, in their short form."""

import re
import runpy
from pathlib import Path

import matplotlib.pyplot as plt
import optuna
import pytest
import torch
import typer
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def example(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def assert_drawn(folder, *names):
    for name in names:
        low, high = Image.open(folder / name).convert("L").getextrema()
        assert high - low > 100


def test_picture_of_a_star_layer(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(EXAMPLES))  # it takes the moons from star_boundary
    accuracy = example("star_picture")["main"](300, 80, 0, tmp_path / "star.png")
    assert accuracy > 0.9  # a linear layer has at most 0.75
    assert_drawn(tmp_path, "star.png")


def test_film_of_a_star_and_a_sum_in_training(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    accuracy = example("star_film")["main"](2, 120, 150, 0, tmp_path)
    assert accuracy["star"] > accuracy["sum"] + 0.04
    with Image.open(tmp_path / "film.gif") as film:
        assert film.n_frames > 10
        low, high = film.convert("L").getextrema()
    assert high - low > 100


@pytest.fixture(scope="module")
def boundary():
    return example("star_boundary")


@pytest.fixture(scope="module")
def moons(boundary):
    return boundary["decision_boundary"](
        "moons", ("star", "sum", "poly"), steps=200, samples=100, grid=40
    )


def test_boundaries_of_stars_bend_and_those_of_sums_do_not(moons):
    assert moons.accuracy["star"] > moons.accuracy["sum"] + 0.04
    assert moons.accuracy["poly"] > moons.accuracy["sum"] + 0.04
    # the score of a sum is affine: its second differences along the grid vanish
    for axis in (0, 1):
        bend = moons.scores["sum"].diff(2, dim=axis).abs().max()
        assert bend < 1e-4 * moons.scores["sum"].abs().max()
        bend = moons.scores["star"].diff(2, dim=axis).abs().max()
        assert bend > 1e-3 * moons.scores["star"].abs().max()


def test_degree_of_a_star_is_two_to_the_layers(boundary, moons):
    """On a grid line a polynomial of degree 2 has no third differences."""
    line = moons.scores["star"][20, ::8].double()  # wide steps against float32 noise
    few = boundary["decision_boundary"]("moons", ["star"], layers=1, steps=20, grid=40)
    short = few.scores["star"][20, ::8].double()
    assert short.diff(3).abs().max() < 1e-4 * short.abs().max()
    assert line.diff(3).abs().max() > 1e-2 * line.abs().max()


@pytest.mark.parametrize("data", ["circles", "moons"])
def test_scores_lie_where_the_points_are(boundary, data):
    b = boundary["decision_boundary"](data, ["rbf"], grid=60)
    assert b.scores["rbf"].shape == (60, 60)
    left, right, bottom, top = b.extent
    share = (b.points - torch.tensor([left, bottom])) / torch.tensor([right - left, top - bottom])
    columns, rows = (share * 59).round().long().T
    assert ((b.scores["rbf"][rows, columns] > 0) == b.labels).float().mean() > 0.9
    if data == "moons":  # which are not symmetric
        assert ((b.scores["rbf"][columns, rows] > 0) == b.labels).float().mean() < 0.9


def test_boundaries_are_the_same_for_a_seed_and_leave_the_generator_alone(boundary, moons):
    before = torch.get_rng_state()
    options = {"samples": 100, "grid": 40}
    again = boundary["decision_boundary"]("moons", ("star",), steps=200, **options)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(again.scores["star"], moons.scores["star"])
    other = boundary["decision_boundary"]("moons", ["rbf"], **options, seed=1)
    assert not torch.equal(other.points, moons.points)


def test_figure_of_boundaries(boundary, moons, tmp_path):
    circles = boundary["decision_boundary"]("circles", list(moons.scores), steps=20, grid=30)
    figure = boundary["plot_boundaries"]([moons, circles])
    assert [ax.get_title() for ax in figure.axes[:3]] == ["star", "sum", "SVM, polynomial"]
    assert [ax.get_ylabel() for ax in figure.axes[::3]] == ["moons", "circles"]
    figure.savefig(tmp_path / "b.png")
    assert (tmp_path / "b.png").stat().st_size > 20_000


@pytest.mark.slow
def test_boundary(boundary, tmp_path, capsys):
    accuracy = boundary["main"](seeds=1, samples=100, out=tmp_path / "run")
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


# --- the example of searching in its short form


EXAMPLE = Path(__file__).parents[2] / "examples" / "star_search.py"
OPTIONS = {"data": "digits", "trials": 3, "steps": 6, "tuning": 8}


@pytest.fixture
def main(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return runpy.run_path(str(EXAMPLE))["main"]


@pytest.mark.slow
def test_star_search(main, tmp_path, capsys):
    rows = main(**OPTIONS, methods="tpe gp cma random", out=tmp_path / "run")
    printed = capsys.readouterr().out
    assert "718 train, 718 validation, 360 test; seed 0" in printed
    *searched, tuned = [name for name in rows if name != "defaults"]
    assert searched == ["tpe", "gp", "cma", "random"]
    best = max(searched, key=lambda method: rows[method][0])
    assert tuned == f"{best}, tuned"
    assert rows[tuned][0] >= rows[best][0]
    for name, (validation, test) in rows.items():
        assert re.search(rf"^{name} +{validation:.2%} +{test:.2%}$", printed, re.M)
    assert plt.imread(tmp_path / "run" / "star_search.png").std() > 0.01
    figures = {f.stem for f in (tmp_path / "run" / best).iterdir()}
    assert {"history", "slice", "parallel"} <= figures

    # what a search says of its best is what the net made again is worth; and a search goes on
    storage = f"sqlite:///{tmp_path / 'run' / 'search.db'}"
    for method in searched:
        study = optuna.load_study(study_name=f"{method}-digits-steps6-seed0", storage=storage)
        assert study.best_value == pytest.approx(rows[method][0])
        assert len(study.trials) == 3
    more = main(**OPTIONS | {"trials": 5}, methods="tpe", out=tmp_path / "run")
    assert more["defaults"] == rows["defaults"]
    assert more["tpe"][0] >= rows["tpe"][0]
    study = optuna.load_study(study_name="tpe-digits-steps6-seed0", storage=storage)
    assert len(study.trials) == 5


def test_star_search_from_the_command_line_says_what_is_wrong(main):
    with pytest.raises(ValueError, match="unknown method 'bayes'"):
        main(**OPTIONS, methods="bayes")
    assert typer.main.get_command(_app(main)).params


def _app(main):
    app = typer.Typer()
    app.command()(main)
    return app
