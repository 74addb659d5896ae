"""Depthwise convolution op against its definition, in torch code and in Triton."""

import pytest
import torch

from starlayers.kernels import dwconv as module
from starlayers.kernels.dwconv import ROWS, dwconv, tile_shape
from tests.helpers import assert_as_exact_as_eager, converted, pairwise, randn, results
from tests.kernels.cases import DTYPES, EITHER, conv_pair, conv_tensors, convolved

in_either = pytest.mark.usefixtures("either")
anywhere = pytest.mark.parametrize("where", EITHER)
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
each_stats = pytest.mark.parametrize("stats", [False, True], ids=["", "stats"])
each_order = pytest.mark.parametrize("order", [1, 2])
NAMES = ("x", "k", "b", "scale", "shift", "residual")
AFFINE = ("scale", "shift")
SMALL = (2, 4, 3, 18, 3)


def against_definition(sizes, *, stats=False, order=1, **options):
    tensors = conv_tensors(*sizes, **options)
    op, definition = conv_pair(stats)
    actual, eager = results(op, tensors, order=order), results(definition, tensors, order=order)
    exact = results(definition, converted(tensors, torch.float64), order=order)
    assert_as_exact_as_eager(actual, eager, exact, sums=True)


@in_either
@pytest.mark.parametrize("stats", [False, True])
def test_a_scale_of_zero_has_a_gradient(stats):
    """Check the sums for the BatchNorm, which divide the stored gradient by the scale."""
    tensors = conv_tensors(2, 5, 4, 16, 3)
    with torch.no_grad():
        tensors[3][::3] = 0
    op, definition = conv_pair(stats)
    exact = results(definition, converted(tensors, torch.float64))
    assert exact[-3][::3].norm() > 100
    assert_as_exact_as_eager(results(op, tensors), results(definition, tensors), exact, sums=True)


def test_the_definition_is_a_sum_over_taps():
    x, k, b, *_ = conv_tensors(2, 5, 4, 3, 5, dtype=torch.float64)
    expected = b.expand(2, 5, 4, 3).clone()
    for di in range(-2, 3):
        for dj in range(-2, 3):
            for i in range(5):
                for j in range(4):
                    if 0 <= i + di < 5 and 0 <= j + dj < 4:
                        expected[:, i, j] += x[:, i + di, j + dj] * k[:, 0, di + 2, dj + 2]
    torch.testing.assert_close(convolved(x, k, b), expected)


# images, height, width, channels, kernel size
SIZES = [
    (1, 8, 3, 16, 3),
    (2, 7, 5, 24, 7),
    (1, 4, 3, 70, 3),
    (3, 2, 9, 17, 5),
    (1, 14, 2, 48, 3),
    (1, 5, 3, 100, 3),
    (2, 1, 1, 16, 7),
    (1, 3, 8, 32, 1),
    (5, 2, 7, 96, 3),
]


BARE = ("b", *AFFINE, "residual")


@in_either
@pytest.mark.parametrize(
    ("sizes", "missing", "stats"), pairwise(SIZES, [(), BARE], [False, True]), ids=str
)
def test_value_and_gradients(sizes, missing, stats):
    against_definition(sizes, missing=missing, stats=stats)


# sizes, missing, statistics, dtype, order
IN_TRITON = [
    ((2, 7, 5, 24, 7), (), True, "f32", 1),
    ((1, 4, 3, 70, 3), BARE, False, "bf16", 1),
    ((3, 2, 9, 17, 5), ("b",), True, "f16", 1),
    ((1, 14, 2, 48, 3), AFFINE, True, "bf16", 1),
    ((2, 9, 4, 16, 3), ("residual",), False, "f32", 2),
    ((1, 3, 8, 32, 1), (), False, "f16", 1),
]


@pytest.mark.interpret
@pytest.mark.parametrize(("sizes", "missing", "stats", "dtype", "order"), IN_TRITON, ids=str)
def test_in_triton(sizes, missing, stats, dtype, order):
    against_definition(sizes, missing=missing, stats=stats, dtype=DTYPES[dtype], order=order)


@in_either
@each_dtype
@each_order
@each_stats
def test_any_dtype(dtype, order, stats):
    against_definition((2, 7, 3, 24, 3), dtype=dtype, order=order, stats=stats)


@in_either
@each_order
@each_stats
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
def test_float32_parameters_of_a_half_precision_input(kind, order, stats):
    dtype = dict.fromkeys(NAMES, torch.float32) | {"x": kind, "residual": kind}
    against_definition((2, 4, 3, 24, 3), dtype=dtype, order=order, stats=stats)


@pytest.mark.interpret
@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "channels", "dtype"), pairwise(ROWS, [13, 20, 60], [torch.float32, torch.float16])
)
def test_tile(rows, channels, dtype, launches):
    # a height that this tile covers with fewer empty rows than any other tile
    height = {14: 13, 8: 15, 7: 21, 4: 3, 2: 9}[rows]
    across = {13: 16, 20: 32, 60: 64}[channels]
    assert tile_shape(height, channels) == (rows, module.ELEMENTS // across, across)
    against_definition((1, height, 3, channels, 3), dtype=dtype, stats=True)
    tiles = {k: (o["TH"], o["BC"]) for k, _, o in launches if k != "merge_statistics"}
    fewer = tile_shape(height, channels, module.ROWS_WEIGHTS)[0]
    assert tiles == {"dw_convolve": (rows, across), "dw_weights": (fewer, across)}


def test_tiles_waste_no_rows_where_a_smaller_one_would_not():
    assert (ROWS, module.ROWS_WEIGHTS) == ((14, 8, 7, 4, 2), (8, 7, 4, 2))
    assert [tile_shape(56, c)[1:] for c in (16, 32, 64)] == [(32, 16), (16, 32), (8, 64)]
    assert [tile_shape(h, 32)[0] for h in (56, 28, 14, 7, 9, 1, 12)] == [14, 14, 14, 7, 2, 2, 4]
    widths = {1: 16, 16: 16, 17: 32, 24: 32, 33: 16, 48: 16, 64: 64, 96: 32, 192: 64}
    assert {c: tile_shape(7, c)[2] for c in widths} == widths


@pytest.mark.interpret
@pytest.mark.slow
@pytest.mark.parametrize("multiprocessors", [1, 2, 132])
def test_any_number_of_programs_yields_the_weight_gradients(multiprocessors, launches, monkeypatch):
    monkeypatch.setattr(module, "multiprocessors", lambda device: multiprocessors)
    against_definition((5, 9, 5, 18, 3), stats=True)
    ((grid, options),) = [(g, o) for kernel, g, o in launches if kernel == "dw_weights"]
    tiles = -(-5 * 5 // options["BP"]) * -(-9 // options["TH"])
    assert tiles == 10
    assert grid == (3 * max(1, min(tiles, module.RESIDENT * multiprocessors // 3)),)


MISSING = [(), ("b",), AFFINE, ("residual",), ("b", *AFFINE), ("b", "residual")]
MISSING += [(*AFFINE, "residual")]


@in_either
@pytest.mark.parametrize(
    ("missing", "stats", "order"), pairwise(MISSING, [False, True], [1, 2]), ids=str
)
def test_any_optional_argument_may_be_missing(missing, stats, order):
    against_definition(SMALL, missing=missing, stats=stats, order=order)


@in_either
def test_zeros_surround_the_image_after_scale_and_shift():
    x, k = torch.zeros(1, 3, 4, 2), torch.ones(2, 1, 3, 3)
    one = torch.ones(2)
    y, _, _ = dwconv(x, k, None, one, one, None, False)
    inside = torch.tensor([[4.0, 6, 6, 4], [6, 9, 9, 6], [4, 6, 6, 4]])
    assert torch.equal(y, inside[None, :, :, None].expand(1, 3, 4, 2))


@in_either
def test_images_do_not_touch():
    x = randn(3, 5, 4, 16)
    k = randn(16, 1, 3, 3, seed=1)
    whole, _, _ = dwconv(x, k, None, None, None, None, False)
    alone = [dwconv(x[i : i + 1], k, None, None, None, None, False)[0] for i in range(3)]
    torch.testing.assert_close(whole, torch.cat(alone))


LAYOUTS = {
    "channels first": lambda t: t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    "part of more channels": lambda t: torch.cat((t, t), -1)[..., : t.shape[-1]],
    "expanded images": lambda t: t[:1].expand(t.shape),
    "every other column": lambda t: t.repeat_interleave(2, 2)[:, :, ::2],
}


def vector_every_other(t):
    return t.repeat_interleave(2, 0)[::2]


@in_either
@pytest.mark.parametrize(
    ("layout", "stats"), [(layout, i % 2 == 0) for i, layout in enumerate(LAYOUTS)]
)
def test_layout_changes_nothing(layout, stats):
    x, k, b, scale, shift, residual = (t.detach() for t in conv_tensors(*SMALL))
    tensors = [
        LAYOUTS[layout](x),
        k.transpose(2, 3).contiguous().transpose(2, 3),
        vector_every_other(b),
        vector_every_other(scale),
        shift[:1].expand(18),
        LAYOUTS[layout](residual),
    ]
    assert not any(t.is_contiguous() for t in tensors)
    dense = [t.clone(memory_format=torch.contiguous_format).requires_grad_() for t in tensors]
    op, _ = conv_pair(stats)
    actual = results(op, [t.requires_grad_() for t in tensors])
    assert actual[0].is_contiguous()
    torch.testing.assert_close(actual, results(op, dense), rtol=1e-4, atol=1e-4)


@in_either
@each_stats
def test_expanded_upstream_gradients(stats):
    tensors = conv_tensors(*SMALL)

    def summed(f):
        outputs = f(*tensors)
        loss = sum(t.sum() for t in ([outputs] if isinstance(outputs, torch.Tensor) else outputs))
        return torch.autograd.grad(loss, tensors)

    op, definition = conv_pair(stats)
    torch.testing.assert_close(summed(op), summed(definition), rtol=1e-4, atol=1e-4)


@in_either
@pytest.mark.parametrize("which", [(0,), (1,), (2,), (1, 2)], ids=["y", "mean", "var", "both"])
def test_the_gradient_of_some_outputs_only(which):
    tensors = conv_tensors(*SMALL)
    op, definition = conv_pair(True)

    def some(f):
        return lambda *t: [f(*t)[i] for i in which]

    exact = results(some(definition), converted(tensors, torch.float64))
    eager = results(some(definition), tensors)
    assert_as_exact_as_eager(results(some(op), tensors), eager, exact, sums=True)


@in_either
@each_stats
def test_nan_is_where_torch_has_it(stats):
    tensors = conv_tensors(2, 5, 6, 18, 3)
    with torch.no_grad():
        tensors[0][0, 1, 2, 3] = tensors[0][1, 4, 5, 17] = float("nan")
        tensors[5][0, 0, 0, 0] = float("nan")
    op, definition = conv_pair(stats)
    actual, expected = results(op, tensors), results(definition, tensors)
    assert expected[0].isnan().sum() == 9 + 4 + 1
    # at the border NaN times a gradient of 0 reaches taps that never meet the NaN
    actual[4 if stats else 2], expected[4 if stats else 2] = (
        t[4 if stats else 2].flatten(1).sum(1) for t in (actual, expected)
    )
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())


@in_either
@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize(
    ("sizes", "missing", "stats"),
    pairwise([(1, 1, 1, 1, 3), (2, 9, 3, 18, 3), (3, 3, 20, 17, 5)], [(), BARE], [False, True]),
    ids=str,
)
def test_nothing_uninitialised_leaks(sizes, missing, stats):
    tensors = conv_tensors(*sizes, missing=missing)
    op, definition = conv_pair(stats)
    actual = results(op, tensors)
    assert not any(t.isnan().any() for t in actual)
    torch.testing.assert_close(actual, results(definition, tensors), rtol=1e-3, atol=1e-3)


@anywhere
@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("missing", [(), BARE], ids=["full", "bare"])
def test_no_images(where, missing, launches):
    tensors = conv_tensors(0, 4, 3, 18, 3, missing=missing)
    y, *grads = results(conv_pair()[0], tensors)
    present = [t for t in tensors if t is not None]
    assert y.shape == (0, 4, 3, 18)
    assert [g.shape for g in grads] == [t.shape for t in present]
    assert not any(g.any() for g in grads)
    assert launches == []


@in_either
@each_stats
@each_order
def test_backward_repeats_and_writes_to_no_input(stats, order):
    tensors = conv_tensors(2, 9, 3, 18, 3)
    kept = [t.detach().clone() for t in tensors]
    outputs = [t for t in dwconv(*tensors, stats) if t.numel()]
    seeds = [randn(*t.shape, seed=9) for t in outputs]
    kept_seeds, kept_outputs = [t.clone() for t in seeds], [t.detach().clone() for t in outputs]
    first, again = (
        torch.autograd.grad(outputs, tensors, seeds, retain_graph=True, create_graph=order > 1)
        for _ in range(2)
    )
    other = [t for t in dwconv(*tensors, stats) if t.numel()]
    fresh = torch.autograd.grad(other, tensors, seeds, create_graph=order > 1)
    for a, b, c in zip(first, again, fresh, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    for a, b in zip([*tensors, *seeds, *outputs], [*kept, *kept_seeds, *kept_outputs], strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(outputs, other, strict=True))


@in_either
@pytest.mark.parametrize(
    ("wanted", "stats", "order"),
    pairwise([*((name,) for name in NAMES), ("x", "shift")], [False, True], [1, 2]),
    ids=str,
)
def test_only_some_inputs_require_gradients(wanted, stats, order):
    tensors = conv_tensors(*SMALL)
    for name, t in zip(NAMES, tensors, strict=True):
        t.requires_grad_(name in wanted)
    op, definition = conv_pair(stats)
    actual, expected = results(op, tensors, order=order), results(definition, tensors, order=order)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@in_either
@each_order
def test_the_input_as_its_own_residual(order):
    tensors = conv_tensors(*SMALL)[:-1]
    op, definition = conv_pair(True)

    def block(f):
        return lambda x, *others: f(x, *others, x)

    exact = results(block(definition), converted(tensors, torch.float64), order=order)
    eager = results(block(definition), tensors, order=order)
    actual = results(block(op), tensors, order=order)
    assert_as_exact_as_eager(actual, eager, exact, sums=True)


@anywhere
@each_stats
@pytest.mark.parametrize("missing", [(), BARE], ids=["full", "bare"])
def test_float64_goes_to_the_definition(where, missing, stats, launches):
    tensors = conv_tensors(2, 2, 3, 2, 3, missing=missing, dtype=torch.float64)
    op, definition = conv_pair(stats)
    torch.testing.assert_close(results(op, tensors), results(definition, tensors))
    assert torch.autograd.gradcheck(lambda *t: op(*t)[: 3 if stats else 1], tensors)
    assert torch.autograd.gradgradcheck(lambda *t: op(*t)[: 3 if stats else 1], tensors)
    assert launches == []


@in_either
@each_stats
def test_half_precision_gradients_survive_a_loss_scale_of_65536(stats):
    tensors = conv_tensors(4, 7, 5, 24, 3, dtype=torch.float16)
    op, definition = conv_pair(stats)

    def scaled(f, tensors):
        outputs = f(*tensors)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
        loss = sum(
            (t.double() * randn(*t.shape, seed=9, dtype=torch.float64)).mean() / 8
            for t in outputs
            if t.numel()
        )
        return torch.autograd.grad(65536 * loss, tensors)

    true = scaled(definition, converted(tensors, torch.float64))
    assert 200 < max(g.abs().max() for g in true) < 65504  # each of them a float16
    actual = scaled(op, tensors)
    assert all(g.isfinite().all() for g in actual)
    for ours, exact in zip(actual, true, strict=True):
        assert (ours - exact).norm() <= 0.01 * exact.norm()


@in_either
@pytest.mark.parametrize("stats", [False, True], ids=["", "stats"])
def test_only_inputs_and_what_statistics_need_are_saved(stats):
    tensors, saved = conv_tensors(*SMALL), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        outputs = dwconv(*tensors, stats)
    known = {t.data_ptr() for t in (*tensors, *(outputs[:2] if stats else ()))}
    assert saved
    assert {t.data_ptr() for t in saved} <= known
