"""StarOp, StarMLP, DropPath and StarBlock: values, options, defaults and errors."""

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import DropPath as TimmDropPath
from torch import nn

from starlayers import ACTIVATIONS, DropPath, StarBlock, StarMLP, StarOp, modules, use_backend
from starlayers.checks import positive_int, probability
from starlayers.modules import COEFFICIENTS
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


STAR = {"act": "relu6", "combine": "mul", "offset": 0.0, "rank": 1, "coefficients": "fixed"}
FACTORY = {"bias": True, "device": None, "dtype": None}
DEFAULTS = {
    StarOp: STAR | FACTORY,
    StarMLP: {"hidden": None, "out_features": None, "recompute": False} | STAR | FACTORY,
    StarBlock: {"expansion": 4, "pre": None, "post": None, "drop_path": 0.0, "layer_scale": None}
    | STAR
    | FACTORY,
    DropPath: {"p": 0.0},
}


@pytest.mark.parametrize("kind", DEFAULTS, ids=lambda kind: kind.__name__)
def test_signature_defaults(kind):
    parameters = inspect.signature(kind).parameters.values()
    assert {p.name: p.default for p in parameters if p.default is not p.empty} == DEFAULTS[kind]


def explicit(options, x, module):
    """Compute a star layer from `options` and the weights of `module`."""
    options = STAR | options
    h1, h2 = (x @ f.weight.T + (0 if f.bias is None else f.bias) for f in (module.f1, module.f2))
    a = FORMULAS[options["act"]](h1)
    y = a + h2 if options["combine"] == "sum" else a * (options["offset"] + h2)
    y = y.unflatten(-1, (options["rank"], -1)).sum(-2)
    g = getattr(module, "g", None)
    return y if g is None else y @ g.weight.T + (0 if g.bias is None else g.bias)


OPTION_VALUES = [
    {},
    {"act": "gelu"},
    {"combine": "sum"},
    {"offset": 1.5},
    {"rank": 2},
    {"bias": False},
    {"act": "tanh", "offset": -0.5, "rank": 3, "bias": False},
]


@pytest.mark.parametrize("options", OPTION_VALUES, ids=str)
@pytest.mark.parametrize("kind", [StarOp, StarMLP, StarBlock], ids=lambda kind: kind.__name__)
def test_every_option_reaches_the_computation(kind, options):
    sizes = (4, 6) if kind is not StarBlock else (4,)
    module, x = kind(*sizes, **options, dtype=DOUBLE), randn(5, 4, dtype=DOUBLE)
    inner = module.mlp if kind is StarBlock else module
    y = explicit(options, x, inner)
    torch.testing.assert_close(module(x), x + y if kind is StarBlock else y)
    assert inner.f1.weight.shape[0] == (16 if kind is StarBlock else 6) * options.get("rank", 1)
    biases = [f.bias for f in inner.children() if isinstance(f, nn.Linear)]
    assert all((b is None) is (options.get("bias") is False) for b in biases)
    if set(options) - {"bias", "rank"}:
        assert not torch.allclose(y, explicit({"rank": options.get("rank", 1)}, x, inner))


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("kind", [StarOp, StarMLP, StarBlock], ids=lambda kind: kind.__name__)
def test_coefficients_device_and_dtype_reach_every_parameter(kind, coefficients):
    sizes = (4, 6) if kind is not StarBlock else (4,)
    extra = {} if kind is not StarBlock else {"layer_scale": 1.0}
    module = kind(*sizes, coefficients=coefficients, device="meta", dtype=torch.bfloat16, **extra)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}
    names = {n.removeprefix("mlp.").split(".")[0] for n, _ in module.named_parameters()}
    learned = {"fixed": set(), "scale": {"scale", "shift"}, "dynamic": {"scale", "shift", "gate"}}
    assert names - {"f1", "f2", "g", "gamma"} == learned[coefficients]


def test_hidden_sizes_by_default_and_as_asked_for():
    assert (StarMLP(3).hidden_features, StarMLP(3).out_features) == (12, 3)
    mlp = StarMLP(3, 5, out_features=7)
    assert (mlp.in_features, mlp.hidden_features, mlp.out_features) == (3, 5, 7)
    assert StarBlock(3).mlp.hidden_features == 12
    assert StarBlock(3, expansion=2).mlp.hidden_features == 6


@pytest.mark.parametrize(("width", "squeezed"), [(16, 8), (128, 8), (144, 9), (320, 20)])
def test_gate_of_dynamic_coefficients_has_a_sixteenth_of_the_channels(width, squeezed):
    gate = StarOp(width, 2, coefficients="dynamic").gate
    assert [m.weight.shape for m in (gate[0], gate[2])] == [(squeezed, width), (2, squeezed)]


def test_drop_path_of_a_block_drops_the_branch_in_training_only():
    block, x = StarBlock(4, drop_path=0.5), randn(64, 4)
    assert block.drop_path.p == 0.5
    torch.manual_seed(0)
    y = block(x)
    dropped = (y == x).all(1)
    assert 0 < dropped.sum() < 64
    branch = star_mlp_formula(block.mlp, x)
    torch.testing.assert_close(y[~dropped], (x + 2 * branch)[~dropped])
    torch.testing.assert_close(block.eval()(x), x + branch)
    assert type(StarBlock(4).drop_path) is nn.Identity


def test_layer_scale_is_where_gamma_starts():
    x = randn(5, 4)
    block = StarBlock(4, layer_scale=0.25)
    torch.testing.assert_close(block(x), x + 0.25 * star_mlp_formula(block.mlp, x))
    assert StarBlock(4).gamma is StarBlock(4).layer_scale is None


def test_drop_path_default_drops_nothing():
    x = randn(4, 3)
    assert DropPath().p == 0.0
    assert DropPath()(x) is x


def test_checks_return_the_number():
    assert positive_int("Layer", "n", 1) == 1
    number = positive_int("Layer", "n", torch.tensor(3))
    assert (number, type(number)) == (3, int)
    assert probability("Layer", "p", 0) == 0.0
    assert isinstance(probability("Layer", "p", 0), float)
    assert probability("Layer", "p", 0.999) == 0.999
    assert COEFFICIENTS == ("fixed", "scale", "dynamic")
    assert set(modules.__all__) == {"DropPath", "StarBlock", "StarMLP", "StarOp"}


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (StarOp(3, 2), "3, 2, act='relu6'"),
        (StarMLP(3, act=None, offset=1, rank=2), "3, 3, act='identity', offset=1.0, rank=2"),
        (StarOp(3, 2, combine="sum", act="swiglu"), "3, 2, act='silu', combine='sum'"),
        (StarMLP(3, recompute=True), "3, 3, act='relu6', recompute=True"),
        (DropPath(0.25), "p=0.25"),
    ],
    ids=["op", "mlp", "sum", "recompute", "drop-path"],
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
    outputs = []
    for layer in (DropPath(0.4), TimmDropPath(0.4)):
        torch.manual_seed(3)
        outputs.append(layer(x))
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], x)


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
    (
        "backend",
        lambda: use_backend("cuda").__enter__(),
        ValueError,
        "'cuda'.*eager, cpu, triton",
    ),
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
    ("block-nearly", lambda: StarBlock(10, expansion=0.2001), ValueError, "gives 2.001"),
    ("coefficients", lambda: StarOp(3, 8, coefficients="x"), ValueError, "'x'.* fixed, scale, dyn"),
    (
        "coefficients-sum",
        lambda: StarOp(3, 8, combine="sum", coefficients="scale"),
        ValueError,
        "StarOp: coefficients='scale' needs combine='mul', got 'sum'",
    ),
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
