"""transformers: a StarNet of timm's registry as TimmBackbone of its models."""

import pytest
import torch
from transformers import (
    AutoBackbone,
    DetrConfig,
    DetrForObjectDetection,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    TimmBackboneConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

import starlayers.vision.timm  # noqa: F401

from .util import BOX, assert_same, images, labels, step

pytestmark = pytest.mark.export


def backbone(*stages):
    return TimmBackboneConfig(
        backbone="starlayers_starnet_s050", use_pretrained_backbone=False, out_indices=stages
    )


def upernet():
    config = UperNetConfig(
        backbone_config=backbone(0, 1, 2, 3),
        hidden_size=16,
        auxiliary_in_channels=64,
        auxiliary_channels=16,
        num_labels=3,
    )
    model = UperNetForSemanticSegmentation(config)
    return model, model.backbone, {"labels": labels()}


def detr():
    config = DetrConfig(
        backbone_config=backbone(1, 2, 3),
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=5,
        num_labels=3,
    )
    x0, y0, x1, y1 = (side / 64 for side in BOX)
    box = torch.tensor([[(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]])
    target = {"class_labels": torch.tensor([1]), "boxes": box}
    model = DetrForObjectDetection(config)
    return model, model.model.backbone, {"labels": [target] * 2}


def mask2former():
    config = Mask2FormerConfig(
        backbone_config=backbone(0, 1, 2, 3),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=32,
        num_queries=5,
        num_labels=3,
        train_num_points=64,
    )
    masks = {
        "mask_labels": list(labels()[:, None].float()),
        "class_labels": [torch.tensor([1])] * 2,
    }
    model = Mask2FormerForUniversalSegmentation(config)
    return model, model.model.pixel_level_module.encoder, masks


def outputs(model):
    out = model(pixel_values=images())
    names = ("logits", "pred_boxes", "class_queries_logits", "masks_queries_logits")
    return [out[name] for name in names if name in out]


@pytest.mark.parametrize("build", [upernet, detr, mask2former])
def test_a_model_trains_and_loads_again(build, tmp_path):
    torch.manual_seed(0)
    model, net, targets = build()
    before, after = step(model, net, lambda: model(pixel_values=images(), **targets).loss)
    assert after < before
    model.save_pretrained(tmp_path)
    assert_same(model, type(model).from_pretrained(tmp_path), outputs)


def test_the_backbone_has_the_maps_of_the_stages():
    net = AutoBackbone.from_config(backbone(1, 3)).eval()
    maps = net(images()).feature_maps
    assert [m.shape[1] for m in maps] == net.channels == [32, 128]
    assert [64 // m.shape[-1] for m in maps] == [8, 32]
