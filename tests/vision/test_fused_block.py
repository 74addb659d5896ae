"""Conditions of the fused block, and the algebra of its norms; its kernels have tests of their own.

Every condition is decided before a kernel is chosen, so that all of them can be tested on a CPU.
"""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

from starlayers import DropPath, StarMLP, plans, use_backend
from starlayers.coefficients.modules import RankStarMLP, ScaledStarMLP, SumMLP
from starlayers.kernels import registration
from starlayers.vision import StarBlock2d, fused_block, norms
from starlayers.vision.fused_block import plan
from starlayers.vision.layout import OnChannelsLast

from .util import image

NO_KERNEL = "no Triton kernel for device 'cpu'"


def pixels(channels=8, size=5, batch=2):
    return image(batch, size, size, channels)


def reason(block, x):
    """Return the reason in the error that the "triton" backend raises for `block` on `x`."""
    with use_backend("triton"), pytest.raises(RuntimeError) as error:
        plan(block, x)
    prefix, _, rest = str(error.value).partition("cannot serve this StarBlock2d: ")
    assert prefix
    return rest.rpartition("; use_backend")[0]


def test_the_backend_is_asked_first():
    block, x = StarBlock2d(8), pixels()
    block.mlp = nn.Identity()
    assert plan(block, x).reason == NO_KERNEL
    with use_backend("eager"):
        assert plan(block, x).reason == "the eager backend was asked for"
        assert plan(block, x.to("meta")).reason == "the eager backend was asked for"
    other = plan(block, x.to("meta")).reason  # a device that may have kernels
    assert other == "the MLP is no StarMLP but a Identity"


class Changed(StarMLP):
    pass


def hooked(module):
    module.register_forward_hook(lambda *_: None)


def reordered(block):
    block.post = OnChannelsLast(OrderedDict(reversed(list(block.post.named_children()))))


def replaced(name, **kwargs):
    """Replace a convolution of the block by one that differs in `kwargs`."""
    made = {"kernel_size": 3, "padding": 1, "groups": 8, **kwargs}

    def change(block):
        out_channels = made.pop("out_channels", 8)
        getattr(block, name).conv = nn.Conv2d(8, out_channels, **made)

    return change


CONV = "a convolution is hooked, changed or not depthwise with odd kernel and stride 1"
NORM = "a norm is hooked or a {} (needs BatchNorm2d or Identity)"
MLP = "the MLP is no StarMLP but a {}"
STRUCTURE = {
    "as_made": (lambda b: None, NO_KERNEL),
    "folded": (lambda b: b.eval().fuse(), NO_KERNEL),
    "same_convolution": (replaced("pre"), NO_KERNEL),
    "kernel_5": (replaced("post", kernel_size=5, padding=2), NO_KERNEL),
    "mlp_hooked": (lambda b: hooked(b.mlp), "the MLP is hooked or has another forward"),
    "mlp_subclass": (lambda b: setattr(b, "mlp", Changed(8)), MLP.format("Changed")),
    "pre_hooked": (lambda b: hooked(b.pre), "'pre' is hooked, wrapped or not just conv and bn"),
    "post_hooked": (lambda b: hooked(b.post), "'post' is hooked, wrapped or not just bn and conv"),
    "pre_replaced": (
        lambda b: setattr(b, "pre", nn.Identity()),
        "'pre' is hooked, wrapped or not just conv and bn",
    ),
    "layer_added": (
        lambda b: b.pre.add_module("act", nn.ReLU()),
        "'pre' is hooked, wrapped or not just conv and bn",
    ),
    "post_reordered": (reordered, "'post' is hooked, wrapped or not just bn and conv"),
    "pre_conv_hooked": (lambda b: hooked(b.pre.conv), CONV),
    "post_conv_hooked": (lambda b: hooked(b.post.conv), CONV),
    "kernel_even": (replaced("pre", kernel_size=4, padding=2), CONV),
    "kernel_oblong": (replaced("pre", kernel_size=(3, 5), padding=(1, 2)), CONV),
    "stride": (replaced("post", stride=2), CONV),
    "dilation": (replaced("pre", dilation=2), CONV),
    "padding": (replaced("pre", padding=0), CONV),
    "groups": (replaced("post", groups=4), CONV),
    "multiplier": (replaced("pre", out_channels=16), CONV),
    "padding_mode": (replaced("post", padding_mode="reflect"), CONV),
    "weight_not_a_parameter": (
        lambda b: setattr(b.pre.conv, "weight", nn.parameter.UninitializedParameter()),
        CONV,
    ),
    "pre_norm_hooked": (lambda b: hooked(b.pre.bn), NORM.format("BatchNorm2d")),
    "post_norm_other": (
        lambda b: setattr(b.post, "bn", nn.InstanceNorm2d(8)),
        NORM.format("InstanceNorm2d"),
    ),
    "branch_hooked": (
        lambda b: hooked(b.mlp.f1),
        "f1 has hooks",
    ),
    "branch_replaced": (
        lambda b: setattr(b.mlp, "g", nn.Identity()),
        "g is an Identity, not nn.Linear",
    ),
    "mlp_rank": (lambda b: setattr(b, "mlp", RankStarMLP(8)), MLP.format("RankStarMLP")),
    "mlp_sum": (lambda b: setattr(b, "mlp", SumMLP(8)), MLP.format("SumMLP")),
    "mlp_scaled": (lambda b: setattr(b, "mlp", ScaledStarMLP(8)), MLP.format("ScaledStarMLP")),
    "mlp_sequential": (
        lambda b: setattr(b, "mlp", nn.Sequential(nn.Linear(8, 8))),
        MLP.format("Sequential"),
    ),
    "mlp_folded": (lambda b: setattr(b, "mlp", ScaledStarMLP(8).fold()), NO_KERNEL),
}


@pytest.mark.parametrize(("change", "message"), STRUCTURE.values(), ids=STRUCTURE)
def test_each_condition_on_the_block(change, message):
    block = StarBlock2d(8, 3)
    change(block)
    assert reason(block, pixels()) == message


def test_no_images():
    assert reason(StarBlock2d(8), pixels(batch=0)) == "the batch is empty"


@pytest.mark.parametrize(
    ("grad", "trained", "wanted"), [(True, True, True), (False, True, False), (True, False, False)]
)
def test_the_tile_is_asked_for_in_training_only_if_a_gradient_is(
    monkeypatch, grad, trained, wanted
):
    asked = []

    def too_wide(device, dtype, sizes, training):
        asked.append((device, dtype, sizes, training))
        return "too wide"

    monkeypatch.setattr(plans, "kernel_reason", lambda call: "")
    monkeypatch.setattr(plans, "too_few", lambda *_: "")
    monkeypatch.setattr(plans, "too_wide", too_wide)
    block, x = StarBlock2d(8).requires_grad_(trained), pixels()
    with torch.set_grad_enabled(grad):
        assert reason(block, x) == "too wide"
    assert asked == [(x.device, torch.float32, (8, 32, 8), wanted)]


def test_few_pixels_are_refused_before_wide_channels(monkeypatch):
    asked = []
    monkeypatch.setattr(
        plans, "kernel_reason", lambda call: asked.append(call.activation.name) or ""
    )
    monkeypatch.setattr(plans, "too_few", lambda *_: "too few")
    block, x = StarBlock2d(8, act="silu"), pixels()
    assert reason(block, x) == "too few"
    assert asked == ["silu"]
    monkeypatch.setattr(plans, "too_few", lambda *_: "")
    monkeypatch.setattr(plans, "too_wide", lambda *_: "")
    with use_backend("triton"):
        assert plan(block, x).path == "block"


@pytest.mark.parametrize(
    ("drop_path", "acts"),
    [
        (nn.Identity(), False),
        (DropPath(0.5), True),
        (DropPath(0.5).eval(), False),
        (nn.Dropout(0.5).eval(), True),
    ],
    ids=["none", "training", "eval", "another_layer"],
)
def test_drop_path_is_skipped_only_where_it_is_idle(drop_path, acts):
    assert fused_block._drop_path_acts(drop_path) is acts


def norm_2d(**kwargs):
    return randomise_norm(nn.BatchNorm2d(6, **kwargs))


def randomise_norm(norm):
    with torch.no_grad():
        for i, t in enumerate((norm.weight, norm.bias, norm.running_mean)):
            if t is not None:
                t.copy_(image(6, seed=i))
        if norm.running_var is not None:
            norm.running_var.copy_(image(6, seed=9).square() + 0.3)
    return norm


NORMS = {
    "default": {},
    "eps": {"eps": 0.1},
    "momentum": {"momentum": 0.7},
    "momentum_zero": {"momentum": 0.0},
    "cumulative": {"momentum": None},
    "untracked": {"track_running_stats": False},
    "without_weights": {"affine": False},
}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", NORMS.values(), ids=NORMS)
def test_a_norm_is_an_affine_map_and_updates_as_batch_norm_does(options, train):
    ours = norm_2d(**options).train(train)
    if not options.get("affine", True):
        assert ours.weight is None
    theirs = copy.deepcopy(ours)
    for seed in (1, 2):
        x = image(3, 6, 4, 5, seed=seed)
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        affine = norms.norm_as_affine(ours, mean, var, 60)
        want = theirs(x)
        x = x.permute(0, 2, 3, 1)
        got = affine.scale * (x - affine.center) + affine.bias
        torch.testing.assert_close(got.permute(0, 3, 1, 2), want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(affine.scale * x + affine.shift, got, rtol=1e-4, atol=1e-5)
        for name, value in theirs.named_buffers():
            torch.testing.assert_close(ours.get_buffer(name), value, msg=name)
    for p in affine.scale, affine.bias:
        assert p.requires_grad is ("affine" not in options)


@pytest.mark.parametrize("missing", ["num_batches_tracked", "running_mean", "running_var"])
def test_statistics_without_one_of_their_buffers(missing):
    norm = norm_2d().train()
    setattr(norm, missing, None)
    before = {name: b.clone() for name, b in norm.named_buffers()}
    norms.update_statistics(norm, torch.ones(6), torch.ones(6), 8)
    changed = {n for n, b in norm.named_buffers() if not torch.equal(b, before[n])}
    if missing == "num_batches_tracked":
        assert changed == {"running_mean", "running_var"}
    else:
        assert changed == {"num_batches_tracked"}


def test_one_value_per_channel_has_no_variance():
    norm = norm_2d()
    with pytest.raises(ValueError, match="more than 1 value per channel, got 1"):
        norms.norm_as_affine(norm, torch.ones(6), torch.zeros(6), 1)
    norm.eval()
    assert norms.norm_as_affine(norm, torch.ones(6), torch.zeros(6), 1) is not None
    assert norms.norm_as_affine(nn.Identity(), None, None, 5) is None


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_an_affine_map_folds_into_the_branches(bias):
    mlp, norm = StarMLP(6, 10, bias=bias), norm_2d().eval()
    affine = norms.norm_as_affine(norm, None, None, 5)
    x = image(7, 6)
    y = norm(x[..., None, None])[..., 0, 0]
    w1, b1, w2, b2 = fused_block._folded_branches(mlp, affine, torch.float32)
    torch.testing.assert_close(x @ w1.T + b1, mlp.f1(y), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x @ w2.T + b2, mlp.f2(y), rtol=1e-4, atol=1e-5)
    w1, b1, w2, b2 = fused_block._folded_branches(mlp, None, torch.float32)
    assert torch.equal(w1, mlp.f1.weight)
    assert torch.equal(w2, mlp.f2.weight)
    assert (b1 is None) is (b2 is None) is (not bias)
    if bias:
        assert torch.equal(b1, mlp.f1.bias)
        assert torch.equal(b2, mlp.f2.bias)


def test_a_large_mean_cancels_in_the_rounded_weight():
    mlp, norm = StarMLP(6, 10), norm_2d(affine=False).eval()
    norm.running_mean.fill_(1000.0)
    affine = norms.norm_as_affine(norm, None, None, 5)
    w1, b1, *_ = fused_block._folded_branches(mlp, affine, torch.bfloat16)
    assert w1.dtype == torch.bfloat16
    x = torch.full((1, 6), 1000.0)  # the norm's mean, so that only the bias remains
    torch.testing.assert_close(x @ w1.float().T + b1, mlp.f1.bias[None], rtol=0, atol=1e-3)


def test_a_declined_block_is_not_planned(monkeypatch):
    """What a whole network declines, at batch 1 for example, should cost it next to nothing."""
    block, x = StarBlock2d(64).eval(), pixels(64, 7, 1)
    monkeypatch.setattr(registration, "KERNEL_DEVICES", {"cpu", "cuda"})
    assert fused_block.plan(block, x).reason
    asked = []
    monkeypatch.setattr(fused_block, "plan", lambda *_: asked.append(1))
    monkeypatch.setattr(fused_block, "kind_of", lambda *_: asked.append(2))
    assert fused_block.compute(block, x) is None
    with use_backend("eager"):
        assert fused_block.compute(block, x) is None
    with use_backend("cpu"):
        assert fused_block.compute(block, x) is None
    assert asked == []


NO_STAR = "act is None or offset no number, which only the definition computes"
MISFITS = {
    "gamma": (lambda b: setattr(b, "gamma", nn.Parameter(torch.ones(()))), "gamma has shape ()"),
    "taps": (
        lambda b: setattr(b.pre.conv, "weight", nn.Parameter(torch.ones(16, 1, 5, 5))),
        "pre.conv.weight has shape (16, 1, 5, 5), not (16, 1, 7, 7)",
    ),
    "a bias": (
        lambda b: setattr(b.post.conv, "bias", nn.Parameter(torch.ones(1))),
        "post.conv.bias has shape (1,), not (16,)",
    ),
    "a norm": (lambda b: setattr(b.pre, "bn", nn.BatchNorm2d(8)), "pre.bn.weight has shape (8,)"),
    "a branch": (
        lambda b: setattr(b.mlp.f2, "weight", nn.Parameter(torch.ones(1, 16))),
        "w2 has shape (1, 16), not (64, 16)",
    ),
    "the MLP": (lambda b: setattr(b, "mlp", StarMLP(8)), "mlp.f1.weight has shape (32, 8)"),
    "act": (lambda b: setattr(b.mlp, "act", None), NO_STAR),
    "offset": (lambda b: setattr(b.mlp, "offset", None), NO_STAR),
    "f1": (lambda b: setattr(b.mlp, "f1", nn.Sequential(b.mlp.f1)), "f1 is a Sequential"),
    "no mean": (
        lambda b: setattr(b.pre.bn, "running_mean", None),
        "only one of running_mean and running_var",
    ),
    "no variance": (
        lambda b: setattr(b.post.bn, "running_var", None),
        "only one of running_mean and running_var",
    ),
    "eps": (lambda b: setattr(b.post.bn, "eps", -0.1), "a norm has eps=-0.1"),
    "another convolution": (
        lambda b: setattr(b.pre.conv, "_conv_forward", lambda x, w, b: x),
        "a convolution is hooked, changed",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_tensors_of_other_shapes_are_left_to_the_definition(name, monkeypatch):
    """Kernels read as much as a layer says that it has."""
    monkeypatch.setattr(registration, "KERNEL_DEVICES", {"cpu", "cuda"})
    block, x = StarBlock2d(16, layer_scale=1.0).eval(), pixels(16, 56, 4).bfloat16()
    assert fused_block.plan(block.bfloat16(), x).fused
    change, words = MISFITS[name]
    change(block)
    assert words in fused_block.plan(block, x).reason


def test_a_running_mean_that_is_no_buffer_is_found(monkeypatch):
    norm = norm_2d().eval()
    mean = norm.running_mean
    del norm.running_mean
    norm.running_mean = mean.clone()
    assert not norms.uses_batch_statistics(norm)
    assert torch.equal(norms.norm_as_affine(norm, None, None, 5).center, mean)


def test_a_function_mode_sees_the_definition_and_a_default_device_is_none(monkeypatch):
    monkeypatch.setattr(registration, "KERNEL_DEVICES", {"cpu", "cuda"})
    block, x = StarBlock2d(16).eval().bfloat16(), pixels(16, 56, 4).bfloat16()

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    with torch.device("cpu"):
        assert fused_block.plan(block, x).fused
        assert fused_block.kind_of(x, ()) is not None
        with Mode():
            assert "function mode" in fused_block.plan(block, x).reason
            assert fused_block.kind_of(x, ()) is None


def test_a_convolution_with_another_method_in_its_class_is_not_plain(monkeypatch):
    assert fused_block.is_plain_convolution(nn.Conv2d(3, 3, 1))
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", lambda self, x, w, b: x)
    assert not fused_block.is_plain_convolution(nn.Conv2d(3, 3, 1))
