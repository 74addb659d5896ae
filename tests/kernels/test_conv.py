"""Strided convolution with norm and activation in one launch, against its definition."""

import pytest
import torch
import torch.nn.functional as F

from starlayers.activations import get_activation
from starlayers.kernels.conv import PATCH_CHANNELS, Convolution, convolve, tile_of, weight_rows
from starlayers.kernels.tiles import FAMILIES
from tests.helpers import assert_as_exact_as_eager, randn
from tests.kernels.cases import DEVICE

pytestmark = pytest.mark.interpret

slow = pytest.mark.slow
F32, F16 = torch.float32, torch.float16
#: the interpreter computes on the bits of a bfloat16
KINDS = (F32, F16) if DEVICE == "cpu" else (F32, F16, torch.bfloat16)


def tensors(n, height, width, channels, out, size, *, dtype=F32):
    """Return images, weights of about unit results, scale and shift."""
    x = randn(n, channels, height, width, dtype=dtype)
    w = randn(out, channels, size, size, seed=1) / (channels * size**2) ** 0.5
    return x, w.to(dtype), randn(out, seed=2), randn(out, seed=3)


def definition(x, w, scale, shift, stride, act):
    """Compute convolution, norm and activation one after the other, each rounded."""
    kind = x.dtype
    y = F.conv2d(x, w, stride=stride, padding=w.shape[-1] // 2)
    y = (y * scale[:, None, None] + shift[:, None, None]).to(kind)
    return get_activation(act).fn(y).permute(0, 2, 3, 1)


def against_definition(x, w, scale, shift, *, stride=2, act="relu6"):
    y = convolve(x, w, scale, shift, stride=stride, act=act)
    eager = definition(x, w, scale, shift, stride, act)
    exact = definition(*(t.double() for t in (x, w, scale, shift)), stride, act)
    assert y.is_contiguous()
    assert_as_exact_as_eager([y], [eager], [exact])
    return y


# images, height, width, channels, channels of the result, rows of taps; stride, activation
CASES = [
    ((1, 9, 33, 3, 32, 3), 2, "relu6"),
    ((2, 7, 7, 3, 24, 3), 1, None),
    ((1, 1, 9, 5, 40, 3), 2, None),
    ((3, 9, 1, 24, 48, 3), 2, "silu"),
    ((1, 7, 9, 40, 24, 3), 1, "gelu"),
    ((2, 7, 7, 64, 128, 3), 2, None),
    ((1, 5, 4, 32, 70, 1), 3, "tanh"),
    ((1, 6, 7, 2, 33, 5), 2, "relu"),
    pytest.param((5, 14, 14, 32, 64, 3), 2, None, marks=slow),
    pytest.param((1, 33, 9, 4, 130, 7), 2, "hardswish", marks=slow),
    pytest.param((1, 14, 14, 128, 256, 3), 2, None, marks=slow),
]


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize(("sizes", "stride", "act"), CASES, ids=str)
def test_values(sizes, stride, act, dtype):
    act = get_activation(act).name
    against_definition(*tensors(*sizes, dtype=dtype), stride=stride, act=act)


def offset(x):
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every second": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "misaligned": offset,
    "a part": lambda x: F.pad(x, (1, 2, 3, 4), value=float("nan"))[:, :, 3:-4, 1:-2],
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("channels", [3, 20])
def test_layout_changes_nothing(name, channels):
    x, *rest = tensors(2, 6, 7, channels, 24, 3)
    moved = LAYOUTS[name](x)
    assert torch.equal(moved, x)
    dense, strided = (convolve(t, *rest, stride=2, act="relu6") for t in (x, moved))
    assert torch.equal(dense, strided)


def test_one_image_may_stand_for_many():
    x, *rest = tensors(1, 5, 5, 3, 8, 3)
    y = convolve(x.expand(3, -1, -1, -1), *rest, stride=1, act="relu")
    torch.testing.assert_close(y, convolve(x, *rest, stride=1, act="relu").expand(3, -1, -1, -1))


@pytest.mark.parametrize("channels", [3, 24])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_where_torch_has_it(bad, channels):
    x, *rest = tensors(2, 9, 12, channels, 16, 3)
    x[0, 1, 2, 3] = x[1, 2, 8, 11] = bad
    y = convolve(x, *rest, stride=2, act="relu6")
    expected = definition(x, *rest, 2, "relu6")
    assert expected.isnan().sum() == (0 if bad == float("inf") else 16 * 3)
    torch.testing.assert_close(y, expected, equal_nan=True)


def test_images_do_not_touch():
    x, *rest = tensors(40, 3, 4, 6, 20, 3)
    whole = convolve(x, *rest, stride=1, act="identity")
    alone = torch.cat([convolve(t[None], *rest, stride=1, act="identity") for t in x[::13]])
    torch.testing.assert_close(whole[::13], alone)


def test_no_images_make_no_launch():
    x, *rest = tensors(0, 3, 4, 6, 20, 3)
    assert convolve(x, *rest, stride=2, act="relu").shape == (0, 2, 2, 20)


@pytest.mark.parametrize("channels", [1, 3, 4, 5, 16, 17, 32, 33, 40, 128])
@pytest.mark.parametrize("out", [1, 24, 32, 40, 48, 96, 192, 256])
def test_weights_fill_whole_tiles(channels, out):
    w = randn(out, channels, 3, 3)
    for size, of in ((2, "sm_90"), (4, "small")):
        tile = tile_of(Convolution(channels, out, 3, 2), of, size)
        rows = weight_rows(w, tile, torch.float64)
        assert rows.is_contiguous()
        assert rows.shape[0] % tile.depth == rows.shape[1] % tile.columns == 0
        assert rows.shape[1] - out < tile.columns
        # as many of each weight, and zeros
        assert torch.equal(rows[rows != 0].sort().values, w.flatten().double().sort().values)
    taps = 9 if channels > PATCH_CHANNELS else 1
    assert rows.shape[0] == taps * -(-channels * 9 // taps // tile.depth) * tile.depth


def test_tiles_pad_little():
    def columns(out, size=2):
        tiles = {tile_of(Convolution(32, out, 3, 2), of, size).columns for of in FAMILIES}
        (width,) = tiles
        return width

    widths = {24: 32, 32: 32, 40: 64, 48: 64, 64: 64, 96: 128, 128: 128, 192: 64, 256: 128}
    assert {out: columns(out) for out in widths} == widths
    assert columns(256, 4) == 64


@pytest.mark.parametrize("of", FAMILIES)
@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_tiles_of_every_family_compute(of, dtype, monkeypatch):
    monkeypatch.setattr("starlayers.kernels.conv.family", lambda device: of)
    against_definition(*tensors(1, 6, 7, 20, 40, 3, dtype=dtype))


def test_pixels_are_those_of_torch():
    for height, stride, size in ((1, 2, 3), (7, 2, 3), (9, 3, 5), (8, 1, 1), (33, 4, 7)):
        x = randn(2, 1, height, 5)
        y = F.conv2d(x, randn(1, 1, size, size), stride=stride, padding=size // 2)
        assert Convolution(1, 1, size, stride).pixels(x.shape) == y.numel()
