"""StarNet copied, compiled, exported, transformed, and in other layouts and precisions."""

import copy
import io
import pickle

import pytest
import torch
from torch.export import Dim

from starlayers import use_backend
from starlayers.backend import fused_mlp_blocker
from starlayers.vision import starnet_s050

from .util import (
    assert_same_tensors,
    grads,
    image,
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
    assert fused_mlp_blocker(block.mlp, torch.zeros(1, 5, 5, 8)) is None
    with use_backend("auto"):
        got = loss_and_grads(model, x)
        with torch.no_grad():
            got_inference = model.eval()(x)
    with use_backend("eager"):
        assert fused_mlp_blocker(block.mlp, torch.zeros(1, 5, 5, 8)) is not None
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
