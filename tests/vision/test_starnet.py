"""Arguments and methods of StarNet, against timm's network and one written out by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.starnet import StarNet as TimmStarNet
from torch import nn

from starlayers.coefficients.modules import SumMLP
from starlayers.vision import StarNet

from .util import (
    ACTS,
    TINY,
    assert_same_tensors,
    image,
    randomise,
    reference_features,
    relative_error,
    snapshot,
    tiny,
    tiny_timm,
)


@pytest.mark.parametrize("act", ACTS, ids=str)
def test_activation_of_stem_and_blocks(act):
    model, x = tiny(act=act).eval(), image(2, 3, 32, 32)
    torch.testing.assert_close(model.forward_features(x), reference_features(model, x, act))


@pytest.mark.parametrize("act", ["relu6", None], ids=str)
def test_blocks_of_sums_add_the_branches(act):
    model, x = tiny(act=act, mlp_layer=SumMLP).eval(), image(2, 3, 32, 32)
    want = reference_features(model, x, act, "sum")
    torch.testing.assert_close(model.forward_features(x), want)
    assert relative_error(reference_features(model, x, act, "mul"), want) > 0.1


@settings(deadline=None, max_examples=40, derandomize=True)
@given(size=st.tuples(st.integers(1, 40), st.integers(1, 40)), n=st.integers(1, 3))
def test_any_image_size_equals_timm(size, n):
    ours = tiny().eval()
    theirs, x = tiny_timm(ours), image(n, 3, *size)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    stem_stride=st.integers(1, 4),
    stage_strides=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    size=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    kernel_size=st.sampled_from([1, 3, 5]),
)
def test_strides_set_size_reduction_and_values(stem_stride, stage_strides, size, kernel_size):
    n = len(stage_strides)
    model = tiny(
        depths=(1,) * n,
        stem_stride=stem_stride,
        stage_strides=stage_strides,
        kernel_size=kernel_size,
        base_dim=4,
    ).eval()
    x, maps = image(1, 3, *size), []
    y, maps = model.forward_intermediates(x)
    torch.testing.assert_close(y, reference_features(model, x), rtol=1e-4, atol=1e-5)
    reduction = stem_stride
    for i, stride in enumerate(stage_strides):
        reduction *= stride
        info = {"num_chs": 4 * 2**i, "reduction": reduction, "module": f"stages.{i}"}
        assert model.feature_info[i] == info
        assert maps[i].shape == (1, 4 * 2**i, *(-(-s // reduction) for s in size))


POOLED = {
    "avg": lambda x: x.mean((2, 3)),
    "max": lambda x: x.amax((2, 3)),
    "avgmax": lambda x: (x.mean((2, 3)) + x.amax((2, 3))) / 2,
    "": lambda x: x,
}


@pytest.mark.parametrize("classes", [0, 10], ids=["no_head", "ten_classes"])
@pytest.mark.parametrize("pool", POOLED, ids=["avg", "max", "avgmax", "none"])
def test_pooling(pool, classes):
    classes = classes if pool else 0
    ours, x = tiny(num_classes=classes, global_pool=pool).eval(), image(2, 3, 20, 28)
    theirs, features = tiny_timm(ours, global_pool=pool), reference_features(ours, x)
    pooled = POOLED[pool](features)
    want = F.linear(pooled, ours.head.weight, ours.head.bias) if classes else pooled
    for got in (ours(x), theirs(x), ours.forward_head(features)):
        torch.testing.assert_close(got, want)
    for model in (ours, theirs):
        torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled)
    torch.testing.assert_close(ours.forward_features(x), features)


@pytest.mark.parametrize("in_chans", [1, 4])
def test_image_channels(in_chans):
    ours, x = tiny(in_chans=in_chans).eval(), image(2, in_chans, 24, 24)
    torch.testing.assert_close(ours(x), tiny_timm(ours)(x))


@pytest.mark.parametrize("ratio", [1, 2.5, 3], ids=str)
def test_mlp_ratio(ratio):
    model, x = tiny(mlp_ratio=ratio).eval(), image(2, 3, 24, 24)
    assert model.stages[1][1].mlp.f1.weight.shape == (16 * ratio, 16)
    torch.testing.assert_close(model.forward_features(x), reference_features(model, x))


@pytest.mark.parametrize(
    "options", [{"drop_rate": 0.5}, {"drop_path_rate": 0.6}], ids=["dropout", "drop_path"]
)
def test_dropout_and_drop_path_are_timms(options):
    ours, x = tiny(**options).train(), image(8, 3, 16, 16)
    theirs, none = tiny_timm(ours, **options), tiny().train()
    torch.manual_seed(4)
    got = ours(x)
    torch.manual_seed(4)
    want = theirs(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert relative_error(none(x), want) > 0.1
    ours, none = tiny(**options).eval(), tiny().eval()
    torch.testing.assert_close(ours(x), none(x), rtol=0, atol=0)


def test_drop_path_rises_linearly_over_the_blocks():
    args = {"base_dim": 4, "depths": [1, 2, 4, 1], "drop_path_rate": 0.35}
    rates = [
        [getattr(block.drop_path, name, 0.0) for stage in model.stages for block in stage[1:]]
        for model, name in ((StarNet(**args), "p"), (TimmStarNet(**args), "drop_prob"))
    ]
    assert rates[0] == pytest.approx([0.05 * i for i in range(8)])
    assert rates[0] == pytest.approx(rates[1])


INDICES = {
    "all": None,
    "last": 1,
    "last_two": 2,
    "one_number": [0],
    "negative": (-1,),
    "mixed": [-2, 2],
    "unordered": [2, 0],
    "repeated": [1, 1],
}


@pytest.mark.parametrize("stop_early", [False, True], ids=["to_the_end", "stop_early"])
@pytest.mark.parametrize("norm", [False, True], ids=["raw", "norm"])
@pytest.mark.parametrize("indices", INDICES.values(), ids=INDICES)
def test_intermediates_equal_timms(indices, norm, stop_early):
    shape = {"depths": (1, 1, 1), "base_dim": 4}
    ours, x = tiny(**shape, stage_strides=(2, 2, 2)).eval(), image(2, 3, 40, 24)
    theirs, options = tiny_timm(ours, **shape), {"norm": norm, "stop_early": stop_early}
    got, maps = ours.forward_intermediates(x, indices, **options)
    want, their_maps = theirs.forward_intermediates(x, indices, **options)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(maps, their_maps)
    only = ours.forward_intermediates(x, indices, intermediates_only=True, **options)
    torch.testing.assert_close(only, maps, rtol=0, atol=0)


def test_stop_early_runs_no_later_stage():
    model, ran = tiny().eval(), []
    model.stages[1][0].register_forward_hook(lambda *_: ran.append(1))
    model.forward_intermediates(image(1, 3, 16, 16), [0], stop_early=True)
    assert ran == []
    model.forward_intermediates(image(1, 3, 16, 16), [0])
    assert ran == [1]


def test_reset_classifier_gives_a_fresh_head_and_keeps_the_rest():
    model, x = tiny(dtype=torch.float64).eval(), image(2, 3, 16, 16, dtype=torch.float64)
    before, pooled = snapshot(model), model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(400)
    head = model.get_classifier()
    assert head is model.head
    assert (head.weight.dtype, head.training, model.num_classes) == (torch.float64, False, 400)
    assert head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not head.bias.any()
    torch.testing.assert_close(model(x), pooled @ head.weight.T)
    body = {k: v for k, v in snapshot(model).items() if not k.startswith("head.")}
    assert_same_tensors(body, {k: v for k, v in before.items() if not k.startswith("head.")})
    model.reset_classifier(0, "max")
    assert isinstance(model.get_classifier(), nn.Identity)
    torch.testing.assert_close(model(x), model.forward_features(x).amax((2, 3)))
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), model.forward_features(x))
    with pytest.raises(ValueError, match="num_classes=5 needs a global_pool"):
        model.reset_classifier(5, "")
    assert (model.global_pool.pool_type, model.num_classes) == ("", 0)
    model.reset_classifier(5)  # a head needs a pool
    assert (model(x).shape, model.global_pool.pool_type) == ((2, 5), "avg")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"act": None, "mlp_layer": SumMLP},
        {"num_classes": 0, "global_pool": ""},
        {"in_chans": 1},
    ],
    ids=["default", "sum", "features", "grey"],
)
def test_fuse_keeps_the_function_and_is_idempotent(options, layout):
    model = tiny(**options).train()
    x = image(2, model.in_chans, 21, 32)
    if layout == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    unfused = copy.deepcopy(model).eval()
    assert model.fuse() is model
    assert not model.training
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert relative_error(model(x), unfused(x)) < 1e-5
    features, want = model.forward_features(x), unfused.forward_features(x)
    assert relative_error(features, want) < 1e-5
    for got, map_ in zip(
        model.forward_intermediates(x, norm=True)[1],
        unfused.forward_intermediates(x, norm=True)[1],
        strict=True,
    ):
        assert relative_error(got, map_) < 1e-5
    once = snapshot(model)
    assert_same_tensors(snapshot(model.fuse()), once)


def test_fused_weights_load_into_a_fused_model():
    fused, other, x = tiny(1).fuse(), tiny(2).fuse(), image(2, 3, 16, 16)
    other.load_state_dict(fused.state_dict())
    torch.testing.assert_close(other(x), fused(x), rtol=0, atol=0)


def kind_statistics(model):
    """Standard deviation and largest value of each kind of parameter of a fresh model."""
    kinds = {"depthwise": [], "conv": [], "head": []}
    for m in model.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            kind = "depthwise" if getattr(m, "groups", 1) > 1 else "conv"
            kinds["head" if m is model.head else kind].append(m.weight.flatten())
    return {k: torch.cat(v) for k, v in kinds.items()}


@pytest.mark.parametrize("build", [StarNet, TimmStarNet], ids=["ours", "timm"])
def test_initial_weights_are_a_truncated_normal(build):
    torch.manual_seed(0)
    model = build(
        16, [2, 2], num_classes=500, **({"stage_strides": (2, 2)} if build is StarNet else {})
    )
    for kind, weights in kind_statistics(model).items():
        assert weights.std().item() == pytest.approx(0.02, rel=0.03), kind
        assert abs(weights.mean().item()) < 0.02 * 4 / len(weights) ** 0.5, kind
        assert 0.06 < weights.abs().max() < 0.12, kind
    assert not model.head.bias.any()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            assert (m.weight == 1).all()
            assert not m.bias.any()
            assert not m.running_mean.any()
            assert (m.running_var == 1).all()
        elif isinstance(m, nn.Conv2d | nn.Linear) and m is not model.head:
            bound = m.weight[0].numel() ** -0.5  # PyTorch's default, uniform
            assert 0.7 * bound < m.bias.abs().max() <= bound


def test_seeds_reproduce():
    models = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        models.append(StarNet(**TINY, stage_strides=(2, 2)))
    assert_same_tensors(snapshot(models[0]), snapshot(models[1]))
    assert not torch.equal(models[0].head.weight, models[2].head.weight)


def test_a_network_is_made_under_a_default_device():
    with torch.device("meta"):
        model = StarNet(**TINY, stage_strides=(2, 2), drop_path_rate=0.2)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model.stages[1][2].drop_path.p == pytest.approx(0.2)


def test_init_weights_after_to_empty():
    model = StarNet(**TINY, stage_strides=(2, 2), num_classes=10, device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    model.to_empty(device="cpu")
    for t in (*model.parameters(), *model.buffers()):
        t.data.fill_(float("nan") if t.is_floating_point() else 99)
    other = randomise(StarNet(**TINY, stage_strides=(2, 2), num_classes=10))
    for m in (model, other):
        torch.manual_seed(1)
        m.init_weights()
    assert_same_tensors(snapshot(model), snapshot(other))
    assert all(v.isfinite().all() for v in model.state_dict().values())
    torch.testing.assert_close(model.eval()(image(1, 3, 16, 16)), other.eval()(image(1, 3, 16, 16)))
