"""Training that starts from trained weights: whose network, head and normalisation it has."""

import json
import shutil
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from starlayers import vision
from starlayers.commands import main, networks
from starlayers.commands.networks import IMAGENET, open_start
from starlayers.vision import load_run, read_metadata
from tests.commands.photos import write_photos

#: a training that changes nothing
STILL = ("--lr", "0", "--epochs", "1", "--norm-batches", "0", "--ema", "0", "--batch-size", "24")


def train(run, out, *words):
    words = ["--data", "folder", "--path", str(run / "photos"), "--out", str(out), *words]
    return main(["train", *map(str, words)])


def config(folder):
    return json.loads((folder / "config.json").read_text())


def test_the_same_classes_keep_network_head_and_normalisation(run, tmp_path, capsys):
    assert train(run, tmp_path / "run", "--start", run / "run", *STILL) == 0
    out = capsys.readouterr().out
    assert f"starts from {run / 'run' / 'model.safetensors'}; images are normalised" in out
    assert "mean and std: its own" in out
    assert "head:" not in out
    before, after = (load_file(f / "model.safetensors") for f in (run / "run", tmp_path / "run"))
    assert before.keys() == after.keys()
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    for name, value in before.items():
        assert name.endswith(statistics) or torch.equal(after[name], value), name
    old, new = (read_metadata(f / "model.safetensors") for f in (run / "run", tmp_path / "run"))
    assert [old[k] for k in ("architecture", "mean", "std", "size")] == [
        new[k] for k in ("architecture", "mean", "std", "size")
    ]
    saved = config(tmp_path / "run")
    assert (saved["start"], saved["pretrained"]) == (str(run / "run"), False)
    assert (saved["size"], saved["mean"]) == (32, old["mean"])


def test_other_classes_get_a_fresh_head_and_the_frozen_stages_stay(run, tmp_path, capsys):
    write_photos(tmp_path / "photos", 8, seed=3)
    for name in ("cross", "ring"):
        shutil.rmtree(tmp_path / "photos" / name)
    start = run / "run" / "best.safetensors"
    words = ["--start", start, "--freeze", "4", "--epochs", "2", "--layer-decay", "0.8"]
    assert train(tmp_path, tmp_path / "run", *words) == 0
    out = capsys.readouterr().out
    assert "head: checkpoint has 5 classes, model keeps its own head of 3" in out
    assert "rate 0.00035" in out  # a quarter of what a network from scratch gets
    assert "are few for a network" not in out
    before, net = load_file(start), load_run(tmp_path / "run")
    assert net.classes == ("circle", "square", "triangle")
    for name, value in net.model.state_dict().items():
        same = name in before and torch.equal(before[name], value)
        assert same is name.startswith(("stem.", "stages.")), name


def test_as_many_other_classes_get_a_fresh_head_too(run, tmp_path, capsys):
    write_photos(tmp_path / "photos", 2)
    (tmp_path / "photos" / "ring").rename(tmp_path / "photos" / "star")
    start = open_start(run / "run", None)
    data = SimpleNamespace(shape=(3, 32, 32), classes=("circle", "cross", "square", "star", "x"))
    net, adapted = start.build(data)
    assert adapted == ("head: the checkpoint knows other classes, a fresh one is trained",)
    saved = load_file(run / "run" / "model.safetensors")
    assert not torch.equal(net.head.weight, saved["head.weight"])
    assert torch.equal(net.stem.conv.weight, saved["stem.conv.weight"])


def timm_file(path, classes=7):
    theirs = timm.create_model("starnet_s050", num_classes=classes)
    save_file(theirs.state_dict(), path)
    return path, theirs


def test_a_file_of_timm_is_taken_for_one_of_imagenet(tmp_path):
    path, theirs = timm_file(tmp_path / "timm.safetensors")
    start = open_start(path, "starnet_s050")
    assert (start.metadata, start.known) == (IMAGENET, False)
    assert start.normalisation(3) == {n: pytest.approx(IMAGENET[n]) for n in ("mean", "std")}
    gray = start.normalisation(1)
    assert gray == {"mean": (pytest.approx(0.449),), "std": (pytest.approx(0.226),)}
    data = SimpleNamespace(shape=(3, 224, 224), classes=tuple("abcdefg"))
    net, adapted = start.build(data, drop_path=0.1)
    assert adapted == ()
    assert net.stages[-1][-1].drop_path.p == pytest.approx(0.1)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(image), theirs.eval()(image), rtol=1e-4, atol=1e-5)


def test_published_weights(monkeypatch, tmp_path, capsys):
    """Of the network that is named, S1 by default; here of a file in place of the hub's."""
    asked, path = [], timm_file(tmp_path / "hub.safetensors", 1000)[0]
    monkeypatch.setattr(networks, "pretrained_path", lambda *hub: asked.append(hub) or path)
    start = open_start(None, None)
    assert asked == [("starnet_s1", "timm/starnet_s1.in1k")]
    assert (start.model, start.known, start.metadata["size"]) == ("starnet_s1", True, [224, 224])
    words = ["--pretrained", "--model", "starnet_s050", "--size", "32", *STILL]
    write_photos(tmp_path / "photos", 6)
    assert train(tmp_path, tmp_path / "run", *words) == 0
    out = capsys.readouterr().out
    assert "head: checkpoint has 1000 classes, model keeps its own head of 5" in out
    saved = config(tmp_path / "run")
    assert (saved["pretrained"], saved["start"], saved["model"]) == (True, None, "starnet_s050")
    assert saved["mean"] == IMAGENET["mean"]
    assert saved["architecture"]["stage_strides"] == [2, 2, 2, 2]
    assert load_run(tmp_path / "run").mean == pytest.approx(IMAGENET["mean"])


def test_a_run_with_a_state_resumes_without_the_weights_it_started_from(run, tmp_path, capsys):
    start = tmp_path / "start.safetensors"
    shutil.copy(run / "run" / "model.safetensors", start)
    assert train(run, tmp_path / "run", "--start", start, *STILL) == 0
    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    start.unlink()
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == weights
    shutil.rmtree(tmp_path / "run" / "state")
    assert main(["train", "--resume", str(tmp_path / "run")]) == 2
    assert f"no weights in {start}" in capsys.readouterr().err


def test_a_run_of_an_earlier_version_keeps_its_strides(tmp_path, capsys):
    """Its `config.json` does not say them, and other strides fit its weights."""
    words = ["--data", "digits", "--epochs", "1", "--batch-size", "512"]
    assert main(["train", *words, "--out", str(tmp_path / "run")]) == 0
    saved = config(tmp_path / "run")
    assert (saved["architecture"]["stem_stride"], saved["model"]) == (1, "starnet_s050")
    for name in ("architecture", "mean", "std", "start", "pretrained", "erase", "layer_decay"):
        del saved[name]
    (tmp_path / "run" / "config.json").write_text(json.dumps(saved))
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    found = read_metadata(tmp_path / "run" / "model.safetensors")["architecture"]
    assert (found["stem_stride"], found["stage_strides"]) == (2, [1, 2, 2, 1])


def fused(run, tmp_path):
    net = load_run(run / "run")
    vision.save_weights(net.model.fuse(), tmp_path / "fused.safetensors")
    return tmp_path / "fused.safetensors"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--start", "nowhere"], "no weights in nowhere"),
        (["--start", "RUN", "--pretrained"], "two weights to start from: choose one"),
        (["--start", "RUN", "--model", "starnet_s1"], "says its architecture: leave --model out"),
        (["--start", "FUSED"], "is of a fused network: start from the weights before fuse()"),
        (["--pretrained", "--model", "starnet_s050"], "starnet_s050 has no published weights"),
        (["--freeze", "9", "--epochs", "1"], "freeze=9 is more than the 4 stages"),
        (["--amp", "--amp-dtype", "float16"], "amp_dtype='float16' needs a GPU"),
    ],
)
def test_what_cannot_be_started_from_is_told(run, tmp_path, capsys, words, message):
    paths = {"RUN": run / "run", "FUSED": fused(run, tmp_path)}
    assert train(run, tmp_path / "run", *(paths.get(word, word) for word in words)) == 2
    assert message in capsys.readouterr().err
