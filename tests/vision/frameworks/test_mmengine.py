"""mmengine, the registry of mmdetection and mmsegmentation: their necks want a tuple of maps.

mmengine asks for opencv-python, which overwrites the files of opencv-python-headless, so that no
extra brings it. To run this file: `pip install --no-deps mmengine addict termcolor yapf`.
"""

import pytest
import timm
import torch
from torch import nn

import starlayers.vision.timm  # noqa: F401

from .util import assert_same, images, step

pytestmark = pytest.mark.export
WHY = "pip install --no-deps mmengine addict termcolor yapf (it asks for another build of OpenCV)"


@pytest.fixture(scope="module")
def registry():
    pytest.importorskip("mmengine", reason=WHY)
    from mmengine.registry import MODELS

    @MODELS.register_module(force=True)
    class TimmMaps(nn.Module):
        def __init__(self, name, **options):
            super().__init__()
            self.net = timm.create_model(name, features_only=True, **options)

        def forward(self, x):
            return tuple(self.net(x))

    return MODELS


def build(registry):
    net = registry.build(
        {"type": "TimmMaps", "name": "starlayers_starnet_s050", "out_indices": (1, 2, 3)}
    )
    assert isinstance(net(images()), tuple)
    return nn.ModuleDict(
        {"backbone": net, "neck": nn.ModuleList(nn.Conv2d(c, 8, 1) for c in (32, 64, 128))}
    )


def outputs(model):
    return [
        lateral(m) for lateral, m in zip(model["neck"], model["backbone"](images()), strict=True)
    ]


def test_a_registered_backbone_trains_and_loads_again(registry, tmp_path):
    from mmengine.runner import load_checkpoint, save_checkpoint

    torch.manual_seed(0)
    model = build(registry)

    def loss():
        return sum(m.square().mean() for m in outputs(model))

    before, after = step(model, model["backbone"], loss)
    assert after < before
    save_checkpoint({"state_dict": model.state_dict()}, str(tmp_path / "weights.pth"))
    again = build(registry)
    load_checkpoint(again, str(tmp_path / "weights.pth"), strict=True)
    assert_same(model, again, outputs)
