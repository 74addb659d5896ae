"""torchvision: StarNet's maps in a feature pyramid, under its three families of detectors."""

import pytest
import torch
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

from starlayers.vision import starnet_s050

from .util import BOX, assert_same, images, reloaded, step

pytestmark = pytest.mark.export
STAGES = {f"stages.{i}": str(i) for i in (1, 2, 3)}
ANCHORS = ((16, 24), (32, 48), (64, 96))
RATIOS = ((0.5, 1.0, 2.0),) * 3
SIDES = {"min_size": 64, "max_size": 64}


def pyramid():
    net = starnet_s050(num_classes=0)
    channels = net.feature_info.channels([1, 2, 3])
    body = create_feature_extractor(net, STAGES)
    backbone = nn.Sequential(body, FeaturePyramidNetwork(channels, 32))
    backbone.out_channels = 32
    return backbone


def retinanet():
    anchors = AnchorGenerator(ANCHORS, RATIOS)
    return RetinaNet(pyramid(), num_classes=3, anchor_generator=anchors, **SIDES)


def fcos():
    anchors = AnchorGenerator(((8,), (16,), (32,)), ((1.0,),) * 3)
    return FCOS(pyramid(), num_classes=3, anchor_generator=anchors, **SIDES)


def faster_rcnn():
    return FasterRCNN(
        pyramid(),
        num_classes=3,
        rpn_anchor_generator=AnchorGenerator(ANCHORS, RATIOS),
        box_roi_pool=MultiScaleRoIAlign(["1", "2", "3"], 7, 2),
        **SIDES,
    )


@pytest.mark.parametrize("build", [retinanet, fcos, faster_rcnn])
def test_a_detector_trains_and_loads_again(build, tmp_path):
    torch.manual_seed(0)
    model, x = build(), list(images())
    targets = [{"boxes": torch.tensor([BOX]), "labels": torch.tensor([1])}] * 2

    def loss():
        return sum(model(x, targets).values())

    before, after = step(model, model.backbone[0], loss)
    assert after < before

    def outputs(net):
        # the heads on the maps, so that no threshold of a score leaves nothing to compare
        maps = list(net.backbone(torch.stack(x)).values())
        if build is faster_rcnn:
            return [*maps, *(t for level in net.rpn.head(maps) for t in level)]
        return [*maps, *net.head(maps).values()]

    again = reloaded(model, build(), tmp_path)
    assert_same(model, again, outputs)
    with torch.no_grad():
        for a, b in zip(model(x), again(x), strict=True):
            assert a["boxes"].shape == b["boxes"].shape
            torch.testing.assert_close(a["scores"], b["scores"], rtol=0, atol=0)
