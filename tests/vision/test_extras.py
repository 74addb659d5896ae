"""Optional packages: importing vision needs einops alone, and errors name the extra to install."""

import importlib
import subprocess
import sys

import pytest
import torch

from starlayers import vision
from starlayers.vision import load_checkpoint

from .util import saved_safely, tiny

CHILD = """
import sys
import torch
allowed = {name.partition(".")[0] for name in sys.modules} | {"starlayers", "einops"}

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OPTIONAL:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

OPTIONAL = {OPTIONAL!r}
sys.meta_path.insert(0, Refuse())
from starlayers.vision import StarNet
import starlayers.vision.cost
model = StarNet(8, (1,), stage_strides=(2,), num_classes=3)
print(tuple(model.fuse()(torch.ones(1, 3, 16, 16)).shape))
others = {name.partition(".")[0] for name in sys.modules} - allowed
others.discard("triton")  # imported by PyTorch's FLOP counter
print(*sorted(others - set(sys.stdlib_module_names)))
"""
OPTIONAL = {
    *("accelerate", "huggingface_hub", "matplotlib", "safetensors", "sklearn", "timm"),
    *("torchdata", "torchmetrics", "torchvision", "tqdm", "transformers", "typer"),
}


def test_vision_imports_and_runs_with_einops_alone():
    code = CHILD.replace("{OPTIONAL!r}", repr(OPTIONAL))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["(1, 3)", ""]


def without(monkeypatch, package, module):
    """Make `package` missing, and `module` not imported yet."""
    for name in list(sys.modules):
        if name == module or name.startswith(module + "."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)


def test_without_einops(monkeypatch):
    without(monkeypatch, "einops", "starlayers.vision")
    message = r"starlayers\.vision needs einops: pip install 'starlayers\[vision\]'"
    with pytest.raises(ImportError, match=message):
        importlib.import_module("starlayers.vision")


@pytest.mark.parametrize(
    "package", ["accelerate", "torchdata", "torchmetrics", "torchvision", "tqdm"]
)
def test_without_a_package_of_training(monkeypatch, package):
    without(monkeypatch, package, "starlayers.vision.training")
    message = rf"vision\.training needs {package}: pip install 'starlayers\[training\]'"
    with pytest.raises(ImportError, match=message):
        importlib.import_module("starlayers.vision.training")


def test_without_timm(monkeypatch):
    for name in ("timm.data", "timm.models"):
        without(monkeypatch, name, "starlayers.vision.timm")
    with pytest.raises(ImportError, match=r"starlayers\.vision\.timm needs timm: pip install timm"):
        importlib.import_module("starlayers.vision.timm")


def test_without_safetensors(monkeypatch, tmp_path):
    model = tiny(2)
    file = saved_safely(tiny(1).state_dict(), tmp_path / "weights.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    message = r"weights\.safetensors needs safetensors: pip install 'starlayers\[vision\]'"
    with pytest.raises(ImportError, match=message):
        load_checkpoint(model, file)
    torch.save(tiny(1).state_dict(), tmp_path / "weights.pth")
    assert load_checkpoint(model, tmp_path / "weights.pth").loaded == len(model.state_dict())


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = (
        r"starnet_s1\(pretrained=True\) needs huggingface_hub: pip install 'starlayers\[vision\]'"
    )
    with pytest.raises(ImportError, match=message):
        vision.starnet_s1(pretrained=True)
