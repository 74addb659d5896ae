"""StarOp, StarMLP, DropPath and StarBlock: values, gradients and inputs that must raise."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import DropPath as TimmDropPath
from torch import nn

from starlayers import ACTIVATIONS, DropPath, StarBlock, StarMLP, StarOp, use_backend
from tests.helpers import FORMULAS, properties, randn, star_mlp_formula, star_op_formula

DOUBLE = torch.float64
OPTIONS = st.fixed_dictionaries(
    {
        "act": st.sampled_from(list(FORMULAS)),
        "rank": st.integers(1, 3),
        "bias": st.booleans(),
    }
)
JOINS = st.sampled_from([("mul", 0.0), ("mul", 1.0), ("mul", -0.5), ("sum", 0.0)])
SHAPES = st.sampled_from([(3,), (1, 3), (4, 3), (2, 5, 3), (0, 3), (2, 0, 3)])


@properties
@given(options=OPTIONS, join=JOINS, shape=SHAPES, out=st.integers(1, 4))
def test_op_is_its_formula(options, join, shape, out):
    op = StarOp(3, out, **options, combine=join[0], offset=join[1], dtype=DOUBLE)
    x = randn(*shape, dtype=DOUBLE)
    assert op(x).shape == (*shape[:-1], out)
    torch.testing.assert_close(op(x), star_op_formula(op, x))


@properties
@given(options=OPTIONS, join=JOINS, shape=SHAPES, out=st.none() | st.integers(1, 4))
def test_mlp_is_its_formula(options, join, shape, out):
    join = {"combine": join[0], "offset": join[1]}
    mlp = StarMLP(3, 5, out_features=out, **options, **join, dtype=DOUBLE)
    x = randn(*shape, dtype=DOUBLE)
    assert mlp(x).shape == (*shape[:-1], out or 3)
    torch.testing.assert_close(mlp(x), star_mlp_formula(mlp, x))


def test_rank_branches_are_laid_out_rank_first():
    op = StarOp(1, 2, act=None, rank=2, bias=False)
    with torch.no_grad():
        op.f1.weight.copy_(torch.tensor([[1.0], [2.0], [10.0], [20.0]]))
        op.f2.weight.fill_(1.0)
    assert op(torch.ones(1)).tolist() == [11.0, 22.0]


@pytest.mark.parametrize("act", FORMULAS)
def test_offset_one_and_zero_f2_is_a_plain_mlp(act):
    mlp = StarMLP(4, 6, act=act, offset=1)
    nn.init.zeros_(mlp.f2.weight)
    nn.init.zeros_(mlp.f2.bias)
    x = 3 * randn(5, 4)
    assert torch.equal(mlp(x), mlp.g(ACTIVATIONS[act].fn(mlp.f1(x))))


def test_swiglu_is_the_usual_one():
    mlp = StarMLP(4, 6, act="swiglu", bias=False)
    gate, up, down = mlp.f1.weight, mlp.f2.weight, mlp.g.weight
    x = randn(2, 5, 4)
    expected = (nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    torch.testing.assert_close(mlp(x), expected)
    assert sorted(mlp.state_dict()) == ["f1.weight", "f2.weight", "g.weight"]


@pytest.mark.parametrize(
    ("module", "shapes"),
    [
        (StarOp(3, 2), {"f1": (2, 3), "f2": (2, 3)}),
        (StarOp(3, 2, rank=4), {"f1": (8, 3), "f2": (8, 3)}),
        (StarMLP(3), {"f1": (12, 3), "f2": (12, 3), "g": (3, 12)}),
        (StarMLP(3, 5, out_features=2, rank=2), {"f1": (10, 3), "f2": (10, 3), "g": (2, 5)}),
    ],
    ids=["op", "op-rank", "mlp-default-hidden", "mlp-rank"],
)
def test_branches_are_plain_linears_and_direct_children(module, shapes):
    assert {k: tuple(m.weight.shape) for k, m in module.named_children()} == shapes
    assert all(type(m) is nn.Linear for m in module.children())
    x = randn(2, 3)
    formula = star_mlp_formula if "g" in shapes else star_op_formula
    torch.testing.assert_close(module(x), formula(module, x))


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (StarOp(3, 2), "3, 2, act='relu6'"),
        (StarMLP(3, act=None, offset=1, rank=2), "3, 3, act='identity', offset=1.0, rank=2"),
        (StarOp(3, 2, combine="sum", act="swiglu"), "3, 2, act='silu', combine='sum'"),
        (DropPath(0.25), "p=0.25"),
    ],
    ids=["op", "mlp", "sum", "drop-path"],
)
def test_repr_shows_what_differs_from_the_default(module, text):
    assert module.extra_repr() == text


def test_drop_path_is_identity_where_nothing_drops():
    x = randn(4, 3)
    assert DropPath(0.9).eval()(x) is x
    assert DropPath(0.0).train()(x) is x


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_drop_path_drops_whole_samples_and_keeps_the_mean(p):
    torch.manual_seed(0)
    n = 4000
    y = DropPath(p)(torch.ones(n, 2, 3)).flatten(1)
    assert (y == y[:, :1]).all()
    kept = y[:, 0] != 0
    torch.testing.assert_close(y[kept, 0], torch.full((int(kept.sum()),), 1 / (1 - p)))
    assert abs(kept.float().mean().item() - (1 - p)) < 4 * (p * (1 - p) / n) ** 0.5


@pytest.mark.parametrize("shape", [(8,), (8, 3), (8, 3, 2, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_drop_path_draws_what_timm_draws(shape, dtype):
    x = randn(*shape, dtype=dtype)
    found = []
    for layer in (DropPath(0.4), TimmDropPath(0.4)):
        torch.manual_seed(3)
        found.append(layer(x))
    assert torch.equal(*found)
    assert not torch.equal(found[0], x)


@pytest.mark.parametrize("layer_scale", [None, 0.5, 1e-6, 0.0], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_block_is_its_formula(layer_scale, training):
    pre, post = nn.LayerNorm(4, dtype=DOUBLE), nn.Linear(4, 4, dtype=DOUBLE)
    options = {"pre": pre, "post": post, "layer_scale": layer_scale, "drop_path": 0.5}
    block = StarBlock(4, expansion=1.5, act="gelu", **options, dtype=DOUBLE).train(training)
    x = randn(6, 2, 4, dtype=DOUBLE)
    branch = post(star_mlp_formula(block.mlp, pre(x))) * (1 if layer_scale is None else layer_scale)
    torch.manual_seed(1)
    y = block(x)
    torch.manual_seed(1)
    torch.testing.assert_close(y, x + DropPath(0.5).train(training)(branch))
    assert block.mlp.hidden_features == 6
    assert block.mlp.f1.weight.shape == (6, 4)


def test_bare_block_is_x_plus_mlp():
    block = StarBlock(4, offset=1, rank=2, bias=False, combine="mul", act=None, dtype=DOUBLE)
    x = randn(3, 4, dtype=DOUBLE)
    torch.testing.assert_close(block(x), x + star_mlp_formula(block.mlp, x))
    assert sorted(block.state_dict()) == ["mlp.f1.weight", "mlp.f2.weight", "mlp.g.weight"]


def test_gamma_is_learned_and_reset():
    block = StarBlock(4, layer_scale=0.25)
    block(randn(3, 4)).sum().backward()
    assert block.gamma.tolist() == [0.25] * 4
    assert block.gamma.grad.abs().min() > 0
    nn.init.zeros_(block.gamma)
    x = randn(3, 4)
    assert torch.equal(block(x), x)
    block.reset_parameters()
    assert block.gamma.tolist() == [0.25] * 4
    assert StarBlock(4).gamma is None


@pytest.mark.parametrize("expansion", [4, 1, 0.25, 8 / 3, 1.5], ids=str)
def test_expansion_gives_the_hidden_width(expansion):
    hidden = round(12 * expansion)
    block = StarBlock(12, expansion=expansion)
    assert tuple(block.mlp.g.weight.shape) == (12, hidden)
    x = randn(2, 12)
    torch.testing.assert_close(block(x), x + star_mlp_formula(block.mlp, x))


X = torch.zeros(8, 32)
REJECTED = [
    (
        "op-channels",
        lambda: StarOp(64, 8)(X),
        ValueError,
        r"StarOp expects 64 .*got 32 .*\(8, 32\)",
    ),
    (
        "mlp-channels",
        lambda: StarMLP(64)(X),
        ValueError,
        r"StarMLP expects 64 .*got 32 .*\(8, 32\)",
    ),
    ("block-channels", lambda: StarBlock(64)(X), ValueError, r"64 .*got 32 .*\(8, 32\)"),
    ("no-channels", lambda: StarOp(3, 8)(X[:, :0]), ValueError, r"3 .*got 0 .*\(8, 0\)"),
    ("scalar", lambda: StarOp(3, 8)(X[0, 0]), ValueError, "3 input features, got a scalar"),
    ("integer", lambda: StarMLP(32)(X.int()), TypeError, "StarMLP .*torch.int32"),
    ("boolean", lambda: StarBlock(32)(X.bool()), TypeError, "torch.bool"),
    ("in-0", lambda: StarOp(0, 8), ValueError, "StarOp: in_features must be at least 1, got 0"),
    ("in-float", lambda: StarOp(3.0, 8), TypeError, "in_features must be an integer, got 3.0"),
    ("out-negative", lambda: StarOp(3, -8), ValueError, "out_features .*got -8"),
    ("dim-0", lambda: StarMLP(0), ValueError, "StarMLP: dim .*got 0"),
    ("dim-string", lambda: StarMLP("12"), TypeError, "dim .*got '12'"),
    ("hidden-0", lambda: StarMLP(3, 0), ValueError, "StarMLP: hidden .*at least 1, got 0"),
    ("hidden-negative", lambda: StarMLP(3, -3), ValueError, "hidden .*got -3"),
    ("hidden-float", lambda: StarMLP(3, 12.5), TypeError, "hidden .*got 12.5"),
    ("hidden-bool", lambda: StarMLP(3, True), TypeError, "hidden .*got True"),
    ("mlp-out-0", lambda: StarMLP(3, out_features=0), ValueError, "out_features .*got 0"),
    ("rank-0", lambda: StarOp(3, 8, rank=0), ValueError, "StarOp: rank .*got 0"),
    ("rank-float", lambda: StarMLP(3, rank=1.5), TypeError, "StarMLP: rank .*got 1.5"),
    ("act", lambda: StarMLP(3, act="relu5"), ValueError, "'relu5'"),
    ("act-module", lambda: StarMLP(3, act=nn.ReLU), TypeError, "ReLU"),
    ("combine", lambda: StarMLP(3, combine="div"), ValueError, "StarMLP: .*'div'.* mul, sum"),
    (
        "offset-sum",
        lambda: StarOp(3, 8, combine="sum", offset=1.5),
        ValueError,
        "offset=1.5 .*'sum'",
    ),
    ("backend", lambda: use_backend("cuda").__enter__(), ValueError, "'cuda'.*auto, eager, triton"),
    ("backend-none", lambda: use_backend(None).__enter__(), ValueError, "None"),
    (
        "drop-negative",
        lambda: DropPath(-0.1),
        ValueError,
        r"DropPath: p must be in \[0, 1\), got -0.1",
    ),
    ("drop-1", lambda: DropPath(1.0), ValueError, "got 1.0"),
    ("drop-nan", lambda: DropPath(float("nan")), ValueError, "got nan"),
    ("block-drop-1", lambda: StarBlock(3, drop_path=1.0), ValueError, "StarBlock: drop_path .*1.0"),
    ("block-dim-0", lambda: StarBlock(0), ValueError, "StarBlock: dim .*got 0"),
    ("block-dim-float", lambda: StarBlock(8.0), TypeError, "StarBlock: dim .*got 8.0"),
    ("block-fraction", lambda: StarBlock(10, expansion=0.25), ValueError, "10 .*0.25 gives 2.5"),
    (
        "block-expansion-0",
        lambda: StarBlock(10, expansion=0),
        ValueError,
        "10 .*expansion=0 gives 0",
    ),
    ("block-negative", lambda: StarBlock(10, expansion=-2), ValueError, "expansion=-2 gives -20"),
    ("block-small", lambda: StarBlock(1, expansion=0.5), ValueError, "expansion=0.5 gives 0.5"),
    ("block-nan", lambda: StarBlock(9, expansion=float("nan")), ValueError, "expansion=nan"),
    ("block-inf", lambda: StarBlock(9, expansion=float("inf")), ValueError, "expansion=inf"),
    ("block-act", lambda: StarBlock(3, act="relu5"), ValueError, "'relu5'"),
]


@pytest.mark.parametrize(
    ("call", "error", "words"), [row[1:] for row in REJECTED], ids=[row[0] for row in REJECTED]
)
def test_wrong_use_names_the_numbers(call, error, words):
    with pytest.raises(error, match=words):
        call()
