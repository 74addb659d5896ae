"""The product critic, and the packed and stacked layers of the nets."""

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from starlayers import ACTIVATIONS, StarOp
from starlayers.rl import ProductTerm, ProductTrunk
from starlayers.rl.stack import GATE_GAIN, PackedStar, StarStack
from tests.helpers import randn


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


# --- packed and stacked star layers against `StarOp`, the definition


def reference(stack, k):
    """Net k of a stack as plain star ops."""
    ops = []
    for weight, bias in stack.layers():
        (w1, w2), (b1, b2) = weight[k].chunk(2, -1), bias[k, 0].chunk(2)
        op = StarOp(w1.shape[0], w1.shape[1], act=stack.act, offset=1.0).to(w1.dtype)
        for branch, w, b in ((op.f1, w1, b1), (op.f2, w2, b2)):
            branch.weight, branch.bias = nn.Parameter(w.t().clone()), nn.Parameter(b.clone())
        ops.append(op.to(weight.dtype))
    return nn.Sequential(*ops)


@given(
    nets=st.integers(1, 3),
    ins=st.integers(1, 9),
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    batch=st.integers(1, 5),
    act=st.sampled_from(sorted(name for name in ACTIVATIONS if name)),
)
@settings(max_examples=40, deadline=None)
def test_a_stack_is_its_nets(nets, ins, widths, batch, act):
    torch.manual_seed(0)
    stack = StarStack(nets, ins, widths, act=act).double()
    x = torch.randn(batch, ins, dtype=torch.float64)
    y = stack(x)
    assert y.shape == (nets, batch, widths[-1])
    for k in range(nets):
        expected = reference(stack, k)(x)
        torch.testing.assert_close(y[k], expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(stack(x, only=k)[0], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("only", [None, 1])
def test_gradients_of_first_and_second_order(only):
    stack = StarStack(2, 3, [4, 2], act="tanh").double()
    x = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    own = list(stack.parameters())

    def run(x, *parameters):
        return torch.func.functional_call(
            stack, dict(zip(dict(stack.named_parameters()), parameters)), (x,), {"only": only}
        )

    assert torch.autograd.gradcheck(run, (x, *own))
    assert torch.autograd.gradgradcheck(run, (x, *own))


def test_the_gradient_of_one_net_leaves_the_others_alone():
    stack = StarStack(2, 3, [4], act="relu")
    stack(torch.randn(5, 3), only=1).sum().backward()
    for p in stack.parameters():
        assert p.grad[0].abs().max() == 0
        assert p.grad[1].abs().max() > 0


def test_a_packed_layer_is_a_star_op():
    layer, op = PackedStar(5, 7, act="gelu"), StarOp(5, 7, act="gelu", offset=1)
    with torch.no_grad():
        layer.f12.weight.copy_(torch.cat([op.f1.weight, op.f2.weight]))
        layer.f12.bias.copy_(torch.cat([op.f1.bias, op.f2.bias]))
    x = torch.randn(2, 3, 5)
    torch.testing.assert_close(layer(x), op(x))
    # its branches are one stock linear layer, which adapters and quantisers find
    assert [type(m) for m in layer.modules()] == [PackedStar, nn.Linear]
    assert list(layer.state_dict()) == ["f12.weight", "f12.bias"]


def star_of(weight, bias, x):
    """Compute `relu(h1) * (1 + h2)` of packed branches."""
    h1, h2 = (x @ weight.T + bias).chunk(2, -1)
    return h1.clamp(min=0) * (1 + h2)


def test_a_packed_layer_loads_the_state_dict_of_its_former_names():
    weight, bias, x = torch.randn(14, 5), torch.randn(14), torch.randn(3, 5)
    state = {"0.proj.weight": weight, "0.proj.bias": bias}
    net = nn.Sequential(PackedStar(5, 7, act="relu"))
    assert str(net.load_state_dict(state)) == "<All keys matched successfully>"
    torch.testing.assert_close(net(x), star_of(weight, bias, x))
    assert list(state) == ["0.proj.weight", "0.proj.bias"]  # the caller's is as it was
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.f12\.bias"):
        net.load_state_dict({"0.proj.weight": weight})
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.f12\.weight"):
        net.load_state_dict({"0.proj.weight": weight[1:], "0.proj.bias": bias})


def test_a_packed_layer_loads_the_state_dict_of_a_star_op():
    op, layer, x = StarOp(5, 7, act="tanh", offset=1), PackedStar(5, 7, act="tanh"), randn(3, 5)
    layer.load_state_dict(op.state_dict())
    torch.testing.assert_close(layer(x), op(x))


@pytest.mark.parametrize("children", [dict, OrderedDict])
def test_a_packed_layer_pickled_before_it_was_a_star_op_computes_the_same(children):
    proj, x = nn.Linear(5, 14), torch.randn(3, 5)
    state = {**nn.Module().__dict__, "in_features": 5, "out_features": 7, "act": "relu"}
    state["_modules"] = children(proj=proj)
    layer = PackedStar.__new__(PackedStar)
    layer.__setstate__(state)
    assert layer.f12 is proj
    torch.testing.assert_close(layer(x), star_of(proj.weight, proj.bias, x))
    again = pickle.loads(pickle.dumps(layer))
    assert repr(again) == repr(PackedStar(5, 7, act="relu"))
    assert torch.equal(again(x), layer(x))
    assert list(again.state_dict()) == ["f12.weight", "f12.bias"]
    layer.reset_branches(2**0.5)
    assert not layer.f12.bias.any()


@pytest.mark.parametrize(
    "make", [lambda: PackedStar(6, 4, act="tanh"), lambda: StarStack(2, 6, [4], act="tanh")]
)
def test_each_branch_is_orthogonal_by_itself(make):
    layer = make()
    layer.reset_branches(2**0.5)
    if isinstance(layer, PackedStar):
        branches = [layer.f12.weight.detach().chunk(2)]
        assert layer.f12.bias.abs().max() == 0
    else:
        ((weight, bias),) = layer.layers()
        branches = [[b.t() for b in net.chunk(2, -1)] for net in weight.detach()]
        assert bias.abs().max() == 0
        assert not torch.equal(branches[0][0], branches[1][0])
    for first, second in branches:
        torch.testing.assert_close(first @ first.t(), 2 * torch.eye(4), atol=1e-5, rtol=0)
        torch.testing.assert_close(
            second @ second.t(), GATE_GAIN**2 * torch.eye(4), atol=1e-5, rtol=0
        )


def test_copies_state_dicts_and_compilation(fresh_compiler):
    stack = StarStack(2, 3, [4, 4], act="relu")
    x = torch.randn(5, 3)
    other = StarStack(2, 3, [4, 4], act="relu")
    other.load_state_dict(stack.state_dict())
    assert list(stack.state_dict()) == ["weight0", "bias0", "weight1", "bias1"]
    for same in (copy.deepcopy(stack), other):
        assert torch.equal(same(x), stack(x))
    torch.testing.assert_close(torch.compile(stack, fullgraph=True)(x), stack(x))


def test_the_second_branch_starts_at_a_tenth():
    assert GATE_GAIN == 0.1


def test_a_stack_starts_as_linear_layers_do():
    torch.manual_seed(0)
    stack = StarStack(3, 100, [50, 20], act="relu")
    for (weight, bias), inputs in zip(stack.layers(), (100, 50)):
        bound = inputs**-0.5
        for p in (weight, bias):
            assert p.abs().max() <= bound
            assert p.abs().max() > 0.9 * bound
            assert p.mean().abs() < 0.2 * bound
    assert [tuple(w.shape) for w, _ in stack.layers()] == [(3, 100, 100), (3, 50, 40)]
    assert (stack.nets, stack.in_features, stack.out_features) == (3, 100, 20)


def test_layers_show_their_sizes():
    assert repr(StarStack(2, 3, [4, 5], act="gelu")) == "StarStack(2, 3, [4, 5], act='gelu')"
    packed = "3, 4, act='gelu', offset=1.0, packed=True"
    assert PackedStar(3, 4, act="gelu").extra_repr() == packed
