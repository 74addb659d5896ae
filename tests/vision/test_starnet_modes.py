"""StarNet copied, compiled, exported, in other layouts and precisions, and with coefficients."""

import copy
import io
import math
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.export import Dim

from starlayers import StarMLP, use_backend
from starlayers.coefficients import CoefficientPenalty, spectrum
from starlayers.coefficients.modules import DynamicStarMLP, RankStarMLP, ScaledStarMLP, SumMLP
from starlayers.vision import StarBlock2d, StarNet, starnet_s050

from .util import (
    assert_same_tensors,
    grads,
    image,
    learned,
    randomise,
    reference_features,
    relative_error,
    snapshot,
    tiny,
    tiny_timm,
)


def loss_and_grads(model, x, run=None):
    x = x.clone().requires_grad_()
    y = (model if run is None else run)(x)
    y.square().mean().backward()
    return {"y": y.detach(), "x": x.grad, **grads(model)}


def assert_close_grads(got, want, tolerance=1e-4):
    assert got.keys() == want.keys()
    for key, value in want.items():
        weight = want.get(key.replace("bias", "weight"), value)
        scale = torch.maximum(value.abs().max(), weight.abs().max())
        assert (got[key] - value).abs().max() <= tolerance * scale, key


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("weights", ["weights_as_made", "weights_channels_last"])
def test_layouts_give_equal_values(weights, train):
    model, x = tiny(act="silu").train(train), image(4, 3, 20, 12)
    other = copy.deepcopy(model)
    if weights == "weights_channels_last":
        other = other.to(memory_format=torch.channels_last)
    want = loss_and_grads(model, x)
    got = loss_and_grads(other, x.contiguous(memory_format=torch.channels_last))
    assert_close_grads(got, want)


def test_features_come_in_channels_last():
    y = tiny().eval().forward_features(image(2, 3, 32, 32))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, reference_features(tiny().eval(), image(2, 3, 32, 32)))


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch_save": lambda m: torch.load(_saved(m), weights_only=False),
}


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("fused", [False, True], ids=["as_trained", "fused"])
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_are_equal_and_independent(duplicate, fused):
    model, x = tiny(drop_path_rate=0.1).eval(), image(2, 3, 16, 16)
    if fused:
        model.fuse()
    want, before = model(x), snapshot(model)
    other = duplicate(model)
    torch.testing.assert_close(other(x), want, rtol=0, atol=0)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert_same_tensors(snapshot(model), before)


def test_state_dict_round_trip():
    source, target, x = tiny(1).eval(), tiny(2).eval(), image(2, 3, 16, 16)
    assert relative_error(target(x), source(x)) > 0.1
    target.load_state_dict(source.state_dict())
    torch.testing.assert_close(target(x), source(x), rtol=0, atol=0)


def test_bfloat16_autocast_is_as_near_as_timms():
    ours, x = tiny().eval(), image(4, 3, 32, 32)
    theirs, exact = tiny_timm(ours), tiny().eval().double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        got, want = ours(x), theirs(x)
    assert got.dtype == want.dtype == torch.bfloat16
    assert relative_error(got.double(), exact) < 2 * relative_error(want.double(), exact)
    ours.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(x).float().square().mean()
    loss.backward()
    exact = loss_and_grads(tiny().double(), x.double())
    for key in ("stem.conv.weight", "stages.1.2.mlp.f1.weight", "head.weight"):
        assert relative_error(grads(ours)[key].double(), exact[key]) < 0.2, key


def test_double_precision():
    model, x = tiny(dtype=torch.float64).eval(), image(2, 3, 24, 24, dtype=torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    want = model.head(reference_features(model, x).mean((2, 3)))
    assert relative_error(model(x), want) < 1e-12
    assert relative_error(tiny().eval()(x.float()).double(), want) < 1e-5


@pytest.mark.parametrize(
    "train", [pytest.param(True, marks=pytest.mark.slow), False], ids=["train", "eval"]
)
def test_compiled_in_one_graph(train):
    torch._dynamo.reset()
    model, x = tiny(depths=(1, 1)).train(train), image(3, 3, 12, 12)
    other = copy.deepcopy(model)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    assert_close_grads(loss_and_grads(other, x, compiled), loss_and_grads(model, x), 1e-5)
    for key, value in snapshot(model).items():
        torch.testing.assert_close(other.state_dict()[key], value, msg=key)


@pytest.mark.parametrize(
    "fused", [False, pytest.param(True, marks=pytest.mark.export)], ids=["as_trained", "fused"]
)
@pytest.mark.usefixtures("fuse_everything")
def test_exported_graph_is_plain_aten(fused):
    model, x = tiny(depths=(1, 1)).eval(), image(2, 3, 16, 16)
    if fused:
        model.fuse()
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("batch")},))
    calls = [n.target for n in exported.graph.nodes if n.op == "call_function"]
    ops = [f for f in calls if isinstance(f, torch._ops.OpOverload)]
    assert {f.namespace for f in ops} == {"aten"}
    assert {f.__name__ for f in calls if f not in ops} <= {"getitem", "_assert_fn", "sym_size"}
    for n in (2, 5):
        x = image(n, 3, 16, 16)
        torch.testing.assert_close(exported.module()(x), model(x))


def test_meta_device_follows_the_real_shapes_and_strides():
    real, meta, x = tiny().eval(), tiny().to("meta").eval(), image(2, 3, 33, 20)
    for run in (lambda m, x: m(x), lambda m, x: m.forward_features(x)):
        got, want = run(meta, x.to("meta")), run(real, x)
        assert (got.device.type, got.dtype) == ("meta", want.dtype)
        assert (got.shape, got.stride()) == (want.shape, want.stride())


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax"])
@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.usefixtures("fuse_everything")
def test_no_images(backend, pool):
    model, x = tiny(global_pool=pool).eval(), image(3, 3, 16, 16)[:0].requires_grad_()
    with use_backend(backend):
        y = model(x)
        y.sum().backward()
    assert (y.shape, x.grad.shape) == ((0, 10), (0, 3, 16, 16))
    for name, grad in grads(model).items():
        assert torch.equal(grad, torch.zeros_like(grad)), name


def test_batches_do_not_mix_in_eval():
    model, x = tiny().eval(), image(5, 3, 20, 20)
    torch.testing.assert_close(model(x), torch.cat([model(one[None]) for one in x]))


def test_per_sample_gradients_by_functional_transforms():
    model, x = tiny(act="silu").eval(), image(3, 3, 12, 12)
    params = {k: v.detach() for k, v in model.named_parameters()}

    def loss(params, x):
        return torch.func.functional_call(model, params, (x[None],)).square().sum()

    got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, x)
    for i, one in enumerate(x):
        model.zero_grad()
        model(one[None]).square().sum().backward()
        assert_close_grads({k: v[i] for k, v in got.items()}, grads(model))


@pytest.mark.parametrize("act", ["relu6", "silu", None], ids=str)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.usefixtures("fuse_everything")
def test_the_fused_op_equals_eager(train, act):
    model, x = tiny(act=act, stem_stride=1).train(train), image(3, 3, 32, 32)
    other, block = copy.deepcopy(model), model.stages[0][1]
    assert block.mlp.plan(torch.zeros(1, 5, 5, 8)).fused
    with use_backend("auto"):
        got = loss_and_grads(model, x)
        with torch.no_grad():
            got_inference = model.eval()(x)
    with use_backend("eager"):
        assert not block.mlp.plan(torch.zeros(1, 5, 5, 8)).fused
        want = loss_and_grads(other, x)
        with torch.no_grad():
            want_inference = other.eval()(x)
    assert relative_error(got["y"], want["y"]) < 1e-5
    assert relative_error(got_inference, want_inference) < 1e-5
    assert_close_grads(got, want)


@pytest.mark.usefixtures("fuse_everything")
def test_the_fused_op_in_a_published_network():
    model, x = randomise(starnet_s050(num_classes=5)).eval(), image(2, 3, 64, 64)
    with torch.no_grad():
        with use_backend("eager"):
            want = model(x)
        assert relative_error(model(x), want) < 1e-5
        assert relative_error(model.fuse()(x), want) < 1e-5


# --- learned and dynamic coefficients in the blocks of StarNet and in StarNet


SMALL = {"depths": (1, 2), "stage_strides": (2, 2), "num_classes": 3}


def stars(model):
    return [m for m in model.modules() if isinstance(m, StarMLP)]


@pytest.mark.parametrize("make", [ScaledStarMLP, DynamicStarMLP])
def test_a_block_of_learned_factors_computes_its_parts(make):
    block = learned(StarBlock2d(6, 3, mlp=make(6, 12))).eval()
    x = image(2, 6, 9, 5)
    pixels = block.pre(x.permute(0, 2, 3, 1))
    want = block.post(block.mlp._definition(pixels)).permute(0, 3, 1, 2)
    torch.testing.assert_close(block(x), x + want)
    if make is DynamicStarMLP:  # one factor for all pixels of an image, another for the next
        torch.testing.assert_close(block(x)[:1], block(x[:1]))
        mean = pixels.mean((1, 2))
        factor = 1 + torch.tanh(block.mlp.gate(mean))
        want = factor[:, None, None] * block.mlp.scale * (block.mlp.shift + block.mlp.f2(pixels))
        torch.testing.assert_close(block.mlp._scaled(pixels, block.mlp.f2(pixels)), want)


@pytest.mark.parametrize(("dim", "width"), [(6, 8), (128, 8), (144, 9), (320, 20)])
def test_the_gate_of_a_dynamic_star_is_a_sixteenth_as_wide_and_at_least_8(dim, width):
    gate = StarBlock2d(dim, 3, mlp=DynamicStarMLP(dim, dim, device="meta")).mlp.gate
    assert [tuple(gate[i].weight.shape) for i in (0, 2)] == [(width, dim), (dim, width)]


@pytest.mark.parametrize("mlp_layer", [ScaledStarMLP, DynamicStarMLP])
def test_a_net_starts_as_one_without_factors(mlp_layer):
    torch.manual_seed(0)
    fixed = StarNet(8, **SMALL).eval()
    net = StarNet(8, **SMALL, mlp_layer=mlp_layer).eval()
    missing, unexpected = net.load_state_dict(fixed.state_dict(), strict=False)
    assert unexpected == []
    assert len(missing) == 3 * (2 if mlp_layer is ScaledStarMLP else 6)
    x = image(2, 3, 32, 32)
    torch.testing.assert_close(net(x), fixed(x))


def assert_unit_factors(net):
    for star in stars(net):
        assert star.scale.tolist() == [1.0] * star.hidden_features
        assert star.shift.tolist() == [0.0] * star.hidden_features
        assert star.gate[0].weight.std() > 0.01
        assert not star.gate[2].weight.any()
        assert not star.gate[2].bias.any()


def test_the_start_survives_init_weights():
    net = StarNet(8, **SMALL, mlp_layer=DynamicStarMLP)
    assert_unit_factors(net)
    learned(net).init_weights()
    assert_unit_factors(net)


def test_the_start_survives_init_weights_after_meta():
    net = StarNet(8, **SMALL, mlp_layer=DynamicStarMLP, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(math.nan)
    net.init_weights()
    assert_unit_factors(net)
    plain, x = StarNet(8, **SMALL).eval(), image(2, 3, 32, 32)
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if k in plain.state_dict()})
    torch.testing.assert_close(net.eval()(x), plain(x))


def test_init_weights_starts_every_layer_of_several_products_again():
    net = StarNet(8, **SMALL, mlp_layer=partial(RankStarMLP, rank=2), device="meta")
    net.to_empty(device="cpu")
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(math.nan)
    torch.manual_seed(0)
    net.init_weights()
    for mlp in (m for m in net.modules() if isinstance(m, RankStarMLP)):
        for layer in (mlp.star.f1, mlp.star.f2, mlp.g):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.2)
            assert layer.bias.abs().max() <= layer.in_features**-0.5


def test_a_second_branch_that_starts_smaller_does_so_after_init_weights_too():
    net = StarNet(8, **SMALL, mlp_layer=partial(StarMLP, offset=1, init="near_linear"))
    net.init_weights()
    for star in stars(net):
        assert star.f1.weight.std().item() == pytest.approx(0.02, rel=0.2)
        assert star.f2.weight.std().item() == pytest.approx(0.002, rel=0.2)
        assert star.f2.bias.abs().max() <= 0.1 * star.in_features**-0.5


@pytest.mark.parametrize(
    ("before", "after"),
    [(ScaledStarMLP, StarMLP), (DynamicStarMLP, DynamicStarMLP), (SumMLP, SumMLP)],
)
def test_a_fused_net_has_its_scales_folded_and_keeps_the_other_mlps(before, after):
    net = learned(StarNet(8, **SMALL, mlp_layer=before)).eval()
    assert {type(star) for star in stars(net)} == {before}
    x = image(2, 3, 32, 32)
    y = net(x)
    torch.testing.assert_close(net.fuse()(x), y, rtol=1e-4, atol=1e-4)
    assert {type(star) for star in stars(net)} == {after}
    assert not [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    named = any("scale" in name or "shift" in name for name in net.state_dict())
    assert named is (after is DynamicStarMLP)


def test_what_makes_an_mlp_gets_the_place_of_the_net_only_if_it_is_given():
    calls = []

    def layer(*args, **options):
        calls.append((args, options))
        return StarMLP(*args, **options)

    StarNet(8, (1, 1), stage_strides=(2, 2), mlp_ratio=3, act="gelu", mlp_layer=layer)
    assert calls == [((8, 24), {"act": "gelu"}), ((16, 48), {"act": "gelu"})]
    calls.clear()
    StarNet(4, (1,), stage_strides=(2,), mlp_layer=layer, device="meta", dtype=torch.float64)
    place = {"device": "meta", "dtype": torch.float64}
    assert calls == [((4, 16), {"act": "relu6", **place})]


def test_factories_take_the_class_and_training_moves_its_factors():
    net = starnet_s050(num_classes=2, mlp_layer=DynamicStarMLP).train()
    loss = nn.functional.cross_entropy(net(image(4, 3, 32, 32)), torch.tensor([0, 1, 0, 1]))
    (loss + CoefficientPenalty(net)()).backward()
    for star in stars(net):
        for p in (star.scale, star.shift, star.gate[2].weight):
            assert p.grad.any()
    assert len(spectrum(net, entropy=False)) == len(stars(net))
