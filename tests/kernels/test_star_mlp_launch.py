"""The star MLP's backward by hidden gradients in memory and matrix products."""

import pytest
import torch

from starlayers.kernels import star_mlp_launch
from starlayers.kernels.registration import MLPWeights
from starlayers.kernels.statistics import Upstream
from starlayers.kernels.tiles import MLP_BACKWARD
from tests.helpers import (
    FORMULAS,
    assert_as_exact_as_eager,
    converted,
    pairwise,
    peak_bytes,
    results,
)
from tests.kernels.cases import DTYPES, mlp_pair, mlp_tensors

OPTIONAL = ("b1", "b2", "b3", "residual")
TILE = MLP_BACKWARD["hidden"]["sm_90"][256]


#: in and out, one or both wider than two passes serve: whole slabs of channels, and ragged ones
CHANNELS = [(128, 128), (192, 130), (256, 24), (130, 256), (24, 192)]
CASES = pairwise(
    [1, 17, 70, 300],
    CHANNELS,
    [51, 72, 200],
    list(FORMULAS),
    [(), OPTIONAL, ("b1", "residual"), ("b2",), ("b3",)],
    [False, True],
    list(DTYPES),
)


@pytest.mark.interpret
@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize(
    ("rows", "channels", "hidden", "act", "missing", "stats", "dtype"),
    [pytest.param(*c, marks=pytest.mark.slow if i % 5 else ()) for i, c in enumerate(CASES)],
    ids=str,
)
def test_gradients(rows, channels, hidden, act, missing, stats, dtype, launches):
    sizes = (rows, channels[0], hidden, channels[1])
    tensors = mlp_tensors(*sizes, missing=missing, dtype=DTYPES[dtype])
    op, definition = mlp_pair(act, 0.5, stats)
    actual, eager = results(op, tensors), results(definition, tensors)
    exact = results(definition, converted(tensors, torch.float64))
    assert_as_exact_as_eager(actual, eager, exact, sums=True)
    names = [kernel for kernel, _, _ in launches]
    assert names[names.index("mlp_upstream") :] == ["mlp_upstream", "mlp_hidden"]


@pytest.mark.interpret
@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize(
    ("dtype", "stats"), [("f32", True), ("f16", False), ("bf16", True)], ids=str
)
def test_gradients_of_parts(dtype, stats, launches, monkeypatch):
    """The last part has 44 rows; the others a row tile, which the bound does not allow."""
    monkeypatch.setattr(star_mlp_launch, "HIDDEN_BYTES", 1000)
    tensors = mlp_tensors(2 * TILE.rows + 44, 130, 72, 100, dtype=DTYPES[dtype])
    op, definition = mlp_pair("gelu", 0.0, stats)
    actual, eager = results(op, tensors), results(definition, tensors)
    exact = results(definition, converted(tensors, torch.float64))
    assert_as_exact_as_eager(actual, eager, exact, sums=True)
    grids = [grid for kernel, grid, _ in launches if kernel == "mlp_hidden"]
    assert grids == [(2,)] * 3


@pytest.mark.interpret
@pytest.mark.usefixtures("nan_memory")
def test_second_gradients_are_those_of_the_definition():
    tensors = mlp_tensors(70, 128, 51, 130)
    op, definition = mlp_pair("silu", 1.0, True)
    actual, eager = results(op, tensors, order=2), results(definition, tensors, order=2)
    exact = results(definition, converted(tensors, torch.float64), order=2)
    assert_as_exact_as_eager(actual, eager, exact, sums=True)


@pytest.mark.interpret
@pytest.mark.usefixtures("nan_memory")
def test_no_rows_launch_nothing(launches):
    tensors = mlp_tensors(0, 130, 72, 100)
    _, *grads = results(mlp_pair("silu")[0], tensors)
    assert launches == []
    assert [g.shape for g in grads] == [t.shape for t in tensors]
    assert not any(g.any() for g in grads)


@pytest.mark.interpret
@pytest.mark.parametrize("stats", [False, True])
def test_nan_is_where_torch_has_it(stats):
    tensors = mlp_tensors(140, 130, 40, 24)
    with torch.no_grad():
        tensors[0][3, 2] = tensors[0][139, 0] = float("nan")
    op, definition = mlp_pair("silu", 1.0, stats)
    actual, expected = results(op, tensors), results(definition, tensors)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())


@pytest.mark.interpret
def test_any_layout_yields_the_same_and_no_input_is_written_to(monkeypatch):
    monkeypatch.setattr(star_mlp_launch, "HIDDEN_BYTES", 0)  # two parts
    tensors = [t.detach() for t in mlp_tensors(140, 130, 40, 24)]
    strided = [t.repeat_interleave(2, -1)[..., ::2] for t in tensors]
    strided[0] = tensors[0].t().contiguous().t()
    strided[3] = torch.cat((tensors[3], tensors[3]), 1)[:, :130]
    op, _ = mlp_pair("silu", 1.0, True)
    dense, kept = converted(tensors, torch.float32), [t.clone() for t in strided]
    actual = results(op, [t.requires_grad_() for t in strided])
    torch.testing.assert_close(actual, results(op, dense), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(strided, kept, strict=True))
    first, again = (torch.autograd.grad(op(*dense)[0].sum(), dense) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("hidden", [64, 1000])
@pytest.mark.parametrize("bound", [0, 2**20, 2**26])
def test_hidden_gradients_in_memory_are_bounded(hidden, bound, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(star_mlp_launch, "launch", lambda *args, **options: None)
    monkeypatch.setattr(star_mlp_launch, "HIDDEN_BYTES", bound)
    rows, channels = 3000, 128
    x, w1, b1, w2, b2, w3, b3, dy = (
        t.detach().to(torch.bfloat16) for t in mlp_tensors(rows, channels, hidden, channels)
    )
    weights = MLPWeights(w1, b1, w2, b2, w3, b3)

    def backward():
        return star_mlp_launch.star_mlp_backward_kernel(Upstream(dy), x, weights, "silu", 0.0)

    backward()
    row = 3 * hidden * 2
    in_memory = min(max(bound, TILE.rows * row), rows * row)
    weight = channels * hidden * 2
    # dx; sums in float32; the stacked weights; of each weight gradient a sum, its parts and copies
    others = rows * channels * 2 + 4 * 24 * (2 * hidden + channels) + 2 * weight + 3 * 6 * weight
    others += 2**16  # for the products themselves, on CPUs that have none for bfloat16
    assert in_memory - TILE.rows * row <= peak_bytes(backward) <= in_memory + others
