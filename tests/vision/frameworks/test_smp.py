"""segmentation_models_pytorch: StarNets as encoders, by their names in timm."""

import pytest
import segmentation_models_pytorch as smp
import torch
from torch.nn import functional as F

import starlayers.vision.timm  # noqa: F401

from .util import assert_same, images, labels, reloaded, step

pytestmark = pytest.mark.export
MODELS = {
    "Unet": {},
    "FPN": {},
    "UPerNet": {},
    "DeepLabV3Plus": {"encoder_output_stride": 8},
}


def build(name):
    return getattr(smp, name)(
        encoder_name="tu-starlayers_starnet_s050", encoder_weights=None, classes=3, **MODELS[name]
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_segmenter_trains_and_loads_again(name, tmp_path):
    torch.manual_seed(0)
    model = build(name)
    assert model.encoder.out_channels[-4:] == [16, 32, 64, 128]
    x, y = images(), labels()
    before, after = step(model, model.encoder, lambda: F.cross_entropy(model(x), y))
    assert after < before
    assert_same(model, reloaded(model, build(name), tmp_path), lambda net: [net(x)])
    model.eval().save_pretrained(tmp_path / "folder")
    again = smp.from_pretrained(tmp_path / "folder")
    assert_same(model, again, lambda net: [net(x)])


@pytest.mark.parametrize("stride", [8, 16])
def test_the_output_stride_of_deeplab_is_that_of_the_encoder(stride):
    model = smp.DeepLabV3Plus(
        "tu-starlayers_starnet_s050", encoder_weights=None, encoder_output_stride=stride
    ).eval()
    assert model.encoder(images(1))[-1].shape[-1] == 64 // stride
    assert model(images(1)).shape == (1, 1, 64, 64)
