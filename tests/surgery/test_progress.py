"""Progress of a long search for MLPs: shown when slow, as users of transformers expect."""

import sys
import time

import pytest
from torch import nn

from starlayers import starify
from starlayers.surgery import progress
from starlayers.surgery.progress import shown
from tests.surgery.small import Gated


@pytest.fixture
def clock(monkeypatch):
    """Each look at the clock takes a second and a half."""
    times = iter(range(0, 3000, 3))
    monkeypatch.setattr(progress, "monotonic", lambda: next(times) / 2)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)


@pytest.fixture
def no_bars(monkeypatch):
    monkeypatch.delitem(sys.modules, "transformers.utils.logging", raising=False)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)


def test_plain_lines_without_tqdm(clock, no_bars, capsys):
    assert list(shown(range(5))) == list(range(5))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"starify: verifying MLPs, {n} of 5" for n in (2, 4)]


def test_nothing_is_shown_when_quick_or_switched_off(clock, no_bars, capsys, monkeypatch):
    monkeypatch.setattr(progress, "monotonic", lambda: 0.0)
    assert list(shown("ab")) == ["a", "b"]
    monkeypatch.setattr(progress, "monotonic", None)  # is not asked
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert list(shown("ab")) == ["a", "b"]
    assert capsys.readouterr().err == ""


def test_a_bar_is_that_of_transformers(monkeypatch, capsys):
    from transformers.utils import logging

    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(progress, "DELAY", 1e-9)
    for _ in shown("ab"):
        time.sleep(0.11)  # a bar is drawn ten times a second
    assert "starify: verifying MLPs" in capsys.readouterr().err
    shows = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        assert list(shown("ab")) == ["a", "b"]
    finally:
        if shows:
            logging.enable_progress_bar()
    assert capsys.readouterr().err == ""


def test_starify_shows_it(monkeypatch, capsys):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(progress, "DELAY", 1e-9)

    class Fresh(Gated):
        """No test has verified it before, which takes a while."""

    starify(nn.ModuleList([Fresh(), Fresh()]), mode="fuse")
    assert "starify: verifying MLPs" in capsys.readouterr().err
