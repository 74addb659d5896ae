"""Portable copies: the values of the model, convolutions in NCHW, and blocks that stay."""

import copy

import pytest
import torch
from torch import nn

from starlayers import StarMLP, use_backend
from starlayers.coefficients.modules import (
    DynamicStarMLP,
    RankStarMLP,
    ScaledStarMLP,
    SumMLP,
)
from starlayers.vision import DemoNet, StarBlock2d, portable
from starlayers.vision.deploy.convolutions import ConvStarBlock, converted

from ..util import assert_same_tensors, image, learned, randomise, relative_error, snapshot, tiny


def with_mlp(kind, **options):
    """Return a layer for `mlp_layer=` that adds options, such as an offset."""
    return lambda dim, hidden, **given: kind(dim, hidden, **{**given, **options})


MLPS = {
    "star": StarMLP,
    "offset": with_mlp(StarMLP, offset=1.0),
    "near_linear": with_mlp(StarMLP, offset=0.5, init="near_linear"),
    "recompute": with_mlp(StarMLP, recompute=True),
    "sum": SumMLP,
    "scaled": ScaledStarMLP,
    "scaled_offset": with_mlp(ScaledStarMLP, offset=1.0),
    "rank_2": RankStarMLP,
    "rank_3_offset": with_mlp(RankStarMLP, rank=3, offset=1.0),
    "rank_1": with_mlp(RankStarMLP, rank=1),
}


@pytest.mark.parametrize("mlp", MLPS)
def test_every_known_mlp_becomes_convolutions_of_the_same_values(mlp):
    model, x = learned(tiny(mlp_layer=MLPS[mlp])).eval(), image(2, 3, 40, 24)
    made, kept = converted(model)
    assert kept == {}
    blocks = [m for stage in made.stages for m in stage[1:]]
    assert [type(b) for b in blocks] == [ConvStarBlock] * 3
    assert not any(isinstance(m, nn.BatchNorm2d) for m in made.modules())
    assert [n for n, m in made.named_modules() if isinstance(m, nn.Linear)] == ["head"]
    with torch.no_grad():
        assert relative_error(made(x), model(x)) < 2e-6


@pytest.mark.parametrize("act", [None, "gelu", "silu", "relu6", "squared_relu"])
def test_activations_are_those_of_the_table(act):
    model, x = tiny(act=act).eval(), image(2, 3, 24, 24)
    made, kept = converted(model)
    assert kept == {}
    with torch.no_grad():
        assert relative_error(made(x), model(x)) < 2e-6


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_bias_offset_and_layer_scale_of_a_block_are_folded(bias, offset, scale):
    mlp = StarMLP(8, 12, bias=bias, offset=offset)
    block = StarBlock2d(8, 3, mlp=mlp, layer_scale=scale).eval()
    for m in block.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            nn.init.normal_(m.weight, std=0.3)
    if scale:
        nn.init.normal_(block.gamma)
    made, x = portable(block), image(2, 8, 9, 9)
    assert isinstance(made, ConvStarBlock)
    # norms give g a bias; f1 and f2 have one only where something is to be added
    assert [m.bias is not None for m in (made.f1, made.f2)] == [bias, bias or offset > 0]
    with torch.no_grad():
        assert relative_error(made(x), block(x)) < 2e-6


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-14), (torch.bfloat16, 3e-2)])
def test_a_copy_keeps_the_dtype(dtype, limit):
    model, x = tiny().to(dtype).eval(), image(2, 3, 24, 24, dtype=dtype)
    made, kept = converted(model)
    assert (kept, {p.dtype for p in made.parameters()}) == ({}, {dtype})
    with torch.no_grad():
        assert relative_error(made(x).double(), model(x).double()) < limit


def test_the_model_stays_as_it_was_to_the_last_bit():
    model, x = tiny(drop_rate=0.1).train(), image(2, 3, 24, 24)
    before, modules = snapshot(model), dict(model.named_modules())
    with torch.no_grad():
        want = copy.deepcopy(model).eval()(x)
    made = portable(model)
    assert (model.training, made.training) == (True, False)
    assert dict(model.named_modules()) == modules
    assert_same_tensors(snapshot(model), before)
    for p in made.parameters():  # the copy has memory of its own
        p.data.zero_()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), want, rtol=0, atol=0)


def test_features_are_those_of_the_model_and_keep_nchw():
    model, x = tiny().eval(), image(2, 3, 33, 47)
    made = portable(model)
    with torch.no_grad():
        got, maps = made.forward_intermediates(x)
        want, wanted = model.forward_intermediates(x)
        pairs = [(got, want), *zip(maps, wanted, strict=True)]
    assert max(relative_error(a, b) for a, b in pairs) < 2e-6
    assert all(a.is_contiguous() and not b.is_contiguous() for a, b in pairs)
    assert isinstance(made, type(model))


def test_a_fused_model_and_a_copy_of_a_copy_are_the_same():
    model, x = tiny().eval(), image(2, 3, 24, 24)
    with torch.no_grad():
        want = portable(model)(x)
        again = portable(portable(model))
        fused = portable(copy.deepcopy(model).fuse())
        for other in (again, fused):
            torch.testing.assert_close(other(x), want, rtol=0, atol=0)


def test_starnets_inside_other_modules_are_converted():
    model, x = nn.Sequential(tiny(), nn.Softmax(1)).eval(), image(2, 3, 24, 24)
    made, kept = converted(model)
    assert (kept, type(made[0].stages[1][2])) == ({}, ConvStarBlock)
    with torch.no_grad():
        assert relative_error(made(x), model(x)) < 2e-6


def test_tracers_record_the_copy():
    model, x = portable(tiny().eval()), image(2, 3, 24, 24)
    with torch.no_grad():
        want = model(x)
        for traced in (torch.fx.symbolic_trace(model), torch.jit.trace(model, x)):
            torch.testing.assert_close(traced(x), want, rtol=0, atol=0)
        torch.testing.assert_close(torch.jit.script(model)(x), want, rtol=0, atol=0)


class Doubled(StarMLP):
    """Star MLP of a user, with a forward of its own."""

    def forward(self, x, residual=None):
        return 2 * super().forward(x, residual)


class Wrapped(nn.Linear):
    """Linear layer of an adapter library."""


def hooked(block):
    block.register_forward_hook(lambda m, args, y: 2 * y)


def hooked_mlp(block):
    block.mlp.register_forward_hook(lambda m, args, y: 2 * y)


def wrapped(block):
    f1 = block.mlp.f1
    block.mlp.f1 = Wrapped(f1.in_features, f1.out_features)


def parametrised(block):
    nn.utils.parametrizations.weight_norm(block.mlp.f2)


def other_products(block):
    own = block.mlp.products
    block.mlp.products = lambda x: 2 * own(x)


def hooked_pre(block):
    block.pre.register_forward_hook(lambda m, args, y: 2 * y)


KEPT = {
    "dynamic": (lambda b: setattr(b, "mlp", DynamicStarMLP(8, 16)), "for a DynamicStarMLP"),
    "own": (lambda b: setattr(b, "mlp", Doubled(8, 16)), "no convolutions are known for a Doubled"),
    "hook": (hooked, "StarBlock2d has hooks or a forward of its own"),
    "hook of the mlp": (hooked_mlp, "the StarMLP has hooks"),
    "wrapped": (wrapped, "f1 is a Wrapped, not nn.Linear"),
    "parametrised": (parametrised, "f2 is parametrised"),
    "products": (other_products, r"as convolutions it differs by \d"),
    "hook of pre": (hooked_pre, "pre or post was replaced or has hooks"),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_has_no_form_as_convolutions_stays_and_says_why(case):
    change, reason = KEPT[case]
    model, x = tiny(), image(2, 3, 24, 24)
    change(model.stages[0][1])
    if case == "dynamic":
        nn.init.normal_(model.stages[0][1].mlp.gate[-1].weight)
    model.eval()
    made, kept = converted(model)
    assert list(kept) == ["stages.0.1"]
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(kept["stages.0.1"])
    assert type(made.stages[0][1]) is StarBlock2d
    assert type(made.stages[1][1]) is ConvStarBlock
    with torch.no_grad(), use_backend("eager"):
        assert relative_error(made(x), model(x)) < 2e-6


def test_nan_is_no_agreement():
    model = tiny().eval()
    model.stages[0][1].mlp.g.weight.data.fill_(float("nan"))
    _, kept = converted(model)
    assert kept == {"stages.0.1": "as convolutions it differs by nan"}


def test_what_has_no_star_blocks_is_copied_as_it_is():
    net, x = randomise(DemoNet(1, 8, num_classes=3, patch_size=4)).eval(), image(2, 3, 8, 8)
    made, kept = converted(net)
    with torch.no_grad():
        torch.testing.assert_close(made(x), net(x), rtol=0, atol=0)
    assert (kept, made is net) == ({}, False)


def test_only_modules_have_portable_copies():
    with pytest.raises(TypeError, match="model must be a module, got str"):
        portable("net.onnx")


def test_a_block_names_what_it_computes():
    made = portable(tiny(mlp_layer=RankStarMLP, act="gelu"))
    assert made.stages[0][1].extra_repr() == "act='gelu', rank=2"
