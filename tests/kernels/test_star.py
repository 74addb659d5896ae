"""Element-wise star op and the statistics of its outputs, in torch code and in Triton."""

from types import SimpleNamespace

import pytest
import torch

from starlayers.kernels.star import ELEMENTS, star, tile_shape
from starlayers.kernels.statistics import (
    Upstream,
    empty_statistics,
    merged_statistics,
    saved_inputs,
    with_statistics,
)
from tests.helpers import FORMULAS, assert_as_exact_as_eager, converted, pairwise, randn, results
from tests.kernels.cases import DTYPES, conv_pair, conv_tensors, mlp_pair, mlp_tensors, star_pair

in_either = pytest.mark.usefixtures("either")
NAN, INF = float("nan"), float("inf")
each_act = pytest.mark.parametrize("act", FORMULAS)


def branches(*shape, dtype=torch.float32):
    return [(4 * randn(*shape, seed=s)).to(dtype).requires_grad_() for s in range(2)]


def against_definition(pair, tensors, order=1):
    op, definition = pair
    actual, eager = results(op, tensors, order=order), results(definition, tensors, order=order)
    exact = results(definition, converted(tensors, torch.float64), order=order)
    assert_as_exact_as_eager(actual, eager, exact)


@in_either
@pytest.mark.parametrize(
    ("act", "dtype", "offset", "order"), pairwise(list(FORMULAS), list(DTYPES), [0.0, 1.0], [1, 2])
)
def test_value_and_gradients(act, dtype, offset, order):
    against_definition(star_pair(act, offset), branches(7, 33, dtype=DTYPES[dtype]), order)


@pytest.mark.interpret
@pytest.mark.parametrize("number", range(12))
def test_in_triton(number):
    """One row per activation, with every other option somewhere among them."""
    act, dtype = list(FORMULAS)[number], list(DTYPES.values())[number % 3]
    clamps = [((), ()), ((-1.0, 2.0), (-0.5, 0.5)), ((-INF, 2.0), (-1.0, INF))][number // 2 % 3]
    rows, cols = [(7, 34), (2, 1100), (150, 24)][number // 4]
    packed = number % 2 == 1
    tensors = branches(rows, cols, dtype=dtype)[: 1 if packed else 2]
    against_definition(star_pair(act, [0.0, 1.0][number // 3 % 2], *clamps), tensors)


# one element; rows narrower than a tile; whole, ragged and several tiles across; flat past one tile
SHAPES = [(1,), (), (5, 1), (3, 16), (2, 3, 17), (150, 24), (3, 2048), (2, 2500)]


@in_either
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
def test_any_shape(shape, dtype):
    against_definition(star_pair("gelu_tanh", 0.5), branches(*shape, dtype=dtype))


@in_either
@pytest.mark.parametrize(
    ("half", "rows", "order"), pairwise([1, 12, 17, 1100], [(9,), (2, 3), ()], [1, 2]), ids=str
)
def test_packed_branches(rows, half, order):
    packed = (3 * randn(*rows, 2 * half)).requires_grad_()
    against_definition(star_pair("silu", 1.0), [packed], order)


@in_either
@pytest.mark.parametrize("cols", [1, 16, 17, 700, 2048, 5000])
def test_a_tile_is_no_wider_than_twice_its_rows(cols):
    rows_of_tile, width = tile_shape(3, cols)
    assert rows_of_tile * width == ELEMENTS
    assert width == 16 or width < 2 * cols
    x = randn(3, cols + 1)[:, :cols]
    torch.testing.assert_close(star(x, x, "relu", 0.0, [], []), x.relu() * x)


LAYOUTS = {
    "row-strided": lambda: [randn(6, 40, seed=s)[:, 3:25] for s in range(2)],
    "one of two strided": lambda: [randn(6, 22), randn(6, 40, seed=1)[:, :22]],
    "halves of one": lambda: list(randn(6, 44).chunk(2, -1)),
    "transposed": lambda: [randn(22, 6, seed=s).t() for s in range(2)],
    "every other column": lambda: [randn(6, 44, seed=s)[:, ::2] for s in range(2)],
    "three axes swapped": lambda: [randn(4, 3, 22, seed=s).transpose(0, 1) for s in range(2)],
    "expanded rows": lambda: [randn(1, 22, seed=s).expand(6, 22) for s in range(2)],
    "expanded columns": lambda: [randn(6, 1, seed=s).expand(6, 22) for s in range(2)],
    "packed, row-strided": lambda: [randn(6, 60)[:, 5:49]],
    "packed, transposed": lambda: [randn(44, 6).t()],
}


@in_either
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_nothing(layout):
    op, _ = star_pair("silu", 1.0)
    tensors = LAYOUTS[layout]()
    dense = [t.clone(memory_format=torch.contiguous_format).requires_grad_() for t in tensors]
    tensors = [t.requires_grad_() for t in tensors]
    actual = results(op, tensors)
    torch.testing.assert_close(actual, results(op, dense))
    assert actual[0].is_contiguous()


@in_either
@pytest.mark.parametrize("packed", [False, True])
def test_an_expanded_upstream_gradient_is_one_of_ones(packed):
    op, definition = star_pair("silu")
    tensors = [randn(6, 44, grad=True)] if packed else branches(6, 22)
    actual = torch.autograd.grad(op(*tensors).sum(), tensors)
    expected = torch.autograd.grad(definition(*tensors).sum(), tensors)
    torch.testing.assert_close(actual, expected)


CLAMPS = {
    "both": ((-1.0, 2.0), (-0.5, 0.5)),
    "first, one side": ((-INF, 2.0), ()),
    "second": ((), (-1.0, 1.0)),
}


@in_either
@pytest.mark.parametrize(
    ("act", "clamps", "packed", "order"),
    pairwise(["silu", "relu6", "identity"], list(CLAMPS), [False, True], [1, 2]),
)
def test_clamped_branches(act, clamps, packed, order):
    tensors = [(2 * randn(7, 34)).requires_grad_()] if packed else branches(7, 17)
    against_definition(star_pair(act, 1.0, *CLAMPS[clamps]), tensors, order)


def clamp_is_closed():
    """Return True if clamp has gradient 1 at a limit, as before about PyTorch 2.12."""
    x = torch.ones(1, requires_grad=True)
    return bool(torch.autograd.grad(x.clamp(max=1.0), x)[0])


@in_either
@pytest.mark.skipif(
    clamp_is_closed(), reason="this PyTorch's clamp lets the gradient through there"
)
def test_the_gradient_at_a_limit_is_that_of_clamp():
    op, definition = star_pair("silu", 1.0, (-1.0, 2.0), (-0.5, 0.5))
    values = [[-1.0, 2.0, -1.5, 2.5, 0.0], [-0.5, 0.5, 0.1, -0.6, 0.6]]
    tensors = [torch.tensor(v, requires_grad=True) for v in values]
    torch.testing.assert_close(results(op, tensors), results(definition, tensors))


@in_either
@each_act
def test_the_gradient_at_a_kink_is_that_of_torch(act):
    op, definition = star_pair(act)
    kinks = torch.tensor([-3.0, 0.0, 3.0, 6.0, -0.0, -100.0, 100.0], requires_grad=True)
    tensors = [kinks, randn(7, grad=True)]
    torch.testing.assert_close(results(op, tensors), results(definition, tensors))


@in_either
@each_act
@pytest.mark.parametrize("clamped", [False, True], ids=["", "clamped"])
def test_nan_is_where_torch_has_it(act, clamped):
    limits = ((-1.0, 1.0), (-1.0, 1.0)) if clamped else ((), ())
    op, definition = star_pair(act, 1.0, *limits)
    tensors = branches(4, 9)
    with torch.no_grad():
        tensors[0][0, 0] = tensors[1][1, 1] = tensors[0][2, 2] = tensors[1][2, 2] = NAN
        tensors[0][1, 1] = 0.5  # no activation is flat there
    actual, expected = results(op, tensors), results(definition, tensors)
    # depends on PyTorch's loop: hardtanh_backward gives 0 or 1, hardswish_backward g or NaN
    if act in ("relu6", "hardswish"):
        actual[1][tensors[0].isnan()] = expected[1][tensors[0].isnan()] = 0
    for ours, theirs in zip(actual, expected, strict=True):
        assert theirs.isnan().any() or clamped
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@in_either
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("act", ["relu", "relu6", "squared_relu", "hardswish"])
def test_no_gradient_comes_out_of_a_flat_piece(act, bad):
    op, definition = star_pair(act)
    tensors = [torch.tensor([-4.0, 1.0], requires_grad=True), randn(2, grad=True)]
    seed = torch.tensor([bad, 1.0])  # as an overflowing loss scale sends it
    actual = torch.autograd.grad(op(*tensors), tensors, seed)
    expected = torch.autograd.grad(definition(*tensors), tensors, seed)
    torch.testing.assert_close(actual, expected, equal_nan=True)


@in_either
@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (150, 24), (3, 1100)], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["two", "packed"])
def test_nothing_uninitialised_leaks(shape, packed):
    rows, cols = shape
    tensors = [randn(rows, 2 * cols, grad=True)] if packed else branches(*shape)
    assert not any(t.isnan().any() for t in results(star_pair("gelu")[0], tensors))


@in_either
@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (2, 0, 6)], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["two", "packed"])
def test_no_elements(shape, packed, launches):
    tensors = branches(*shape)[: 1 if packed else 2]
    if packed and shape == (0,):
        expected = (0,)
    else:
        expected = (*shape[:-1], shape[-1] // 2) if packed else shape
    actual = results(lambda *t: star(t[0], None if packed else t[1], "relu6", 0.0, [], []), tensors)
    assert actual[0].shape == expected
    assert [g.shape for g in actual[1:]] == [t.shape for t in tensors]
    assert launches == []
    star(randn(1), randn(1), "relu6", 0.0, [], [])  # the fixture `either` wants a launch


@in_either
@pytest.mark.parametrize("packed", [False, True], ids=["two", "packed"])
@pytest.mark.parametrize("order", [1, 2])
def test_backward_repeats_and_writes_to_no_input(packed, order):
    op, _ = star_pair("gelu", 1.0)
    tensors = [randn(6, 44, grad=True)] if packed else branches(6, 22)
    kept = [t.detach().clone() for t in tensors]
    y = op(*tensors)
    dy = randn(6, 22, seed=9)
    seed = dy.clone()
    first, again = (
        torch.autograd.grad(y, tensors, dy, retain_graph=True, create_graph=order > 1)
        for _ in range(2)
    )
    fresh = torch.autograd.grad(op(*tensors), tensors, dy, create_graph=order > 1)
    for a, b, c in zip(first, again, fresh, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert all(torch.equal(a, b) for a, b in zip(tensors, kept, strict=True))
    assert torch.equal(dy, seed)
    assert torch.equal(y, op(*tensors))


@in_either
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("wanted", [0, 1])
def test_the_gradient_of_one_branch_alone(wanted, order):
    op, definition = star_pair("silu", 1.0)
    tensors = branches(6, 22)
    tensors[1 - wanted].requires_grad_(False)
    torch.testing.assert_close(
        results(op, tensors, order=order), results(definition, tensors, order=order)
    )


@in_either
@pytest.mark.parametrize("order", [1, 2])
def test_one_tensor_as_both_branches(order):
    op, definition = star_pair("silu", 1.0)
    x = [randn(6, 22, grad=True)]
    actual = results(lambda t: op(t, t), x, order=order)
    torch.testing.assert_close(actual, results(lambda t: definition(t, t), x, order=order))


@in_either
@pytest.mark.parametrize(
    ("act", "packed"), [(act, i % 2 == 1) for i, act in enumerate(FORMULAS)], ids=str
)
def test_float64_goes_to_the_definition(act, packed, launches):
    op, definition = star_pair(act, 0.5, (-3.0, 3.0))
    shapes = [(3, 8)] if packed else [(3, 4), (3, 4)]
    tensors = [randn(*s, seed=i, dtype=torch.float64, grad=True) for i, s in enumerate(shapes)]
    assert torch.equal(op(*tensors), definition(*tensors))
    assert torch.autograd.gradcheck(op, tensors)
    assert torch.autograd.gradgradcheck(op, tensors)
    assert launches == []
    op(*branches(2, 2))  # the fixture `either` wants a launch


@in_either
@pytest.mark.parametrize("create_graph", [False, True], ids=["first", "create-graph"])
def test_backward_called_under_autocast(create_graph):
    op, definition = star_pair("silu")
    tensors = branches(6, 22)
    y, seed = op(*tensors), randn(6, 22, seed=9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = torch.autograd.grad(y, tensors, seed, create_graph=create_graph)
    torch.testing.assert_close(actual, torch.autograd.grad(definition(*tensors), tensors, seed))


# --- mean and variance as outputs of kernels: merging over tiles, and gradients


def parts_of(y, rows):
    """Return what kernels write per tile of `rows`: count, mean, squared deviations."""
    tiles = []
    for tile in y.split(rows):
        mean = tile.mean(0)
        count = torch.full_like(mean, len(tile))
        tiles.append(torch.stack((count, mean, (tile - mean).square().sum(0))))
    return torch.stack(tiles)


#: the row for the quick tier cancels most, over several tiles
MERGED = [
    pytest.param(
        rows, *moments, marks=() if (rows, moments) == (32, (1e4, 0.1)) else pytest.mark.slow
    )
    for rows, moments in pairwise(
        [1, 32, 128, 5000], [(0.0, 1.0), (3.0, 2.0), (1e4, 0.1), (-1e4, 0.1)]
    )
]


@pytest.mark.interpret
@pytest.mark.parametrize(("rows", "mean", "std"), MERGED)
def test_merged_statistics_do_not_cancel(mean, std, rows):
    y = (mean + std * randn(5000, 6, dtype=torch.float64)).float()
    found_mean, found_var = merged_statistics(parts_of(y, rows))
    assert found_mean.dtype == found_var.dtype == torch.float32
    true = y.double()
    torch.testing.assert_close(found_mean.double(), true.mean(0), rtol=3e-7, atol=1e-6)
    torch.testing.assert_close(found_var.double(), true.var(0, correction=0), rtol=1e-3, atol=0)


def test_a_sum_of_squares_would_have_cancelled():
    y = (1e4 + 0.1 * randn(5000, 6, dtype=torch.float64)).float()
    naive = y.square().mean(0) - y.mean(0).square()
    true = y.double().var(0, correction=0)
    assert ((naive - true).abs() > 0.5 * true).any()


@pytest.mark.interpret
def test_tiles_of_unequal_length_weigh_by_their_rows():
    parts = torch.tensor([[[3.0], [1.0], [6.0]], [[1.0], [5.0], [0.0]]])
    mean, var = merged_statistics(parts)
    assert mean.item() == 2.0  # of -1, 1, 3 (or any three like them) and 5
    assert var.item() == (6 + 3 * 1 + 1 * 9) / 4


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("shift", [0.0, 1e3])
def test_statistics_of_a_shifted_output(shift):
    """Compare with float64 statistics of the output that the next layer normalises."""
    tensors = mlp_tensors(300, 17, 40, 24)
    image = conv_tensors(3, 9, 5, 18, 3)
    with torch.no_grad():
        tensors[6] += shift
        image[2] += shift
    for pair, inputs in ((mlp_pair("silu", stats=True), tensors), (conv_pair(True), image)):
        y, mean, var = pair[0](*inputs)
        true = y.detach().double().flatten(0, -2)
        torch.testing.assert_close(mean.double(), true.mean(0), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(var.double(), true.var(0, correction=0), rtol=1e-4, atol=0)


def normalised(f):
    """Return `f` followed by a BatchNorm that uses the statistics of `f`."""

    def normalise(*tensors):
        y, mean, var = f(*tensors)
        return (y - mean) * (var + 1e-5).rsqrt()

    return normalise


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("order", [1, 2])
def test_a_batch_norm_after_an_op_is_that_of_torch(order):
    op, definition = mlp_pair("silu", stats=True)

    def torch_norm(*tensors):
        return torch.nn.functional.batch_norm(definition(*tensors)[0], None, None, training=True)

    tensors = mlp_tensors(130, 17, 40, 24)
    actual = results(normalised(op), tensors, order=order)
    exact = results(torch_norm, converted(tensors, torch.float64), order=order)
    for ours, true in zip(actual, exact, strict=True):
        assert (ours - true).norm() <= 1e-4 * true.norm().clamp(min=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_gradient_of_the_statistics_is_an_affine_map_of_the_output(dtype):
    y = randn(4, 3, 5, dtype=dtype, grad=True)
    outputs = with_statistics(y, True)
    dy, dmean, dvar = (randn(*t.shape, seed=i, dtype=t.dtype) for i, t in enumerate(outputs, 1))
    (expected,) = torch.autograd.grad(outputs, y, [dy, dmean, dvar])
    saved = SimpleNamespace(tensors=1, saved_tensors=(y, y.detach(), outputs[1].detach()))
    inputs, upstream = saved_inputs(saved, dy, dmean, dvar)
    actual = upstream.total()
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, expected)
    assert inputs == [y]
    assert Upstream(dy).total() is dy


def test_statistics_are_empty_and_float32_unless_wanted():
    y = randn(4, 5, dtype=torch.float16)
    same, mean, var = with_statistics(y, False)
    assert same is y
    assert [(t.shape, t.dtype) for t in (mean, var)] == [((0,), torch.float32)] * 2
    assert [(t.shape, t.dtype) for t in empty_statistics(y)] == [((0,), torch.float32)] * 2
