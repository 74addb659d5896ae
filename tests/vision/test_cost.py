"""Multiply-adds against counts by hand."""

import pytest
import torch
from torch import nn

from starlayers.vision import ConvNorm, StarBlock2d
from starlayers.vision.cost import multiply_adds

from .util import assert_same_tensors, snapshot, tiny


def test_a_convolution_and_its_norm():
    layer = ConvNorm(3, 8, 5, stride=2)
    assert multiply_adds(layer, (3, 9, 6)) == 8 * 5 * 3 * (3 * 25 + 2)


@pytest.mark.usefixtures("fuse_everything")
def test_a_block_is_counted_by_its_definition_whatever_runs():
    depthwise, norms, mlp = 2 * 6 * 9, 2 * 6 * 2, 3 * 6 * 12
    block = StarBlock2d(6, 3, expansion=2)
    assert multiply_adds(block, (6, 5, 7)) == 5 * 7 * (depthwise + norms + mlp)


def test_the_default_image_has_224_pixels_a_side():
    assert multiply_adds(nn.Conv2d(3, 1, 1)) == 3 * 224 * 224


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_the_model_is_left_as_it_was(train):
    model = tiny().train(train)
    before = snapshot(model)
    multiply_adds(model, (3, 16, 16))
    assert model.training is train
    assert_same_tensors(snapshot(model), before)
    assert not any(m._forward_hooks for m in model.modules())


def test_on_the_device_of_the_model():
    assert multiply_adds(ConvNorm(3, 2, 1, device="meta"), (3, 4, 4)) == 16 * (6 + 4)
    assert torch.is_grad_enabled()
