"""Stem and convolutions of a StarNet as recorded launches, in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch

from starlayers import explain, use_backend
from starlayers.activations import ACTIVATIONS
from starlayers.vision import StarNet, starnet
from tests.helpers import randn
from tests.kernels import test_conv_layer
from tests.kernels.test_block2d_triton import lively
from tests.kernels.test_conv_layer import hooked, images, made
from tests.kernels.test_program import assert_same, eagerly, fused

pytestmark = pytest.mark.interpret

recorded = test_conv_layer.recorded


def copies(monkeypatch):
    """Return a list that grows by one whenever a network copies images to channels_last."""
    seen = []
    whole = starnet.to_channels_last

    def counted(x):
        seen.append(tuple(x.shape))
        return whole(x)

    monkeypatch.setattr(starnet, "to_channels_last", counted)
    return seen


def test_a_stem_reads_images_as_they_are(monkeypatch, recorded):
    seen = copies(monkeypatch)
    module, x = made("stem"), images("stem")
    fused(module, x)
    assert seen == []
    eagerly(module, x)
    assert len(seen) == 1
    for _ in range(2):  # called by itself it is the same launch
        assert_same(fused(module.net.stem, x), eagerly(module.net.stem, x))
        assert_same(fused(module, x), eagerly(module, x))
    assert recorded == ["relu6"]
    seen.clear()
    hooked(module.net.stem)  # which a fused stem would skip
    assert_same(fused(module, x), eagerly(module, x))
    assert len(seen) == 2
    # its hooks run around its forward, which gets a copy in channels_last
    assert recorded == ["relu6", "relu6"]


@pytest.mark.parametrize("act", ["identity", "silu", "gelu"])
def test_other_activations_follow_the_stem(act, recorded):
    module, x = made("stem"), images("stem")
    first = fused(module, x)
    module.net.act = act
    assert_same(fused(module, x), eagerly(module, x))
    assert not torch.allclose(fused(module, x), first)
    assert len(recorded) == 2


def test_an_activation_without_a_triton_form_follows_the_launch(monkeypatch, recorded):
    module, x = made("stem"), images("stem")
    fused(module, x)
    other = replace(ACTIVATIONS["relu6"], fn=lambda x: 0.5 * x, triton=None)
    monkeypatch.setitem(ACTIVATIONS, "relu6", other)
    assert_same(fused(module, x), eagerly(module, x))
    assert eagerly(module, x).min() < 0
    assert recorded == ["relu6", None]


def test_explain_tells_what_computes_convolutions():
    net, x = lively(StarNet(8, (1, 1), stage_strides=(2, 2))).eval(), randn(1, 3, 32, 32)
    with use_backend("triton"), torch.no_grad():
        rows = {row.name: str(row.plan) for row in explain(net, x)}
    fused_rows = {name for name, plan in rows.items() if plan == "runs fused: convolution"}
    assert fused_rows == {"stem", "stages.0.0", "stages.1.0"}


@pytest.mark.parametrize("fuse", [False, True])
def test_a_whole_network_is_that_of_the_definition(fuse, recorded):
    net = lively(StarNet(8, (1, 1), stage_strides=(2, 2), num_classes=5)).eval()
    x = randn(2, 3, 33, 40)
    expected = eagerly(net, x)
    if fuse:
        net.fuse()
    assert_same(fused(net, x), expected)
    assert_same(fused(net, x), expected)
    assert recorded == ["relu6", None, None]
