"""The `starlayers` command."""

import re

import torch
from typer.testing import CliRunner

from starlayers import __version__
from starlayers.cli import app


def test_info_lists_versions_backend_and_model_sizes():
    result = CliRunner().invoke(app, ["info"], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    words = re.sub(r"[│┃\s]+", " ", result.output)
    assert f"starlayers {__version__}" in words
    assert f"torch {torch.__version__.split('+')[0]}" in words
    assert "backend: 'auto'" in words
    assert "starnet_s1 2.87 425 timm/starnet_s1.in1k" in words
    assert "starnet_s050 0.54 93 -" in words


def test_info_names_the_backend_asked_for(monkeypatch):
    monkeypatch.setenv("STARLAYERS_BACKEND", "eager")
    assert "backend: 'eager'" in CliRunner().invoke(app, ["info"]).output


def test_without_a_command_the_help_is_shown():
    assert "info" in CliRunner().invoke(app, []).output
