"""The facts of `starlayers info`, and the words of the command."""

import json
import subprocess
import sys

import pytest
import torch

from starlayers import __version__, info
from starlayers.commands import main


def words(capsys):
    return " ".join(capsys.readouterr().out.split())


def test_text_lists_versions_code_paths_and_model_sizes(capsys):
    assert main(["info"]) == 0
    text = words(capsys)
    assert f"starlayers {__version__}" in text
    assert f"torch {torch.__version__.split('+')[0]}" in text
    assert "backend auto, in which run" in text
    assert "starnet_s1 2.87 425 timm/starnet_s1.in1k" in text
    assert "starnet_s050 0.54 93 -" in text


def test_json_has_the_facts_of_a_bug_report(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert list(facts) == [
        "packages", "platform", "devices", "compilers", "backend", "auto", "models",
    ]  # fmt: skip
    assert facts["packages"]["starlayers"] == __version__
    assert facts["devices"][0]["device"] == "cpu"
    assert facts["devices"][0]["threads"] == torch.get_num_threads()
    assert {"cuda", "hip", "nvcc"} < set(facts["compilers"])
    assert facts["backend"] == "auto"
    assert len(facts["models"]) == 7


def test_code_paths_are_those_of_the_layers():
    small, inference, training, wide = info.collect()["auto"][:4]
    assert small == {
        "layer": "StarMLP(64)",
        "rows": 8,
        "device": "cpu",
        "dtype": "float32",
        "gradients": False,
        "runs": "eager",
        "reason": "hidden activation of 8192 bytes is small enough for eager",
    }
    assert [(row["runs"], row["gradients"]) for row in (inference, training, wide)] == [
        ("fused", False),
        ("fused", True),
        ("eager", True),
    ]
    assert (wide["layer"], wide["rows"]) == ("StarMLP(512)", 4096)
    words = "in training 512 channels are too many for what the op computes twice"
    assert wide["reason"] == words


@pytest.mark.parametrize(
    ("name", "backend", "reason"),
    [
        ("eager", "eager", "the eager backend was asked for"),
        ("triton", "triton", "the triton backend cannot serve this StarMLP"),
        ("cuda", "unknown backend 'cuda'", "unknown backend 'cuda'"),
    ],
)
def test_backend_of_the_environment_and_its_errors(monkeypatch, name, backend, reason):
    monkeypatch.setenv("STARLAYERS_BACKEND", name)
    facts = info.collect()
    assert backend in facts["backend"]
    assert all(row["runs"] == "eager" for row in facts["auto"])
    assert all(reason in row["reason"] for row in facts["auto"])


def test_missing_packages_and_compilers_are_named(monkeypatch, capsys):
    monkeypatch.setattr(info, "PACKAGES", ("torch", "no-such-package"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert info.collect()["packages"]["no-such-package"] is None
    assert info.collect()["compilers"]["no-such-compiler"] is None
    main(["info"])
    text = words(capsys)
    assert "no-such-package not installed" in text
    assert "no-such-compiler not found" in text


def test_a_compiler_that_hangs_or_breaks_is_no_failure(monkeypatch):
    def broken(*_, **__):
        raise OSError("no permission")

    monkeypatch.setattr(info.subprocess, "run", broken)
    monkeypatch.setenv("CC", sys.executable)
    assert info.collect()["compilers"][sys.executable].endswith("no permission")


def test_without_the_vision_extra_there_are_no_models(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "starlayers.vision.cost", None)
    assert info.collect()["models"] == []
    main(["info"])
    assert "models need pip install 'starlayers[vision]'" in words(capsys)


@pytest.mark.parametrize(
    "arguments", [[], ["information"], ["info", "--yaml"], ["train", "--yaml"]]
)
def test_wrong_words_show_the_usage(capsys, arguments):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: starlayers" in capsys.readouterr().err


def test_it_runs_as_a_module():
    command = [sys.executable, "-m", "starlayers.commands", "info", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["packages"]["starlayers"] == __version__
