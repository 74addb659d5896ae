"""Depthwise convolution of 16-bit images on tensor cores, against its definition."""

import pytest
import torch

from starlayers.kernels import dwconv as module
from starlayers.kernels.dwconv import BANDS, dwconv, dwconv_backward, on_tensor_cores, strip_rows
from tests.helpers import assert_as_exact_as_eager, converted, randn, results
from tests.kernels.cases import conv_pair, conv_tensors

pytestmark = pytest.mark.interpret

F16 = torch.float16
CONVOLVE, WEIGHTS = "dw_convolve_toeplitz", "dw_weights_toeplitz"
AFFINE = ("scale", "shift")
BARE = ("b", *AFFINE, "residual")
NAMES = ("x", "k", "b", "scale", "shift", "residual")


def against_definition(sizes, *, missing=(), stats=False, dtype=F16, order=1):
    tensors = conv_tensors(*sizes, missing=missing, dtype=dtype)
    op, definition = conv_pair(stats)
    actual, eager = results(op, tensors, order=order), results(definition, tensors, order=order)
    exact = results(definition, converted(tensors, torch.float64), order=order)
    assert_as_exact_as_eager(actual, eager, exact, sums=True)


def kernels(launches):
    return [name for name, _, _ in launches if name != "merge_statistics"]


slow = pytest.mark.slow
# (images, height, width, channels, rows of taps), missing, statistics
CASES = [
    ((1, 5, 9, 8, 7), (), True),
    ((3, 7, 7, 1, 7), BARE, False),
    ((1, 17, 3, 9, 7), AFFINE, True),
    ((17, 1, 2, 9, 7), ("residual",), False),
    ((3, 5, 9, 8, 9), ("b",), True),
    pytest.param((3, 14, 14, 24, 7), (), True, marks=slow),
    pytest.param((1, 14, 14, 24, 7), ("residual",), False, marks=slow),
    pytest.param((1, 17, 3, 96, 7), (), True, marks=slow),
    pytest.param((1, 12, 17, 24, 9), AFFINE, True, marks=slow),
]


@pytest.mark.parametrize(("sizes", "missing", "stats"), CASES, ids=str)
def test_value_and_gradients(sizes, missing, stats, launches):
    against_definition(sizes, missing=missing, stats=stats)
    assert kernels(launches) == [CONVOLVE, CONVOLVE, WEIGHTS]


@pytest.mark.parametrize("stats", [False, True])
def test_second_gradients_are_those_of_the_definition(stats):
    against_definition((1, 5, 9, 8, 7), stats=stats, order=2)


def test_float32_parameters_of_a_half_precision_input(launches):
    dtype = dict.fromkeys(NAMES, torch.float32) | {"x": F16, "residual": F16}
    against_definition((2, 6, 9, 8, 7), dtype=dtype, stats=True)
    assert kernels(launches) == [CONVOLVE, CONVOLVE, WEIGHTS]


@pytest.mark.parametrize("size", [3, 5, 7, 9, 11])
@pytest.mark.parametrize("dtype", [F16, torch.float32], ids=["f16", "f32"])
def test_dtype_and_size_choose_the_kernels(dtype, size, launches):
    against_definition((1, 4, 5, 8, size), dtype=dtype)
    expected = [CONVOLVE, CONVOLVE, WEIGHTS]
    if dtype is torch.float32 or size not in (7, 9):
        expected = ["dw_convolve", "dw_convolve", "dw_weights"]
    assert kernels(launches) == expected


def test_bfloat16_images_are_taken():
    # the interpreter widens them before it gets here
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = torch.empty(1, 2, 2, 3, dtype=dtype)
        sizes = [size for size in range(1, 15, 2) if on_tensor_cores(x, size)]
        assert sizes == ([7, 9] if x.element_size() == 2 else [])


def test_a_band_holds_all_taps():
    for band in BANDS.values():
        assert all(band["BI"] >= band["BW"] + size - 1 for size in module.BAND_SIZES)


@pytest.mark.parametrize("sizes", [(2, 9, 17, 9, 7), (1, 5, 20, 8, 9)], ids=str)
def test_tiles_of_amd(sizes, launches, monkeypatch):
    monkeypatch.setitem(BANDS, "cuda", BANDS["hip"])
    against_definition(sizes, stats=True)
    assert {o["BW"] for k, _, o in launches if k in (CONVOLVE, WEIGHTS)} == {16}


@pytest.mark.parametrize("processors", [1, pytest.param(132, marks=slow)])
def test_any_number_of_programs_yields_the_kernel_gradient(processors, launches, monkeypatch):
    monkeypatch.setattr(module, "multiprocessors", lambda device: processors)
    against_definition((18, 8, 9, 9, 7))
    ((grid, options),) = [(g, o) for kernel, g, o in launches if kernel == WEIGHTS]
    strips = 18 * -(-8 // options["TH"])
    tiles = -(-strips // 16) * 2
    assert grid == (2 * min(tiles, max(1, 2 * processors // 2)),)


def rows_of_strips(n, side, channels, size=7):
    return strip_rows(torch.Size((n, side, side, channels)), size, BANDS["cuda"], 2 * 132)


def test_strips_are_short_where_there_are_few_programs():
    stages = ((56, 32), (28, 64), (14, 128), (7, 256))
    assert [rows_of_strips(256, *stage) for stage in stages] == [56, 28, 14, 7]
    assert [rows_of_strips(1, *stage) for stage in stages] == [7, 7, 7, 7]
    assert rows_of_strips(1, 224, 32, 9) == 9
    assert rows_of_strips(0, 7, 8) == 7


@pytest.mark.parametrize(
    ("bad", "stats"), [(float("nan"), True), pytest.param(-float("inf"), False, marks=slow)]
)
def test_what_is_not_finite_is_where_torch_has_it(bad, stats):
    tensors = conv_tensors(1, 9, 12, 4, 7, dtype=F16)
    with torch.no_grad():
        tensors[0][0, 1, 2, 3] = tensors[0][0, 8, 9, 2] = bad
        tensors[5][0, 0, 0, 0] = bad
    op, definition = conv_pair(stats)
    actual, expected = (results(f, tensors) for f in (op, definition))
    y, wanted = actual[0].double(), expected[0].double()
    assert (~wanted.isfinite()).sum() == 5 * 6 + 4 * 6 + 1
    torch.testing.assert_close(y, wanted, rtol=4e-3, atol=0.03, equal_nan=True)
    for ours, theirs in zip(actual[1:], expected[1:], strict=True):
        # channels come first in k, and last or alone elsewhere
        spoilt = [
            (t.movedim(-1, 0) if t.shape[-1] == 4 else t).reshape(4, -1)
            for t in (~ours.isfinite(), ~theirs.isfinite())
        ]
        assert torch.equal(*(t.any(1) for t in spoilt))


def test_an_upstream_nan_is_where_torch_has_it():
    x, k, *_ = (t.detach() for t in conv_tensors(1, 9, 12, 8, 7, dtype=F16))
    dy = randn(1, 9, 12, 8, dtype=F16, seed=5)
    dy[0, 4, 7, 2] = float("nan")
    none = [None] * 4
    actual, expected = (
        f(dy, *none, x, k, None, None)[0] for f in (dwconv_backward, dwconv_backward.plain)
    )
    assert expected.isnan().sum() == 7 * 7
    torch.testing.assert_close(actual, expected, rtol=4e-3, atol=0.03, equal_nan=True)


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize(
    ("sizes", "missing", "stats"),
    [
        ((1, 1, 1, 1, 7), BARE, False),
        ((2, 9, 3, 10, 7), (), True),
        pytest.param((1, 3, 20, 8, 9), BARE, True, marks=slow),
    ],
    ids=str,
)
def test_nothing_uninitialised_leaks(sizes, missing, stats):
    tensors = conv_tensors(*sizes, missing=missing, dtype=F16)
    op, definition = conv_pair(stats)
    actual, eager = results(op, tensors), results(definition, tensors)
    assert not any(t.isnan().any() for t in actual)
    exact = results(definition, converted(tensors, torch.float64))
    assert_as_exact_as_eager(actual, eager, exact, sums=True)


def test_a_gradient_of_statistics_below_half_a_rounding_step_is_not_lost():
    x = torch.ones(3, 9, 9, 8, dtype=F16)
    k = randn(8, 1, 7, 7)
    mean, q = torch.zeros(8), torch.full((8,), 2.0**-13)  # 1 + 2^-13 is 1 in float16
    _, dk, db, _, _ = dwconv_backward(x, x, mean, torch.zeros(8), q, x, k, None, None)
    exact = torch.ones(3, 1, 9, 9, dtype=torch.float64) * (1 + 2.0**-13)
    ones = torch.ones(3, 1, 9, 9, dtype=torch.float64)
    wanted = torch.ops.aten.convolution_backward(
        exact, ones, torch.ones(1, 1, 7, 7, dtype=torch.float64), None, [1, 1], [3, 3], [1, 1],
        False, [0, 0], 1, [False, True, False],
    )[1]  # fmt: skip
    torch.testing.assert_close(dk.double(), wanted.expand(8, 1, 7, 7), rtol=1e-6, atol=0)
    torch.testing.assert_close(db, torch.full((8,), 3 * 81 * (1 + 2.0**-13)), rtol=1e-6, atol=0)


def test_a_scale_of_zero_has_a_gradient():
    tensors = conv_tensors(2, 5, 4, 16, 7, dtype=F16)
    with torch.no_grad():
        tensors[3][::3] = 0
    op, definition = conv_pair(False)
    exact = results(definition, converted(tensors, torch.float64))
    assert exact[-3][::3].norm() > 100
    assert_as_exact_as_eager(results(op, tensors), results(definition, tensors), exact, sums=True)


def test_layout_changes_nothing():
    tensors = [t.detach() for t in conv_tensors(2, 6, 9, 8, 7, dtype=F16)]
    moved = [t.repeat_interleave(2, -1)[..., ::2] for t in tensors]
    assert not any(t.is_contiguous() for t in moved)
    op, _ = conv_pair(True)
    dense, strided = (results(op, [t.requires_grad_() for t in ts]) for ts in (tensors, moved))
    assert all(torch.equal(a, b) for a, b in zip(dense, strided, strict=True))


def test_images_do_not_touch_and_results_repeat():
    x, k = randn(20, 3, 9, 8, dtype=F16), randn(8, 1, 7, 7, seed=1, dtype=F16)
    rest = (None, None, None, None, False)
    whole = dwconv(x, k, *rest)[0]
    alone = torch.cat([dwconv(x[i : i + 1], k, *rest)[0] for i in (0, 15, 16, 19)])
    assert torch.equal(whole[[0, 15, 16, 19]], alone)
    none = [None] * 4
    first, again = (dwconv_backward(x, *none, x, k, None, None) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
