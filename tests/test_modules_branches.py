"""Branches that users replace, hook or parametrise run, also if a fused op could."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from starlayers import StarMLP, StarOp
from tests.helpers import RecordOps, randn, star_mlp_formula, star_op_formula


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
