"""Training, testing and using a classifier from the command line."""

import json
import re

import pytest

from starlayers.commands import main
from starlayers.datasets import load_images
from starlayers.datasets.image_folder import split_folder
from starlayers.vision import load_run
from tests.commands.photos import CLASSES, write_photos


def accuracy(text):
    return re.search(r"(\d+) of (\d+) right", text).groups()


def test_a_run_is_a_model(run, capsys):
    net = load_run(run / "run")
    assert (net.classes, net.size) == (CLASSES, (32, 32))
    assert main(["eval", str(run / "run")]) == 0
    right, total = accuracy(capsys.readouterr().out)
    lines = (run / "run" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert total == "10"
    assert int(right) / 10 == pytest.approx(last["test_accuracy"])


def test_the_recipe_is_printed_and_few_steps_are_told(run, capsys):
    words = ["--data", "digits", "--epochs", "1", "--batch-size", "512", "--out", str(run / "few")]
    assert main(["train", *words]) == 0
    out = capsys.readouterr().out
    assert "1,437 training images of 10 classes; 1 epochs of 3 steps, batch 512, rate 0.008" in out
    assert "3 steps are few" in out
    assert main(["train", *words[:-1], str(run / "mirrored"), "--flip", "0.5", "--crop", "1"]) == 0
    out = capsys.readouterr().out
    assert "of 10 classes, mirrored and shifted by 1 pixels; 1 epochs" in out


def test_predictions_are_those_of_the_training(run, capsys):
    """The files of the test images give the accuracy of the run's last validation back."""
    data = load_images("folder", path=run / "photos", size=32)
    subset = data.test.dataset
    files = [subset.dataset.samples[i][0] for i in subset.indices]
    assert main(["predict", str(run / "run"), *files]) == 0
    out = capsys.readouterr().out
    right, total = accuracy(out)
    last = json.loads((run / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (int(right) / int(total), total) == (pytest.approx(last["test_accuracy"]), "10")
    assert all(file in out for file in files)


def test_predict_names_bad_files_and_goes_on(run, capsys):
    folder = run / "mixed"
    write_photos(folder, 2)
    (folder / "ring" / "0.png").write_bytes(b"")
    truncated = folder / "cross" / "0.png"
    truncated.write_bytes(truncated.read_bytes()[:900])
    (folder / "notes.txt").write_text("no image")
    assert main(["predict", str(run / "run"), str(folder), "--top", "2", "--json"]) == 1
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert len(lines) == 8
    assert all(len(line["classes"]) == 2 and set(line["classes"]) < set(CLASSES) for line in lines)
    assert str(folder / "ring" / "0.png") in err
    assert str(truncated) in err


def test_a_truncated_photo_is_named_and_left_out(capsys, tmp_path):
    """Of a folder of all kinds of files; predict gives the accuracy of the training back."""
    write_photos(tmp_path / "photos", 8)
    bad = [tmp_path / "photos" / name / "1.jpg" for name in ("square", "ring")]
    for file in bad:
        file.write_bytes(file.read_bytes()[:500])
    words = ["--data", "folder", "--path", str(tmp_path / "photos"), "--epochs", "1"]
    assert main(["train", *words, "--out", str(tmp_path / "run"), "--size", "32"]) == 0
    out = capsys.readouterr().out
    assert all(f"left out: {file} cannot be read as an image" in out for file in bad)
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert main(["eval", str(tmp_path / "run")]) == 0
    right, total = accuracy(capsys.readouterr().out)
    assert int(right) / int(total) == pytest.approx(last["test_accuracy"])
    images, (_, test), _ = split_folder(tmp_path / "photos")
    files = [file for file, _ in (images.samples[i] for i in test)]
    assert main(["predict", str(tmp_path / "run"), *files]) == any(str(f) in files for f in bad)
    assert accuracy(capsys.readouterr().out) == (right, total)


def test_a_folder_of_broken_files_is_refused(capsys, tmp_path):
    write_photos(tmp_path / "photos", 3)
    for file in (tmp_path / "photos" / "ring").iterdir():
        file.write_bytes(b"")
    words = ["--data", "folder", "--path", str(tmp_path / "photos"), "--out", str(tmp_path / "run")]
    assert main(["train", *words]) == 2
    err = capsys.readouterr().err
    assert "3 of 15 files cannot be read, among them: " in err
    assert str(tmp_path / "photos" / "ring" / "0.png") in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predict", "RUN", "nothing.jpg"], "no file nothing.jpg"),
        (["predict", "RUN", "EMPTY"], "no image files in"),
        (["predict", "nowhere", "EMPTY"], "no weights in nowhere"),
        (["predict", "RUN", "EMPTY", "--top", "0"], "--top must be at least 1, got 0"),
        (["eval", "RUN", "--data", "digits"], "the network knows the classes circle, cross"),
        (["train", "--data", "folder", "--path", "nowhere"], "nowhere"),
        (["train", "--data", "digits", "--resume", "nowhere"], "no run to resume in nowhere"),
        (["train", "--data", "digits", "--lr", "-1"], "lr must not be negative, got -1.0"),
    ],
)
def test_what_cannot_be_done_is_one_line(run, capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "RUN").symlink_to(run / "run")
    (tmp_path / "EMPTY").mkdir()
    assert main(words) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1
    assert err.startswith(f"starlayers {words[0]}: ")


@pytest.mark.slow
def test_300_photos_train_to_a_useful_network(tmp_path, capsys):
    """By the documented command, all defaults: chance is 20 %."""
    write_photos(tmp_path / "photos", 60)
    words = ["--data", "folder", "--path", str(tmp_path / "photos"), "--out", str(tmp_path / "run")]
    assert main(["train", *words]) == 0
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["test_accuracy"] >= 0.75
    fresh = tmp_path / "fresh"
    write_photos(fresh, 30, seed=1)
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "run"), str(fresh)]) == 0
    right, total = accuracy(capsys.readouterr().out)
    assert int(right) / int(total) >= 0.7
