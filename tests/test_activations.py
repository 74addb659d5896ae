"""Activations against closed forms and against autograd."""

import ast
import functools
import random
import re
import runpy
import warnings
from contextlib import contextmanager
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import starlayers
from starlayers import ACTIVATIONS, StarMLP, get_activation, register_activation, star
from starlayers.activations import Activation
from tests.helpers import FORMULAS, properties, randn

NAN, INF = float("nan"), float("inf")
KINKS = [-3.0, 0.0, 3.0, 6.0, -0.0]
ALIASES = {
    None: "identity",
    "bilinear": "identity",
    "reglu": "relu",
    "geglu": "gelu",
    "swiglu": "silu",
    "swish": "silu",
    "glu": "sigmoid",
    "relu2": "squared_relu",
}
rows = pytest.mark.parametrize("name", FORMULAS)
PACKAGE = Path(starlayers.__file__).parent


def autograd_derivative(fn, x):
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(fn(x).sum(), x)
    return grad


@pytest.fixture
def table():
    """Yield the table and restore it afterwards."""
    saved = dict(ACTIVATIONS)
    yield ACTIVATIONS
    ACTIVATIONS.clear()
    ACTIVATIONS.update(saved)


def test_table_holds_the_known_names_only():
    assert set(ACTIVATIONS) == set(FORMULAS) | set(ALIASES)
    assert {row.name for row in ACTIVATIONS.values()} == set(FORMULAS)


@pytest.mark.parametrize(("alias", "name"), ALIASES.items(), ids=map(str, ALIASES))
def test_alias_is_the_row_itself(alias, name):
    assert get_activation(alias) is get_activation(name)
    assert get_activation(alias).name == name


@rows
@properties
@given(values=st.lists(st.floats(-15, 15), min_size=1, max_size=20))
def test_value_is_the_closed_form(name, values):
    x = torch.tensor(values + KINKS, dtype=torch.float64)
    torch.testing.assert_close(get_activation(name).fn(x), FORMULAS[name](x), rtol=1e-9, atol=1e-12)


@rows
def test_derivative_is_the_slope_of_the_closed_form(name):
    x, h = torch.linspace(-8.03, 8.03, 400, dtype=torch.float64), 1e-5
    assert (x[:, None] - torch.tensor(KINKS)).abs().min() > h, "a kink has no slope"
    slope = (FORMULAS[name](x + h) - FORMULAS[name](x - h)) / (2 * h)
    torch.testing.assert_close(get_activation(name).derivative(x), slope, rtol=1e-7, atol=1e-8)


@rows
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_derivative_is_autograd_also_at_kinks_and_nonfinite(name, dtype):
    row = get_activation(name)
    x = torch.tensor([*KINKS, NAN, INF, -INF, 1e-30, 25.0, -25.0], dtype=dtype)
    x = torch.cat([x, 4 * randn(50, dtype=dtype)])
    before = x.clone()
    torch.testing.assert_close(row.derivative(x), autograd_derivative(row.fn, x), equal_nan=True)
    torch.testing.assert_close(x, before, rtol=0, atol=0, equal_nan=True)


@rows
def test_nan_stays_nan(name):
    assert get_activation(name).fn(torch.tensor([NAN, 1.0])).isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        (torch.relu, TypeError, "built-in method relu"),
        (6, TypeError, "got 6; register_activation"),
        (("relu",), TypeError, r"\('relu',\)"),
        ("relu7", ValueError, "unknown activation 'relu7'; known: bilinear, .*relu6.* or None"),
        ("ReLU", ValueError, "'ReLU'"),
        ("", ValueError, "''"),
    ],
    ids=["function", "number", "tuple", "unknown", "case", "empty"],
)
def test_get_activation_rejects(act, error, words):
    with pytest.raises(error, match=words):
        get_activation(act)


def test_registered_row_is_used_by_name_and_alias(table):
    row = register_activation("cube", lambda x: x**3, lambda x: 3 * x**2, aliases=("cubic",))
    assert get_activation("cube") is get_activation("cubic") is row
    mlp = StarMLP(3, 5, act="cubic", dtype=torch.float64)
    x = randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(mlp(x), mlp.g(mlp.f1(x) ** 3 * mlp.f2(x)))


def test_default_derivative_is_autograd_to_any_order(table):
    derivative = register_activation("cube", lambda x: x**3).derivative
    x = torch.tensor([2.0, -1.0])
    assert derivative(x).tolist() == [12.0, 3.0]
    with torch.no_grad():
        assert derivative(x.clone().requires_grad_()).tolist() == [12.0, 3.0]
    x.requires_grad_()
    (second,) = torch.autograd.grad(derivative(x).sum(), x, create_graph=True)
    assert second.tolist() == [12.0, -6.0]
    assert torch.autograd.grad(second.sum(), x)[0].tolist() == [6.0, 6.0]


@pytest.mark.parametrize(
    ("positional", "aliases", "words"),
    [
        (("relu", torch.exp), (), r"already registered: \['relu'\]"),
        (("swiglu", torch.exp), (), r"\['swiglu'\]"),
        (("fresh", torch.exp), ("geglu", None), r"\['geglu', None\]"),
        (("fresh", torch.exp), ("fresh",), r"distinct and not empty, got \('fresh', 'fresh'\)"),
        (("fresh", torch.exp), ("new", "new"), r"distinct .*\('fresh', 'new', 'new'\)"),
        (("fresh", torch.exp), (None, None), r"distinct .*\('fresh', None, None\)"),
        (("fresh", torch.exp), (None,), r"already registered: \[None\]"),
        (("fresh", torch.exp), ("",), r"not empty, got \('fresh', ''\)"),
        (("", torch.exp), (), r"not empty, got \('',\)"),
        (("total", torch.sum), (), r"'total' must be element-wise: .*\(2, 3\) into \(\)"),
        (("flip", torch.t), (), r"'flip' .*into \(3, 2\)"),
    ],
    ids=[
        "name",
        "alias-as-name",
        "aliases",
        "own-name",
        "twice",
        "none-twice",
        "none",
        "empty-alias",
        "empty-name",
        "reduction",
        "transpose",
    ],
)
def test_register_rejects_and_leaves_the_table(table, positional, aliases, words):
    before = dict(table)
    with pytest.raises(ValueError, match=words):
        register_activation(*positional, aliases=aliases)
    assert table == before


@pytest.mark.parametrize(
    ("name", "aliases", "words"),
    [
        ("fresh", "abc", "aliases of 'fresh' must be a tuple of names, got 'abc'"),
        ("fresh", None, "aliases of 'fresh' .* got None"),
        ("fresh", 5, "aliases of 'fresh' .* got 5"),
        ("fresh", b"ab", r"must be strings, got \('fresh', 97, 98\)"),
        ("fresh", ([],), r"must be strings, got \('fresh', \[\]\)"),
        (None, (), r"must be strings, got \(None,\)"),
        (3, (), r"must be strings, got \(3,\)"),
    ],
    ids=str,
)
def test_register_rejects_what_is_no_name(table, name, aliases, words):
    before = dict(table)
    with pytest.raises(TypeError, match=words):
        register_activation(name, torch.exp, aliases=aliases)
    assert table == before


def test_aliases_may_be_any_collection(table):
    row = register_activation("sine", torch.sin, aliases=(name for name in ("sin", "wave")))
    assert table["sin"] is table["wave"] is table["sine"] is row


# --- functions that are probed and refused


def alternating(x):
    return x * (-1) ** torch.arange(x.shape[-1])


def without_first(x):
    return x * (torch.arange(x.numel()).view(x.shape) != 0)


def clipped_to_quantile(x):
    return x.clamp(max=x.flatten().quantile(0.9))


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sin()


NUMBERS = r"gave \S+ and \S+ at x = \S+; \d+ of \d+ differ"
MIXES = rf"must be element-wise.* {NUMBERS}"
RANDOM = rf"must not be random.* eval mode: two calls {NUMBERS}"
IN_PLACE = r"must not work in place: it changed \d of 6 inputs"
DETACHED = "must work, with differentiable torch functions.* does not require grad"
REFUSED = {
    "softmax": (lambda x: x.softmax(-1), ValueError, MIXES),
    "softmax_of_all": (lambda x: x.flatten().softmax(0).view_as(x), ValueError, MIXES),
    "layer_norm": (lambda x: F.layer_norm(x, x.shape[-1:]), ValueError, MIXES),
    "normalize": (lambda x: F.normalize(x, dim=0), ValueError, MIXES),
    "cumsum": (lambda x: x.cumsum(-1), ValueError, MIXES),
    "cumsum_of_all": (lambda x: x.flatten().cumsum(0).view_as(x), ValueError, MIXES),
    "centred": (lambda x: x - x.mean(), ValueError, MIXES),
    "centred_columns": (lambda x: x - x.mean(0, keepdim=True), ValueError, MIXES),
    "above_minimum": (lambda x: x - x.min(), ValueError, MIXES),
    "by_maximum": (lambda x: x / x.abs().max(), ValueError, MIXES),
    "by_norm": (lambda x: x / x.norm().clamp(min=1), ValueError, MIXES),
    "by_size": (lambda x: x / x.shape[-1] ** 0.5, ValueError, MIXES),
    "quantile": (clipped_to_quantile, ValueError, MIXES),
    "flip": (lambda x: x.flip(-1), ValueError, MIXES),
    "flip_all": (lambda x: x.flip(tuple(range(x.dim()))), ValueError, MIXES),
    "roll": (lambda x: x.roll(1), ValueError, MIXES),
    "sort": (lambda x: x.sort(-1).values, ValueError, MIXES),
    "alternating": (alternating, ValueError, MIXES),
    "without_first": (without_first, ValueError, MIXES),
    "dropout": (F.dropout, ValueError, RANDOM),
    "rare_dropout": (lambda x: F.dropout(x, 0.02), ValueError, RANDOM),
    "rrelu": (nn.RReLU(), ValueError, RANDOM),
    "noise": (lambda x: x + 0.1 * torch.randn_like(x), ValueError, RANDOM),
    "python_noise": (lambda x: x * random.random(), ValueError, RANDOM),
    "relu_in_place": (nn.ReLU(inplace=True), ValueError, IN_PLACE),
    "scaled_in_place": (lambda x: x.mul_(2), ValueError, IN_PLACE),
    "data_in_place": (lambda x: x.data.clamp_(-1) * x, ValueError, IN_PLACE),
    "turned_in_place": (lambda x: x.t_(), ValueError, r"keep x.shape, not \(2, 3\) into \(3, 2\)"),
    "detached": (lambda x: x.detach().sin(), ValueError, DETACHED),
    "constant": (torch.ones_like, ValueError, DETACHED),
    "step": (lambda x: (x > 0).to(x.dtype), ValueError, DETACHED),
    "numpy": (
        lambda x: torch.from_numpy(np.tanh(x.numpy())),
        ValueError,
        r"Can't call numpy\(\) on Tensor that requires grad",
    ),
    "no_backward": (NoBackward.apply, ValueError, "raised NotImplementedError"),
    "two_inputs": (torch.matmul, ValueError, r"float32 of shape \(2, 3\) it raised TypeError"),
    "integers": (lambda x: x.int(), ValueError, "x.dtype, not torch.float32 into torch.int32"),
    "doubles": (lambda x: x.double(), ValueError, "not torch.float32 into torch.float64"),
    "singles": (lambda x: x.float(), ValueError, "not torch.float16 into torch.float32"),
    "meta": (lambda x: x.to("meta"), ValueError, "x.device, not cpu into meta"),
    "unpooled": (lambda x: x.mean(-1, keepdim=True), ValueError, r"\(2, 3\) into \(2, 1\)"),
    "nothing": (lambda x: None, TypeError, "must return a tensor .* got <class 'NoneType'>"),
    "number": (lambda x: 3.0, TypeError, "got <class 'float'>"),
    "pair": (lambda x: (x, x), TypeError, "got <class 'tuple'>"),
    "class": (nn.ReLU, TypeError, "got <class 'torch.nn.*ReLU'>"),
    "three": (3, TypeError, "needs functions such as torch.sin, got 3"),
    "none": (None, TypeError, "got None"),
}
#: derivatives of sin
WRONG = rf"must be corrected or omitted: it and autograd {NUMBERS}"
REFUSED_DERIVATIVES = {
    "scaled": (lambda x: 1.078 * x.cos(), ValueError, WRONG),
    "shifted": (lambda x: x.cos() + 5.7, ValueError, WRONG),
    "negative": (lambda x: -x.cos(), ValueError, WRONG),
    "wrong_from_5_to_6": (lambda x: x.cos() * ((x < 5) | (x > 6)), ValueError, WRONG),
    "wrong_above_11": (lambda x: x.clamp(max=11).cos(), ValueError, WRONG),
    "nan": (lambda x: x.cos() * NAN, ValueError, "gave nan and"),
    "flipped": (lambda x: x.cos().flip(0), ValueError, WRONG),
    "random": (lambda x: F.dropout(x.cos()), ValueError, WRONG),
    "in_place": (lambda x: x.cos_(), ValueError, IN_PLACE),
    "sum": (lambda x: x.cos().sum(), ValueError, r"keep x.shape, not \(2, 3\) into \(\)"),
    "singles": (lambda x: x.cos().float(), ValueError, "not torch.float16 into torch.float32"),
    "failing": (lambda x: x.cos() / 0 + {}, ValueError, "it raised TypeError: unsupported operand"),
    "number": (lambda x: 1.0, TypeError, "must return a tensor .* got <class 'float'>"),
    "three": (3, TypeError, "got 3"),
    "zero": (0, TypeError, "got 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_register_refuses_a_function(table, name):
    fn, error, words = REFUSED[name]
    before = dict(table)
    with pytest.raises(error, match=rf"activation '{name}' .*{words}"):
        register_activation(name, fn)
    assert table == before


@pytest.mark.parametrize("name", REFUSED_DERIVATIVES)
def test_register_refuses_a_derivative(table, name):
    derivative, error, words = REFUSED_DERIVATIVES[name]
    before = dict(table)
    with pytest.raises(error, match=rf"activation '{name}' .*{words}"):
        register_activation(name, torch.sin, derivative)
    assert table == before


@properties
@given(scale=st.floats(-3, 3).filter(lambda a: abs(a - 1) > 1e-2), shift=st.floats(-6, 6))
def test_register_refuses_any_other_scale_and_shift_of_a_derivative(scale, shift):
    for fn, slope in ((torch.tanh, lambda x: 1 - x.tanh() ** 2), (F.softplus, torch.sigmoid)):
        with pytest.raises(ValueError, match=WRONG):
            register_activation("fresh", fn, lambda x, slope=slope: scale * slope(x) + shift)
    assert "fresh" not in ACTIVATIONS


@pytest.mark.parametrize(
    ("fn", "derivative"),
    [
        (torch.exp, lambda x: x.clamp(min=-1).exp()),  # its largest values are right
        (lambda x: 1e-6 * x.sin(), torch.zeros_like),
    ],
    ids=["growing", "small"],
)
def test_derivatives_are_compared_at_their_own_size(table, fn, derivative):
    with pytest.raises(ValueError, match=WRONG):
        register_activation("fresh", fn, derivative)


# --- functions that are accepted


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g


class NumpySine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.from_numpy(np.sin(x.numpy()))

    @staticmethod
    def backward(ctx, g):
        return g * torch.from_numpy(np.cos(ctx.saved_tensors[0].numpy()))


def silu(x):
    return x * torch.sigmoid(x)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated, but in use
    scripted = torch.jit.script(silu)


def silu_slope(x):
    return x.sigmoid() * (1 + x * (1 - x.sigmoid()))


def in_place_inside(x):
    return (2 * x).sigmoid_() * x


def between(x, low, high):
    return ((x > low) & (x < high)).to(x.dtype)


def elu_slope(x):
    return torch.where(x > 0, 1, x.exp())


def mish_slope(x):
    t = F.softplus(x).tanh()
    return t + x * (1 - t * t) * x.sigmoid()


ACCEPTED = {
    "mish": (F.mish, mish_slope),
    "mish_module": (nn.Mish(), mish_slope),
    "elu": (F.elu, elu_slope),
    "celu": (F.celu, elu_slope),
    "hardtanh": (F.hardtanh, lambda x: between(x, -1, 1)),
    "leaky_relu": (F.leaky_relu, lambda x: torch.where(x > 0, 1.0, 0.01).to(x)),
    "relu_with_another_slope_at_0": (F.relu, lambda x: (x >= 0).to(x.dtype)),
    "square": (lambda x: x**2, lambda x: 2 * x),
    "sine": (torch.sin, torch.cos),
    "softsign": (F.softsign, lambda x: 1 / (1 + x.abs()) ** 2),
    "threshold": (lambda x: F.threshold(x, 0.1, 20.0), lambda x: (x > 0.1).to(x.dtype)),
    "clamp": (lambda x: x.clamp(-0.5, 2), lambda x: between(x, -0.5, 2)),
    "sign": (torch.sign, torch.zeros_like),
    "round": (torch.round, torch.zeros_like),
    "sawtooth": (lambda x: x % 1, torch.ones_like),
    "exp": (torch.exp, torch.exp),
    "log": (torch.log, torch.reciprocal),
    "root": (torch.sqrt, lambda x: 0.5 * x**-0.5),
    "guarded_root": (
        lambda x: torch.where(x > 0, x.sqrt(), 0),  # its autograd is NaN below 0
        lambda x: torch.where(x > 0, 0.5 * x.abs() ** -0.5, 0),
    ),
    "tiny": (lambda x: 1e-6 * x.sin(), lambda x: 1e-6 * x.cos()),
    "huge": (lambda x: (x * x).exp(), lambda x: 2 * x * (x * x).exp()),
    "constant_of_its_own": (lambda x: torch.tensor(0.5) * x, lambda x: torch.full_like(x, 0.5)),
    "in_single": (lambda x: F.silu(x.float()).to(x.dtype), silu_slope),
    "in_place_inside": (in_place_inside, None),
    "scripted": (scripted, silu_slope),
    "straight_through": (StraightThrough.apply, torch.ones_like),
    "numpy_with_backward": (NumpySine.apply, torch.cos),
    "prelu": (
        nn.PReLU().requires_grad_(False),
        lambda x: torch.where(x > 0, 1, 0.25).to(x.dtype),
    ),  # float32 alone
    "rrelu_in_eval_mode": (nn.RReLU(0.5, 0.5).eval(), lambda x: torch.where(x > 0, 1, 0.5).to(x)),
    "dropout_in_eval_mode": (nn.Dropout().eval(), torch.ones_like),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_register_accepts(table, name):
    fn, slope = ACCEPTED[name]
    x = 3 * randn(50)
    for derivative in (None, slope) if slope else (None,):
        row = register_activation(name, fn, derivative)
        assert row == Activation(name, fn, row.derivative, derivative is not None, None)
        assert table.pop(name) is row
        expected = autograd_derivative(fn, x)
        ordinary = expected.isfinite()
        with torch.no_grad():
            torch.testing.assert_close(row.derivative(x)[ordinary], expected[ordinary])


@rows
def test_built_in_rows_pass_the_probe(table, name):
    row = table[name]
    table.clear()
    for derivative in (row.derivative, None):
        register_activation(name, row.fn, derivative)
        assert table.pop(name).closed_form is (derivative is not None)


# --- where and how the probe runs


@contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype(dtype):
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


SURROUNDINGS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "default_device": lambda: default_device("meta"),
    "device_context": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_probe_is_the_same_everywhere(table, name):
    seen = set()

    def fn(x):
        seen.add((x.device.type, x.dtype, torch.is_autocast_enabled("cpu")))
        return x.sqrt() * torch.tensor(2.0)  # a constant on the default device

    with SURROUNDINGS[name]():
        register_activation("root", fn, lambda x: x**-0.5)
        register_activation("softplus_by_autograd", F.softplus)
        with pytest.raises(ValueError, match="'soft' must be element-wise"):
            register_activation("soft", lambda x: x.softmax(-1))
        with pytest.raises(ValueError, match="derivative of activation 'wave'"):
            register_activation("wave", torch.sin, torch.sin)
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    assert seen == {("cpu", dtype, False) for dtype in dtypes}


@pytest.mark.parametrize("fn", [F.dropout, lambda x: (torch.manual_seed(1), x.sin())[1]])
def test_probe_leaves_the_global_random_numbers(table, fn):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    try:
        register_activation("fresh", fn)
    except ValueError:
        assert fn is F.dropout
    assert torch.equal(torch.rand(3), expected)


def test_a_function_may_lack_a_kernel_for_other_dtypes(table):
    def single(x):
        if x.dtype != torch.float32:
            raise NotImplementedError("float32 alone")
        return x.sin()

    register_activation("single", single, torch.cos)
    with pytest.raises(ValueError, match=WRONG):
        register_activation("wrong", single, torch.sin)


def test_a_function_with_a_weight_that_is_trained_needs_autograd():
    prelu = nn.PReLU()
    slope = functools.partial(torch.where, other=torch.tensor(0.25))
    with pytest.raises(ValueError, match="'prelu' depends on a tensor that is trained"):
        register_activation("prelu", prelu, lambda x: slope(x > 0, torch.ones_like(x)).to(x.dtype))
    assert "prelu" not in ACTIVATIONS
    row = register_activation("prelu", prelu)
    try:
        assert not row.closed_form
        star(torch.tensor([-2.0]), torch.tensor([3.0]), "prelu").backward()
        assert prelu.weight.grad.item() == -6.0
    finally:
        del ACTIVATIONS["prelu"]


# --- what others repeat of the table


def test_triton_forms_are_those_that_rows_name():
    source = (PACKAGE / "kernels/device/activation.py").read_text()
    functions = {f.name: f for f in ast.parse(source).body if isinstance(f, ast.FunctionDef)}
    named = {row.triton for row in ACTIVATIONS.values() if row.triton is not None}
    for name in ("act_value", "_derivative"):
        assert set(re.findall(r"ACT == '(\w+)'", ast.unparse(functions[name]))) == named, name
    # kernels get the name of a row
    assert all(row.triton in (None, row.name) for row in ACTIVATIONS.values())


def test_a_row_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        get_activation("relu").triton = None


def test_registered_rows_have_no_triton_form(table):
    assert register_activation("sine", torch.sin, torch.cos).triton is None
    assert Activation("sine", torch.sin, torch.cos).triton is None


def test_portable_copy_repeats_the_rows():
    """It runs without starlayers: `run_path` imports the file alone."""
    portable = runpy.run_path(str(PACKAGE / "nlp/portable_starformer.py"))["get_activation"]
    x = torch.cat([4 * randn(200), torch.tensor([*KINKS, NAN, INF, -INF])])
    for name, row in ACTIVATIONS.items():
        fn = portable(name).fn
        assert portable(name).name == (None if row.name == "identity" else row.name)
        torch.testing.assert_close(fn(x), row.fn(x), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(
            autograd_derivative(fn, x), autograd_derivative(row.fn, x), equal_nan=True
        )
