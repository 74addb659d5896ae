"""Activations against closed forms and against autograd."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from starlayers import ACTIVATIONS, StarMLP, get_activation, register_activation
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
        (("total", torch.sum), (), r"'total' must be element-wise: .*\(2, 3\) into \(\)"),
        (("flip", torch.t), (), r"'flip' .*into \(3, 2\)"),
    ],
    ids=["name", "alias-as-name", "aliases", "reduction", "transpose"],
)
def test_register_rejects_and_leaves_the_table(table, positional, aliases, words):
    before = dict(table)
    with pytest.raises(ValueError, match=words):
        register_activation(*positional, aliases=aliases)
    assert table == before
