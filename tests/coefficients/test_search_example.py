"""The example of searching in its short form."""

import re
import runpy
from pathlib import Path

import matplotlib.pyplot as plt
import optuna
import pytest
import typer

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


def test_it_is_short():
    assert len(EXAMPLE.read_text().splitlines()) < 150
