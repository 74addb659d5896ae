"""StarBlock2d and StarNet under `use_backend("triton")`, in Triton's interpreter."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

from starlayers import StarMLP, use_backend
from starlayers.coefficients.modules import RankStarMLP
from starlayers.vision import StarBlock2d, StarNet, fused_block
from starlayers.vision.recompute import recompute
from tests.helpers import RecordOps, assert_close_in_scale, randn
from tests.kernels.cases import DEVICE
from tests.kernels.test_layer_triton import held_to_eager, slow, some

pytestmark = pytest.mark.interpret


def lively(module):
    """Move BatchNorms away from their start values, as training does."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(3)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for t, low, high in (
                (norm.weight, 0.5, 2.0),
                (norm.bias, -1.0, 1.0),
                (norm.running_mean, -1.0, 1.0),
                (norm.running_var, 0.5, 2.0),
            ):
                with torch.no_grad():
                    t.uniform_(low, high, generator=generator)
    return module


BLOCKS = {
    "plain": (lambda: StarBlock2d(16, act="silu"), (2, 16, 9, 9)),
    "starnet-s1": (lambda: StarBlock2d(24, expansion=3, act="gelu"), (2, 24, 7, 7)),
    "kernel-3": (lambda: StarBlock2d(32, 3, mlp=StarMLP(32, act="tanh", offset=1)), (1, 32, 5, 11)),
    "scaled": (lambda: StarBlock2d(16, 5, act="silu", layer_scale=0.3), (1, 16, 8, 3)),
}


QUICK = [("plain", True), ("kernel-3", False)]
CASES = [
    pytest.param(name, training, marks=() if (name, training) in QUICK else slow)
    for name in BLOCKS
    for training in (True, False)
]


@pytest.mark.parametrize(("name", "training"), CASES)
def test_block_matches_eager(name, training):
    make, shape = BLOCKS[name]
    block = lively(make()).train(training)
    counts = held_to_eager(block, randn(*shape))
    assert counts["starlayers::dwconv"] == 2
    assert counts["starlayers::dwconv_backward"] == 2
    assert counts["starlayers::star_mlp"] == counts["starlayers::star_mlp_backward"] == 1
    assert not any("batch_norm" in op or "convolution" in op for op in counts)


@pytest.mark.parametrize("training", [False, True])
def test_only_norms_in_training_ask_for_statistics(monkeypatch, training):
    asked = []

    def recording(op):
        def call(*args):
            asked.append(args[-1])
            return op(*args)

        return call

    for name in ("dwconv", "star_mlp"):
        monkeypatch.setattr(fused_block, name, recording(getattr(fused_block, name)))
    with use_backend("triton"), torch.no_grad(), RecordOps():  # a mode sees the ops
        lively(StarBlock2d(16, 3, act="silu")).train(training)(randn(1, 16, 5, 5))
    # the last convolution is followed by no norm
    assert asked == [training, training, False]


@pytest.mark.parametrize("momentum", [0.1, pytest.param(None, marks=slow)])
def test_running_statistics_are_those_of_batch_norm(momentum):
    ours, theirs = (lively(StarBlock2d(16, 3, act="silu")) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    for block in (ours, theirs):
        block.pre.bn.momentum = block.post.bn.momentum = momentum
    for step in range(2):
        x = randn(2, 16, 5, 5, seed=step)
        with use_backend("triton"):
            ours(x)
        with use_backend("eager"):
            theirs(x)
    for (name, a), b in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_one_value_per_channel_raises_as_batch_norm_does():
    block = StarBlock2d(16, 3)
    for backend in ("triton", "eager"):
        with use_backend(backend), pytest.raises(ValueError, match="more than 1 value per channel"):
            block(randn(1, 16, 1, 1))


@pytest.mark.parametrize("fused", [pytest.param(False, marks=slow), True], ids=["norms", "folded"])
def test_inference(fused):
    block = lively(StarBlock2d(16, 3, act="silu")).eval()
    x = randn(1, 16, 9, 9)
    with torch.no_grad(), use_backend("eager"):
        expected = block(x)
        if fused:
            block.fuse()
    with torch.no_grad(), use_backend("triton"), RecordOps() as ops:
        torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)
    assert ops.counts["starlayers::dwconv"] == 2
    assert ops.counts["starlayers::star_mlp"] == 1


def test_drop_path_draws_as_eager_does():
    block, x = StarBlock2d(16, 3, drop_path=0.5), randn(6, 16, 5, 5)
    outputs = []
    for backend in ("triton", "eager"):
        torch.manual_seed(0)
        with use_backend(backend):
            outputs.append(copy.deepcopy(block)(x))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    kept = (outputs[0] != x).flatten(1).any(1)
    assert 0 < kept.sum() < 6


@slow
def test_autocast():
    block, x = lively(StarBlock2d(16, 3, act="silu")), randn(2, 16, 7, 7)
    outputs = []
    for backend in ("triton", "eager"):
        with torch.autocast("cpu", dtype=torch.bfloat16), use_backend(backend):
            outputs.append(copy.deepcopy(block)(x))
    assert outputs[0].dtype == outputs[1].dtype
    assert_close_in_scale(outputs[:1], outputs[1:], 0.03)


REFUSED = {
    "conv": (
        lambda b: b.pre.conv.register_forward_hook(lambda *_: None),
        "convolution is hooked",
    ),
    "norm": (lambda b: setattr(b.post, "bn", nn.InstanceNorm2d(16)), "InstanceNorm2d"),
    "branch": (lambda b: b.mlp.f1.register_forward_hook(lambda *_: None), "f1 has hooks"),
    "rank": (lambda b: setattr(b, "mlp", RankStarMLP(16)), "no StarMLP but a RankStarMLP"),
}


@pytest.mark.parametrize("name", some(("norm",), REFUSED))
def test_triton_says_why_it_cannot_serve_a_block(name):
    block, x = StarBlock2d(16, 3), randn(1, 16, 5, 5)
    change, words = REFUSED[name]
    change(block)
    with use_backend("triton"), pytest.raises(RuntimeError, match=f"StarBlock2d: .*{words}"):
        block(x)


@slow
def test_block_compiles_without_a_graph_break(fresh_compiler):
    block, x = StarBlock2d(16, 3), randn(2, 16, 5, 5)
    with use_backend("triton"):
        expected = copy.deepcopy(block)(x)
        y = torch.compile(block, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(y, expected)


@slow
def test_small_starnet_matches_eager_with_relu6():
    net = StarNet(16, (1, 1), num_classes=5, stage_strides=(2, 2)).train()
    # a value that crosses a kink of relu6 in one of the two moves single elements, not the norm
    held_to_eager(net, randn(2, 3, 32, 32), factor=3.0, floor=1e-2, elementwise=False)


@slow
@pytest.mark.skipif(DEVICE == "cuda", reason="no tile for its widest blocks in float32")
def test_every_width_of_starnet_s4_matches_eager():
    net = lively(StarNet(32, (1, 1, 2, 1), num_classes=4, act="silu")).train()
    counts = held_to_eager(net, randn(4, 3, 32, 32), factor=2.0, floor=1e-5)
    blocks = [m for m in net.modules() if isinstance(m, StarBlock2d)]
    assert {block.mlp.in_features for block in blocks} == {32, 64, 128, 256}
    assert counts["starlayers::dwconv"] == 2 * len(blocks)
    assert counts["starlayers::star_mlp_backward"] == len(blocks)


class Overridden(StarMLP):
    def forward(self, x, residual=None):
        return super().forward(x, residual) * 2


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)

    def forward(self, x):
        return self.module(x) * 2


CHANGED = {
    "hook on the mlp": lambda b: b.mlp.register_forward_hook(lambda m, i, o: o * 0),
    "subclass": lambda b: setattr(b, "mlp", Overridden(16)),
    "wrapper": lambda b: setattr(b, "mlp", Wrapper(b.mlp)),
    "another mlp": lambda b: setattr(b, "mlp", nn.Sequential(nn.Linear(16, 16), nn.ReLU())),
    "layer added": lambda b: b.pre.add_module("act", nn.ReLU()),
    "pre replaced": lambda b: setattr(b, "pre", nn.Identity()),
    "hook on a side": lambda b: b.post.register_forward_hook(lambda m, i, o: o * 0),
    "order": lambda b: setattr(b, "post", type(b.post)(OrderedDict(b.pre.named_children()))),
}


@pytest.mark.parametrize("name", some(("subclass", "order"), CHANGED))
def test_what_was_attached_to_a_part_is_never_skipped(name):
    block, x = StarBlock2d(16, 3), randn(1, 16, 5, 5)
    CHANGED[name](block)
    with use_backend("triton"), pytest.raises(RuntimeError, match="cannot serve this StarBlock2d"):
        block(x)


@slow
def test_statistics_that_are_not_tracked_stay():
    for change in ("track_running_stats", "num_batches_tracked"):
        outputs = []
        for backend in ("triton", "eager"):
            block = lively(StarBlock2d(16, 3, act="silu"))
            block.load_state_dict(lively(StarBlock2d(16, 3, act="silu")).state_dict())
            torch.manual_seed(0)
            for p in block.parameters():
                nn.init.normal_(p, std=0.1)
            setattr(block.pre.bn, change, False if change == "track_running_stats" else None)
            with use_backend(backend):
                outputs.append([block(randn(2, 16, 5, 5)), *block.buffers()])
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


@slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_second_gradients_in_half_precision(dtype):
    block = lively(StarBlock2d(16, 3, act="silu")).to(dtype)
    second = []
    for backend in ("triton", "eager"):
        x = randn(2, 16, 5, 5, dtype=dtype, grad=True)
        with use_backend(backend):
            (dx,) = torch.autograd.grad(block(x).sum(), x, create_graph=True)
            second.append(torch.autograd.grad(dx.float().square().sum(), x)[0].float())
    assert (second[0] - second[1]).norm() <= 0.1 * second[1].norm()


@slow
def test_a_norm_far_from_its_mean_folds_as_exactly_as_it_runs():
    block = lively(StarBlock2d(16, 3, act=None))
    with torch.no_grad():
        block.pre.conv.bias.mul_(100)
    held_to_eager(block.to(torch.bfloat16), randn(4, 16, 7, 7, dtype=torch.bfloat16), floor=0.02)


@slow
@pytest.mark.export
def test_export_holds_the_ops_where_triton_is_forced():
    block, x = StarBlock2d(16, 3).eval(), randn(1, 16, 5, 5)
    with use_backend("triton"), torch.no_grad():
        program = torch.export.export(block, (x,))
        expected = block(x)
    assert any("starlayers." in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), expected)


def test_recomputation_keeps_the_backend_of_the_forward():
    block, x = StarBlock2d(16, 3), randn(2, 16, 5, 5, grad=True)
    with use_backend("triton"):
        y = recompute(block, x)
        expected = torch.autograd.grad(copy.deepcopy(block)(x).sum(), x)
    dx = torch.autograd.grad(y.sum(), x)  # outside of the block
    torch.testing.assert_close(dx, expected)
