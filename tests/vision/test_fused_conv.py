"""Conditions of the fused ConvNorm; its kernel and its launches have tests of their own."""

import pytest
import torch
from torch import nn

from starlayers import plans, use_backend
from starlayers.kernels import registration
from starlayers.kernels.conv import Convolution
from starlayers.vision import STARNETS, ConvNorm, StarNet, fused_conv
from starlayers.vision.starnet import STEM_CHANNELS

from .util import image

BF16 = torch.bfloat16


def test_the_definition_serves_cpus_and_every_backend():
    layer, x = ConvNorm(3, 8, 3, stride=2).eval(), image(1, 3, 9, 9)
    assert layer.plan(x).reason == "no Triton kernel for device 'cpu'"
    for backend in ("eager", "cpu", "triton"):
        with use_backend(backend), torch.no_grad():
            assert not layer.plan(x).fused
            assert torch.equal(layer(x), layer.bn(layer.conv(x)))
    with use_backend("eager"):
        assert layer.plan(x).reason == "the eager backend was asked for"


def test_a_declined_layer_is_not_looked_at(monkeypatch):
    """What a whole network declines should cost it next to nothing."""
    asked = []
    for name in ("plan", "kind_of", "_state"):
        monkeypatch.setattr(fused_conv, name, lambda *_, name=name: asked.append(name))
    layer, x = ConvNorm(64, 128, 3, stride=2).eval().to(BF16), image(1, 64, 8, 8, dtype=BF16)
    assert fused_conv.compute(layer, x) is None
    monkeypatch.setattr(registration, "KERNEL_DEVICES", {"cpu", "cuda"})
    for backend in ("eager", "cpu", "auto"):  # few pixels
        with use_backend(backend):
            assert fused_conv.compute(layer, x) is None
    assert asked == []
    with use_backend("triton"):
        assert fused_conv.compute(layer, x) is None
    assert asked == ["kind_of"]


def test_launches_on_amd_are_not_recorded(monkeypatch):
    monkeypatch.setattr(registration, "KERNEL_DEVICES", {"cpu", "cuda"})
    monkeypatch.setattr(registration, "INTERPRET", False)
    layer, x = ConvNorm(3, 8, 3, stride=2).eval().to(BF16), image(1, 3, 9, 9, dtype=BF16)
    with torch.no_grad():
        assert layer.plan(x).path == "convolution"
        assert layer.plan(x.float()).reason.startswith("input and parameters differ in dtype")
        assert layer.plan(x[:0]).reason == "the batch is empty"
        monkeypatch.setattr(torch.version, "hip", "6.0")
        assert layer.plan(x).reason == "launches on AMD's GPUs are not recorded"
        assert torch.equal(layer(x), layer.bn(layer.conv(x)))
    monkeypatch.setattr(torch.version, "hip", None)
    assert layer.plan(x).reason == fused_conv.EACH_STEP  # of gradients
    with torch.no_grad():
        layer.train()
        assert "statistics of the batch" in layer.plan(x).reason


def unsuited(conv, *shape, dtype=BF16, channels_last=True):
    x = torch.empty(shape, dtype=dtype, device="meta")
    return plans.unsuited(conv, x.to(memory_format=torch.channels_last) if channels_last else x)


def test_sizes_that_the_kernel_takes_by_itself():
    conv = Convolution(64, 128, 3, 2)
    assert unsuited(conv, 256, 64, 28, 28) == ""
    assert unsuited(conv, 256, 64, 28, 28, dtype=torch.float16) == ""
    text = unsuited(conv, 256, 64, 28, 28, dtype=torch.float32)
    assert text == "cuDNN computes float32 convolutions"
    text = unsuited(conv, 256, 64, 28, 28, channels_last=False)
    assert text == "64 channels that are not channels_last"
    assert unsuited(Convolution(3, 32, 3, 2), 256, 3, 224, 224, channels_last=False) == ""
    text = unsuited(conv, 1, 64, 28, 28)
    assert text == "196 pixels of 128 channels would leave most of a GPU idle"
    assert unsuited(conv, 20, 64, 28, 28) != ""
    assert unsuited(conv, 21, 64, 28, 28) == ""  # 4116 pixels
    assert unsuited(Convolution(128, 256, 3, 2), 256, 128, 14, 14) == ""
    text = unsuited(Convolution(160, 320, 3, 2), 256, 160, 14, 14)
    assert text == "1440 products an output are more than the saved passes are worth"


@pytest.mark.parametrize("name", ["starnet_s1", "starnet_s4"])
@pytest.mark.parametrize(("batch", "taken"), [(256, 5), (1, 3)])
def test_convolutions_of_a_starnet(name, batch, taken):
    base, side, chans = STARNETS[name].base_dim, 224, [3, STEM_CHANNELS]
    chans += [base << i for i in range(4)]
    reasons = []
    for i in range(5):
        conv = Convolution(chans[i], chans[i + 1], 3, 2)
        reasons.append(unsuited(conv, batch, chans[i], side, side, channels_last=i > 0))
        side = -(-side // 2)
    assert sum(reason == "" for reason in reasons) == taken
    assert "" not in reasons[taken:]


def test_the_reason_names_what_was_changed():
    x = image(1, 3, 9, 9)
    wide = ConvNorm(4, 8, 3)
    with use_backend("triton"):
        assert fused_conv._convolution(wide, x) == "the input is not (N, 4, H, W)"
        assert fused_conv._convolution(wide, x[0]) == "the input is not (N, 4, H, W)"
    lazy = ConvNorm(3, 8, 3)
    lazy.conv = nn.LazyConv2d(8, 3, padding=1)
    assert "not a Conv2d with a parameter" in fused_conv._convolution(lazy, x)
    assert fused_conv._convolution(ConvNorm(3, 8, 5, stride=4), x) == Convolution(3, 8, 5, 4)


def test_an_activation_is_a_child_that_may_be_hooked_or_replaced():
    layer, x = ConvNorm(3, 8, 3, act="relu6").eval(), image(1, 3, 9, 9)
    assert [name for name, _ in layer.named_children()] == ["conv", "bn", "act"]
    assert [name for name, _ in ConvNorm(3, 8, 3).named_children()] == ["conv", "bn"]
    assert fused_conv.activation(layer) == "relu6"
    assert fused_conv._convolution(layer, x) == Convolution(3, 8, 3, 1)
    torch.testing.assert_close(layer(x), layer.bn(layer.conv(x)).clamp(0, 6))
    layer.act.register_forward_hook(lambda m, i, o: o + 1)
    assert fused_conv._convolution(layer, x) == (
        "the activation is hooked or another module, Activation"
    )
    torch.testing.assert_close(layer(x), layer.bn(layer.conv(x)).clamp(0, 6) + 1)
    layer.act = nn.Tanh()
    assert fused_conv._convolution(layer, x) == ("the activation is hooked or another module, Tanh")
    torch.testing.assert_close(layer(x), layer.bn(layer.conv(x)).tanh())


@pytest.mark.parametrize(
    "recorded",
    [
        lambda layer, x: torch.vmap(lambda t: layer(t[None])[0])(x),
        lambda layer, x: torch.jit.trace(layer, x, check_trace=False)(x),
        lambda layer, x: torch.fx.symbolic_trace(layer)(x),
        pytest.param(
            lambda layer, x: torch.compile(layer, backend="eager", fullgraph=True)(x),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda layer, x: torch.export.export(layer, (x,)).module()(x),
            marks=pytest.mark.export,
        ),
    ],
    ids=["vmap", "trace", "fx", "compile", "export"],
)
def test_transforms_and_tracers_see_the_definition(recorded, monkeypatch):
    monkeypatch.setattr(registration, "KERNEL_DEVICES", {"cpu", "cuda"})
    launched = []
    monkeypatch.setattr(fused_conv, "_launched", lambda *args: launched.append(args))
    layer, x = ConvNorm(8, 8, 3, stride=2).eval().to(BF16), image(2, 8, 9, 9, dtype=BF16)
    x = x.to(memory_format=torch.channels_last)
    assert fused_conv.rules_convolution_out(x, Convolution(8, 8, 3, 2)) is False
    with torch.no_grad():
        torch.testing.assert_close(recorded(layer, x), layer.bn(layer.conv(x)))
    assert launched == []


def test_a_script_computes_the_layer():
    layer, x = ConvNorm(3, 8, 3, stride=2).eval(), image(2, 3, 9, 9)
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))


def test_single_images_and_wrong_channels_are_as_in_torch():
    layer = ConvNorm(3, 8, 3).eval()
    with pytest.raises(RuntimeError, match="3 channels"):
        layer(image(1, 4, 5, 5))
    net = StarNet(8, (1,), stage_strides=(2,), num_classes=0).eval()
    net.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1))  # any module may take its place
    assert net(image(1, 3, 8, 8)).shape == (1, 8)
