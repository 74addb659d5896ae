"""Star layers of all kinds, drawn at random in float64, and their forms by plain formulas."""

import torch
from hypothesis import strategies as st

from starlayers import StarMLP, StarOp
from starlayers.coefficients.modules import (
    DynamicStarOp,
    RankStarMLP,
    RankStarOp,
    ScaledStarMLP,
    ScaledStarOp,
    SumOp,
)
from tests.helpers import FORMULAS, branch_parameters, randn

DOUBLE = torch.float64
CLOSE = {"rtol": 1e-10, "atol": 1e-10}

#: options of `star_op` and `star_mlp`; several products and learned factors are different classes
OPTIONS = st.builds(
    lambda variant, **options: variant | options,
    st.sampled_from([{}, {"rank": 2}, {"rank": 3}, {"scaled": True}]),
    bias=st.booleans(),
    offset=st.sampled_from([0.0, 1.0, -0.5]),
    packed=st.booleans(),
)


def filled(layer, seed=0):
    """The layer with all parameters drawn anew, none of them at a start value."""
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.copy_(randn(*p.shape, seed=100 * seed + i, dtype=p.dtype))
    return layer


def star_op(d=4, out=3, seed=0, act=None, *, rank=1, scaled=False, **options):
    """Make a `StarOp`, or the class that has several products or learned factors."""
    kind = ScaledStarOp if scaled else StarOp
    if rank > 1:
        kind, options = RankStarOp, options | {"rank": rank}
    return filled(kind(d, out, act=act, **options, dtype=DOUBLE), seed)


def star_mlp(d=4, hidden=5, seed=0, act=None, *, rank=1, scaled=False, packed=False, **options):
    """Make an MLP like `star_op`; only that of several products has packed branches."""
    kind = ScaledStarMLP if scaled else StarMLP
    if rank > 1:
        kind, options = RankStarMLP, options | {"rank": rank, "packed": packed}
    return filled(kind(d, hidden, act=act, **options, dtype=DOUBLE), seed)


def star_of(op):
    """The layer that has the branches: `star` inside of a layer of several products."""
    return op.star if isinstance(op, RankStarOp) else op


def dense_forms(op):
    """Q of every product channel from the parameters alone, an outer product at a time."""
    rank = op.rank if isinstance(op, RankStarOp) else 1
    (first, bias1), (second, bias2) = branch_parameters(star_of(op))
    d, rows = op.in_features, len(first)
    forms = torch.zeros(rows // rank, d + 1, d + 1, dtype=DOUBLE)
    for row in range(rows):
        w1, w2 = (torch.zeros(d + 1, dtype=DOUBLE) for _ in range(2))
        w1[:d], w2[:d] = first[row], second[row]
        if bias1 is not None:
            w1[d], w2[d] = bias1[row], bias2[row]
        if isinstance(op, ScaledStarOp):
            w2[d] += op.shift[row]
            w2 = w2 * op.scale[row]
        else:
            w2[d] += op.offset
        forms[row // rank] += (torch.outer(w1, w2) + torch.outer(w2, w1)) / 2
    return forms


def hidden_formula(op, x):
    """What a layer of any class computes before `g`, from its weights and options alone."""
    inner = star_of(op)
    h1, h2 = (x @ w.T + (0 if b is None else b) for w, b in branch_parameters(inner))
    y = FORMULAS[inner.act](h1)
    if isinstance(op, SumOp):
        return y + h2
    if not isinstance(op, ScaledStarOp):
        y = y * (inner.offset + h2)
        rank = op.rank if isinstance(op, RankStarOp) else 1
        return sum(y[..., r::rank] for r in range(rank))
    y = y * op.scale * (op.shift + h2)
    return y * sample_factors(op, x) if isinstance(op, DynamicStarOp) and x.numel() else y


def layer_formula(layer, x):
    """`layer(x)` of an op or an MLP of any class, from its weights and options alone."""
    y, g = hidden_formula(layer, x), getattr(layer, "g", None)
    return y if g is None else y @ g.weight.T + (0 if g.bias is None else g.bias)


def sample_factors(op, x):
    """The factors of a `DynamicStarOp` that depend on the sample, one sample at a time."""
    factors = []
    for sample in x if x.ndim > 1 else [x]:
        mean = sample.reshape(-1, x.shape[-1]).mean(0)
        squeezed = (op.gate[0].weight @ mean + op.gate[0].bias).clamp(min=0)
        gate = op.gate[2].weight @ squeezed + op.gate[2].bias
        factors.append((1 + torch.tanh(gate)).view([1] * max(0, x.ndim - 2) + [-1]))
    return torch.stack(factors) if x.ndim > 1 else factors[0]
