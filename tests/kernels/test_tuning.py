"""Measured dispatch, with a stopwatch that tells what it is told to."""

import pytest

from starlayers.kernels import tuning
from starlayers.kernels.tuning import choose


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(tuning, "_winners", {})


def test_the_fastest_serves_and_is_timed_once():
    asked = []

    def timer(candidates):
        asked.append(list(candidates))
        return {"library": 2.0, "triton": 1.0}

    candidates = {"library": lambda: 1, "triton": lambda: 2}
    assert choose("shape", candidates, timer=timer) == "triton"
    assert choose("shape", candidates, timer=timer) == "triton"
    assert asked == [["library", "triton"]]


def test_every_key_has_a_winner_of_its_own_and_ties_go_to_the_first():
    for key, times, winner in (
        ("a", {"library": 1.0, "triton": 3.0}, "library"),
        ("b", {"library": 3.0, "triton": 1.0}, "triton"),
        ("c", {"library": 1.0, "triton": 1.0}, "library"),
    ):
        assert choose(key, dict.fromkeys(times, int), timer=lambda _, t=times: t) == winner


@pytest.mark.parametrize(("value", "expected"), [(None, False), ("0", False), ("1", True)])
def test_tuning_is_asked_for_by_the_environment(monkeypatch, value, expected):
    monkeypatch.delenv(tuning.ENV_VAR, raising=False)
    if value is not None:
        monkeypatch.setenv(tuning.ENV_VAR, value)
    assert tuning.tuning() is expected
