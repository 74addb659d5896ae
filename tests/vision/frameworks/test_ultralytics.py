"""ultralytics: the two YAML files, from a training to a file, to another process and to ONNX."""

import os
import subprocess
import sys

import cv2
import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from ultralytics import YOLO
from ultralytics.cfg import get_cfg

from starlayers.vision import StarNet, portable
from starlayers.vision.yolo import StarCSP, model_yaml

from .util import BOX, assert_same, images, reloaded, step

pytestmark = pytest.mark.export
NAMES = ["yolo-starnet_s050", "yolo11n-starcsp"]
LABEL = [(BOX[0] + BOX[2]) / 128, (BOX[1] + BOX[3]) / 128] + [(BOX[2] - BOX[0]) / 64] * 2

ANOTHER_PROCESS = """
import sys, torch
import starlayers.vision.yolo
from ultralytics import YOLO

weights, data, out = sys.argv[1:]
model = YOLO(weights)
with torch.no_grad():
    torch.save(model.model.float().eval()(torch.load(out + "/x.pt"))[0], out + "/y.pt")
options = {"workers": 0, "device": "cpu", "plots": False, "project": out}
model.train(data=data, epochs=1, imgsz=64, batch=2, **options)
"""


@pytest.fixture(autouse=True)
def _own_environment():
    """Restore the environment: training on a CPU hides the GPUs of a process."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four images with a square as a data set."""
    folder = tmp_path_factory.mktemp("data")
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    for i, x in enumerate(images(4)):
        pixels = (x.clamp(-1, 1) * 127 + 128).byte().permute(1, 2, 0).numpy()
        cv2.imwrite(str(folder / f"images/{i}.png"), np.ascontiguousarray(pixels))
        (folder / f"labels/{i}.txt").write_text(" ".join(map(str, [1, *LABEL])) + "\n")
    file = folder / "data.yaml"
    file.write_text(f"path: {folder}\ntrain: images\nval: images\nnames: [background, square]\n")
    return str(file)


def trained(name, data, folder):
    """Return a model after an epoch, from the file that the training wrote."""
    model = YOLO(model_yaml(name))
    options = {"workers": 0, "device": "cpu", "plots": False, "project": str(folder)}
    model.train(data=data, epochs=1, imgsz=64, batch=2, **options)
    return str(model.trainer.last)


def build(name):
    net = YOLO(model_yaml(name)).model
    net.args = get_cfg()
    return net


def stars(net):
    """Return the part of a detector that is the library's."""
    return nn.ModuleList(m for m in net.modules() if isinstance(m, StarCSP)) or net.model[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_detector_trains_and_loads_again(name, tmp_path):
    torch.manual_seed(0)
    net = build(name)
    batch = {
        "img": images(),
        "batch_idx": torch.tensor([0.0, 1.0]),
        "cls": torch.ones(2, 1),
        "bboxes": torch.tensor([LABEL] * 2),
    }
    # the loss is over the scores of the boxes that found a target, and rises with them at first
    step(net, stars(net), lambda: net(batch)[0].sum())
    assert net.stride.tolist() == [8, 16, 32]
    assert_same(net, reloaded(net, build(name), tmp_path), lambda model: [model(images())[0]])


@pytest.mark.parametrize("name", NAMES)
def test_a_trained_file_is_the_same_in_another_process_and_trains_on(name, data, tmp_path):
    weights = trained(name, data, tmp_path)
    torch.save(images(), tmp_path / "x.pt")
    command = [sys.executable, "-c", ANOTHER_PROCESS, weights, data, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    model = YOLO(weights)
    with torch.no_grad():
        want = model.model.float().eval()(images())[0]
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), want, rtol=0, atol=0)
    (result,) = model.predict(os.path.join(os.path.dirname(data), "images/0.png"), imgsz=64, conf=0)
    assert result.names == {0: "background", 1: "square"}
    assert len(result.boxes) > 0


@pytest.mark.parametrize("convolutions", [False, True], ids=["as it is", "portable"])
@pytest.mark.parametrize("name", NAMES)
def test_an_exported_detector_computes_the_same(name, convolutions, data, tmp_path):
    model = YOLO(trained(name, data, tmp_path))
    with torch.no_grad():
        want = model.model.float().eval()(images(1))[0]
    if convolutions:
        model.model = portable(model.model)
    file = model.export(format="onnx", imgsz=64, simplify=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"images": images(1).numpy()})
    torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-4, atol=1e-4)


def test_the_maps_of_the_backbone_are_those_of_the_starnet():
    _, *steps = build("yolo-starnet_s050").eval().model[0](images())
    net = StarNet(16, (1, 1, 3, 1), mlp_ratio=3, num_classes=0)
    assert [m.shape[1] for m in steps] == [32, *net.feature_info.channels()]
    assert [64 // m.shape[-1] for m in steps] == [2, *net.feature_info.reduction()]
