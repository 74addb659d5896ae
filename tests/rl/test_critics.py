"""The product critic: its formula, and what the norms are for."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from starlayers.rl import ProductTerm, ProductTrunk


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


def test_defaults_are_relu_and_layer_norm():
    trunk = ProductTrunk(3, 2, [8, 4])
    assert (trunk.act, trunk.in_features, trunk.out_features) == ("relu", 5, 4)
    kinds = [type(m) for m in (trunk.state_norm, trunk.action_norm)]
    assert kinds == [nn.LayerNorm, nn.LayerNorm]
    assert (trunk.tail[0].act, trunk.tail[0].in_features) == ("relu", 8)
    assert len(ProductTrunk(3, 2, [8]).tail) == 0


@pytest.mark.parametrize(
    ("norm", "kinds"),
    [("rms", ["PackedStar", "RMSNorm"]), ("none", ["PackedStar"])],
)
def test_the_norm_is_that_of_all_layers(norm, kinds):
    trunk = ProductTrunk(3, 2, [8, 8], norm=norm)
    assert [type(m).__name__ for m in trunk.tail] == kinds


@pytest.mark.parametrize("outputs", [1, 5])
def test_a_product_term_is_the_formula(outputs):
    q = nn.Linear(5, outputs).double()
    term = ProductTerm(q, 3, 2, outputs, 7)
    s, a = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    x = torch.cat([s, a], -1)
    assert torch.equal(term(x), q(x))
    nn.init.normal_(term.head.weight)
    torch.testing.assert_close(term(x), q(x) + term.head(term.state(s).tanh() * term.action(a)))
    assert term.head.bias is None
    assert term.head.weight.shape == (outputs, 7)
    assert {p.dtype for p in term.parameters()} == {torch.float64}


@pytest.mark.parametrize("training", [True, False])
def test_a_product_term_is_in_the_mode_of_its_network(training):
    assert ProductTerm(nn.Linear(5, 1).train(training), 3, 2, 1, 4).training is training
