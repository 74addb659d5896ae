"""Paths of a StarMLP: recomputed, with a residual, alone or at the end of a block."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from starlayers import StarBlock, StarMLP, StarOp, use_backend
from starlayers.coefficients.modules import RankStarMLP
from tests.helpers import RecordOps, gradients, randn, star_mlp_formula, star_op_formula


def saved_bytes(call):
    """Return the bytes that autograd saves in the call, without parameters and views."""
    sizes = []

    def pack(t):
        if not isinstance(t, nn.Parameter) and t._base is None:
            sizes.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    return sum(sizes)


@pytest.mark.parametrize("act", ["silu", None])
def test_recompute_gives_the_same_gradients_from_less(act):
    mlp, x = StarMLP(6, 50, act=act), randn(30, 6)
    twin = copy.deepcopy(mlp)
    twin.recompute = True
    for ours, theirs in zip(gradients(twin, x), gradients(mlp, x), strict=True):
        assert torch.equal(ours, theirs)
    x = x.clone().requires_grad_()
    assert saved_bytes(lambda: twin(x)) <= x.numel() * 4
    assert saved_bytes(lambda: mlp(x)) >= 2 * 30 * 50 * 4


def test_recompute_is_shown_and_off_by_default():
    assert StarMLP(4).recompute is False
    assert "recompute=True" in repr(StarMLP(4, recompute=True))
    assert "recompute" not in repr(StarMLP(4))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_residual_is_added(fused, recompute, request):
    if fused:
        request.getfixturevalue("eligible")
    mlp, x = StarMLP(5, 7, out_features=3, recompute=recompute), randn(70, 5)
    residual = randn(70, 3, seed=1, grad=True)
    with RecordOps() as ops:
        y = mlp(x, residual)
    assert ops.counts.get("starlayers::star_mlp", 0) == fused
    torch.testing.assert_close(y, residual + star_mlp_formula(mlp, x))
    (d,) = torch.autograd.grad((y * 2).sum(), residual)
    assert torch.equal(d, torch.full((70, 3), 2.0))


@pytest.mark.parametrize("backend", ["auto", "eager", "cpu"])
def test_a_residual_of_another_dtype_is_added_as_a_sum_is(backend, eligible):
    mlp, x = StarMLP(5), randn(70, 5)
    for dtype in (torch.float64, torch.bfloat16):
        residual = randn(70, 5, dtype=dtype)
        with use_backend(backend):
            y = mlp(x, residual)
        assert y.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(y, residual + star_mlp_formula(mlp, x).to(y.dtype))


@pytest.mark.parametrize("backend", ["auto", "eager", "cpu"])
@pytest.mark.parametrize("shape", [(5,), (1, 5), (70, 1), (70, 4), (2, 70, 5), ()], ids=str)
def test_a_residual_of_another_shape_is_refused_on_every_path(shape, backend, eligible):
    words = f"residual must have the shape of the result, (70, 5), got {shape}"
    with use_backend(backend), pytest.raises(ValueError, match=re.escape(words)):
        StarMLP(5)(randn(70, 5), randn(*shape))


BLOCKS = {
    "bare": (lambda: StarBlock(5), True),
    "normed": (lambda: StarBlock(5, pre=nn.LayerNorm(5)), True),
    "post": (lambda: StarBlock(5, post=nn.LayerNorm(5)), False),
    "scaled": (lambda: StarBlock(5, layer_scale=0.5), False),
    "dropped": (lambda: StarBlock(5, drop_path=0.5), False),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_that_ends_in_its_mlp_lets_it_add(name):
    make, adds = BLOCKS[name]
    block, x = make().eval(), randn(7, 5)
    seen = []
    block.mlp.register_forward_pre_hook(lambda _, args: seen.append(len(args)))
    y = block.post(star_mlp_formula(block.mlp, block.pre(x)))
    torch.testing.assert_close(block(x), x + (y if block.gamma is None else block.gamma * y))
    assert seen == [1]  # a hooked MLP gets no residual
    block.mlp._forward_pre_hooks.clear()
    torch.testing.assert_close(block(x), x + (y if block.gamma is None else block.gamma * y))
    assert block._ends_in_mlp() is adds


def test_recompute_draws_the_same_dropout_again():
    mlp = StarMLP(8, bias=False, act=None, recompute=True)
    mlp.f1 = nn.Sequential(mlp.f1, nn.Dropout(0.5))
    results = []
    for mlp.recompute in (True, False):
        torch.manual_seed(0)
        results.append(gradients(mlp, randn(20, 8)))
    torch.testing.assert_close(*results)


def test_recompute_keeps_the_backend_of_the_forward(eligible):
    for mlp in (StarMLP(8, recompute=True), RankStarMLP(8, rank=2, recompute=True)):
        x = randn(70, 8, grad=True)
        with use_backend("eager"):
            y = mlp(x)
        with use_backend("triton"):  # would refuse a star on a CPU
            y.sum().backward()
        assert x.grad is not None


# --- branches that users replace, hook or parametrise run, also if a fused op could


class LowRank(nn.Module):
    """Wrapper like that of LoRA, which is no `nn.Linear`."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.update = nn.Parameter(randn(base.out_features, base.in_features, seed=3))

    def forward(self, x):
        return self.base(x) + x @ self.update.T

    @property
    def weight(self):
        return self.base.weight + self.update

    @property
    def bias(self):
        return self.base.bias


class TripledLinear(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


def hooked(branch):
    branch.register_forward_hook(lambda m, i, o: 3 * o)
    return branch


def weight_normed(branch):
    parametrizations.weight_norm(branch)
    with torch.no_grad():
        branch.parametrizations.weight.original0.mul_(3)
    return branch


def tripled(branch):
    twin = TripledLinear(branch.in_features, branch.out_features, bias=branch.bias is not None)
    twin.load_state_dict(branch.state_dict())
    return twin


class Negative(nn.Module):
    def forward(self, w):
        return -w


def negated(branch):
    parametrize.register_parametrization(branch, "weight", Negative())
    return branch


def pruned(branch):
    return prune.l1_unstructured(branch, "weight", amount=0.5)


@pytest.mark.usefixtures("eligible")
@pytest.mark.parametrize("name", ["f1", "f2", "g"])
@pytest.mark.parametrize("change", [LowRank, tripled, hooked, weight_normed, negated, pruned])
def test_changed_branch_is_really_used(change, name):
    mlp, x = StarMLP(4, act="tanh"), randn(70, 4)
    before = mlp(x)
    mlp.set_submodule(name, change(mlp.get_submodule(name)))
    y = mlp(x)
    expected = mlp.g(mlp.f1(x).tanh() * mlp.f2(x))
    assert torch.equal(y, expected)
    assert (y - before).abs().max() > 0.01


@pytest.mark.usefixtures("eligible")
def test_hooks_run_on_the_layer_and_leave_it_fused():
    mlp, x, seen = StarMLP(4), randn(70, 4), []
    before = mlp(x)
    mlp.register_forward_pre_hook(lambda m, inputs: seen.append("pre") or (2 * inputs[0],))
    mlp.register_forward_hook(lambda m, inputs, y: seen.append("post") or -y)
    with RecordOps() as ops:
        y = mlp(x)
    assert seen == ["pre", "post"]
    assert ops.counts["starlayers::star_mlp"] == 1
    torch.testing.assert_close(y, -star_mlp_formula(mlp, 2 * x))
    assert not torch.equal(y, before)


def test_formula_of_a_wrapped_branch_by_weight():
    op, x = StarOp(4, 3, act="silu"), randn(5, 4)
    op.f1 = LowRank(op.f1)
    torch.testing.assert_close(op(x), star_op_formula(op, x))


@pytest.mark.parametrize(
    "make", [lambda: StarMLP(4, recompute=True), lambda: RankStarMLP(4, recompute=True)]
)
def test_recompute_gives_way_to_transforms_and_tracers(make):
    """Checkpoints fail under torch.func, and `torch.jit.trace` would record one."""
    mlp, x = make(), randn(3, 4)
    weights = dict(mlp.named_parameters())

    def loss(weights):
        return torch.func.functional_call(mlp, weights, (x,)).square().sum()

    grads = torch.func.grad(loss)(weights)
    loss(weights).backward()
    for name, p in mlp.named_parameters():
        torch.testing.assert_close(grads[name], p.grad)
    torch.testing.assert_close(torch.jit.trace(mlp, x)(2 * x), mlp(2 * x))


def test_a_residual_may_change_before_the_backward():
    """Its gradient does not depend on it, fused as in the definition."""
    mlp, x = StarMLP(8), randn(300, 8, grad=True)
    grads = []
    for backend in ("cpu", "eager"):
        residual = randn(300, 8)
        with use_backend(backend):
            y = mlp(x, residual)
        residual.zero_()
        grads.append(torch.autograd.grad(y.square().sum(), [x, *mlp.parameters()]))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        residual = randn(300, 8)
    with use_backend("cpu"):
        mlp(x, residual).sum().backward()
    assert x.grad.isfinite().all()
