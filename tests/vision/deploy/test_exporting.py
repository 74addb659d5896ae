"""export: files compute what PyTorch does, hold their metadata, and are left only if they agree."""

import json
from collections import Counter
from pathlib import Path
from typing import ClassVar

import pytest
import timm
import torch
from torch import nn

from starlayers.coefficients.modules import DynamicStarMLP
from starlayers.vision import ExportReport, export, portable, starnet_s1, starnet_s4
from starlayers.vision.deploy import formats
from starlayers.vision.deploy.exporting import capture
from starlayers.vision.deploy.formats import FORMATS, as_text, quiet

from ..util import image, relative_error, tiny

SHAPE = (3, 24, 24)
METADATA = {"classes": [f"class {i}" for i in range(10)], "mean": [0.1, 0.2, 0.3], "note": "a b"}
#: format -> how to read one entry of its metadata
READ = {
    "onnx": lambda path, key: _session(path).get_modelmeta().custom_metadata_map[key],
    "openvino": lambda path, key: _openvino(path).get_rt_info(["metadata", key]).astype(str),
    "torch": lambda path, key: torch._inductor.aoti_load_package(str(path)).get_metadata()[key],
    "executorch": lambda path, key: _executorch(path).load_method(key).execute([])[0],
    "coreml": lambda path, key: _coreml(path).user_defined_metadata[key],
}
NEEDED = {"executorch": "executorch", "coreml": "coremltools"}


def _session(path):
    import onnxruntime

    return onnxruntime.InferenceSession(path)


def _openvino(path):
    import openvino

    return openvino.Core().read_model(path)


def _executorch(path):
    from executorch.runtime import Runtime

    return Runtime.get().load_program(path)


def _coreml(path):
    import coremltools

    return coremltools.models.MLModel(str(path))


def target(folder, name):
    """Return a path for a format, or skip it where its converter is no development package."""
    if name in NEEDED:
        pytest.importorskip(NEEDED[name])
    return folder / f"net{FORMATS[name].suffix}"


slow = pytest.mark.slow
NAMES = ["onnx", "openvino", pytest.param("torch", marks=slow)]
NAMES += [pytest.param(name, marks=slow) for name in ("executorch", "coreml")]


@pytest.mark.export
@pytest.mark.parametrize("name", NAMES)
def test_a_file_computes_the_network_and_holds_its_metadata(name, tmp_path):
    model, path = tiny().train(), target(tmp_path, name)
    report = export(model, path, shape=SHAPE, metadata=METADATA)
    assert (report.path, report.format, report.kept, model.training) == (path, name, {}, True)
    files = {path.name} | ({"net.bin"} if name == "openvino" else set())
    assert {p.name for p in tmp_path.iterdir()} == files
    for key, value in METADATA.items():
        text = READ[name](path, key)
        assert (text if key == "note" else json.loads(text)) == value
    run = FORMATS[name].load(path)
    if run is None:
        assert (name, report.difference) == ("coreml", None)
        return
    assert report.difference < 1e-5
    sizes = [(1, *SHAPE)] if FORMATS[name].fixed else [(1, *SHAPE), (3, 3, 41, 17), (5, 3, 8, 8)]
    with torch.no_grad():
        for size in sizes:
            x = image(*size)
            assert relative_error(run(x)[0], model.eval()(x)) < 1e-5


@pytest.mark.export
@pytest.mark.parametrize(
    ("build", "name"), [(starnet_s1, "starnet_s1"), (starnet_s4, "starnet_s4")]
)
def test_the_graph_has_the_operations_of_timms_and_no_transposition(build, name, tmp_path):
    import onnx

    report = export(build(), tmp_path / "net.onnx", shape=(3, 64, 64))
    peer = timm.create_model(name).eval()
    with quiet():
        FORMATS["onnx"].write(capture(peer, (3, 64, 64)), tmp_path / "timm.onnx", {})
    ours, theirs = (
        Counter(node.op_type for node in onnx.load(tmp_path / file).graph.node)
        for file in ("net.onnx", "timm.onnx")
    )
    assert report.nodes == ours.total() <= theirs.total()
    # timm's last norm is a 1x1 depthwise convolution in ours
    theirs["Conv"] += theirs.pop("BatchNormalization")
    assert ours == theirs
    assert ours["Transpose"] == 0
    graph = onnx.load(tmp_path / "net.onnx").graph
    sizes = [d.dim_param or d.dim_value for d in graph.input[0].type.tensor_type.shape.dim]
    assert (graph.input[0].name, sizes) == ("images", ["batch", 3, "height", "width"])
    assert [output.name for output in graph.output] == ["logits"]


@pytest.mark.export
@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_int8_is_calibrated_compared_and_keeps_the_metadata(name, tmp_path):
    model, path = tiny().eval(), target(tmp_path, name)
    images = image(40, *SHAPE)
    with torch.no_grad():
        classes = model(images).argmax(1)
    wrong = classes.clone()
    wrong[:10] += 1
    report = export(
        model, path, shape=SHAPE, int8=images, metadata=METADATA, labelled=(images, wrong)
    )
    before, after = report.accuracy
    assert before == 0.75
    assert (report.difference < 1e-5, 1e-3 < report.int8_difference < 0.3) == (True, True)
    # the labelled images are those of the calibration
    assert report.agreement > 0.8
    assert abs(after - before) <= 1 - report.agreement + 1e-9
    assert json.loads(READ[name](path, "classes")) == METADATA["classes"]
    assert path.with_suffix(".bin").exists() == (name == "openvino")
    with torch.no_grad():  # batch and size stay free
        assert FORMATS[name].load(path)(image(2, 3, 33, 40))[0].shape == (2, 10)
    words = f"accuracy 75.00% in PyTorch and {after:.2%} in the file"
    assert words in str(report)
    if name == "onnx":
        import onnx

        kinds = Counter(node.op_type for node in onnx.load(path).graph.node)
        assert kinds["QuantizeLinear"] > 10
        assert report.nodes == kinds.total()


@pytest.mark.export
def test_a_single_size_on_request(tmp_path):
    model, path = tiny().eval(), tmp_path / "net.onnx"
    report = export(
        model, path, shape=SHAPE, dynamic=False, labelled=[(image(3, *SHAPE), torch.zeros(3))]
    )
    assert _session(path).get_inputs()[0].shape == [1, *SHAPE]
    assert report.accuracy[0] == report.accuracy[1]
    with pytest.raises(ValueError, match=r"labelled needs images \(N, 3, 24, 24\), got \(2, 3, 8"):
        export(
            model, path, shape=SHAPE, dynamic=False, labelled=[(image(2, 3, 8, 8), torch.zeros(2))]
        )


@pytest.mark.export
def test_maps_are_exported_and_blocks_that_stay_are_told(tmp_path):
    class Maps(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = tiny(mlp_layer=DynamicStarMLP)

        def forward(self, x):
            return self.net.forward_intermediates(x, intermediates_only=True)

    model = Maps().to(torch.bfloat16)
    report = export(model, tmp_path / "maps.onnx", shape=SHAPE)
    outputs = [(o.name, o.shape[1]) for o in _session(report.path).get_outputs()]
    assert outputs == [("map0", 8), ("map1", 16)]
    assert next(model.parameters()).dtype == torch.bfloat16
    reason = "no convolutions are known for a DynamicStarMLP"
    assert report.kept == {f"net.stages.{i}.{j}": reason for i, j in ((0, 1), (1, 1), (1, 2))}
    assert f"net.stages.0.1 is no convolution: {reason}" in str(report)


class Text(formats.Format):
    """Format of the tests, whose engine is PyTorch itself with an error added."""

    suffix = ".txt"
    packages: ClassVar = {}
    error = 0.0

    def write(self, program, path, metadata):
        self.run = program.module()
        path.write_text(json.dumps(dict(metadata)))

    def load(self, path):
        assert path.is_file()
        return lambda x: [self.run(x) * (1 + self.error)]


@pytest.fixture
def text(monkeypatch):
    """Return a format that needs no converter."""
    made = Text()
    monkeypatch.setitem(FORMATS, "text", made)
    return made


def test_a_report_has_what_was_measured(text, tmp_path):
    x, classes = image(70, *SHAPE), torch.zeros(70, dtype=torch.long)
    report = export(
        tiny(), tmp_path / "net.txt", shape=SHAPE, metadata=METADATA, labelled=(x, classes)
    )
    with torch.no_grad():
        share = (tiny().eval()(x).argmax(1) == 0).double().mean().item()
    assert report.accuracy == pytest.approx((share, share))
    assert (report.format, report.nodes, report.int8_difference) == ("text", None, None)
    assert 0 < report.difference < 1e-5
    assert json.loads((tmp_path / "net.txt").read_text())["note"] == "a b"


@pytest.mark.parametrize("error", [2e-4, float("nan")])
def test_a_file_that_differs_is_not_left(text, tmp_path, error):
    path = tmp_path / "net.txt"
    path.write_text("an older file")
    text.error = error
    with pytest.raises(RuntimeError, match=r"text file and PyTorch differ by .*, more than 0.0001"):
        export(tiny(), path, shape=SHAPE)
    assert (path.read_text(), list(tmp_path.iterdir())) == ("an older file", [path])
    text.error = 5e-5
    report = export(tiny(), path, shape=SHAPE)
    assert (path.read_text(), list(tmp_path.iterdir())) == ("{}", [path])
    assert report.difference == pytest.approx(5e-5, rel=0.1)


def test_a_file_without_an_engine_here_is_not_compared(text, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "load", lambda path: None)
    report = export(tiny(), tmp_path / "net.txt", shape=SHAPE)
    assert report.difference is None
    assert "not compared with PyTorch" in str(report)


IMAGES = torch.zeros(2, *SHAPE)
WRONG = {
    "unknown": ({"format": "tflite"}, ValueError, "unknown format 'tflite', choose one of 'onnx'"),
    "suffix": ({"format": "onnx"}, ValueError, r"format 'onnx' is a \.onnx file, got 'net\.txt'"),
    "many": ({"metadata": {"classes": ["a"]}}, ValueError, "1 classes in metadata for 10 outputs"),
    "key": ({"metadata": {"a b": 1}}, TypeError, "names such as 'classes' as keys, got 'a b'"),
    "value": ({"metadata": {"a": {1, 2}}}, TypeError, "metadata 'a' is nothing for JSON"),
    "no_int8": ({"int8": IMAGES}, ValueError, "no int8 in format 'text', only in 'onnx', 'openv"),
    "bytes": (
        {"labelled": (IMAGES.byte(), torch.zeros(2))},
        TypeError,
        r"labelled needs floating images, normalised as in training, got torch\.uint8",
    ),
    "channels": (
        {"labelled": (IMAGES[:, :1], torch.zeros(2))},
        ValueError,
        r"labelled needs images \(N, 3, H, W\), got \(2, 1, 24, 24\)",
    ),
    "none": ({"labelled": (IMAGES[:0], torch.zeros(0))}, ValueError, "labelled needs images, got"),
    "shape": ({"shape": (1, 24, 24)}, ValueError, r"expects \(N, 3, H, W\), got shape \(2, 1,"),
}


@pytest.mark.usefixtures("text")
@pytest.mark.parametrize("case", WRONG)
def test_errors_name_what_does_not_fit(case, tmp_path):
    options, error, words = WRONG[case]
    with pytest.raises(error, match=words):
        export(tiny(), tmp_path / "net.txt", **{"shape": SHAPE, **options})
    assert list(tmp_path.iterdir()) == []


def test_only_modules_are_exported(text, tmp_path):
    with pytest.raises(TypeError, match="export: model must be a module, got str"):
        export("net.pt", tmp_path / "net.txt", shape=SHAPE)


def test_a_path_names_a_format_in_a_folder_that_exists(tmp_path):
    with pytest.raises(ValueError, match=r"no format has the suffix of 'net\.pb', choose .*\.onnx"):
        export(tiny(), tmp_path / "net.pb")
    with pytest.raises(FileNotFoundError, match=r"no folder .*missing"):
        export(tiny(), tmp_path / "missing" / "net.onnx")


@pytest.mark.parametrize(
    ("name", "int8", "words"),
    [
        ("onnx", False, r"needs onnx and onnxscript and onnxruntime: pip install 'starlayers\[dep"),
        ("openvino", False, r"needs openvino: pip install 'starlayers\[openvino\]'"),
        ("openvino", True, r"needs openvino and nncf: pip install 'starlayers\[openvino\]'$"),
        ("executorch", False, "needs executorch: pip install executorch"),
        ("coreml", False, "needs coremltools: pip install coremltools"),
    ],
)
def test_a_missing_converter_says_what_to_install(name, int8, words, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "find_spec", lambda module: None)
    path = tmp_path / f"net{FORMATS[name].suffix}"
    with pytest.raises(ImportError, match=f"format '{name}' {words}"):
        export(tiny(), path, shape=SHAPE, int8=IMAGES if int8 else None)


def test_text_stays_text_and_the_rest_is_json():
    assert as_text({"a": "x", "b": (1, "y")}) == {"a": "x", "b": '[1, "y"]'}


def test_a_report_reads_as_a_sentence():
    report = ExportReport(Path("a.xml"), "openvino", 7, 1e-6, 0.02, 0.995, (0.9, 0.895))
    assert str(report) == (
        "a.xml: openvino, 7 nodes, differs from PyTorch by 1.0e-06 of the largest output, in int8 "
        "by 2.0e-02, with the same class for 99.50% of the calibration images, accuracy 90.00% in "
        "PyTorch and 89.50% in the file"
    )


def test_captured_graphs_have_free_sizes_unless_asked_otherwise():
    model = portable(tiny())
    free = capture(model, SHAPE).module()
    with torch.no_grad():
        for size in ((1, 3, 8, 8), (3, 3, 57, 20)):
            torch.testing.assert_close(free(image(*size)), model(image(*size)))
    fixed = capture(model, SHAPE, dynamic=False).module()
    with pytest.raises(AssertionError):
        fixed(image(2, *SHAPE))
