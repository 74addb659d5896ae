"""Learned and per-sample coefficients of star layers: values, folding, fusing."""

import copy
import pickle
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from starlayers import StarBlock, StarMLP, StarOp, param_groups, use_backend
from tests.helpers import (
    FORMULAS,
    RecordOps,
    assert_close_in_scale,
    gradients,
    properties,
    randn,
    star_mlp_formula,
    star_op_formula,
)

DOUBLE = torch.float64
LEARNED = ("scale", "dynamic")
OPTIONS = st.fixed_dictionaries(
    {
        "act": st.sampled_from(list(FORMULAS)),
        "rank": st.integers(1, 3),
        "bias": st.booleans(),
        "offset": st.sampled_from([0.0, 1.0, -0.5]),
    }
)
SHAPES = st.sampled_from([(3,), (1, 3), (4, 3), (2, 5, 3), (2, 3, 4, 3), (0, 3), (2, 0, 3)])
learned = pytest.mark.parametrize("coefficients", LEARNED)
kinds = pytest.mark.parametrize("kind", [StarOp, StarMLP, StarBlock])


def build(kind, coefficients, **options):
    sizes = (4, 6) if kind is not StarBlock else (4,)
    return filled(kind(*sizes, coefficients=coefficients, **options))


def filled(module):
    """Draw all parameters anew, so that none is at its start value."""
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(randn(*p.shape, seed=i, dtype=p.dtype))
    return module


def formula(op, x):
    """Compute `op(x)` of a layer with coefficients from its weights alone."""
    h1, h2 = (x @ f.weight.T + (0 if f.bias is None else f.bias) for f in (op.f1, op.f2))
    y = FORMULAS[op.act](h1) * op.scale * (op.shift + h2)
    if op.coefficients == "dynamic":
        factors = []
        for sample in x if x.ndim > 1 else [x]:
            mean = sample.reshape(-1, x.shape[-1]).mean(0)
            squeezed = (op.gate[0].weight @ mean + op.gate[0].bias).clamp(min=0)
            gate = op.gate[2].weight @ squeezed + op.gate[2].bias
            factors.append((1 + torch.tanh(gate)).view([1] * max(0, x.ndim - 2) + [-1]))
        y = y * (torch.stack(factors) if x.ndim > 1 and factors else factors[0] if factors else 1)
    width = y.shape[-1] // op.rank
    return sum(y[..., r * width : (r + 1) * width] for r in range(op.rank))


@properties
@given(options=OPTIONS, shape=SHAPES, coefficients=st.sampled_from(LEARNED))
def test_op_is_its_formula(options, shape, coefficients):
    op = filled(StarOp(3, 2, **options, coefficients=coefficients, dtype=DOUBLE))
    x = randn(*shape, dtype=DOUBLE)
    assert op(x).shape == (*shape[:-1], 2)
    torch.testing.assert_close(op(x), formula(op, x))


@learned
def test_mlp_and_block_use_it(coefficients):
    x = randn(2, 5, 4, dtype=DOUBLE)
    mlp = build(StarMLP, coefficients, dtype=DOUBLE, rank=2)
    torch.testing.assert_close(mlp(x), mlp.g(formula(mlp, x)))
    torch.testing.assert_close(mlp(x, x), x + mlp.g(formula(mlp, x)))
    block = build(StarBlock, coefficients, dtype=DOUBLE)
    torch.testing.assert_close(block(x), x + block.mlp.g(formula(block.mlp, x)))


@kinds
@learned
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_it_starts_as_the_fixed_layer(kind, coefficients, offset):
    torch.manual_seed(0)
    sizes = (4, 6) if kind is not StarBlock else (4,)
    twin, x = kind(*sizes, offset=offset, rank=2), randn(3, 5, 4)
    module = kind(*sizes, offset=offset, rank=2, coefficients=coefficients)
    missing, unexpected = module.load_state_dict(twin.state_dict(), strict=False)
    assert unexpected == []
    assert {name.split(".")[-1] for name in missing} >= {"scale", "shift"}
    torch.testing.assert_close(module(x), twin(x))
    # from the first step on everything learns, except the first layer of the gate
    grads = dict(zip(dict(module.named_parameters()), gradients(module, x)[2:]))
    still = {name for name, g in grads.items() if not g.any()}
    assert all("gate.0" in name for name in still)


@kinds
def test_fixed_layers_are_what_they_were(kind):
    sizes = (4, 6) if kind is not StarBlock else (4,)
    torch.manual_seed(0)
    plain = kind(*sizes)
    torch.manual_seed(0)
    fixed = kind(*sizes, coefficients="fixed")
    names = [f"{f}.{p}" for f in ("f1", "f2", "g") for p in ("weight", "bias")]
    expected = [n for n in names if kind is not StarOp or not n.startswith("g")]
    assert [n.removeprefix("mlp.") for n in plain.state_dict()] == expected
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), fixed.parameters()))
    assert "coefficients" not in repr(fixed)
    assert "coefficients='scale'" in repr(kind(*sizes, coefficients="scale"))


def test_layers_pickled_before_there_was_a_choice_are_fixed():
    op, x = StarOp(4, 3), randn(2, 4)
    del op.__dict__["coefficients"]
    op = pickle.loads(pickle.dumps(op))
    torch.testing.assert_close(op(x), star_op_formula(op, x))
    assert op.fold() is op


@properties
@given(options=OPTIONS)
def test_folding_keeps_the_function(options):
    op = filled(StarOp(3, 2, **options, coefficients="scale", dtype=DOUBLE))
    x = randn(50, 3, dtype=DOUBLE)
    before = op(x)
    assert op.fold() is op
    torch.testing.assert_close(op(x), before, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(op(x), star_op_formula(op, x))
    assert op.coefficients == "fixed"
    assert op.offset == options["offset"]
    assert {n.split(".")[0] for n in op.state_dict()} == {"f1", "f2"}
    assert op.f2.bias is not None
    assert (op.f1.bias is None) is not options["bias"]


def test_folding_makes_no_bias_that_is_not_needed():
    op = StarOp(3, 2, coefficients="scale", bias=False)
    nn.init.normal_(op.scale)
    x = randn(5, 3)
    before = op(x)
    torch.testing.assert_close(op.fold()(x), before)
    assert op.f2.bias is None


def test_a_folded_layer_is_the_layer_one_can_build():
    op, x = build(StarMLP, "scale", offset=1.0), randn(3, 4)
    twin = StarMLP(4, 6, offset=1.0)
    twin.load_state_dict(op.fold().state_dict())
    assert torch.equal(twin(x), op(x))


def test_folding_keeps_small_gates_in_half_precision():
    # a bias of 1 + 1e-3 would be 1 in bfloat16
    op = StarOp(4, 3, act=None, offset=1.0, coefficients="scale", dtype=torch.bfloat16)
    nn.init.constant_(op.f2.bias, 1e-3)
    nn.init.zeros_(op.f2.weight)
    op.fold()
    torch.testing.assert_close(op.f2.bias.float(), torch.full((3,), 1e-3), rtol=1e-2, atol=0)


def test_frozen_layers_stay_frozen():
    op = filled(StarOp(4, 3, coefficients="scale", bias=False)).requires_grad_(False)
    assert not any(p.requires_grad for p in op.fold().parameters())


def parametrised():
    op = StarOp(4, 3, coefficients="scale")
    parametrizations.weight_norm(op.f2)
    return op


def replaced():
    op = StarOp(4, 3, coefficients="scale")
    op.f2 = nn.Sequential(op.f2)
    return op


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: StarOp(4, 3, coefficients="dynamic"), "dynamic coefficients depend on the input"),
        (parametrised, "f2 is a wrapped or parametrised ParametrizedLinear"),
        (replaced, "f2 is a wrapped or parametrised Sequential"),
    ],
)
def test_what_cannot_be_folded(make, words):
    op = make()
    with pytest.raises(ValueError, match=words):
        op.fold()
    assert "scale" in dict(op.named_parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"coefficients": "learned"}, "unknown coefficients 'learned', choose one of fixed, scale"),
        (
            {"coefficients": "scale", "combine": "sum"},
            "coefficients='scale' needs combine='mul', got 'sum'",
        ),
    ],
)
@kinds
def test_options_that_must_raise(kind, options, words):
    with pytest.raises(ValueError, match=words):
        kind(4, **options) if kind is not StarOp else kind(4, 3, **options)


@kinds
@pytest.mark.parametrize("shape", [(4,), (3, 4), (3, 2, 4), (3, 2, 2, 4)])
def test_dynamic_factors_are_of_one_sample_alone(kind, shape):
    module, x = build(kind, "dynamic", dtype=DOUBLE), randn(*shape, dtype=DOUBLE)
    y = module(x)
    if x.ndim > 1:
        alone = torch.cat([module(sample[None]) for sample in x])
        torch.testing.assert_close(y, alone)
        other = x.clone()
        other[1:] += 1
        torch.testing.assert_close(module(other)[0], y[0])
    if x.ndim > 2:  # the factors depend on the whole sample
        other = x.clone()
        other[:, -1] += 1
        assert not torch.allclose(module(other)[:, 0], y[:, 0])


@kinds
@learned
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(kind, coefficients, dtype):
    exact, x = build(kind, coefficients), randn(3, 5, 4)
    with torch.no_grad():
        for p in exact.parameters():
            p.mul_(0.3)
    half, y = copy.deepcopy(exact).to(dtype), exact(x)
    cast = half(x.to(dtype))
    assert cast.dtype == dtype
    assert_close_in_scale([cast], [y], 0.02)
    with torch.autocast("cpu", dtype=dtype):
        cast = exact(x)
        assert cast.dtype == (dtype if kind is not StarBlock else torch.float32)
    assert_close_in_scale([cast], [y], 0.02)
    assert all(g.isfinite().all() for g in gradients(half, x.to(dtype)))


#: the quick tier compiles one layer, the slow one all
COMPILED = [
    pytest.param(
        kind,
        coefficients,
        marks=() if (kind, coefficients) == (StarOp, "scale") else pytest.mark.slow,
    )
    for kind in (StarOp, StarMLP, StarBlock)
    for coefficients in LEARNED
]


@pytest.mark.parametrize(("kind", "coefficients"), COMPILED)
def test_compiled_is_eager(kind, coefficients, fresh_compiler):
    module, x = build(kind, coefficients, act="gelu"), randn(3, 5, 4)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(compiled, x), gradients(module, x)):
        torch.testing.assert_close(a, b)
    if coefficients == "scale":
        stars = [m for m in module.modules() if isinstance(m, StarOp)]
        before = module(x)
        for star in stars:
            star.fold()
        torch.testing.assert_close(compiled(x), before, rtol=1e-4, atol=1e-4)


@kinds
@learned
def test_copies_and_transforms(kind, coefficients):
    module, x = build(kind, coefficients, act="tanh"), randn(3, 5, 4)
    y = module(x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), y)
        for p in twin.parameters():
            nn.init.zeros_(p)
        assert torch.equal(module(x), y)
    torch.testing.assert_close(torch.func.vmap(lambda v: module(v[None])[0])(x), y)


@pytest.mark.export
@kinds
@learned
def test_exported_is_eager(kind, coefficients):
    module, x = build(kind, coefficients, act="tanh"), randn(3, 5, 4)
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), module(x))


@learned
@pytest.mark.parametrize("act", [None, "gelu"])
def test_gradients_of_any_order(coefficients, act):
    op = filled(StarOp(3, 2, act=act, rank=2, coefficients=coefficients, dtype=DOUBLE))
    x = randn(2, 2, 3, dtype=DOUBLE, grad=True)
    assert torch.autograd.gradcheck(op, (x,))
    assert torch.autograd.gradgradcheck(op, (x,))


@learned
def test_start_values_can_be_set_again(coefficients):
    op = build(StarOp, coefficients, offset=0.5)
    op.reset_parameters()
    assert op.scale.tolist() == [1.0] * 6
    assert op.shift.tolist() == [0.5] * 6
    if coefficients == "dynamic":
        assert not op.gate[2].weight.any()
        assert op.gate[0].weight.any()
    on_meta = StarOp(4, 6, coefficients=coefficients, device="meta")
    assert on_meta.scale.is_meta
    assert StarOp(4, 6, coefficients=coefficients, dtype=DOUBLE).scale.dtype == DOUBLE


def test_factors_are_not_decayed():
    mlp = StarMLP(4, 6, coefficients="scale")
    groups = param_groups(mlp, 0.1)
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    assert id(mlp.f1.weight) in decayed
    assert not {id(mlp.scale), id(mlp.shift)} & decayed


@pytest.mark.usefixtures("eligible")
@learned
@pytest.mark.parametrize("recompute", [False, True])
def test_fused_paths_say_why_they_stand_back(coefficients, recompute):
    mlp = build(StarMLP, coefficients, recompute=recompute)
    x = randn(70, 4)
    words = f"coefficients='{coefficients}' (needs 'fixed'"
    assert words in mlp.plan(x).reason
    assert ("fold()" in mlp.plan(x).reason) is (coefficients == "scale")
    expected = mlp.g(formula(mlp, x))
    with RecordOps() as ops:
        y = mlp(x)
    assert "starlayers::star_mlp" not in ops.counts
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    y.sum().backward()
    assert mlp.scale.grad.abs().sum() > 0
    with use_backend("triton"), pytest.raises(RuntimeError, match=re.escape(words)):
        mlp(x)


@pytest.mark.usefixtures("eligible")
def test_folded_layers_run_fused():
    mlp, x = build(StarMLP, "scale").fold(), randn(70, 4)
    with RecordOps() as ops:
        y = mlp(x)
    assert ops.counts["starlayers::star_mlp"] == 1
    torch.testing.assert_close(y, star_mlp_formula(mlp, x), rtol=1e-4, atol=1e-4)
