"""Depthwise convolution and star MLP in one op, against both definitions one after the other."""

import pytest
import torch

from starlayers.kernels._tiles import FAMILIES, MLP_FORWARD
from starlayers.kernels.dw_star_mlp import dw_star_mlp
from tests.helpers import FORMULAS, assert_as_exact_as_eager
from tests.kernels.cases import DEVICE, DTYPES, dw_mlp_pair, dw_mlp_tensors

served = pytest.mark.usefixtures("served_by")
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def against_definition(sizes, act="silu", offset=0.0, **options):
    tensors = dw_mlp_tensors(*sizes, **options)
    op, definition = dw_mlp_pair(act, offset)
    exact = definition(*(None if t is None else t.double() for t in tensors))
    found = op(*tensors)
    assert_as_exact_as_eager([found], [definition(*tensors)], [exact], sums=True)
    assert found.is_contiguous()


# images, height, width, channels, kernel size, hidden, out
SIZES = [
    (2, 7, 7, 32, 7, 64, 32),
    (1, 5, 9, 24, 3, 72, 17),
    (1, 14, 10, 96, 5, 40, 96),
    (3, 1, 1, 17, 7, 51, 24),
    (2, 3, 40, 16, 1, 8, 48),
    (1, 4, 33, 100, 3, 20, 100),
]


@served
@each_dtype
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_value(sizes, dtype):
    against_definition(sizes, dtype=dtype)


@served
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("act", FORMULAS)
def test_any_activation(act, offset):
    against_definition((2, 4, 3, 17, 3, 40, 24), act, offset)


@served
@pytest.mark.parametrize("missing", [("b1",), ("b2",), ("b3",), ("b1", "b2", "b3")], ids="-".join)
def test_biases_may_be_missing(missing):
    against_definition((2, 4, 3, 17, 3, 40, 24), missing=missing)


@pytest.mark.interpret
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("channels", sorted({c for f in FAMILIES for c in MLP_FORWARD[f]}))
def test_tile(channels, family, on_family, launches):
    on_family(family)
    if DEVICE == "cuda":
        pytest.skip("float32 has tiles of its own on a GPU")
    tile = MLP_FORWARD[family][channels]
    against_definition((1, tile.rows // 16 + 1, 16, channels, 3, tile.hidden + 8, channels - 3))
    ((kernel, grid, options),) = launches
    assert (kernel, grid) == ("mlp_forward", (2,))
    assert (options["BM"], options["BH"]) == (tile.rows, tile.hidden)


@served
@pytest.mark.parametrize("which", ["x", "weights", "vectors"])
def test_layout_changes_nothing(which):
    dense = dw_mlp_tensors(2, 4, 3, 18, 3, 40, 24)

    def changed(t):
        if which == "x" and t.ndim == 4 and t.shape[1] != 1:
            return torch.cat((t, t), -1)[..., : t.shape[-1]]
        if which == "weights" and t.ndim == 2:
            return t.t().contiguous().t()
        return t.repeat_interleave(2)[::2] if which == "vectors" and t.ndim == 1 else t

    tensors = [changed(t) for t in dense]
    assert any(not t.is_contiguous() for t in tensors)
    kept = [t.clone() for t in tensors]
    found = dw_star_mlp(*tensors, "silu", 1.0)
    torch.testing.assert_close(found, dw_star_mlp(*dense, "silu", 1.0), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(tensors, kept, strict=True))
    assert torch.equal(found, dw_star_mlp(*tensors, "silu", 1.0))


@served
@pytest.mark.usefixtures("nan_memory")
def test_nothing_uninitialised_leaks():
    tensors = dw_mlp_tensors(2, 5, 7, 17, 5, 40, 23)
    op, definition = dw_mlp_pair("gelu", 1.0)
    assert not op(*tensors).isnan().any()
    torch.testing.assert_close(op(*tensors), definition(*tensors), rtol=1e-3, atol=1e-3)


@served
@pytest.mark.parametrize("act", ["relu6", "silu"])
def test_nan_is_where_torch_has_it(act):
    tensors = dw_mlp_tensors(2, 5, 6, 17, 3, 40, 24)
    tensors[0][0, 1, 2, 3] = tensors[0][1, 4, 5, 16] = float("nan")
    op, definition = dw_mlp_pair(act)
    expected = definition(*tensors).isnan()
    assert expected.sum() == (9 + 4) * 24
    assert torch.equal(op(*tensors).isnan(), expected)


@pytest.mark.parametrize("where", ["plain", pytest.param("triton", marks=pytest.mark.interpret)])
def test_no_images_and_float64_need_no_kernel(where, launches):
    assert dw_star_mlp(*dw_mlp_tensors(0, 4, 3, 18, 3, 40, 24), "silu", 0.0).shape == (0, 4, 3, 24)
    tensors = dw_mlp_tensors(1, 4, 3, 18, 3, 40, 24, dtype=torch.float64)
    op, definition = dw_mlp_pair("silu", 1.0)
    torch.testing.assert_close(op(*tensors), definition(*tensors))
    assert launches == []


@served
def test_it_has_no_gradient_and_says_so():
    tensors = dw_mlp_tensors(1, 4, 3, 18, 3, 40, 24)
    y = dw_star_mlp(tensors[0].requires_grad_(), *tensors[1:], "silu", 0.0)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        y.sum().backward()
