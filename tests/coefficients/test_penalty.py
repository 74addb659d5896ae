"""The penalty against the same from the matrices, in value and gradient."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from starlayers import StarBlock, StarOp, use_backend
from starlayers.coefficients import CoefficientPenalty, branch_vectors, norms
from starlayers.coefficients.modules import RankStarMLP, RankStarOp, SumOp
from starlayers.coefficients.penalty import imbalance
from tests.coefficients.layers import (
    CLOSE,
    DOUBLE,
    OPTIONS,
    dense_forms,
    filled,
    star_mlp,
    star_of,
    star_op,
)
from tests.helpers import properties

SIZES = st.tuples(st.integers(1, 5), st.integers(1, 4))
MODES = st.sampled_from([(2, False), (1, False), (1, True), (None, False)])


def dense_penalty(layers, p, normalise, balance, bound):
    """The definition, from matrices."""
    total, share = 0.0, 1 / len(layers)
    for op in layers:
        q = dense_forms(op)
        side = q.shape[-1]
        per_channel = None
        if p == 2:
            per_channel = q.square().sum((1, 2))
        elif bound:
            per_channel = sum(
                w1.abs().sum(-1) * w2.abs().sum(-1)
                for w1, w2 in zip(*(w.unbind(1) for w in branch_vectors(op)))
            )
        elif p == 1:
            per_channel = q.abs().sum((1, 2))
        if per_channel is not None:
            width = side if p == 1 else 1
            total = total + (per_channel.mean() * share / width if normalise else per_channel.sum())
        if balance:
            effective = q.square().sum().square() / q.pow(4).sum()
            total = total + balance * share * (1 - effective.log() / math.log(q.numel()))
    return total


@properties
@given(
    options=OPTIONS, size=SIZES, seed=st.integers(0, 99), mode=MODES, normalise=st.booleans(),
    balance=st.sampled_from([0.0, 0.3]),
)  # fmt: skip
def test_value_and_gradients_are_those_of_the_matrices(
    options, size, seed, mode, normalise, balance
):
    (p, bound), balance = mode, balance or (0.5 if mode[0] is None else 0.0)
    layers = [star_op(*size, seed=seed, **options), star_mlp(3, 2, seed=seed + 1, **options)]
    model = nn.Sequential(*layers)
    penalty = CoefficientPenalty(model, p, normalise=normalise, balance=balance, bound=bound)
    found, expected = penalty(), dense_penalty(layers, p, normalise, balance, bound)
    assert found.shape == ()
    torch.testing.assert_close(found, expected, **CLOSE)
    parameters = [p for n, p in model.named_parameters() if "g." not in n]
    for a, b in zip(
        torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters)
    ):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("options", [{"p": 2}, {"p": 1}, {"p": 1, "bound": True}, {"p": None}])
def test_gradcheck(rank, options):
    op = star_op(4, 2, rank=rank)
    penalty = CoefficientPenalty(op, **options, balance=1.0)
    names = [n for n, _ in op.named_parameters()]

    def value(*tensors):
        for name, tensor in zip(names, tensors):
            branch, kind = name.removeprefix("star.").split(".")
            getattr(star_of(op), branch)._parameters[kind] = tensor
        return penalty()

    parameters = tuple(p.detach().clone().requires_grad_() for p in op.parameters())
    assert torch.autograd.gradcheck(value, parameters)
    assert torch.autograd.gradgradcheck(value, parameters)


def zeros_in(op):
    """Weights cut off: rows of one branch, of the other, of both, and equal and opposite ones."""
    first, second = star_of(op).f1.weight, star_of(op).f2.weight
    with torch.no_grad():
        first[:, :3] = 0
        second[:, 2:5] = 0
        first[:, 5] = second[:, 5]
        first[:, 6] = -second[:, 6]
        second[0] = first[0]
        first[1].zero_()
    return op


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_absolute_values_have_derivative_zero_where_a_coefficient_is_zero(rank, dtype):
    op = zeros_in(star_op(8, 4, rank=rank)).to(dtype)
    parameters = list(op.parameters())
    twin = copy.deepcopy(op).double()
    found = torch.autograd.grad(CoefficientPenalty(op, 1, normalise=False)(), parameters)
    dense = dense_forms(twin).abs().sum()
    expected = torch.autograd.grad(dense, list(twin.parameters()))
    tolerance = CLOSE if dtype == DOUBLE else {"rtol": 1e-5, "atol": 1e-5}
    for a, b in zip(found, expected):
        torch.testing.assert_close(a.double(), b, **tolerance)


@pytest.mark.parametrize("rank", [1, 2])
def test_the_bound_bounds(rank):
    op = star_op(8, 16, rank=rank)
    exact, bound = (CoefficientPenalty(op, 1, bound=b)() for b in (False, True))
    assert exact < bound < 3 * exact


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("p", [1, 2])
def test_chunks_change_nothing_and_save_only_the_vectors(p, rank, backend, monkeypatch):
    op = star_op(6, 9, rank=rank)
    penalty = CoefficientPenalty(op, p, balance=0.2)
    parameters = list(op.parameters())
    whole = [penalty(), *torch.autograd.grad(penalty(), parameters)]
    monkeypatch.setattr(norms, "CHUNK_BYTES", 1)
    with use_backend(backend):
        value = penalty()
    for a, b in zip([value, *torch.autograd.grad(value, parameters)], whole):
        torch.testing.assert_close(a, b, **CLOSE)


def saved_numbers(call):
    """Numbers kept for the backward, each storage once."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        y = call()
    return sum(kept.values()), y


@pytest.mark.parametrize(("p", "most"), [(2, 4), (1, 4)])
def test_memory_is_of_the_order_of_the_parameters(p, most, monkeypatch):
    # for p=1 in chunks of 2 MiB, beyond which everything is computed again
    monkeypatch.setattr(norms, "CHUNK_BYTES", 2**21)
    op = StarOp(512, 2048, act=None)
    parameters = sum(t.numel() for t in op.parameters())
    kept, _ = saved_numbers(CoefficientPenalty(op, p))
    assert kept < most * parameters  # the matrices are 256 times the parameters


def test_balance_measures_how_even_coefficients_are():
    op = star_op(3, 2, bias=False)
    with torch.no_grad():
        for f in (op.f1, op.f2):
            f.weight.zero_()
            f.weight[0, 0] = 5.0
    penalty = CoefficientPenalty(op, None, balance=2.0)
    torch.testing.assert_close(penalty(), torch.tensor(2.0, dtype=DOUBLE))  # one coefficient
    with torch.no_grad():
        op.f1.weight.fill_(1.0)
        op.f2.weight.fill_(3.0)
    even = 1 - math.log(2 * 9) / math.log(2 * 16)  # all but those with the constant coordinate
    torch.testing.assert_close(penalty(), torch.tensor(2 * even, dtype=DOUBLE))


def test_balance_does_not_care_for_size_and_survives_zero():
    op = StarOp(6, 4, act=None)
    before = CoefficientPenalty(op, None, balance=1.0)()
    with torch.no_grad():
        for p in op.f1.parameters():
            p.mul_(1e-15)
    torch.testing.assert_close(CoefficientPenalty(op, None, balance=1.0)(), before)
    with torch.no_grad():
        for p in op.parameters():
            p.zero_()
    for options in ({"p": 2}, {"p": 1}, {"p": None}):
        penalty = CoefficientPenalty(op, **options, balance=1.0)
        value = penalty()
        grads = torch.autograd.grad(value, list(op.parameters()))
        assert all(g.isfinite().all() for g in grads), options
        torch.testing.assert_close(value, torch.ones(()))  # the balance, of no coefficients


def test_training_with_it_does_what_it_says():
    torch.manual_seed(0)
    for options, measured in (
        ({"p": 2}, lambda w: norms.squares(*w).sum()),
        ({"p": 1}, lambda w: norms.absolutes(*w).sum()),
        ({"p": None, "balance": 1.0}, lambda w: imbalance(*w)),
    ):
        op = StarOp(6, 4, act="gelu")
        penalty = CoefficientPenalty(op, **options)
        before = measured(branch_vectors(op)).item()
        optimizer = torch.optim.SGD(op.parameters(), lr=0.5)
        for _ in range(20):
            optimizer.zero_grad()
            penalty().backward()
            optimizer.step()
        assert measured(branch_vectors(op)).item() < 0.9 * before, options


def test_normalised_sizes_do_not_depend_on_the_model():
    torch.manual_seed(0)
    small = nn.Sequential(StarOp(32, 64))
    large = nn.Sequential(StarOp(128, 256), StarOp(256, 512), StarOp(512, 64))
    for p in (1, 2):
        values = [CoefficientPenalty(m, p)().item() for m in (small, large)]
        assert 0.7 < values[0] / values[1] < 1.4
        sums = [CoefficientPenalty(m, p, normalise=False)().item() for m in (small, large)]
        assert sums[1] > 8 * sums[0]


def test_layers_are_found_and_read_at_every_call():
    model = nn.Sequential(StarBlock(4), SumOp(4, 4), RankStarOp(4, 3, rank=2))
    penalty = CoefficientPenalty(model)
    assert list(penalty.layers) == ["0.mlp", "2"]
    assert repr(penalty) == "CoefficientPenalty(2 layers, p=2)"
    before = penalty()
    with torch.no_grad():
        model[2].star.f1.weight.mul_(2)
        model[2].star.f1.bias.mul_(2)
    assert penalty() > before
    penalty().backward()
    assert model[0].mlp.f1.weight.grad.abs().sum() > 0
    assert model[0].mlp.g.weight.grad is None
    assert model[1].f1.weight.grad is None


def test_learned_scales_take_part():
    op = star_op(4, 3, scaled=True)
    CoefficientPenalty(op)().backward()
    assert all(p.grad.abs().sum() > 0 for p in (op.scale, op.shift))
    value = CoefficientPenalty(op)().detach()
    torch.testing.assert_close(CoefficientPenalty(op.fold())().detach(), value, **CLOSE)


def test_half_precision_and_autocast_are_summed_in_float32():
    op = RankStarMLP(16, rank=2)
    exact = CoefficientPenalty(op, balance=0.1)()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = CoefficientPenalty(op, balance=0.1)()
    assert torch.equal(found, exact)
    half = CoefficientPenalty(op.to(torch.bfloat16), balance=0.1)()
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0.02, atol=0)
    half.backward()
    assert op.star.f1.weight.grad.dtype == torch.bfloat16


@pytest.mark.slow
def test_it_compiles(fresh_compiler):
    model = nn.Sequential(StarOp(4, 8), RankStarOp(8, 3, rank=2))
    for options in ({"p": 2}, {"p": 1}, {"p": 2, "balance": 0.5}):
        penalty = CoefficientPenalty(model, **options)
        compiled = torch.compile(penalty, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(), penalty())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"p": 3}, "p must be 1, 2 or None, got 3"),
        ({"p": None}, "p=None needs a balance above 0"),
        ({"balance": -0.5}, "balance must be at least 0, got -0.5"),
        ({"p": 2, "bound": True}, "bound=True is for p=1, got p=2"),
    ],
)
def test_options_that_make_no_sense(options, words):
    with pytest.raises(ValueError, match=words):
        CoefficientPenalty(StarOp(3, 2), **options)


def test_models_without_star_layers():
    for model in (nn.Linear(3, 2), SumOp(3, 2)):
        with pytest.raises(ValueError, match="has no star layers"):
            CoefficientPenalty(model)


def test_large_layers_need_no_matrix_but_for_absolute_values_of_sums():
    op = filled(RankStarOp(17_000, 2, act=None, rank=2))
    with pytest.raises(ValueError, match=r"17001 x 17001 takes 1\.1 GiB.*bound=True"):
        CoefficientPenalty(op, 1)()
    assert CoefficientPenalty(op, 1, bound=True)() > 0
    assert CoefficientPenalty(op, 2)() > 0
    assert CoefficientPenalty(filled(StarOp(17_000, 2, act=None)), 1)() > 0
