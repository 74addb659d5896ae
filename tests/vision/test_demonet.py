"""DemoNet against its own parts, composed by hand in NCHW."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from starlayers import use_backend
from starlayers.vision import DemoNet

from .util import ACTS, assert_same_tensors, grads, image, randomise, relative_error, snapshot

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
