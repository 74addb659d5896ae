"""`star`, `star_packed`, `star_mlp` and the reference definitions."""

import inspect

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from starlayers import ACTIVATIONS, functional, star, use_backend
from starlayers.dispatch import Plan
from starlayers.functional import (
    star_mlp,
    star_mlp_reference,
    star_packed,
    star_product,
    star_reference,
)
from starlayers.reference import sum_reference
from tests.helpers import FORMULAS, properties, randn

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = {
    "contiguous": lambda: randn(2, 7, 3).unbind(),
    "chunked": lambda: randn(7, 6).chunk(2, -1),
    "transposed": lambda: (randn(3, 7).t(), randn(7, 3, seed=1)),
    "expanded": lambda: (randn(1, 3).expand(7, 3), randn(7, 1, seed=1).expand(7, 3)),
    "strided": lambda: (randn(14, 3)[::2], randn(7, 6, seed=1)[:, 1::2]),
    "scalar": lambda: (randn(seed=2), randn(seed=3)),
    "empty": lambda: (randn(0, 3), randn(0, 3)),
}
rows = pytest.mark.parametrize("act", FORMULAS)


@properties
@given(
    values=st.lists(st.tuples(st.floats(-8, 8), st.floats(-8, 8)), max_size=12),
    act=st.sampled_from(list(FORMULAS)),
    offset=st.sampled_from([0.0, 1.0, -2.5]),
    dtype=st.sampled_from(DTYPES),
)
def test_star_is_its_formula(values, act, offset, dtype):
    x1, x2 = torch.tensor(values, dtype=torch.float64).view(-1, 2).to(dtype).unbind(1)
    y = star(x1, x2, act, offset=offset)
    expected = FORMULAS[act](x1.double()) * (offset + x2.double())
    assert y.dtype == dtype
    # three roundings, of the activation, the sum and the product
    scale = (1 + x1.double() ** 2) * (abs(offset) + x2.double().abs() + 1)
    bound = 4 * torch.finfo(dtype).eps * scale
    assert ((y.double() - expected).abs() <= bound.clamp(min=1e-9)).all()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layout_changes_nothing_and_inputs_stay(layout, dtype):
    x1, x2 = (x.to(dtype) for x in layout())
    kept = x1.clone(), x2.clone()
    y = star(x1, x2, "relu6", offset=1.0)
    dense = star(x1.contiguous(), x2.contiguous(), "relu6", offset=1.0)
    torch.testing.assert_close(y, dense, rtol=0, atol=0)
    assert y.dtype == dtype
    assert torch.equal(x1, kept[0])
    assert torch.equal(x2, kept[1])


@pytest.mark.parametrize("act", ["identity", "relu6"])
def test_result_is_a_new_tensor(act):
    x1, x2 = torch.ones(3), torch.ones(3)
    star(x1, x2, act).zero_()
    assert x1.tolist() == x2.tolist() == [1.0, 1.0, 1.0]


OPTIONS = {"act": "relu6", "offset": 0.0}
CLAMPS = {"clamp1": None, "clamp2": None}
DEFAULTS = {
    star: OPTIONS | CLAMPS,
    star_packed: OPTIONS | CLAMPS,
    star_product: OPTIONS | CLAMPS,
    star_reference: OPTIONS | CLAMPS,
    sum_reference: {"act": "relu6"},
    star_mlp_reference: OPTIONS,
}


@pytest.mark.parametrize("f", DEFAULTS, ids=lambda f: f.__name__)
def test_signature_defaults(f):
    parameters = inspect.signature(f).parameters.values()
    assert {p.name: p.default for p in parameters if p.default is not p.empty} == DEFAULTS[f]


INF = float("inf")
# options, value of star(x1, x2): relu6 and no offset unless set
VALUES = [
    ({}, [0.0, 2.0, -24.0]),
    ({"act": None}, [-9.0, 2.0, -32.0]),
    ({"act": "relu"}, [0.0, 2.0, -32.0]),
    ({"offset": 1}, [0.0, 3.0, -18.0]),
    ({"act": None, "clamp1": (-2, 7)}, [-6.0, 2.0, -28.0]),
    ({"act": None, "clamp2": (-3, 2.5)}, [-7.5, 2.0, -24.0]),
    ({"act": None, "clamp1": (-INF, 7), "clamp2": (-1, INF)}, [-9.0, 2.0, -7.0]),
    ({"act": "relu", "offset": 1, "clamp1": (2, 9), "clamp2": (-1, 1)}, [4.0, 4.0, 0.0]),
]


@pytest.mark.parametrize(("options", "value"), VALUES, ids=str)
def test_every_option_changes_the_value_as_documented(options, value):
    x1, x2 = torch.tensor([-3.0, 1.0, 8.0]), torch.tensor([3.0, 2.0, -4.0])
    assert star(x1, x2, **options).tolist() == value
    assert star_packed(torch.cat((x1, x2)), **options).tolist() == value
    assert star_reference(x1, x2, **options).tolist() == value
    assert star_product(x1, x2, **options).tolist() == value


@pytest.fixture
def fused(monkeypatch):
    """Record the calls of the fused op, which computes its definition on a CPU."""
    calls, op = [], functional.star_op
    monkeypatch.setattr(functional, "plan_star", lambda x1, x2, act: Plan("star"))
    monkeypatch.setattr(functional, "star_op", lambda *args: calls.append(args) or op(*args))
    return calls


def test_the_op_gets_every_option_and_packed_branches_whole(fused):
    h = randn(3, 8)
    options = {"offset": 1, "clamp1": (-INF, 0.7), "clamp2": (-0.5, 0.5)}
    y = star(h[:, :4], h[:, 4:], "swiglu", **options)
    packed = star_packed(h, "swiglu", **options)
    (x1, x2, *passed), (whole, none, *again) = fused
    assert passed == again == ["silu", 1.0, [-INF, 0.7], [-0.5, 0.5]]
    assert torch.equal(torch.cat((x1, x2), 1), h)
    assert whole is h
    assert none is None
    expected = star_reference(h[:, :4], h[:, 4:], "silu", **options)
    assert torch.equal(y, expected)
    assert torch.equal(packed, expected)


LAST = torch.channels_last
#: formats of both branches -> do they reach the op as (N, H, W, C)?
FORMATS = [
    (LAST, LAST, True),
    (LAST, torch.contiguous_format, False),
    (torch.contiguous_format, LAST, False),
    (torch.contiguous_format, torch.contiguous_format, False),
]


@pytest.mark.parametrize(("first", "second", "permuted"), FORMATS, ids=str)
def test_channels_last_branches_reach_the_op_as_they_lie_in_memory(first, second, permuted, fused):
    x1, x2 = (
        randn(2, 3, 4, 5, seed=s).contiguous(memory_format=f) for s, f in enumerate((first, second))
    )
    y = star(x1, x2, "silu", offset=1)
    assert fused[0][0].shape == ((2, 4, 5, 3) if permuted else (2, 3, 4, 5))
    assert y.is_contiguous(memory_format=LAST) is permuted
    assert torch.equal(y, star_reference(x1, x2, "silu", offset=1))


def test_default_activation_is_relu6():
    x1, x2 = torch.tensor([-1.0, 2.0, 9.0]), torch.tensor([5.0, 3.0, -1.0])
    assert star(x1, x2).tolist() == [0.0, 6.0, -6.0]
    assert star(x1, x2, None).tolist() == [-5.0, 6.0, -9.0]


@rows
def test_offset_one_with_zero_branch_is_the_activation(act):
    x = 4 * randn(5, 3)
    assert torch.equal(star(x, torch.zeros_like(x), act, offset=1), ACTIVATIONS[act].fn(x))


def test_gate_stored_as_one_plus_keeps_bf16_digits():
    # a stored 1.001 would be 1 in bf16, and the small gate would be lost in training
    gate = torch.tensor([1e-3], dtype=torch.bfloat16)
    assert (1 + gate).item() == 1.0
    x2 = gate.clone().requires_grad_()
    star(torch.ones_like(gate), x2, None, offset=1).backward()
    assert x2.item() == gate.item()
    assert x2.grad.item() == 1.0


@rows
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_first_and_second_order_gradients(act, offset):
    x1, x2 = (randn(2, 3, seed=s, dtype=torch.float64, grad=True) for s in (5, 6))

    def f(a, b):
        return star(a, b, act, offset=offset)

    assert torch.autograd.gradcheck(f, (x1, x2))
    assert torch.autograd.gradgradcheck(f, (x1, x2))


def test_gradient_of_an_expanded_branch_is_summed():
    small = randn(1, 3, dtype=torch.float64, grad=True)
    big = randn(4, 3, seed=1, dtype=torch.float64)
    star(big, small.expand(4, 3), "silu").sum().backward()
    torch.testing.assert_close(small.grad, FORMULAS["silu"](big).sum(0, keepdim=True))


def test_relu6_bounds_what_overflows_fp16():
    x = torch.tensor([300.0], dtype=torch.float16)
    assert star(x, x, None).isinf().all()
    assert star(x, x, "relu6").item() == 1800.0
    grads = {}
    for act in ("relu6", None):
        x1, x2 = (x.clone().requires_grad_() for _ in range(2))
        star(x1, x2, act).backward(torch.full_like(x, 256.0))  # a loss scale's worth
        grads[act] = [x1.grad.item(), x2.grad.item()]
    assert grads == {"relu6": [0.0, 1536.0], None: [float("inf")] * 2}


def test_transforms_see_the_formula():
    x1, x2 = randn(4, 3, dtype=torch.float64), randn(4, 3, seed=1, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(star)(x1, x2), star(x1, x2))
    value, tangent = torch.func.jvp(lambda a: star(a, x2, "tanh"), (x1,), (torch.ones_like(x1),))
    torch.testing.assert_close(value, x1.tanh() * x2)
    torch.testing.assert_close(tangent, (1 - x1.tanh() ** 2) * x2)


@pytest.mark.parametrize(
    ("x1", "x2", "act", "error", "words"),
    [
        (torch.ones(2).int(), torch.ones(2).int(), None, TypeError, "got torch.int32; use x.float"),
        (torch.ones(2), torch.ones(2).long(), None, TypeError, "got torch.int64; use x.float"),
        (torch.ones(2).bool(), torch.ones(2), None, TypeError, r"got torch.bool; use x\.float\(\)"),
        (torch.ones(2).cfloat(), torch.ones(2), None, TypeError, "complex64"),
        (torch.ones(2), torch.ones(2).half(), None, TypeError, "one dtype.*float32.*float16"),
        (torch.ones(2, 3), torch.ones(3), None, ValueError, r"\(2, 3\) and \(3,\)"),
        (torch.ones(2, 1), torch.ones(2, 3), None, ValueError, r"\(2, 1\) and \(2, 3\)"),
        (torch.ones(2), torch.ones(2), "relu9", ValueError, "'relu9'"),
        (torch.ones(2), torch.ones(2), 9, TypeError, "got 9"),
    ],
    ids=["int", "long", "bool", "complex", "mixed", "ndim", "broadcast", "unknown-act", "act-type"],
)
def test_star_rejects(x1, x2, act, error, words):
    with pytest.raises(error, match=words):
        star(x1, x2, act)


@rows
def test_references_are_their_formulas(act):
    x, w1, w2, w3 = (
        randn(*s, seed=i, dtype=torch.float64)
        for i, s in enumerate([(4, 3), (5, 3), (5, 3), (2, 5)])
    )
    b1, b2, b3 = (randn(n, seed=n, dtype=torch.float64) for n in (5, 6, 2))
    b2 = b2[:5]
    a, h2 = FORMULAS[act](x @ w1.T + b1), x @ w2.T + b2
    torch.testing.assert_close(star_reference(x @ w1.T + b1, h2, act, offset=2), a * (2 + h2))
    torch.testing.assert_close(sum_reference(x @ w1.T + b1, h2, act), a + h2)
    torch.testing.assert_close(
        star_mlp_reference(x, w1, b1, w2, b2, w3, b3, act, offset=2), a * (2 + h2) @ w3.T + b3
    )


def test_the_sum_is_a_definition_without_an_offset():
    assert sum_reference(torch.tensor([9.0]), torch.tensor([3.0])).tolist() == [9.0]
    assert sum_reference(torch.tensor([9.0]), torch.tensor([3.0]), None).tolist() == [12.0]
    with pytest.raises(TypeError, match="offset"):
        sum_reference(torch.tensor([9.0]), torch.tensor([3.0]), offset=1)


def test_packed_is_the_star_of_its_halves():
    h = randn(3, 8)
    assert torch.equal(star_packed(h, "gelu", offset=1), star(h[:, :4], h[:, 4:], "gelu", offset=1))
    for bad in (randn(3, 7), randn()):
        with pytest.raises(ValueError, match="even last dimension"):
            star_packed(bad)
    with pytest.raises(TypeError, match="floating"):
        star_packed(torch.ones(2, 4, dtype=torch.int64))


def test_clamps_come_before_everything_else():
    x1, x2 = torch.tensor([-9.0, 1.0, 9.0]), torch.tensor([3.0, -3.0, 0.5])
    y = star(x1, x2, None, offset=1, clamp1=(-INF, 7), clamp2=(-2, 2))
    assert torch.equal(y, torch.tensor([-27.0, -1.0, 10.5]))


@pytest.mark.parametrize("limits", [(1, -1), (1,), (float("nan"), 1)])
def test_an_empty_clamp_raises(limits):
    x = torch.ones(2)
    with pytest.raises(ValueError, match="clamp2 must be"):
        star(x, x, clamp2=limits)
    with pytest.raises(ValueError, match="clamp2 must be"):
        star_packed(x, clamp2=limits)


# --- star MLP from its weights


def mlp_weights(width=3, hidden=5, out=4, dtype=torch.float32):
    shapes = [(hidden, width), (hidden,), (hidden, width), (hidden,), (out, hidden), (out,)]
    return [randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


#: argument of `star_mlp`, value, error, words
WRONG_MLPS = [
    ("x", None, TypeError, "x expects a tensor, got a NoneType"),
    ("x", torch.ones(2, 3, dtype=torch.int64), TypeError, "x expects a .* got torch.int64"),
    ("x", torch.ones(2, 4), ValueError, r"x must have shape \(2, 3\) .* got \(2, 4\)"),
    ("x", torch.tensor(1.0), ValueError, r"x \(..., in\)"),
    ("w1", None, TypeError, "w1 expects a tensor, got a NoneType"),
    ("w1", torch.ones(5), ValueError, r"'w1': \(5,\)"),
    ("w3", torch.ones(4, 6), ValueError, r"w3 must have shape \(4, 5\) .* got \(4, 6\)"),
    ("w2", torch.ones(5, 4), ValueError, r"w2 must have shape \(5, 3\) .* got \(5, 4\)"),
    ("b1", torch.ones(4), ValueError, r"b1 must have shape \(5,\)"),
    ("b2", torch.ones(4), ValueError, r"b2 must have shape \(5,\)"),
    ("b2", [1.0] * 5, TypeError, "b2 expects a tensor, got a list"),
    ("b3", torch.ones(5), ValueError, r"b3 must have shape \(4,\)"),
    ("residual", torch.ones(5, 1, 4), ValueError, r"residual must have shape \(2, 4\)"),
    ("residual", torch.ones(4), ValueError, r"residual must have shape \(2, 4\)"),
    ("offset", None, TypeError, "offset must be a number, got None"),
    ("offset", "1", TypeError, "offset must be a number, got '1'"),
    ("act", "sillu", ValueError, "unknown activation 'sillu'"),
]


@pytest.mark.parametrize(("name", "value", "error", "words"), WRONG_MLPS)
def test_a_wrong_argument_of_star_mlp_is_named(name, value, error, words):
    arguments = dict(zip(("w1", "b1", "w2", "b2", "w3", "b3"), mlp_weights(), strict=True))
    arguments = {"x": randn(2, 3), **arguments, name: value}
    with pytest.raises(error, match=words):
        star_mlp(**arguments)


@pytest.mark.parametrize("path", ["eager", "cpu"])
@pytest.mark.parametrize("missing", [(), (1, 3, 5)], ids=["biases", "no biases"])
@pytest.mark.parametrize("residual", [False, True])
def test_star_mlp_is_its_formula_on_every_path(path, missing, residual):
    tensors = [randn(2, 6, 3, seed=9), *mlp_weights()]
    tensors = [None if i - 1 in missing else t.requires_grad_() for i, t in enumerate(tensors)]
    x, w1, b1, w2, b2, w3, b3 = (0 if t is None else t for t in tensors)
    added = randn(2, 6, 4, seed=8) if residual else None
    h = torch.nn.functional.silu(x @ w1.T + b1) * (0.5 + x @ w2.T + b2)
    expected = h @ w3.T + b3 + (0 if added is None else added)
    with use_backend(path):
        y = star_mlp(*tensors, "silu", offset=0.5, residual=added)
    torch.testing.assert_close(y, expected)
    needed = [t for t in tensors if t is not None]
    grads = torch.autograd.grad(y.square().sum(), needed)
    torch.testing.assert_close(grads, torch.autograd.grad(expected.square().sum(), needed))


@pytest.mark.parametrize("path", ["auto", "eager", "cpu"])
@pytest.mark.parametrize(
    ("rows", "width", "hidden", "out"), [(2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 5, 0), (0, 3, 5, 4)]
)
def test_star_mlp_of_nothing(path, rows, width, hidden, out):
    with use_backend(path):
        y = star_mlp(randn(rows, width), *mlp_weights(width, hidden, out), "silu")
    expected = star_mlp_reference(randn(rows, width), *mlp_weights(width, hidden, out), "silu")
    torch.testing.assert_close(y, expected)


X = torch.ones(3, 4)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: star(None, X), TypeError, "star expects a tensor, got a NoneType"),
        (lambda: star(X, [1.0]), TypeError, "star expects a tensor, got a list; use torch.as"),
        (lambda: star(X, X.to_sparse()), TypeError, "dense"),
        (lambda: star(X, X, offset=float("nan")), ValueError, "offset must be .*got nan"),
        (lambda: star(X, X, offset=X), TypeError, "offset must be a number"),
        (lambda: star_packed(None), TypeError, "star_packed expects a tensor, got a NoneType"),
        (lambda: star_packed(X, offset="1"), TypeError, "offset must be a number, got '1'"),
        (lambda: star_mlp(X, *[X] * 6, offset=True), TypeError, "offset must be .*got True"),
        (lambda: star_mlp(X, *[X] * 6, offset=1e39), ValueError, "offset must be .*got 1e[+]39"),
    ],
)
def test_odd_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_numbers_of_numpy_are_offsets():
    y = star(X, X, offset=np.float32(0.5))
    torch.testing.assert_close(y, star(X, X, offset=0.5))
    w = torch.eye(4)
    y = star_mlp(X, w, None, w, None, w, None, offset=np.float64(0.5))
    torch.testing.assert_close(y, star(X, X, offset=0.5))
