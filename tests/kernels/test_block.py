"""StarBlock2d in training as one step of autograd, in Triton's interpreter."""

import copy

import pytest
import torch
from torch import nn

from starlayers import use_backend
from starlayers.kernels import block as block_module
from starlayers.vision import StarBlock2d, StarNet, fused_block
from starlayers.vision.recompute import recompute
from tests.helpers import randn
from tests.kernels.test_block2d_triton import lively

pytestmark = pytest.mark.interpret


@pytest.fixture
def steps(monkeypatch):
    """Return a list that grows by one at each forward in one step of autograd."""
    calls = []
    whole = block_module._forward

    def counted(x, *rest):
        calls.append(tuple(x.shape))
        return whole(x, *rest)

    monkeypatch.setattr(block_module, "_forward", counted)
    return calls


def made(channels=16, kernel_size=3, **options):
    return lively(StarBlock2d(channels, kernel_size, **{"act": "silu"} | options)).train()


def step(block, x, backend, **changes):
    """Return result, gradients and buffers of a training step."""
    x = x.detach().requires_grad_(changes.get("x_needs", True))
    with use_backend(backend):
        y = block(x)
    upstream = randn(*y.shape, seed=5).to(y)
    wanted = [t for t in (x, *block.parameters()) if t.requires_grad]
    return y, torch.autograd.grad(y, wanted, upstream), [b.clone() for b in block.buffers()]


def held_to_eager(block, x, **changes):
    eager, exact = copy.deepcopy(block), copy.deepcopy(block).double()
    ours = step(block, x, "triton", **changes)
    theirs = step(eager, x, "eager", **changes)
    right = step(exact, x.double(), "eager", **changes)
    for a, b, c in zip((ours[0], *ours[1]), (theirs[0], *theirs[1]), (right[0], *right[1]),
                       strict=True):  # fmt: skip
        # biases in front of a norm have no gradient but rounding errors
        scale = c.abs().max() + 0.1
        assert a.dtype == b.dtype
        assert (a - c).abs().max() <= 2e-4 * scale + 4 * (b - c).abs().max()
    for a, b in zip(ours[2], theirs[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (2, 16, 5, 4)),
        ({"channels": 24, "expansion": 3, "act": "gelu"}, (1, 24, 3, 7)),
        ({"channels": 20, "kernel_size": 7, "act": "relu6"}, (3, 20, 4, 4)),
        ({"channels": 130, "expansion": 0.5}, (2, 130, 2, 3)),  # by products of the library
        ({"channels": 40, "expansion": 2}, (2, 40, 1, 9)),
    ],
)
def test_a_training_step_is_eagers(options, shape, steps):
    held_to_eager(made(**options), randn(*shape))
    assert len(steps) == 1


@pytest.mark.parametrize("without", ["conv", "mlp", "first branch", "all"])
def test_biases_are_optional(without, steps):
    block = made()
    if without in ("conv", "all"):
        block.pre.conv.bias = block.post.conv.bias = None
    if without in ("mlp", "all"):
        block.mlp.g.bias = block.mlp.f2.bias = None
    if without in ("first branch", "all"):
        block.mlp.f1.bias = None
    held_to_eager(block, randn(2, 16, 3, 4))
    assert len(steps) == 1


@pytest.mark.parametrize("frozen", ["x", "mlp", "pre", "post.bn", "mlp.f1.weight"])
def test_frozen_parts_get_no_gradient(frozen, steps):
    block = made()
    for name, p in block.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    held_to_eager(block, randn(2, 16, 3, 4), x_needs=frozen != "x")
    assert len(steps) == 1


def test_second_gradients_are_those_of_the_definition(steps):
    block, x = made(), randn(2, 16, 3, 3)
    grads = []
    for backend in ("triton", "eager"):
        leaf = x.clone().requires_grad_()
        with use_backend(backend):
            y = block(leaf)
        (dx,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
        grads.append([dx, *torch.autograd.grad(dx.square().sum(), [leaf, block.mlp.f1.weight])])
    assert len(steps) == 1
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours / theirs.abs().max(), theirs / theirs.abs().max(),
                                   rtol=1e-3, atol=1e-4)  # fmt: skip


def test_a_checkpoint_computes_the_same_and_counts_statistics_once(steps):
    block, x = made(), randn(2, 16, 3, 4)
    twin = copy.deepcopy(block)
    y, grads, buffers = step(block, x, "triton")
    leaf = x.detach().requires_grad_()
    with use_backend("triton"):
        again = recompute(twin, leaf)
        found = torch.autograd.grad(again, [leaf, *twin.parameters()], randn(*y.shape, seed=5))
    assert torch.equal(again, y)
    for ours, theirs in zip((*found, *twin.buffers()), (*grads, *buffers), strict=True):
        assert torch.equal(ours, theirs)
    assert len(steps) == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b.pre.bn.eval(),
        lambda b: setattr(b.post.bn, "momentum", None),
        lambda b: setattr(b.pre, "bn", nn.BatchNorm2d(16, affine=False)),
        lambda b: setattr(b.pre, "bn", nn.BatchNorm2d(16, track_running_stats=False)),
        lambda b: setattr(b, "gamma", nn.Parameter(torch.ones(16))),
        lambda b: setattr(b.mlp.f1.weight, "data", b.mlp.f1.weight.t().contiguous().t().detach()),
    ],
)
def test_other_blocks_take_the_ops(change, steps):
    block = made()
    change(block)
    held_to_eager(block, randn(2, 16, 3, 4))
    assert steps == []


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("side", ["pre", "post"])
def test_strided_tensors_of_a_norm_are_read_and_written_where_they_are(side, name, steps):
    block, x = made(), randn(2, 16, 3, 4)
    eager = copy.deepcopy(block)  # before: a copy would not be strided
    memory = torch.full((32,), 7.0)
    memory[::2] = getattr(block, side).bn.get_parameter(name) if name in (
        "weight", "bias") else getattr(block, side).bn.get_buffer(name)  # fmt: skip
    kinds = {"weight": nn.Parameter, "bias": nn.Parameter}
    setattr(getattr(block, side).bn, name, kinds.get(name, torch.Tensor)(memory.detach()[::2]))
    ours, theirs = step(block, x, "triton"), step(eager, x, "eager")
    assert steps == []
    assert torch.equal(memory[1::2], torch.full((16,), 7.0))
    for a, b in zip((ours[0], *ours[1], *ours[2]), (theirs[0], *theirs[1], *theirs[2]),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_half_precision_under_autocast(steps):
    block, x = made(), randn(2, 16, 3, 4).half()
    exact = step(copy.deepcopy(block).double(), x.double(), "eager")
    with torch.autocast("cpu", torch.float16):
        y, grads, _ = step(block, x, "triton")
        eager, eager_grads, _ = step(block, x, "eager")
    assert len(steps) == 1
    assert [g.dtype for g in grads] == [g.dtype for g in eager_grads]
    for ours, theirs, right in zip((y, *grads), (eager, *eager_grads), (exact[0], *exact[1]),
                                   strict=True):  # fmt: skip
        scale = right.abs().max() + 0.1
        error = (ours.double() - right).abs().max() / scale
        assert error <= 2 * (theirs.double() - right).abs().max() / scale + 2e-3


def test_one_value_a_channel_has_no_variance(steps):
    with use_backend("triton"), pytest.raises(ValueError, match="more than 1 value per channel"):
        made()(randn(1, 16, 1, 1))
    assert steps == []


def test_training_a_network_is_training_its_definition(steps):
    torch.manual_seed(0)
    net = StarNet(16, (1, 1), stage_strides=(2, 1), num_classes=3)
    twin = copy.deepcopy(net)
    x, target = randn(4, 3, 12, 12), torch.tensor([0, 1, 2, 1])
    for model, backend in ((net, "triton"), (twin, "eager")):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with use_backend(backend):
            for _ in range(3):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), target).backward()
                optimizer.step()
    assert len(steps) == 6
    for ours, theirs in zip(net.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)


def test_gradients_are_recorded_by_the_step_alone(monkeypatch):
    """Its backward is found by PyTorch, once for a block."""
    block, x = made(), randn(2, 16, 3, 4, grad=True)
    monkeypatch.setattr(fused_block, "fused_block", None)
    with use_backend("triton"):
        y = block(x)
    assert type(y.grad_fn.next_functions[0][0]).__name__ == "_BlockBackward"
