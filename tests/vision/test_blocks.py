"""ConvNorm, StarBlock2d and DemoNet against their parts, composed by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import DropPath as TimmDropPath
from timm.models.starnet import Block as TimmBlock
from torch import nn

from starlayers import ACTIVATIONS, StarBlock, StarMLP, use_backend
from starlayers.coefficients.modules import (
    DynamicStarMLP,
    RankStarMLP,
    ScaledStarMLP,
    SumMLP,
)
from starlayers.vision import ConvNorm, DemoNet, StarBlock2d

from .util import (
    ACTS,
    assert_same_tensors,
    grads,
    image,
    learned,
    randomise,
    reference_block,
    relative_error,
    snapshot,
)


def test_every_activation_is_covered_here():
    builtin = {name for name, act in ACTIVATIONS.items() if act.fn.__module__ != __name__}
    assert builtin - {"swish", "glu", "relu2"} <= set(ACTS)


@pytest.mark.parametrize("groups", [1, 4], ids=lambda g: f"groups{g}")
@pytest.mark.parametrize("stride", [1, 2, 3], ids=lambda s: f"stride{s}")
@pytest.mark.parametrize("kernel_size", [1, 3, 7], ids=lambda k: f"kernel{k}")
def test_conv_norm_is_convolution_then_batch_norm(kernel_size, stride, groups):
    layer = randomise(ConvNorm(4, 8, kernel_size, stride=stride, groups=groups)).eval()
    conv, bn, x = layer.conv, layer.bn, image(2, 4, 9, 12)
    y = F.conv2d(x, conv.weight, conv.bias, stride, kernel_size // 2, groups=groups)
    y = (y - bn.running_mean[:, None, None]) / (bn.running_var[:, None, None] + bn.eps).sqrt()
    want = y * bn.weight[:, None, None] + bn.bias[:, None, None]
    assert want.shape == (2, 8, -(-9 // stride), -(-12 // stride))
    torch.testing.assert_close(layer(x), want)
    layer.fuse()
    assert isinstance(layer.bn, nn.Identity)
    torch.testing.assert_close(layer(x), want)
    fused = snapshot(layer)
    layer.fuse()
    assert_same_tensors(snapshot(layer), fused)


@pytest.mark.parametrize("combine", ["mul", "sum"])
@pytest.mark.parametrize("act", ACTS, ids=str)
def test_block_equals_its_parts(act, combine):
    options = {"expansion": 3, "act": act}
    if combine == "sum":
        options = {"mlp": SumMLP(6, 18, act=act)}
    block = randomise(StarBlock2d(6, **options)).eval()
    assert block.mlp.hidden_features == 18
    x = image(2, 6, 9, 5)
    torch.testing.assert_close(block(x), x + reference_block(block, x, ACTS[act], combine))


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_block_equals_timms_block(train):
    ours, theirs = StarBlock2d(6, expansion=3), TimmBlock(6, mlp_ratio=3)
    randomise(ours)
    parts = {
        "dwconv.conv": ours.pre.conv,
        "dwconv.bn": ours.pre.bn,
        "f1.conv": ours.mlp.f1,
        "f2.conv": ours.mlp.f2,
        "g.conv": ours.mlp.g,
        "g.bn": ours.post.bn,
        "dwconv2.conv": ours.post.conv,
    }
    for name, part in parts.items():
        target = theirs.get_submodule(name)
        state = part.state_dict()
        state["weight"] = state["weight"].view_as(target.weight)
        target.load_state_dict(state)
    ours.train(train), theirs.train(train)
    x = [image(3, 6, 8, 8).requires_grad_() for _ in range(2)]
    y, want = ours(x[0]), theirs(x[1])
    torch.testing.assert_close(y, want)
    for out in (y, want):
        out.square().sum().backward()
    torch.testing.assert_close(x[0].grad, x[1].grad, rtol=1e-4, atol=1e-3)
    for name, part in parts.items():
        grad = theirs.get_submodule(name).weight.grad
        torch.testing.assert_close(part.weight.grad.view_as(grad), grad, rtol=1e-4, atol=1e-3)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    dim=st.integers(1, 9),
    kernel_size=st.sampled_from([1, 3, 5, 7]),
    expansion=st.integers(1, 4),
    size=st.tuples(st.integers(1, 3), st.integers(1, 11), st.integers(1, 11)),
    channels_last=st.booleans(),
)
def test_any_shape_and_layout(dim, kernel_size, expansion, size, channels_last):
    n, h, w = size
    block = randomise(StarBlock2d(dim, kernel_size, expansion=expansion)).eval()
    x = image(n, dim, h, w)
    want = x + reference_block(block, x, ACTS["relu6"])
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(block(x), want, rtol=1e-5, atol=1e-5)


def test_strided_and_expanded_inputs():
    block, x = randomise(StarBlock2d(4)).eval(), image(2, 4, 12, 6)
    torch.testing.assert_close(block(x[:, :, ::2]), block(x[:, :, ::2].clone()))
    expanded = x[:, :, :1].expand(2, 4, 5, 6)
    torch.testing.assert_close(block(expanded), block(expanded.clone()))
    torch.testing.assert_close(block(x.mT), block(x.mT.clone()))


def test_the_input_is_left_alone():
    block, x = randomise(StarBlock2d(4)), image(2, 4, 6, 6).to(memory_format=torch.channels_last)
    before = x.clone()
    block(x)
    torch.testing.assert_close(x, before, rtol=0, atol=0)


def products(mlp, y):
    """Compute `act(f1(y)) * (offset + f2(y))` with ReLU6."""
    return mlp.f1(y).clamp(0, 6) * (mlp.offset + mlp.f2(y))


def scaled(mlp, y):
    """Compute `act(f1(y)) * scale * (shift + f2(y))` with ReLU6."""
    return mlp.f1(y).clamp(0, 6) * mlp.scale * (mlp.shift + mlp.f2(y))


#: an MLP for 4 channels, and its formula on pixels
MLPS = {
    "offset": (lambda: StarMLP(4, 16, offset=1.0), lambda mlp, y: mlp.g(products(mlp, y))),
    "rank": (
        lambda: RankStarMLP(4, 16, rank=2, offset=0.5),
        lambda mlp, y: mlp.g(sum(products(mlp.star, y)[..., r::2] for r in range(2))),
    ),
    "sum": (
        lambda: SumMLP(4, 16),
        lambda mlp, y: mlp.g(mlp.f1(y).clamp(0, 6) + mlp.f2(y)),
    ),
    "scaled": (
        lambda: learned(ScaledStarMLP(4, 16)),
        lambda mlp, y: mlp.g(scaled(mlp, y)),
    ),
    "dynamic": (
        lambda: learned(DynamicStarMLP(4, 16)),
        lambda mlp, y: mlp.g(scaled(mlp, y) * (1 + mlp.gate(y.mean((1, 2))).tanh())[:, None, None]),
    ),
    "sequential": (
        lambda: nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 4)),
        lambda mlp, y: mlp[2](mlp[0](y).tanh()),
    ),
}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("make", "formula"), MLPS.values(), ids=MLPS)
def test_the_mlp_of_a_block_can_be_any_module(make, formula, train):
    mlp = make()
    block = randomise(StarBlock2d(4, 5, mlp=mlp, layer_scale=0.5)).train(train)
    other, x = copy.deepcopy(block), image(2, 4, 6, 5).requires_grad_()
    assert block.mlp is mlp
    y = other.pre.bn(other.pre.conv(x)).permute(0, 2, 3, 1)
    y = formula(other.mlp, y).permute(0, 3, 1, 2)
    want = x + other.post.conv(other.post.bn(y)) * other.gamma[:, None, None]
    (want_dx,) = torch.autograd.grad(want.square().sum(), x)
    (dx,) = torch.autograd.grad(block(x).square().sum(), x)
    torch.testing.assert_close(block(x), want)
    torch.testing.assert_close(dx, want_dx, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("make", "formula"), MLPS.values(), ids=MLPS)
def test_a_block_of_any_mlp_fuses_to_the_same_function(make, formula):
    block, x = randomise(StarBlock2d(4, mlp=make())).eval(), image(2, 4, 6, 5)
    want, mlp = block(x), block.mlp
    block.fuse()
    torch.testing.assert_close(block(x), want, rtol=1e-5, atol=1e-5)
    # a norm after the MLP folds into its last layer; nothing is known of that of a user's module
    kept = {m for m in block.modules() if isinstance(m, nn.BatchNorm2d)}
    assert kept == ({block.pre.bn, block.post.bn} if isinstance(mlp, nn.Sequential) else set())
    assert type(block.mlp) is (StarMLP if type(mlp) is ScaledStarMLP else type(mlp))
    fused = snapshot(block)
    block.fuse()
    assert_same_tensors(snapshot(block), fused)


def _hooked(mlp):
    mlp.register_forward_hook(lambda m, args, y: y.relu())
    return mlp


class _Rectified(StarMLP):
    def forward(self, x, residual=None):
        return super().forward(x, residual).relu()


@pytest.mark.parametrize("kind", [StarMLP, ScaledStarMLP])
def test_fuse_leaves_norms_around_an_mlp_whose_last_layer_is_not_its_result(kind):
    for mlp in (_Rectified(4, 6), _hooked(kind(4, 6))):
        block, x = randomise(StarBlock2d(4, mlp=mlp)).eval(), image(2, 4, 6, 5)
        want = block(x)
        block.fuse()
        assert block.mlp is mlp
        torch.testing.assert_close(block(x), want, rtol=0, atol=0)


def test_layer_scale():
    block = randomise(StarBlock2d(4, layer_scale=0.5)).eval()
    assert torch.equal(block.gamma, torch.full((4,), 0.5))
    with torch.no_grad():
        block.gamma.copy_(torch.tensor([0.0, 1.0, 2.0, -3.0]))
    x = image(2, 4, 5, 5)
    branch = reference_block(block, x, ACTS["relu6"])
    torch.testing.assert_close(block(x), x + block.gamma[:, None, None] * branch)


def test_drop_path_drops_whole_samples_as_timms_does():
    block, x = randomise(StarBlock2d(4, drop_path=0.75)).train(), image(16, 4, 3, 3)
    branch = reference_block(copy.deepcopy(block), x, ACTS["relu6"])
    torch.manual_seed(5)
    got = block(x)
    torch.manual_seed(5)
    want = x + TimmDropPath(0.75)(branch)
    torch.testing.assert_close(got, want)
    kept = ((got - x).abs().amax((1, 2, 3)) > 0).sum()
    assert 0 < kept < 16
    block.eval()
    torch.testing.assert_close(block(x), x + reference_block(block, x, ACTS["relu6"]))


@pytest.mark.parametrize("act", ["relu6", None], ids=str)
def test_fuse_keeps_the_function_and_is_idempotent(act):
    block, x = randomise(StarBlock2d(6, act=act, layer_scale=0.7)).eval(), image(2, 6, 8, 8)
    want = block(x)
    block.fuse()
    assert not [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
    torch.testing.assert_close(block(x), want, rtol=1e-5, atol=1e-5)
    fused = snapshot(block)
    block.fuse()
    assert_same_tensors(snapshot(block), fused)


def test_fuse_folds_both_norms_or_none():
    for name in ("pre", "post"):
        block, x = randomise(StarBlock2d(4)).eval(), image(2, 4, 5, 5)
        getattr(block, name).bn = nn.Identity()
        want, before = block(x), snapshot(block)
        block.fuse()
        assert_same_tensors(snapshot(block), before)
        torch.testing.assert_close(block(x), want, rtol=0, atol=0)


def test_device_and_dtype_reach_every_parameter_and_buffer():
    options = {"layer_scale": 0.5, "device": "meta", "dtype": torch.float64}
    for layer in (
        StarBlock2d(4, **options),
        StarBlock2d(4, mlp=DynamicStarMLP(4, device="meta", dtype=torch.float64), **options),
        ConvNorm(3, 4, 3, device="meta", dtype=torch.float64),
    ):
        tensors = [*layer.parameters(), *layer.buffers()]
        assert {t.device.type for t in tensors} == {"meta"}
        assert {t.dtype for t in tensors if t.is_floating_point()} == {torch.float64}


def test_it_is_the_shared_block_with_other_surroundings():
    block = randomise(StarBlock2d(4)).eval()
    plain = StarBlock(4, pre=block.pre, post=block.post).eval()
    plain.mlp = block.mlp
    x = image(2, 4, 5, 5)
    want = plain(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(block(x), want)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_second_order_gradients(train):
    block = randomise(StarBlock2d(2, 3, expansion=2, act="tanh", dtype=torch.float64)).train(train)
    x = image(2, 2, 3, 2, dtype=torch.float64).requires_grad_()
    weight = block.mlp.f1.weight

    def run(x, w):
        return torch.func.functional_call(block, {"mlp.f1.weight": w}, (x,))

    assert torch.autograd.gradcheck(run, (x, weight), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x, weight), fast_mode=True)


@pytest.mark.usefixtures("fuse_everything")
def test_the_fused_op_in_a_block_differentiates_twice():
    def penalty(block):
        x = image(2, 4, 5, 5).requires_grad_()
        (dx,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
        dx.square().mean().backward()
        return {"dx": dx, "x": x.grad, **grads(block)}

    block = randomise(StarBlock2d(4, act="silu"))
    double = copy.deepcopy(block).double()
    for m in double.modules():
        m.register_forward_pre_hook(lambda _m, args: tuple(a.double() for a in args))
    got, want = penalty(block), penalty(double)
    assert got.keys() == want.keys()
    for key, value in want.items():
        scale = value.abs().max().clamp(min=1e-2)
        assert (got[key] - value).abs().max() / scale < 1e-4, key


# --- DemoNet against its own parts, composed by hand in NCHW


VARIANTS = [("mul", "gelu"), ("sum", "gelu"), ("mul", None), ("sum", None)]
SMALL = {"depth": 2, "dim": 8, "num_classes": 5, "patch_size": 4}


def small(**kwargs):
    return randomise(DemoNet(**{**SMALL, "layer_scale": 0.5, **kwargs}))


def reference(net, x, combine, act):
    """Compute the paper's description in NCHW with 1x1 convolutions."""

    def pointwise(y, linear):
        return F.conv2d(y, linear.weight[..., None, None], linear.bias)

    def norm(y, layer):
        y = (y - y.mean(1, keepdim=True)) / (
            y.var(1, correction=0, keepdim=True) + layer.eps
        ) ** 0.5
        return y * layer.weight[:, None, None] + layer.bias[:, None, None]

    x = F.conv2d(x, net.stem.weight, net.stem.bias, net.patch_size)
    for block in net.blocks:
        layer_norm, conv = block.pre
        y = F.conv2d(
            norm(x, layer_norm), conv.weight, conv.bias, padding=3, groups=conv.out_channels
        )
        a, b = ACTS[act](pointwise(y, block.mlp.f1)), pointwise(y, block.mlp.f2)
        y = pointwise(a * b if combine == "mul" else a + b, block.mlp.g)
        x = x + block.gamma[:, None, None] * y
    pooled = norm(x.mean((2, 3), keepdim=True), net.norm)[:, :, 0, 0]
    return pooled @ net.head.weight.T + net.head.bias


@pytest.mark.parametrize(("combine", "act"), VARIANTS)
def test_forward_and_gradients_equal_the_parts(combine, act):
    net = small(combine=combine, act=act)
    other, x = copy.deepcopy(net), image(2, 3, 20, 12)
    got, want = net(x), reference(other, x, combine, act)
    assert 0.1 < want.std() < 10
    torch.testing.assert_close(got, want)
    got.square().sum().backward()
    want.square().sum().backward()
    for name, grad in grads(other).items():
        assert relative_error(grads(net)[name], grad) < 1e-4, name


def test_variants_differ_in_value_alone():
    nets = [small(combine=combine, act=act) for combine, act in VARIANTS]
    for net in nets[1:]:
        assert_same_tensors(snapshot(net), snapshot(nets[0]))
    outputs = [net(image(2, 3, 16, 16)) for net in nets]
    for i, y in enumerate(outputs):
        for z in outputs[:i]:
            assert relative_error(y, z) > 0.05


@pytest.mark.parametrize("dim", [8, 192])
def test_parameter_count(dim):
    counts = {
        sum(p.numel() for p in DemoNet(dim=dim, combine=c, act=a, device="meta").parameters())
        for c, a in VARIANTS
    }
    embed, head, hidden = dim * (3 * 16**2 + 1), 1000 * (dim + 1), 3 * dim
    mlp = 2 * hidden * (dim + 1) + dim * (hidden + 1)
    block = 2 * dim + dim * (7**2 + 1) + mlp + dim
    assert counts == {embed + 12 * block + 2 * dim + head}


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("patch_size", [1, 2, 5], ids=lambda p: f"patch{p}")
def test_patches(patch_size, in_chans):
    net = small(patch_size=patch_size, in_chans=in_chans)
    x = image(2, in_chans, 3 * patch_size, 5 * patch_size)
    torch.testing.assert_close(net(x), reference(net, x, "mul", "gelu"))
    channels_last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(net(channels_last), net(x))


def test_drop_path_rises_linearly():
    net = DemoNet(**{**SMALL, "depth": 4}, drop_path_rate=0.3)
    rates = [getattr(block.drop_path, "p", 0.0) for block in net.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])
    net, plain, x = small(drop_path_rate=0.9), small(), image(16, 3, 8, 8)
    torch.testing.assert_close(net.eval()(x), plain(x), rtol=0, atol=0)
    torch.manual_seed(0)
    assert relative_error(net.train()(x), plain(x)) > 0.01


def test_a_network_is_made_under_a_default_device():
    with torch.device("meta"):
        net = DemoNet(**SMALL, drop_path_rate=0.2)
    assert {p.device.type for p in net.parameters()} == {"meta"}
    assert net.blocks[1].drop_path.p == pytest.approx(0.2)


def test_initial_values():
    torch.manual_seed(0)
    net = DemoNet(depth=2, dim=64)
    for m in net.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            assert m.weight.std().item() == pytest.approx(0.02, rel=0.06)
            assert m.weight.abs().max() < 0.12
            assert not m.bias.any()
    for block in net.blocks:
        assert torch.equal(block.gamma, torch.full((64,), 1e-6))
    assert torch.equal(net.norm.weight, torch.ones(64))


@pytest.mark.usefixtures("fuse_everything")
def test_the_fused_op_equals_eager():
    fused, x = small(), image(2, 3, 20, 20)
    eager = copy.deepcopy(fused)
    y = fused(x)
    y.square().sum().backward()
    with use_backend("eager"):
        want = eager(x)
        want.square().sum().backward()
    torch.testing.assert_close(y, want)
    for name, grad in grads(eager).items():
        assert relative_error(grads(fused)[name], grad) < 1e-4, name


def test_double_precision_and_meta():
    net, x = small(dtype=torch.float64), image(2, 3, 8, 8, dtype=torch.float64)
    assert relative_error(net(x), reference(net, x, "mul", "gelu")) < 1e-12
    meta = DemoNet(**SMALL, device="meta")
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    assert meta(x.float().to("meta")).shape == (2, 5)
