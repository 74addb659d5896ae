"""Star layers of all kinds, drawn at random in float64, and their forms by plain formulas."""

import torch
from hypothesis import strategies as st

from starlayers import StarMLP, StarOp
from tests.helpers import randn

DOUBLE = torch.float64
CLOSE = {"rtol": 1e-10, "atol": 1e-10}

OPTIONS = st.fixed_dictionaries(
    {
        "rank": st.integers(1, 3),
        "bias": st.booleans(),
        "offset": st.sampled_from([0.0, 1.0, -0.5]),
        "coefficients": st.sampled_from(["fixed", "scale"]),
    }
)


def filled(layer, seed=0):
    """The layer with all parameters drawn anew, none of them at a start value."""
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.copy_(randn(*p.shape, seed=100 * seed + i, dtype=p.dtype))
    return layer


def star_op(d=4, out=3, seed=0, act=None, **options):
    return filled(StarOp(d, out, act=act, **options, dtype=DOUBLE), seed)


def star_mlp(d=4, hidden=5, seed=0, act=None, **options):
    return filled(StarMLP(d, hidden, act=act, **options, dtype=DOUBLE), seed)


def dense_forms(op):
    """Q of every product channel from the parameters alone, an outer product at a time."""
    d, width = op.in_features, op.f1.out_features // op.rank
    forms = torch.zeros(width, d + 1, d + 1, dtype=DOUBLE)
    for row in range(op.rank * width):
        w1, w2 = (torch.zeros(d + 1, dtype=DOUBLE) for _ in range(2))
        w1[:d], w2[:d] = op.f1.weight[row], op.f2.weight[row]
        shift = op.offset if op.coefficients == "fixed" else op.shift[row]
        if op.f1.bias is not None:
            w1[d], w2[d] = op.f1.bias[row], op.f2.bias[row]
        w2[d] += shift
        if op.coefficients != "fixed":
            w2 = w2 * op.scale[row]
        forms[row % width] += (torch.outer(w1, w2) + torch.outer(w2, w1)) / 2
    return forms
