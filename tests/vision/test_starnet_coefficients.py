"""Learned and dynamic coefficients in the blocks of StarNet and in StarNet."""

import pytest
import torch
from torch import nn

from starlayers import StarMLP
from starlayers.coefficients import CoefficientPenalty, spectrum
from starlayers.vision import StarBlock2d, StarNet, starnet_s050

from .util import image, randomise

SMALL = {"depths": (1, 2), "stage_strides": (2, 2), "num_classes": 3}


def stars(model):
    return [m for m in model.modules() if isinstance(m, StarMLP)]


def learned(model):
    """Draw all weights and coefficients of the model away from their start values."""
    for star in stars(randomise(model)):
        nn.init.normal_(star.scale, 1, 0.3)
        nn.init.normal_(star.shift, 0, 0.3)
    return model.eval()


@pytest.mark.parametrize("coefficients", ["scale", "dynamic"])
def test_a_block_passes_them_to_its_mlp(coefficients):
    block = learned(StarBlock2d(6, 3, expansion=2, coefficients=coefficients))
    x = image(2, 6, 9, 5)
    pixels = block.pre(x.permute(0, 2, 3, 1))
    want = block.post(block.mlp._eager(pixels)).permute(0, 3, 1, 2)
    torch.testing.assert_close(block(x), x + want)
    if coefficients == "dynamic":  # one factor for all pixels of an image, another for the next
        torch.testing.assert_close(block(x)[:1], block(x[:1]))
        mean = pixels.mean((1, 2))
        factor = 1 + torch.tanh(block.mlp.gate(mean))
        want = factor[:, None, None] * block.mlp.scale * (block.mlp.shift + block.mlp.f2(pixels))
        torch.testing.assert_close(block.mlp._scaled(pixels, block.mlp.f2(pixels)), want)


@pytest.mark.parametrize(("dim", "width"), [(6, 8), (128, 8), (144, 9), (320, 20)])
def test_the_gate_of_dynamic_coefficients_is_a_sixteenth_as_wide_and_at_least_8(dim, width):
    gate = StarBlock2d(dim, 3, expansion=1, coefficients="dynamic", device="meta").mlp.gate
    assert [tuple(gate[i].weight.shape) for i in (0, 2)] == [(width, dim), (dim, width)]


@pytest.mark.parametrize("coefficients", ["scale", "dynamic"])
def test_a_net_starts_as_the_fixed_one(coefficients):
    torch.manual_seed(0)
    fixed = StarNet(8, **SMALL).eval()
    net = StarNet(8, **SMALL, coefficients=coefficients).eval()
    missing, unexpected = net.load_state_dict(fixed.state_dict(), strict=False)
    assert unexpected == []
    assert len(missing) == 3 * (2 if coefficients == "scale" else 6)
    x = image(2, 3, 32, 32)
    torch.testing.assert_close(net(x), fixed(x))


def test_the_start_survives_init_weights_after_meta():
    net = StarNet(8, **SMALL, coefficients="dynamic", device="meta").to_empty(device="cpu")
    net.init_weights()
    for star in stars(net):
        assert star.scale.tolist() == [1.0] * star.hidden_features
        assert star.shift.tolist() == [0.0] * star.hidden_features
        assert star.gate[0].weight.std() > 0.01
        assert not star.gate[2].weight.any()


@pytest.mark.parametrize(("before", "after"), [("scale", "fixed"), ("dynamic", "dynamic")])
def test_a_fused_net_has_its_scales_folded_and_keeps_what_is_dynamic(before, after):
    net = learned(StarNet(8, **SMALL, coefficients=before))
    x = image(2, 3, 32, 32)
    y = net(x)
    torch.testing.assert_close(net.fuse()(x), y, rtol=1e-4, atol=1e-4)
    assert {star.coefficients for star in stars(net)} == {after}
    named = any("scale" in name or "shift" in name for name in net.state_dict())
    assert named is (after == "dynamic")


def test_factories_take_the_option_and_training_moves_it():
    net = starnet_s050(num_classes=2, coefficients="dynamic").train()
    loss = nn.functional.cross_entropy(net(image(4, 3, 32, 32)), torch.tensor([0, 1, 0, 1]))
    (loss + CoefficientPenalty(net)()).backward()
    for star in stars(net):
        for p in (star.scale, star.shift, star.gate[2].weight):
            assert p.grad.any()
    assert len(spectrum(net, entropy=False)) == len(stars(net))
