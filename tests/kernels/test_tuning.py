"""Measured dispatch, with times that the tests set."""

import pytest
import torch

from starlayers.kernels import tuning
from starlayers.kernels.tuning import choose, winner


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(tuning, "_winners", {})


def test_the_fastest_serves_and_is_timed_once():
    timed = []

    def timer(candidates):
        timed.append(list(candidates))
        return {"library": 2.0, "triton": 1.0}

    candidates = {"library": lambda: 1, "triton": lambda: 2}
    assert winner("shape") is None
    assert choose("shape", candidates, timer=timer) == "triton"
    assert choose("shape", candidates, timer=timer) == "triton"
    assert timed == [["library", "triton"]]
    assert winner("shape") == "triton"
    assert winner("another shape") is None


def test_every_key_has_a_winner_of_its_own_and_ties_go_to_the_first():
    for key, times, fastest in (
        ("a", {"library": 1.0, "triton": 3.0}, "library"),
        ("b", {"library": 3.0, "triton": 1.0}, "triton"),
        ("c", {"library": 1.0, "triton": 1.0}, "library"),
    ):
        assert choose(key, dict.fromkeys(times, int), timer=lambda _, t=times: t) == fastest


def test_times_are_medians_without_the_warm_up_and_candidates_take_turns(monkeypatch):
    ran, clock = [], iter(range(10**6))
    cost = {"library": 5.0, "triton": 3.0}

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at, self.runs = next(clock), len(ran)

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            assert end.at == self.at + 1
            assert end.runs == self.runs + 1, "one run between both events"
            name, number = ran[-1], len(ran)
            if number <= 4:  # two rounds of two candidates
                return 1000.0
            return cost[name] + (100.0 if number % 5 == 0 else 0.0)  # outliers

    monkeypatch.setattr(torch.cuda, "Event", Event)
    candidates = {name: lambda name=name: ran.append(name) for name in cost}
    assert tuning._interleaved(candidates) == cost
    assert ran == ["library", "triton"] * (2 + 20)
    ran.clear()
    assert choose("measured", candidates) == "triton"


@pytest.mark.parametrize(
    ("value", "expected"), [(None, False), ("", False), ("0", False), ("1", True)]
)
def test_tuning_is_asked_for_by_the_environment(monkeypatch, value, expected):
    monkeypatch.delenv(tuning.ENV_VAR, raising=False)
    if value is not None:
        monkeypatch.setenv(tuning.ENV_VAR, value)
    assert tuning.tuning() is expected
