"""The product critic: its formula, and what the norms are for."""

import pytest
import torch
import torch.nn.functional as F

from starlayers.rl import ProductTrunk


@pytest.mark.parametrize("norm", ["layer", "rms", "none"])
def test_the_first_layer_is_the_formula(norm):
    trunk = ProductTrunk(3, 2, [8], act="gelu", norm=norm).double()
    s, a = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    u, v = trunk.state(s), trunk.action(a)
    if norm == "layer":
        u, v = F.layer_norm(u, (8,)), F.layer_norm(v, (8,))
    if norm == "rms":
        u, v = F.rms_norm(u, (8,)), F.rms_norm(v, (8,))
    x = torch.cat([s, a], -1)
    torch.testing.assert_close(trunk(x), F.gelu(u) * v + trunk.both(x))


def gradient_in_the_action(norm, scale):
    torch.manual_seed(0)
    trunk = ProductTrunk(3, 2, [64], act="relu", norm=norm)
    s = scale * torch.randn(256, 3)
    a = torch.randn(256, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(trunk(torch.cat([s, a], -1)).sum(-1).sum(), a)
    return grad.norm(dim=-1).mean().item()


def test_the_norm_bounds_the_gradient_in_the_action():
    # the branch of the state multiplies it: without a norm it grows with the state
    assert gradient_in_the_action("none", 100) > 20 * gradient_in_the_action("none", 1)
    assert gradient_in_the_action("layer", 100) < 2 * gradient_in_the_action("layer", 1)


def test_deeper_trunks_go_on_with_stars():
    trunk = ProductTrunk(3, 2, [8, 6, 4])
    assert trunk.out_features == 4
    assert [type(m).__name__ for m in trunk.tail] == ["PackedStar", "LayerNorm"] * 2


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"needs a layer for its product: net_arch=\[\] has none"):
        ProductTrunk(3, 2, [])
    with pytest.raises(
        ValueError, match="unknown norm 'batch', choose one of layer, rms or 'none'"
    ):
        ProductTrunk(3, 2, [8], norm="batch")
