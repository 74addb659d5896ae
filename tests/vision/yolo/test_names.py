"""Names in other packages: added, never replaced; and the YAML files that use them."""

import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import _api as registry
from torchvision.models import get_model
from ultralytics.nn.tasks import DetectionModel, yaml_model_load

from starlayers.vision import models, save_weights
from starlayers.vision.yolo import StarCSP, model_yaml
from starlayers.vision.yolo.names import add_name, add_starnets

from ..util import image, randomise

ADDED = """
import importlib, sys
import starlayers.vision
assert "ultralytics" not in sys.modules
from torchvision.models._api import BUILTIN_MODELS
from ultralytics.nn import tasks
before = dict(vars(tasks)), dict(BUILTIN_MODELS)
import starlayers.vision.yolo
importlib.reload(starlayers.vision.yolo)
for old, new in zip(before, (vars(tasks), BUILTIN_MODELS)):
    assert all(new[name] is thing for name, thing in old.items())
    print(*sorted(new.keys() - old.keys()))
"""
MISSING = """
import sys
sys.modules["ultralytics"] = None
import starlayers.vision.yolo
"""


def child(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_the_import_adds_names_and_replaces_none():
    done = child(ADDED)
    assert done.returncode == 0, done.stderr
    rows, starnets = done.stdout.splitlines()[-2:]
    assert rows == "StarCSP"
    assert starnets.split() == sorted(f"starlayers_{name}" for name in models.MODELS)


def test_without_ultralytics_the_import_says_what_to_install():
    last = child(MISSING).stderr.splitlines()[-1]
    assert last.startswith("ImportError: starlayers.vision.yolo needs ultralytics: pip install")


def test_a_name_of_somebody_else_stays():
    module = types.ModuleType("rows")
    module.StarCSP = nn.Identity
    with pytest.raises(RuntimeError, match=r"rows has a StarCSP of its own.*Identity"):
        add_name(module, "StarCSP", StarCSP)
    assert module.StarCSP is nn.Identity


def test_a_model_of_somebody_else_stays(monkeypatch):
    monkeypatch.setitem(registry.BUILTIN_MODELS, "starlayers_starnet_s1", len)
    with pytest.raises(ValueError, match="starlayers_starnet_s1"):
        add_starnets()
    assert registry.BUILTIN_MODELS["starlayers_starnet_s1"] is len


def test_torchvisions_starnet_is_the_starnet(monkeypatch, tmp_path):
    net, x = randomise(models.starnet_s1()).eval(), image(1, 3, 64, 64)
    save_weights(net, tmp_path / "weights.safetensors")
    monkeypatch.setattr(
        models, "pretrained_path", lambda name, hub: tmp_path / "weights.safetensors"
    )
    again = get_model("starlayers_starnet_s1", weights="DEFAULT").eval()
    torch.testing.assert_close(again(x), net(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="weights must be None or 'DEFAULT', got 'IMAGENET1K_V1'"):
        get_model("starlayers_starnet_s1", weights="IMAGENET1K_V1")


@pytest.mark.parametrize("size", ["", "n", "s", "m", "l", "x"])
def test_the_paths_are_those_of_files_in_the_package(size):
    path = Path(model_yaml(f"yolo11{size}-starcsp"))
    assert path.name == f"yolo11{size}-starcsp.yaml"
    assert yaml_model_load(path)["scale"] == size
    assert path.with_name("yolo11-starcsp.yaml").is_file()


@pytest.mark.parametrize("name", ["yolo11z-starcsp", "yolon-starnet_s050", "../csp", ""])
def test_another_name_is_refused(name):
    with pytest.raises(ValueError, match="there are yolo-starnet_s050 and yolo11-starcsp, got"):
        model_yaml(name)


def test_the_size_scales_channels_and_stages():
    def stages(name):
        model = DetectionModel(yaml_model_load(model_yaml(name)), verbose=False)
        return [m.dim for m in model.modules() if isinstance(m, StarCSP)]

    assert stages("yolo11n-starcsp") == [32, 64, 128, 256, 128, 64, 128, 256]
    assert stages("yolo11s-starcsp") == [64, 128, 256, 512, 256, 128, 256, 512]


def test_channels_that_do_not_fit_are_told_with_their_numbers():
    rows = yaml_model_load(model_yaml("yolo11n-starcsp"))
    rows["backbone"][2][3] = [48]
    with pytest.raises(ValueError, match=r"StarCSP expects \(N, 48, H, W\), got shape \(1, 32"):
        DetectionModel(rows, verbose=False)
