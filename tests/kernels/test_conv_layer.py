"""Recorded launches of ConvNorm and of a StarNet's stem, in Triton's interpreter."""

import copy
import io
import threading

import pytest
import torch
from torch import nn
from triton.runtime.interpreter import GridExecutor

from starlayers import use_backend
from starlayers.vision import ConvNorm, StarNet, fused_conv, recordings
from tests.helpers import RecordOps, randn
from tests.kernels.test_block2d_triton import lively
from tests.kernels.test_program import (
    assert_plain_tensor_is_seen,
    assert_same,
    eagerly,
    fused,
    sgd,
)

pytestmark = pytest.mark.interpret


class Stem(nn.Module):
    """Stem of a StarNet with its activation, as the network calls it."""

    def __init__(self):
        super().__init__()
        self.net = StarNet(8, (1,), stage_strides=(2,), num_classes=0)

    def forward(self, x):
        return self.net._stem(x)


def made(kind="layer"):
    return lively(Stem() if kind == "stem" else ConvNorm(6, 20, 3, stride=2)).eval()


def part(module):
    return module.net.stem if isinstance(module, Stem) else module


def images(kind="layer", *, seed=0, shape=(2, 7, 9)):
    n, height, width = shape
    return randn(n, 3 if kind == "stem" else 6, height, width, seed=seed)


KINDS = pytest.mark.parametrize("kind", ["layer", "stem"])


@pytest.fixture
def recorded(monkeypatch):
    """Return a list that grows by one whenever a layer folds its norm to record a launch."""
    calls = []
    whole = fused_conv._launched

    def counted(layer, x):
        calls.append(fused_conv.fused_activation(layer))
        return whole(layer, x)

    monkeypatch.setattr(fused_conv, "_launched", counted)
    return calls


@KINDS
def test_a_layer_is_one_launch_and_nothing_else(kind, recorded):
    module = made(kind)
    for seed in range(3):
        x = images(kind, seed=seed)
        y = fused(module, x)
        assert_same(y, eagerly(module, x))
        assert y.is_contiguous(memory_format=torch.channels_last)
    assert recorded == ["relu6" if kind == "stem" else None]


@torch.no_grad()
def trained_statistics(layer):
    layer.train()
    with use_backend("eager"):
        layer(randn(3, layer.conv.in_channels, 4, 4, seed=9))
    layer.eval()


@torch.no_grad()
def through_data(layer):
    layer.conv.weight.data.mul_(2)  # PyTorch does not count it
    layer.eval()


def transposed(layer):
    layer.conv.weight.data = layer.conv.weight.data.flip(-1).transpose(-1, -2)


@torch.no_grad()
def another_state(layer):
    torch.manual_seed(5)
    like = ConvNorm(layer.conv.in_channels, layer.conv.out_channels, 3, stride=2)
    layer.load_state_dict(lively(like).state_dict())


def convolution(layer, size=3, **options):
    conv = layer.conv
    return nn.Conv2d(
        conv.in_channels, conv.out_channels, size, stride=2, padding=size // 2, **options
    )


#: changes of a layer after which launches that were recorded before would be wrong
CHANGES = {
    "a weight in place": lambda m: m.conv.weight.detach().mul_(1.5),
    "a bias in place": lambda m: m.conv.bias.detach().add_(0.5),
    "running statistics": lambda m: m.bn.running_var.mul_(4),
    "a training step's statistics": trained_statistics,
    "a state dict": another_state,
    "an optimizer": sgd,
    "a fused optimizer": lambda m: sgd(m, fused=True),
    "through .data": through_data,
    "another memory": lambda m: setattr(m.bn.bias, "data", m.bn.bias.data * 3),
    "the same memory, other strides": transposed,
    "another parameter": lambda m: setattr(m.bn, "weight", nn.Parameter(m.bn.weight * 2)),
    "no bias": lambda m: setattr(m.conv, "bias", None),
    "another convolution": lambda m: setattr(m, "conv", convolution(m)),
    "a larger convolution": lambda m: setattr(m, "conv", convolution(m, 5)),
    "another stride": lambda m: setattr(m.conv, "stride", (1, 1)),
    "another norm": lambda m: setattr(m, "bn", nn.BatchNorm2d(m.conv.out_channels).eval()),
    "a norm without weights": lambda m: setattr(
        m, "bn", nn.BatchNorm2d(m.conv.out_channels, affine=False).eval()
    ),
    "another epsilon": lambda m: setattr(m.bn, "eps", 1.0),
    "no norm": lambda m: setattr(m, "bn", nn.Identity()),
    "folded": lambda m: m.fuse(),
}


@KINDS
@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_layer_is_recorded_anew(name, kind, recorded):
    module, x = made(kind), images(kind)
    first = fused(module, x)
    assert torch.equal(fused(module, x), first)
    CHANGES[name](part(module))
    expected = eagerly(module, x)
    same = expected.shape == first.shape and torch.allclose(expected, first, 1e-4, 1e-4)
    assert same == (name == "folded")
    assert_same(fused(module, x), expected)
    assert_same(fused(module, 2 * x), eagerly(module, 2 * x))
    assert len(recorded) == 2


def batch_statistics(layer):
    layer.bn.track_running_stats = False
    layer.bn.running_mean = layer.bn.running_var = None


def hooked(module):
    module.register_forward_hook(lambda m, args, y: 2 * y)


def replaced_forward(layer):
    layer.conv.forward = lambda x: 3 * nn.Conv2d.forward(layer.conv, x)


def other_layer(layer):
    layer.append(nn.Tanh())


#: changes after which the definition computes, and the reason in the plan
DECLINED = {
    "a hook of the convolution": (lambda m: hooked(m.conv), "hooked"),
    "a hook of the norm": (lambda m: hooked(m.bn), "hooked"),
    "a forward replaced": (replaced_forward, "hooked"),
    "another layer": (other_layer, "not just conv, bn and act"),
    "the norm in training": (lambda m: m.bn.train(), "statistics of the batch"),
    "batch statistics": (batch_statistics, "statistics of the batch"),
    "another kind of norm": (
        lambda m: setattr(m, "bn", nn.InstanceNorm2d(m.conv.out_channels)),
        "needs BatchNorm2d",
    ),
    "reflected borders": (lambda m: setattr(m, "conv", convolution(m, padding_mode="reflect")),
                          "groups, dilation"),
    "dilation": (lambda m: setattr(m, "conv", convolution(m, dilation=2)), "groups, dilation"),
    "no padding": (lambda m: setattr(m.conv, "padding", (0, 0)), "groups, dilation"),
    "padding by name": (
        lambda m: (setattr(m.conv, "padding", "valid"), setattr(m.conv, "stride", (1, 1))),
        "groups, dilation",
    ),
    "unequal strides": (lambda m: setattr(m.conv, "stride", (2, 1)), "groups, dilation"),
    "a stride of both": (lambda m: setattr(m.conv, "stride", 1), "groups, dilation"),
}  # fmt: skip


@KINDS
@pytest.mark.parametrize("name", DECLINED)
def test_what_launches_cannot_stand_for_is_computed_by_the_definition(name, kind, recorded):
    module, x = made(kind), images(kind)
    first = fused(module, x)
    change, reason = DECLINED[name]
    change(part(module))
    for image in (x, 2 * x):
        expected = eagerly(module, image)
        torch.testing.assert_close(fused(module, image), expected)
    assert expected.shape != first.shape or not torch.allclose(eagerly(module, x), first)
    assert len(recorded) == 1
    with use_backend("triton"), torch.no_grad():
        assert reason in part(module).plan(x).reason


@pytest.mark.parametrize(
    ("options", "fusable"),
    [
        ({"momentum": None}, True),
        ({"affine": False}, True),
        ({"eps": 0.5}, True),
        ({"track_running_stats": False}, False),
    ],
)
def test_norms_of_each_kind(options, fusable, recorded):
    layer, x = made(), images()
    layer.bn = nn.BatchNorm2d(20, **options).eval()
    for t in (layer.bn.weight, layer.bn.running_var):
        if t is not None:
            nn.init.uniform_(t, 0.5, 2.0)
    for _ in range(2):
        assert_same(fused(layer, x), eagerly(layer, x))
    assert len(recorded) == fusable


def test_groups_are_computed_by_the_definition(recorded):
    layer, x = lively(ConvNorm(6, 12, 3, groups=3)).eval(), images()
    torch.testing.assert_close(fused(layer, x), eagerly(layer, x))
    assert recorded == []


@torch.no_grad()
@KINDS
@pytest.mark.parametrize(
    ("path", "name"),
    [("conv", "weight"), ("conv", "bias"), ("bn", "weight"), ("bn", "running_mean"),
     ("bn", "running_var")],
)  # fmt: skip
def test_tensors_that_are_no_parameters_are_not_recorded(path, name, kind):
    module = made(kind)
    assert_plain_tensor_is_seen(module, part(module).get_submodule(path), name, images(kind))


@pytest.mark.parametrize("name", ["bias", "running_mean"])
def test_a_norm_of_another_size_raises_as_in_torch(name):
    layer, x = made(), images()
    setattr(layer.bn, name, nn.Parameter(torch.zeros(1)) if name == "bias" else torch.zeros(1))
    with pytest.raises(RuntimeError, match=r"should contain 20 elements|must match"):
        fused(layer, x)


@KINDS
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:1, :, :1, :1],
        lambda x: x[..., :1],
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3),
        lambda x: x.flip(0)[:, :, 1:, 2:],
        lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),  # misaligned
        lambda x: x[:1].expand(3, -1, -1, -1),
        lambda x: torch._neg_view(x),
    ],
)
def test_inputs_of_each_kind_have_launches_of_their_own(change, kind):
    module, known = made(kind), images(kind)
    first = fused(module, known)
    x = change(known)
    for _ in range(2):
        assert_same(fused(module, x), eagerly(module, x))
        assert torch.equal(fused(module, known), first)


@KINDS
def test_other_types_have_launches_of_their_own(kind, recorded):
    module, x = made(kind), images(kind)
    fused(module, x)
    for dtype in (torch.float16, torch.float32, torch.bfloat16, torch.float64):
        module.to(dtype)
        y = fused(module, x.to(dtype))
        assert y.dtype == dtype
        torch.testing.assert_close(
            y.float(), eagerly(module, x.to(dtype)).float(), rtol=0.05, atol=0.05
        )
    assert len(recorded) == 3  # bfloat16 by the definition in the interpreter
    module.float()
    with use_backend("triton"), torch.no_grad(), torch.autocast("cpu", torch.float16):
        y = module(x)  # which casts
        assert y.dtype == torch.float16
        y = module(x.half())
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), eagerly(module, x), rtol=0.02, atol=0.02)
    assert len(recorded) == 4


@KINDS
def test_gradients_modes_and_empty_batches_take_the_definition(kind, recorded):
    module, x = made(kind), images(kind)
    with use_backend("triton"):
        y = module(x)
        assert y.requires_grad
        y = module(x.requires_grad_())
        y.sum().backward()
        assert x.grad.abs().sum() > 0
    x = x.detach()
    expected = eagerly(module, x)
    with use_backend("triton"), torch.no_grad(), RecordOps() as ops:
        module(x)
    assert ops.counts["aten::convolution"] == 1
    with use_backend("triton"), torch.no_grad():
        per_image = torch.vmap(lambda t: module(t[None])[0])(x)
        part(module).train()
        module(x)
        part(module).eval()
        assert module(x[:0]).shape[0] == 0
    torch.testing.assert_close(per_image, expected)
    with use_backend("auto"), torch.no_grad():  # the interpreter serves where it is asked for
        module(x)
    assert recorded == []
    part(module).requires_grad_(False)
    with use_backend("triton"):
        module(x)
    assert len(recorded) == 1
    with torch.inference_mode():
        unversioned = made(kind)
    for _ in range(2):
        assert_same(fused(unversioned, x), eagerly(unversioned, x))
    assert len(recorded) == 1


@KINDS
def test_launches_are_kept_for_a_few_kinds_and_not_copied(kind, monkeypatch):
    monkeypatch.setattr(recordings, "MOST_RECORDINGS", 2)
    module = made(kind)
    for width in (1, 2, 3):
        fused(module, images(kind, shape=(1, 1, width)))
    assert len(part(module).recordings) == 1
    assert list(part(module).state_dict()) == list(part(made(kind)).state_dict())
    x = images(kind, shape=(1, 1, 3))
    expected = fused(module, x)
    twin = copy.deepcopy(module)
    assert part(twin).recordings == {}
    with torch.no_grad():
        part(twin).conv.weight.mul_(2)
    assert_same(fused(twin, x), eagerly(twin, x))
    assert torch.equal(fused(module, x), expected)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert_same(fused(loaded, x), expected)
    assert "recordings" not in part(module.train()).__dict__


def test_memory_of_weights_is_not_given_to_others():
    layer, x = made(), images()
    fused(layer, x)
    weight = layer.conv.weight
    address = weight.data_ptr()
    weight.data = torch.empty(0)
    others = [torch.randn(20, 6, 3, 3) for _ in range(50)]
    assert address not in [t.data_ptr() for t in others]
    weight.data = others[0]
    assert_same(fused(layer, x), eagerly(layer, x))


def test_threads_share_launches(monkeypatch):
    # the interpreter itself serves one thread at a time
    lock, run = threading.Lock(), GridExecutor.__call__

    def alone(*args, **options):
        with lock:
            return run(*args, **options)

    monkeypatch.setattr(GridExecutor, "__call__", alone)
    layer, x = made(), images()
    expected = [eagerly(layer, i * x) for i in range(4)]
    results = {}

    def call(i):
        results[i] = [fused(layer, i * x) for _ in range(3)]

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, y in enumerate(expected):
        assert len(results[i]) == 3
        for result in results[i]:
            assert_same(result, y)
