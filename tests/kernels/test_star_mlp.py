"""Fused star MLP op against its definition, in row blocks and in Triton."""

import itertools
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from starlayers.kernels.star_mlp import star_mlp, star_mlp_backward
from tests.helpers import (
    FORMULAS,
    assert_as_exact_as_eager,
    converted,
    pairwise,
    properties,
    randn,
    results,
)
from tests.kernels.cases import DTYPES, EITHER, mlp_pair, mlp_tensors

pytestmark = pytest.mark.usefixtures("eligible")
in_either = pytest.mark.usefixtures("either")
each_act = pytest.mark.parametrize("act", FORMULAS)
each_stats = pytest.mark.parametrize("stats", [False, True], ids=["", "stats"])
each_order = pytest.mark.parametrize("order", [1, 2])
OPTIONAL = ("b1", "b2", "b3", "residual")
NAMES = ("x", "w1", "b1", "w2", "b2", "w3", "b3", "residual")
# rows, in, hidden, out. Blocks have 64 rows here: a short one, a full one, a full one and a single
# row, two full ones and a short one
SIZES = [(7, 5, 11, 3), (64, 4, 8, 4), (65, 1, 1, 1), (177, 5, 11, 3)]


def against_definition(sizes, act, *, offset=0.0, stats=False, order=1, **options):
    tensors = mlp_tensors(*sizes, **options)
    op, definition = mlp_pair(act, offset, stats)
    actual, eager = results(op, tensors, order=order), results(definition, tensors, order=order)
    exact = results(definition, converted(tensors, torch.float64), order=order)
    assert_as_exact_as_eager(actual, eager, exact, sums=True)


def absent(bare):
    return OPTIONAL if bare else ()


@in_either
@pytest.mark.parametrize(
    ("act", "offset", "bare", "stats"),
    pairwise(list(FORMULAS), [0.0, 1.0], [False, True], [False, True]),
)
def test_every_activation(act, offset, bare, stats):
    against_definition(SIZES[3], act, offset=offset, missing=absent(bare), stats=stats)


@in_either
@pytest.mark.parametrize("bare", [False, True], ids=["full", "bare"])
@each_stats
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_division_into_blocks(sizes, bare, stats):
    against_definition(sizes, "silu", offset=1.0, missing=absent(bare), stats=stats)


@in_either
@pytest.mark.parametrize(("act", "dtype", "order"), pairwise(list(FORMULAS), list(DTYPES), [1, 2]))
def test_any_dtype(act, dtype, order):
    against_definition((37, 17, 40, 24), act, dtype=DTYPES[dtype], stats=True, order=order)


# sizes, activation, offset, missing, statistics, dtype, order: gradients in one pass and in two,
# one channel part and two, weight gradients by kernels and by matrix products
IN_TRITON = [
    ((7, 5, 11, 3), "relu6", 0.0, (), True, "f32", 1),
    ((130, 17, 51, 24), "silu", 1.0, OPTIONAL, False, "bf16", 1),
    ((1, 24, 140, 17), "gelu", 0.5, ("b1", "residual"), True, "f16", 1),
    ((66, 48, 72, 24), "tanh", 0.0, ("b2",), False, "f32", 2),
    ((70, 96, 40, 48), "hardswish", 1.0, ("b3",), True, "bf16", 1),
    ((40, 100, 24, 132), "identity", -0.5, (), True, "f16", 1),
    ((20, 8, 136, 100), "squared_relu", 1.0, OPTIONAL, True, "f32", 1),
    ((130, 17, 24, 250), "relu6", 0.0, (), True, "bf16", 1),  # the output in halves
]


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("sizes", "act", "offset", "missing", "stats", "dtype", "order"), IN_TRITON, ids=str
)
def test_in_triton(sizes, act, offset, missing, stats, dtype, order):
    against_definition(
        sizes, act, offset=offset, missing=missing, stats=stats, dtype=DTYPES[dtype], order=order
    )


ODD = [
    (1, 24, 72, 24),
    (5, 48, 72, 17),
    (70, 96, 288, 48),
    (133, 192, 72, 100),
    (66, 100, 300, 100),
    (130, 17, 51, 24),
]


@in_either
@pytest.mark.parametrize(
    ("sizes", "dtype", "stats"), pairwise(ODD, [torch.float32, torch.float16], [False, True])
)
def test_odd_sizes(sizes, dtype, stats):
    against_definition(sizes, "silu", offset=0.5, dtype=dtype, stats=stats)


@in_either
@pytest.mark.parametrize(
    ("missing", "stats", "order"),
    pairwise(
        [m for n in range(5) for m in itertools.combinations(OPTIONAL, n)], [False, True], [1, 2]
    ),
    ids=str,
)
def test_any_optional_argument_may_be_missing(missing, stats, order):
    against_definition((40, 17, 72, 24), "silu", missing=missing, stats=stats, order=order)


def any_size(rows):
    return given(
        sizes=st.tuples(st.integers(0, rows), *[st.integers(1, 9)] * 3),
        act=st.sampled_from(list(FORMULAS)),
        offset=st.sampled_from([0.0, 1.0, -0.5]),
        missing=st.sets(st.sampled_from(OPTIONAL)),
    )


@properties
@any_size(rows=200)
def test_any_size(sizes, act, offset, missing):
    against_definition(sizes, act, offset=offset, missing=missing)


@pytest.mark.interpret
@pytest.mark.slow
@settings(properties, max_examples=15)
@any_size(rows=140)
def test_any_size_in_triton(sizes, act, offset, missing):
    against_definition(sizes, act, offset=offset, missing=missing)


@in_either
@pytest.mark.usefixtures("nan_memory")
@each_stats
@pytest.mark.parametrize("missing", [(), OPTIONAL], ids=["full", "bare"])
@pytest.mark.parametrize("sizes", [(1, 5, 11, 3), (64, 96, 40, 24), (133, 5, 140, 3)], ids=str)
def test_nothing_uninitialised_leaks(sizes, missing, stats):
    tensors = mlp_tensors(*sizes, missing=missing)
    op, definition = mlp_pair("gelu", 1.0, stats)
    actual = results(op, tensors)
    assert not any(t.isnan().any() for t in actual)
    torch.testing.assert_close(actual, results(definition, tensors), rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("where", EITHER)
@pytest.mark.parametrize("width", [8, 96])
def test_no_rows(where, width, launches):
    tensors = mlp_tensors(0, width, 200, 3)
    y, *grads = results(mlp_pair("silu", 1.0)[0], tensors)
    assert y.shape == (0, 3)
    assert [g.shape for g in grads] == [t.shape for t in tensors]
    assert not any(g.any() for g in grads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's var_mean says it too
        _, mean, var = star_mlp(*tensors, "silu", 1.0, True)
    assert mean.isnan().all()  # as torch for no elements
    assert var.isnan().all()
    assert launches == []


def other_layout(t, layout):
    """Return `t` in other strides; "expanded" repeats its first row."""
    if layout == "row-strided":
        wide = t.new_zeros(*t.shape[:-1], t.shape[-1] + 5)
        wide[..., 2:-3] = t
        return wide[..., 2:-3]
    if layout == "transposed":
        return t.t().contiguous().t()
    if layout == "every other":
        return t.repeat_interleave(2, -1)[..., ::2]
    return t[:1].expand(t.shape)


LAYOUTS = [
    ("row-strided", ("x", "w1", "w2", "w3", "residual")),
    ("transposed", ("x", "w1", "w2", "w3", "residual")),
    ("every other", NAMES),
    ("every other", ("b1", "b2", "b3")),
    ("expanded", ("x", "residual")),
    ("expanded", ("b1", "b2", "b3")),
    ("expanded", ("w1", "w2", "w3")),
]


@in_either
@each_stats
@pytest.mark.parametrize(("layout", "changed"), LAYOUTS, ids=str)
def test_layout_changes_nothing(layout, changed, stats):
    op, _ = mlp_pair("silu", 1.0, stats)
    tensors = [
        other_layout(t.detach(), layout) if name in changed else t.detach()
        for name, t in zip(NAMES, mlp_tensors(70, 24, 40, 48), strict=True)
    ]
    dense = [t.clone(memory_format=torch.contiguous_format).requires_grad_() for t in tensors]
    actual = results(op, [t.requires_grad_() for t in tensors])
    assert actual[0].is_contiguous()
    torch.testing.assert_close(actual, results(op, dense), rtol=1e-4, atol=1e-4)


@in_either
@each_stats
def test_expanded_upstream_gradients(stats):
    tensors = mlp_tensors(70, 24, 40, 48)

    def summed(f):
        outputs = f(*tensors)
        loss = sum(t.sum() for t in ([outputs] if isinstance(outputs, torch.Tensor) else outputs))
        return torch.autograd.grad(loss, tensors)

    op, definition = mlp_pair("silu", 1.0, stats)
    torch.testing.assert_close(summed(op), summed(definition), rtol=1e-4, atol=1e-4)


@in_either
@pytest.mark.parametrize("which", [(0,), (1,), (2,), (1, 2)], ids=["y", "mean", "var", "both"])
def test_the_gradient_of_some_outputs_only(which):
    tensors = mlp_tensors(70, 24, 40, 48)
    op, definition = mlp_pair("silu", 1.0, True)

    def some(f):
        return lambda *t: [f(*t)[i] for i in which]

    exact = results(some(definition), converted(tensors, torch.float64))
    eager = results(some(definition), tensors)
    assert_as_exact_as_eager(results(some(op), tensors), eager, exact, sums=True)


@in_either
@pytest.mark.parametrize(
    ("act", "stats"), [(act, i % 2 == 0) for i, act in enumerate(FORMULAS)], ids=str
)
def test_nan_is_where_torch_has_it(act, stats):
    tensors = mlp_tensors(70, 17, 40, 24)
    with torch.no_grad():
        tensors[0][3, 2] = tensors[0][69, 0] = float("nan")
        tensors[7][5, 1] = float("nan")
    op, definition = mlp_pair(act, 1.0, stats)
    actual, expected = results(op, tensors), results(definition, tensors)
    assert expected[0].isnan().sum() == 2 * 24 + 1
    if act == "relu6":  # hardtanh_backward: 0 in its vectorised loop, 1 in the scalar one
        assert torch.equal(actual[0].isnan(), expected[0].isnan())
        return
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())


@in_either
@pytest.mark.parametrize(("hidden", "stats", "order"), pairwise([40, 140], [False, True], [1, 2]))
def test_backward_repeats_and_writes_to_no_input(hidden, stats, order):
    tensors = mlp_tensors(133, 24, hidden, 17)
    kept = [t.detach().clone() for t in tensors]
    outputs = [t for t in star_mlp(*tensors, "gelu", 1.0, stats) if t.numel()]
    seeds = [randn(*t.shape, seed=9) for t in outputs]
    kept_seeds = [t.clone() for t in seeds]
    kept_outputs = [t.detach().clone() for t in outputs]
    first, again = (
        torch.autograd.grad(outputs, tensors, seeds, retain_graph=True, create_graph=order > 1)
        for _ in range(2)
    )
    other = [t for t in star_mlp(*tensors, "gelu", 1.0, stats) if t.numel()]
    fresh = torch.autograd.grad(other, tensors, seeds, create_graph=order > 1)
    for a, b, c in zip(first, again, fresh, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    for a, b in zip([*tensors, *seeds, *outputs], [*kept, *kept_seeds, *kept_outputs], strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(outputs, other, strict=True))


@in_either
@each_order
def test_tied_branches_get_the_sum_of_both_gradients(order):
    x, w1, b1, _, _, w3, b3, residual = mlp_tensors(40, 17, 72, 24)
    op, definition = mlp_pair("tanh", 1.0, True)

    def tied(f):
        return lambda x, w, b, w3, b3, r: f(x, w, b, w, b, w3, b3, r)

    tensors = [x, w1, b1, w3, b3, residual]
    exact = results(tied(definition), converted(tensors, torch.float64), order=order)
    eager = results(tied(definition), tensors, order=order)
    assert_as_exact_as_eager(results(tied(op), tensors, order=order), eager, exact, sums=True)


@in_either
@each_order
def test_the_input_as_its_own_residual(order):
    tensors = mlp_tensors(40, 17, 72, 17)[:-1]
    op, definition = mlp_pair("silu", 0.0, True)

    def block(f):
        return lambda x, *weights: f(x, *weights, x)

    exact = results(block(definition), converted(tensors, torch.float64), order=order)
    eager = results(block(definition), tensors, order=order)
    assert_as_exact_as_eager(results(block(op), tensors, order=order), eager, exact, sums=True)


SUBSETS = [(name,) for name in NAMES] + [("x", "w3"), ("w1", "b2", "residual")]


@in_either
@pytest.mark.parametrize(
    ("wanted", "stats", "order"), pairwise(SUBSETS, [False, True], [1, 2]), ids=str
)
def test_only_some_inputs_require_gradients(wanted, stats, order):
    tensors = mlp_tensors(40, 17, 72, 24)
    for name, t in zip(NAMES, tensors, strict=True):
        t.requires_grad_(name in wanted)
    op, definition = mlp_pair("silu", 1.0, stats)
    actual, expected = results(op, tensors, order=order), results(definition, tensors, order=order)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@in_either
@pytest.mark.parametrize("create_graph", [False, True], ids=["first", "create-graph"])
def test_backward_called_under_autocast(create_graph):
    def under_autocast(f, tensors):
        y = f(*tensors)
        y = y if isinstance(y, torch.Tensor) else y[0]
        dy = randn(*y.shape, seed=90)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            grads = torch.autograd.grad(y, tensors, dy, create_graph=create_graph)
        return [g.detach() for g in grads]

    tensors = mlp_tensors(70, 17, 40, 24)
    op, definition = mlp_pair("silu")
    actual, eager = under_autocast(op, tensors), under_autocast(definition, tensors)
    _, *exact = results(definition, converted(tensors, torch.float64))
    assert {g.dtype for g in actual} == {torch.float32}
    assert_as_exact_as_eager(actual, eager, exact, sums=True)
    if not create_graph:
        torch.testing.assert_close(actual, [g.float() for g in exact], rtol=1e-4, atol=1e-4)


@in_either
@each_stats
def test_only_inputs_and_what_statistics_need_are_saved(stats):
    tensors, saved = mlp_tensors(133, 17, 64, 24), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        outputs = star_mlp(*tensors, "gelu", 1.0, stats)
    known = {t.data_ptr() for t in (*tensors, *(outputs[:2] if stats else ()))}
    assert saved
    assert {t.data_ptr() for t in saved} <= known


@in_either
def test_changing_a_saved_tensor_is_noticed():
    tensors = mlp_tensors(20, 5, 11, 3)
    y, _, _ = star_mlp(*tensors, "gelu", 1.0, False)
    with torch.no_grad():
        tensors[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("where", EITHER)
@pytest.mark.parametrize(
    ("act", "stats"), [(act, i % 2 == 0) for i, act in enumerate(FORMULAS)], ids=str
)
def test_float64_goes_to_the_definition(act, stats, where, launches):
    tensors = mlp_tensors(3, 2, 4, 2, dtype=torch.float64)
    op, definition = mlp_pair(act, 0.5, stats)
    torch.testing.assert_close(results(op, tensors), results(definition, tensors))
    assert torch.autograd.gradcheck(lambda *t: op(*t)[: 3 if stats else 1], tensors)
    assert torch.autograd.gradgradcheck(lambda *t: op(*t)[: 3 if stats else 1], tensors)
    assert launches == []


@in_either
@pytest.mark.parametrize(
    ("sizes", "stats"),
    [
        ((133, 24, 72, 24), False),
        ((133, 24, 72, 24), True),
        ((133, 96, 300, 96), True),
        ((133, 128, 300, 128), True),
    ],
    ids=str,
)
def test_half_precision_gradients_survive_a_loss_scale_of_65536(sizes, stats):
    tensors = mlp_tensors(*sizes, dtype=torch.float16)
    op, definition = mlp_pair("relu6", 0.0, stats)

    def scaled(f, tensors):
        outputs = f(*tensors)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
        # a mean over the batch, as in training
        loss = sum(
            (t.double() * randn(*t.shape, seed=9, dtype=torch.float64)).mean() / 4
            for t in outputs
            if t.numel()
        )
        return torch.autograd.grad(65536 * loss, tensors)

    true = scaled(definition, converted(tensors, torch.float64))
    largest = max(g.abs().max() for g in true)
    assert 200 < largest < 65504  # large, but each of them a float16
    actual = scaled(op, tensors)
    assert all(g.isfinite().all() for g in actual)
    for ours, exact in zip(actual, true, strict=True):
        assert (ours - exact).norm() <= 0.01 * exact.norm()


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("channels", "hidden"),
    [pytest.param(17, 16, marks=pytest.mark.slow), (17, 140), (100, 16)],
    ids=["one pass", "two passes", "products"],
)
def test_a_mean_far_below_a_rounding_step_of_the_gradient_is_not_lost(channels, hidden):
    """Check the dither: rounded to nearest, dy + q would be dy nearly everywhere."""
    rows, out, q = 1500, 24, 1e-4
    tensors = [t.detach() for t in mlp_tensors(rows, channels, hidden, out, dtype=torch.float16)]
    dy = randn(rows, out, seed=7, dtype=torch.float16)
    zero = torch.zeros(out)
    *_, db3 = star_mlp_backward(dy, dy, zero, zero, zero + q, *tensors[:7], "silu", 0.0)
    added = (db3.double() - dy.double().sum(0)).mean() / rows
    nearest = (dy.double() + q).half().double().mean() - dy.double().mean()
    assert nearest < 0.8 * q
    assert abs(added - q) < 0.1 * q
