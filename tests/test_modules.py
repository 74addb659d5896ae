"""StarOp, StarMLP, DropPath and StarBlock: values, options, defaults and errors."""

import copy
import inspect
import pickle
from decimal import Decimal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import DropPath as TimmDropPath
from torch import nn

from starlayers import ACTIVATIONS, DropPath, StarBlock, StarMLP, StarOp, modules, use_backend
from starlayers.checks import positive_int, probability
from tests.helpers import FORMULAS, properties, randn, star_mlp_formula, star_op_formula

DOUBLE = torch.float64
OPTIONS = st.fixed_dictionaries(
    {
        "act": st.sampled_from(list(FORMULAS)),
        "offset": st.sampled_from([0.0, 1.0, -0.5]),
        "bias": st.booleans(),
    }
)
SHAPES = st.sampled_from([(3,), (1, 3), (4, 3), (2, 5, 3), (0, 3), (2, 0, 3)])


@properties
@given(options=OPTIONS, packed=st.booleans(), shape=SHAPES, out=st.integers(1, 4))
def test_op_is_its_formula(options, packed, shape, out):
    op = StarOp(3, out, packed=packed, **options, dtype=DOUBLE)
    x = randn(*shape, dtype=DOUBLE)
    assert op(x).shape == (*shape[:-1], out)
    torch.testing.assert_close(op(x), star_op_formula(op, x))


@properties
@given(options=OPTIONS, shape=SHAPES, out=st.none() | st.integers(1, 4))
def test_mlp_is_its_formula(options, shape, out):
    mlp = StarMLP(3, 5, out_features=out, **options, dtype=DOUBLE)
    x = randn(*shape, dtype=DOUBLE)
    assert mlp(x).shape == (*shape[:-1], out or 3)
    torch.testing.assert_close(mlp(x), star_mlp_formula(mlp, x))


@pytest.mark.parametrize("bias", [True, False])
def test_packed_branches_are_one_linear_layer_that_loads_two(bias):
    plain, packed = (StarOp(3, 4, act="gelu", bias=bias, packed=p) for p in (False, True))
    assert [type(m) for m in packed.children()] == [nn.Linear]
    assert packed.f12.weight.shape == (8, 3)
    packed.load_state_dict(plain.state_dict())
    x = randn(5, 3)
    torch.testing.assert_close(packed(x), plain(x))
    assert list(packed.state_dict()) == ["f12.weight", "f12.bias"][: 2 if bias else 1]
    with pytest.raises(RuntimeError, match="f12"):
        packed.load_state_dict({"f1.weight": plain.f1.weight})


@pytest.mark.parametrize("kind", ["op", "packed", "mlp"])
@pytest.mark.parametrize("bias", [True, False])
def test_near_linear_starts_the_second_branch_at_a_tenth(kind, bias):
    def build(init):
        torch.manual_seed(0)
        options = {"offset": 1.0, "bias": bias, "init": init}
        if kind == "mlp":
            return StarMLP(5, 7, **options)
        return StarOp(5, 7, packed=kind == "packed", **options)

    usual, near = build("linear"), build("near_linear")
    for (w, b), (small_w, small_b), gain in zip(
        usual.branch_layers(), near.branch_layers(), (1.0, 0.1), strict=True
    ):
        torch.testing.assert_close(small_w, gain * w)
        assert (small_b is None) is not bias
        if bias:
            torch.testing.assert_close(small_b, gain * b)
    assert "init='near_linear'" in near.extra_repr()
    assert "init" not in usual.extra_repr()


RESETS = {
    "parents first": lambda layer: [m.reset_parameters() for m in layer.modules()],
    "children first": lambda layer: [m.reset_parameters() for m in [*layer.modules()][::-1]],
    "the layer": lambda layer: layer.reset_parameters(),
    "its copy": lambda layer: copy.deepcopy(layer).reset_parameters(),
}


@pytest.mark.parametrize("order", RESETS)
@pytest.mark.parametrize("packed", [False, True])
def test_near_linear_layers_reset_in_any_order(order, packed):
    op = StarOp(64, 32, offset=1.0, packed=packed, init="near_linear")
    for copied in (op, copy.deepcopy(op), pickle.loads(pickle.dumps(op))):
        for parameter in copied.parameters():
            nn.init.constant_(parameter, 7.0)
        RESETS[order](copied)
        reset = order != "its copy"  # a copy resets itself, not what it was copied from
        (first, _), (second, _) = copied.branch_layers()
        bound = 1 / 8  # of nn.Linear with 64 inputs
        assert (0.9 * bound < first.abs().max().item() <= bound) is reset
        assert (0.09 * bound < second.abs().max().item() <= 0.1 * bound) is reset


def test_resetting_draws_every_layer_anew():
    mlp = StarMLP(4, 6)
    before = [p.clone() for p in mlp.parameters()]
    mlp.reset_parameters()
    assert not any(torch.equal(p, q) for p, q in zip(before, mlp.parameters(), strict=True))


def test_near_linear_layers_begin_close_to_the_plain_layer():
    torch.manual_seed(0)
    op, x = StarOp(64, 64, act="gelu", offset=1.0, init="near_linear"), randn(100, 64)
    plain = nn.functional.gelu(op.f1(x))
    assert (op(x) - plain).norm() < 0.1 * plain.norm()


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
        (StarMLP(3), {"f1": (12, 3), "f2": (12, 3), "g": (3, 12)}),
        (StarMLP(3, 5, out_features=2), {"f1": (5, 3), "f2": (5, 3), "g": (2, 5)}),
    ],
    ids=["op", "mlp-default-hidden", "mlp"],
)
def test_branches_are_plain_linears_and_direct_children(module, shapes):
    assert {k: tuple(m.weight.shape) for k, m in module.named_children()} == shapes
    assert all(type(m) is nn.Linear for m in module.children())
    x = randn(2, 3)
    formula = star_mlp_formula if "g" in shapes else star_op_formula
    torch.testing.assert_close(module(x), formula(module, x))


STAR = {"act": "relu6", "offset": 0.0, "bias": True, "init": "linear"}
FACTORY = {"device": None, "dtype": None}
DEFAULTS = {
    StarOp: STAR | FACTORY | {"packed": False},
    StarMLP: {"hidden": None, "out_features": None, "recompute": False} | STAR | FACTORY,
    StarBlock: {"mlp": None, "pre": None, "post": None, "drop_path": 0.0, "layer_scale": None},
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
    y = FORMULAS[options["act"]](h1) * (options["offset"] + h2)
    g = getattr(module, "g", None)
    return y if g is None else y @ g.weight.T + (0 if g.bias is None else g.bias)


OPTION_VALUES = [
    {},
    {"act": "gelu"},
    {"offset": 1.5},
    {"bias": False},
    {"act": "tanh", "offset": -0.5, "bias": False},
]


@pytest.mark.parametrize("options", OPTION_VALUES, ids=str)
@pytest.mark.parametrize("kind", [StarOp, StarMLP], ids=lambda kind: kind.__name__)
def test_every_option_reaches_the_computation(kind, options):
    module, x = kind(4, 6, **options, dtype=DOUBLE), randn(5, 4, dtype=DOUBLE)
    y = explicit(options, x, module)
    torch.testing.assert_close(module(x), y)
    assert module.f1.weight.shape[0] == 6
    assert all((f.bias is None) is (options.get("bias") is False) for f in module.children())
    if set(options) - {"bias"}:
        assert not torch.allclose(y, explicit({}, x, module))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("init", ["linear", "near_linear"])
def test_device_and_dtype_reach_every_parameter(packed, init):
    factory = {"device": "meta", "dtype": torch.bfloat16}
    for module in (
        StarOp(4, 6, packed=packed, offset=1, init=init, **factory),
        StarMLP(4, 6, offset=1, init=init, **factory),
        StarBlock(4, StarMLP(4, 6, **factory), layer_scale=1.0),
    ):
        assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}


def test_hidden_sizes_by_default_and_as_asked_for():
    assert (StarMLP(3).hidden_features, StarMLP(3).out_features) == (12, 3)
    mlp = StarMLP(3, 5, out_features=7)
    assert (mlp.in_features, mlp.hidden_features, mlp.out_features) == (3, 5, 7)
    assert StarBlock(3).mlp.hidden_features == 12
    assert StarBlock(3, StarMLP(3, 6)).mlp.hidden_features == 6


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
    assert set(modules.__all__) == {"DropPath", "StarBlock", "StarMLP", "StarOp"}


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (StarOp(3, 2), "3, 2, act='relu6'"),
        (StarMLP(3, act=None, offset=1), "3, 12, act='identity', offset=1.0"),
        (StarMLP(8, hidden=99), "8, 99, act='relu6'"),
        (StarMLP(3, 5, out_features=7), "3, 5, 7, act='relu6'"),
        (StarOp(3, 2, packed=True, act="swiglu"), "3, 2, act='silu', packed=True"),
        (StarMLP(3, recompute=True), "3, 12, act='relu6', recompute=True"),
        (DropPath(0.25), "p=0.25"),
    ],
    ids=["op", "mlp", "hidden", "out", "packed", "recompute", "drop-path"],
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
    block = StarBlock(4, StarMLP(4, 6, act="gelu", dtype=DOUBLE), **options).train(training)
    x = randn(6, 2, 4, dtype=DOUBLE)
    branch = post(star_mlp_formula(block.mlp, pre(x))) * (1 if layer_scale is None else layer_scale)
    torch.manual_seed(1)
    y = block(x)
    torch.manual_seed(1)
    torch.testing.assert_close(y, x + DropPath(0.5).train(training)(branch))
    assert block.mlp.hidden_features == 6
    assert block.mlp.f1.weight.shape == (6, 4)


def test_bare_block_is_x_plus_mlp():
    block = StarBlock(4, StarMLP(4, 8, offset=1, bias=False, act=None, dtype=DOUBLE))
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


def test_any_module_is_an_mlp_of_a_block():
    mlp = nn.Sequential(nn.Linear(4, 9), nn.GELU(), nn.Linear(9, 4))
    block, x = StarBlock(4, mlp, layer_scale=0.5), randn(2, 4)
    torch.testing.assert_close(block(x), x + 0.5 * mlp(x))
    assert StarBlock(4, nn.Identity(), layer_scale=0.5)(x).tolist() == (1.5 * x).tolist()


def test_gamma_is_made_like_the_parameters_of_the_mlp():
    block = StarBlock(4, StarMLP(4, device="meta", dtype=torch.bfloat16), layer_scale=0.5)
    assert (block.gamma.device.type, block.gamma.dtype) == ("meta", torch.bfloat16)
    assert StarBlock(4, nn.Identity(), layer_scale=0.5).gamma.dtype == torch.float32


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
    ("act", lambda: StarMLP(3, act="relu5"), ValueError, "'relu5'"),
    ("act-module", lambda: StarMLP(3, act=nn.ReLU), TypeError, "ReLU"),
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
    ("block-mlp", lambda: StarBlock(3, 5), TypeError, "StarBlock: mlp must be a module .*got 5"),
    ("block-pre", lambda: StarBlock(3, pre=abs), TypeError, "pre must be a module or None"),
    ("block-mlp-in", lambda: StarBlock(3, StarMLP(4)), ValueError, "keep 3 .*in_features is 4"),
    (
        "block-mlp-out",
        lambda: StarBlock(3, StarMLP(3, out_features=5)),
        ValueError,
        "keep 3 channels, its out_features is 5",
    ),
    ("block-scale", lambda: StarBlock(3, layer_scale="1"), TypeError, "layer_scale .*got '1'"),
    ("offset-nan", lambda: StarOp(3, 8, offset=float("nan")), ValueError, "StarOp: offset .*nan"),
    ("offset-inf", lambda: StarMLP(3, offset=float("inf")), ValueError, "offset .*finite, got inf"),
    ("offset-text", lambda: StarOp(3, 8, offset="1"), TypeError, "offset .*number, got '1'"),
    ("offset-bool", lambda: StarOp(3, 8, offset=True), TypeError, "offset .*number, got True"),
    ("offset-none", lambda: StarOp(3, 8, offset=None), TypeError, "offset .*number, got None"),
    (
        "bias-text",
        lambda: StarMLP(3, bias="no"),
        TypeError,
        "StarMLP: bias .*True or False, got 'no'",
    ),
    ("bias-int", lambda: StarOp(3, 8, bias=0), TypeError, "bias .*got 0"),
    ("packed-int", lambda: StarOp(3, 8, packed=1), TypeError, "packed .*got 1"),
    ("recompute", lambda: StarMLP(3, recompute="yes"), TypeError, "recompute .*got 'yes'"),
    ("dtype-int", lambda: StarOp(3, 8, dtype=torch.int32), TypeError, "floating .*torch.int32"),
    ("dtype-bool", lambda: StarMLP(3, dtype=torch.bool), TypeError, "floating .*torch.bool"),
    ("dtype-text", lambda: StarMLP(3, dtype="float32"), TypeError, "dtype .*'float32'"),
    ("init", lambda: StarOp(3, 8, init="small"), ValueError, "init 'small', .*linear, near_linear"),
    (
        "near-linear",
        lambda: StarOp(3, 8, init="near_linear"),
        ValueError,
        "needs an offset.*not 0",
    ),
    ("none", lambda: StarMLP(3)(None), TypeError, "StarMLP expects a tensor, got a NoneType"),
    ("numpy", lambda: StarMLP(3)(np.ones((2, 3))), TypeError, "got a ndarray; use torch.as_tensor"),
    ("list", lambda: StarOp(3, 8)([1.0, 2.0, 3.0]), TypeError, "got a list; use torch.as_tensor"),
    (
        "complex",
        lambda: StarOp(32, 8)(X.cfloat()),
        TypeError,
        "floating tensor, got torch.complex64",
    ),
    ("sparse", lambda: StarOp(32, 8)(X.to_sparse()), TypeError, r"dense .*use x.to_dense\(\)"),
    ("sparse-csr", lambda: StarMLP(32)(X.to_sparse_csr()), TypeError, "dense .*sparse_csr"),
    ("residual-rows", lambda: StarMLP(32)(X, X[:1]), ValueError, r"\(8, 32\), got \(1, 32\)"),
    ("residual-dims", lambda: StarMLP(32)(X, X[None]), ValueError, r"\(8, 32\), got \(1, 8, 32\)"),
    (
        "residual-out",
        lambda: StarMLP(32, out_features=4)(X, X),
        ValueError,
        r"\(8, 4\), got \(8, 32\)",
    ),
    (
        "residual-list",
        lambda: StarMLP(32)(X, [X]),
        TypeError,
        "residual expects a tensor, got a list",
    ),
    ("residual-int", lambda: StarMLP(32)(X, X.int()), TypeError, "residual .*torch.int32"),
    ("residual-sparse", lambda: StarMLP(32)(X, X.to_sparse()), TypeError, "residual .*dense"),
    ("mkldnn", lambda: StarMLP(32)(X.to_mkldnn()), TypeError, r"dense .*use x.to_dense\(\)"),
    (
        "nested",
        lambda: StarMLP(32)(torch.nested.nested_tensor([X, X[:2]])),
        TypeError,
        "a nested one; use layout=torch.jagged",
    ),
    ("offset-large", lambda: StarOp(3, 8, offset=1e39), ValueError, "float32 .*got 1e[+]39"),
    ("offset-decimal", lambda: StarOp(3, 8, offset=Decimal("sNaN")), TypeError, "number, got"),
    (
        "offset-trained",
        lambda: StarOp(3, 8, offset=X[0, 0].clone().requires_grad_()),
        TypeError,
        "offset must be a number, got tensor",
    ),
    ("offset-numpy-bool", lambda: StarOp(3, 8, offset=np.True_), TypeError, "number, got"),
    ("in-float-tensor", lambda: StarOp(torch.tensor(3.0), 8), TypeError, "integer, got tensor"),
    ("in-1d-tensor", lambda: StarOp(torch.tensor([3]), 8), TypeError, "integer, got tensor"),
    ("drop-text", lambda: DropPath("0.1"), TypeError, "p must be a number, got '0.1'"),
    ("drop-none", lambda: StarBlock(3, drop_path=None), TypeError, "drop_path must be a number"),
    (
        "dtype-float8",
        lambda: StarOp(3, 8, dtype=torch.float8_e4m3fn),
        TypeError,
        "16 bits or more, such as torch.bfloat16, got torch.float8_e4m3fn",
    ),
    (
        "block-narrower",
        lambda: StarBlock(32, post=nn.Linear(32, 1), layer_scale=1.0)(X),
        ValueError,
        r"Identity, StarMLP, Linear must keep the shape \(8, 32\)",
    ),
    (
        "block-pooled",
        lambda: StarBlock(32, pre=nn.AdaptiveAvgPool2d((1, 32)), post=nn.Flatten())(X[None]),
        ValueError,
        r"must keep the shape \(1, 8, 32\), got \(1, 32\)",
    ),
    (
        "block-no-batch",
        lambda: StarBlock(32, drop_path=0.5)(X[0]),
        ValueError,
        r"drop_path needs a batch, got shape \(32,\)",
    ),
]


@pytest.mark.parametrize(
    ("call", "error", "words"), [row[1:] for row in REJECTED], ids=[row[0] for row in REJECTED]
)
def test_wrong_use_names_the_numbers(call, error, words):
    with pytest.raises(error, match=words):
        call()


class Limited(StarMLP):
    """Star MLP whose second branch is limited."""

    def branches(self, x):
        first, second = super().branches(x)
        return first, second.clamp(-0.1, 0.1)


def replaced_products(mlp, patch):
    patch.setattr(StarOp, "products", lambda self, x: torch.relu(self.f1(x)))


def own_products(mlp, patch):
    mlp.products = lambda x: torch.relu(mlp.f1(x))


def own_definition(mlp, patch):
    patch.setattr(StarMLP, "_definition", lambda self, x: self.g(torch.relu(self.f1(x))))


@pytest.mark.usefixtures("fuse_everything")
@pytest.mark.parametrize("change", [replaced_products, own_products, own_definition])
@pytest.mark.parametrize("rows", [6, 300])
def test_methods_that_were_replaced_run_at_every_size(monkeypatch, change, rows):
    mlp, x = StarMLP(8, 16), randn(rows, 8)
    change(mlp, monkeypatch)
    torch.testing.assert_close(mlp(x), mlp.g(torch.relu(mlp.f1(x))))
    assert "a method of its own" in mlp.plan(x).reason


@pytest.mark.usefixtures("fuse_everything")
@pytest.mark.parametrize("rows", [6, 300])
def test_branches_that_were_overridden_run_at_every_size(rows):
    mlp, x = Limited(8, 16, act="tanh"), 5 * randn(rows, 8)
    expected = mlp.g(torch.tanh(mlp.f1(x)) * mlp.f2(x).clamp(-0.1, 0.1))
    torch.testing.assert_close(mlp(x), expected)


@pytest.mark.usefixtures("fuse_everything")
@pytest.mark.parametrize("rows", [6, 300])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_weights_that_are_no_parameters_count(rows, name):
    mlp, x = StarMLP(8, 16), randn(rows, 8)
    value = getattr(mlp.f1, name).detach() + 1
    delattr(mlp.f1, name)
    setattr(mlp.f1, name, value)
    torch.testing.assert_close(mlp(x), star_mlp_formula(mlp, x))


@pytest.mark.usefixtures("fuse_everything")
@pytest.mark.parametrize("rows", [6, 300])
def test_a_gate_of_one_channel_is_broadcast_at_every_size(rows):
    mlp, x = StarMLP(8, 16), randn(rows, 8)
    mlp.f2 = nn.Linear(8, 1)
    torch.testing.assert_close(mlp(x), mlp.g(mlp.f1(x).clamp(0, 6) * mlp.f2(x)))
    assert mlp.plan(x).reason == "f1, f2, g do not fit together"


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore")
def test_resets_do_not_shrink_what_they_do_not_draw(wrap):
    mlp = StarMLP(8, 16, offset=1.0, init="near_linear")
    wrap(mlp.f2)
    mlp(randn(2, 8))
    before = mlp.f2.weight.detach().clone()
    for _ in range(3):
        mlp.reset_parameters()
    mlp(randn(2, 8))
    torch.testing.assert_close(mlp.f2.weight.detach(), before)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"f1.weight": (4, 8)}, "Unexpected key.*f1.weight"),
        ({"f1.weight": (3, 8), "f2.weight": (5, 8)}, "Unexpected key.*f1.weight"),
        (
            {"f1.weight": (4, 8), "f2.weight": (4, 8), "f12.weight": (8, 8)},
            "Unexpected key.*f1.weight",
        ),
    ],
)
def test_packed_layers_load_two_whole_branches_or_say_what_is_wrong(state, words):
    op = StarOp(8, 4, packed=True, bias=False)
    with pytest.raises(RuntimeError, match=words):
        op.load_state_dict({name: torch.zeros(shape) for name, shape in state.items()})


def test_two_branches_load_a_packed_one():
    packed, op = StarOp(8, 4, packed=True), StarOp(8, 4)
    op.load_state_dict(packed.state_dict())
    x = randn(2, 8)
    torch.testing.assert_close(op(x), packed(x))
    with pytest.raises(RuntimeError, match=r"size mismatch for f1\.weight"):
        op.load_state_dict(StarOp(8, 5, packed=True).state_dict())


def test_another_last_layer_decides_the_width_of_the_residual():
    mlp, x = StarMLP(8), randn(3, 8)
    mlp.g = nn.Linear(32, 5)
    residual = randn(3, 5)
    torch.testing.assert_close(mlp(x, residual), residual + mlp(x))
    with pytest.raises(ValueError, match=r"result, \(3, 5\), got \(3, 8\)"):
        mlp(x, x)


@pytest.mark.parametrize("rows", [3, 20_000])
@pytest.mark.parametrize("make", [lambda: StarMLP(8, 64), lambda: StarOp(8, 64)])
def test_an_offset_that_is_trained_gets_its_gradient_at_every_size(make, rows):
    layer, x = make(), randn(rows, 8)
    layer.offset = nn.Parameter(torch.tensor(0.5))
    y = layer(x)
    y.sum().backward()
    a = F.relu6(layer.f1(x))
    expected = (layer.g(a) - layer.g.bias).sum() if isinstance(layer, StarMLP) else a.sum()
    torch.testing.assert_close(layer.offset.grad, expected.detach(), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    "mlp", [nn.LazyLinear(4), nn.Embedding(4, 4).to(torch.complex64), nn.Identity()]
)
def test_gamma_has_the_default_dtype_without_a_parameter_to_follow(mlp):
    assert StarBlock(4, mlp, layer_scale=0.5).gamma.dtype == torch.float32


def test_sizes_of_numpy_do_not_overflow():
    op = StarOp(4, np.uint8(200), packed=True)
    assert op(randn(2, 4)).shape == (2, 200)
    assert StarMLP(np.int8(100)).f1.weight.shape == (400, 100)
