"""starlayers export: files that compute the run's network and say what they are of."""

import json
import re

import numpy as np
import pytest
import torch

from starlayers.commands import main
from starlayers.commands.export import _spread
from starlayers.commands.files import image_files
from starlayers.datasets.image_folder import load_image
from starlayers.vision import load_run
from starlayers.vision.deploy import formats
from tests.commands.photos import CLASSES


def read(path):
    """Return a file's function of normalised images, and its metadata."""
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path)
        entries = session.get_modelmeta().custom_metadata_map
        return lambda x: session.run(["logits"], {"images": x})[0], entries
    import openvino

    model = openvino.Core().read_model(path)
    names = ("classes", "mean", "std", "size")
    entries = {n: model.get_rt_info(["metadata", n]).astype(str) for n in names}
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: compiled(x)[0], entries


def photos(run, count=10):
    return [load_image(f, (3, 32, 32)) for f in image_files(run / "photos")[:count]]


@pytest.mark.export
def test_the_files_of_a_run_are_enough_to_predict(run, tmp_path, capsys):
    words = ["export", str(run / "run"), "--format", "onnx", "openvino", "--out", str(tmp_path)]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir()} == {"model.onnx", "model.xml", "model.bin"}
    net, images = load_run(run / "run"), torch.stack(photos(run))
    want = net.logits(images).numpy()
    for name in ("model.onnx", "model.xml"):
        compute, entries = read(tmp_path / name)
        metadata = {key: json.loads(value) for key, value in entries.items()}
        assert (metadata["classes"], metadata["size"]) == (list(CLASSES), [32, 32])
        mean, std = (np.float32(metadata[key])[:, None, None] for key in ("mean", "std"))
        got = compute((images.numpy().astype(np.float32) / 255 - mean) / std)
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
        size = sum(f.stat().st_size for f in tmp_path.glob(name.replace(".xml", ".*"))) / 1e6
        if name == "model.xml":
            size -= (tmp_path / "model.onnx").stat().st_size / 1e6
        line = (
            rf"{name}: .* differs from PyTorch by \S+e-0[67] .*\n  {size:.2f} MB; inside: classes"
        )
        assert re.search(line, out)


@pytest.mark.export
@pytest.mark.parametrize(("name", "suffix"), [("onnx", ".onnx"), ("openvino", ".xml")])
@pytest.mark.parametrize("own", [True, False])
def test_int8_is_calibrated_by_photos(run, tmp_path, capsys, name, suffix, own):
    """By those of a folder, where unreadable files are named, or by the run's own."""
    words = ["export", str(run / "run"), "--format", name, "--out", str(tmp_path), "--images", "20"]
    broken = run / "photos" / "ring" / "broken.png"
    words += ["--int8"] if own else ["--int8", str(run / "photos")]
    if not own:
        broken.write_bytes(b"")
    try:
        assert main([*words, "--images", "61" if not own else "20"]) == 0
    finally:
        broken.unlink(missing_ok=True)
    out, err = capsys.readouterr()
    assert ("broken.png cannot be read" in err) is not own
    assert re.search(r"in int8 by \d.*, with the same class for \d", out)
    compute, entries = read(tmp_path / f"model-int8{suffix}")
    assert json.loads(entries["classes"]) == list(CLASSES)
    net, images = load_run(run / "run"), torch.stack(photos(run))
    want = net.logits(images).numpy()
    got = compute(net.normalise(images).numpy())
    assert 0 < np.abs(got - want).max() < 0.5 * np.abs(want).max()


@pytest.mark.export
def test_a_weights_file_names_the_export_and_a_fixed_size_is_one_image(run, tmp_path, capsys):
    import onnx

    words = ["export", str(run / "run" / "best.safetensors"), "--fixed", "--out", str(tmp_path)]
    assert main(words) == 0
    (graph_input,) = onnx.load(tmp_path / "best.onnx").graph.input
    assert [d.dim_value for d in graph_input.type.tensor_type.shape.dim] == [1, 3, 32, 32]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "no weights in nowhere"),
        (["RUN", "--int8", "nowhere"], "no file nowhere"),
        (["RUN", "--int8", "BROKEN"], "none of the 1 images in "),
        (["RUN", "--format", "torch", "--int8", "PHOTOS"], "no int8 in format 'torch'"),
        (["RUN", "--images", "0"], "--images must be at least 1, got 0"),
        (["RUN", "--out", "nowhere"], "no folder nowhere"),
    ],
)
def test_what_cannot_be_exported_is_told(run, tmp_path, capsys, words, message):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "photo.png").write_bytes(b"")
    paths = {"RUN": run / "run", "PHOTOS": run / "photos", "BROKEN": broken}
    assert main(["export", *(str(paths.get(word, word)) for word in words)]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_converter_is_one_line(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    assert main(["export", str(run / "run"), "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("starlayers export: format 'onnx' needs onnx and ")
    assert "pip install 'starlayers[deploy]'" in err


@pytest.mark.parametrize(
    ("items", "count", "want"), [(10, 3, [0, 3, 6]), (2, 5, [0, 1]), (1, 1, [0])]
)
def test_images_are_taken_at_equal_distances(items, count, want):
    assert _spread(range(items), count) == want
