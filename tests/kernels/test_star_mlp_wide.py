"""Memory and products of the wide star MLP's backward."""

import pytest
import torch

from starlayers.functional import star_mlp_reference
from starlayers.kernels import star as star_module
from starlayers.kernels import star_linear as star_linear_module
from starlayers.kernels import star_mlp_wide as star_mlp_wide_module
from starlayers.kernels.registration import flattened
from starlayers.kernels.star_linear import product_dgated
from starlayers.kernels.star_mlp_wide import star_mlp_wide
from tests.helpers import RecordOps, assert_as_exact_as_eager, pairwise, peak_bytes, randn
from tests.kernels.cases import DTYPES, mlp_tensors

CHANNELS, HIDDEN = 64, 224  # a Llama's 4096 -> 14336


@pytest.fixture
def on_gpu(monkeypatch):
    """Allocate what the ops allocate on a GPU; kernels are not launched and yield nothing."""
    pytest.importorskip("triton")
    for module in (star_module, star_linear_module):
        monkeypatch.setattr(module, "launch", lambda *args, **options: None)
    monkeypatch.setattr(star_linear_module, "star", flattened(star_module._kernel))
    programs = {
        "library": (star_linear_module._plain, star_linear_module._product_dgated),
        "triton": (star_linear_module._kernel, star_linear_module._dgated_kernel),
    }
    for gemm, kernels in programs.items():
        program = tuple(flattened(kernel) for kernel in kernels)
        monkeypatch.setitem(star_mlp_wide_module.PROGRAMS, gemm, program)


def peaks(rows, act, recompute, gemm, missing=()):
    """Return the most bytes of a forward and backward: by the op, and by the definition."""
    tensors = mlp_tensors(rows, CHANNELS, HIDDEN, CHANNELS, missing=missing)[:-1]
    inputs = [t for t in tensors if t is not None]
    dy = randn(rows, CHANNELS)

    def op():
        y = star_mlp_wide(*tensors, act, 0.0, recompute, gemm)[0]
        return torch.autograd.grad(y, inputs, dy)

    def definition():
        return torch.autograd.grad(star_mlp_reference(*tensors, act), inputs, dy)

    for run in (op, definition):
        run()  # whatever is allocated once
    return peak_bytes(op), peak_bytes(definition)


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize(
    ("rows", "act", "recompute", "gemm"),
    pairwise([16, 64, 512], ["silu", "relu", "identity"], [False, True], ["library", "triton"]),
)
def test_the_peak_on_a_gpu_is_at_most_that_of_the_definition(rows, act, recompute, gemm):
    ours, eager = peaks(rows, act, recompute, gemm)
    assert ours <= eager
    # both branches, both gradients and the star; at the end one gradient, dx and those of weights
    hidden, weight, x = (4 * a * b for a, b in ((rows, HIDDEN), (CHANNELS, HIDDEN), (rows, 64)))
    least = max(5 * hidden, hidden + 3 * weight + x)
    assert least <= ours <= least + 2 * x + 0.03 * weight


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("rows", [16, 64])
def test_the_peak_in_torch_code_is_at_most_that_of_the_definition(rows, recompute):
    ours, eager = peaks(rows, "silu", recompute, "library")
    assert ours <= eager


#: matrix products after the hidden gradients: dx 2, each weight 1 and each bias 1
PRODUCTS = [(("x",), 2), (("w1",), 1), (("w3", "b3"), 2), (("b1", "w2", "b2"), 3)]


@pytest.mark.parametrize(("wanted", "count"), PRODUCTS, ids=str)
def test_frozen_weights_cost_no_product(wanted, count):
    names = ("x", "w1", "b1", "w2", "b2", "w3", "b3")
    tensors = mlp_tensors(6, 5, 9, 3)[:-1]
    for name, t in zip(names, tensors, strict=True):
        t.requires_grad_(name in wanted)
    needed = [t for t in tensors if t.requires_grad]
    y, _, _ = star_mlp_wide(*tensors, "silu", 0.5, False, "library")
    with RecordOps() as recorded:
        actual = torch.autograd.grad(y.sum(), needed)
    assert sum(recorded.counts.get(f"aten::{name}", 0) for name in ("mm", "addmm_")) == count
    expected = torch.autograd.grad(star_mlp_reference(*tensors, "silu", offset=0.5).sum(), needed)
    torch.testing.assert_close(actual, expected)


def test_a_retained_graph_yields_the_same_gradients_again():
    tensors = mlp_tensors(6, 5, 9, 3)[:-1]
    y, _, _ = star_mlp_wide(*tensors, "silu", 0.5, False, "library")
    first = torch.autograd.grad(y.sum(), tensors, retain_graph=True)
    again = torch.autograd.grad(y.sum(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_a_compiled_backward_serves_any_number_of_rows(recompute):
    compiled = torch.compile(
        lambda *t: star_mlp_wide(*t, "silu", 0.5, recompute, "library")[0],
        backend="aot_eager", fullgraph=True, dynamic=True,
    )  # fmt: skip
    for rows in (6, 9):
        tensors = mlp_tensors(rows, 5, 9, 3)[:-1]
        y = star_mlp_reference(*tensors, "silu", offset=0.5)
        with torch._dynamo.config.patch(error_on_recompile=rows == 9):
            actual = torch.autograd.grad(compiled(*tensors).sum(), tensors)
        torch.testing.assert_close(actual, torch.autograd.grad(y.sum(), tensors))


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("rows", "hidden", "act", "dtype"),
    pairwise([1, 17, 70], [9, 224], ["silu", "relu6", "identity"], list(DTYPES)),
)
def test_hidden_gradients_in_triton(rows, hidden, act, dtype, launches):
    kind = DTYPES[dtype]
    dy, h1, h2 = (randn(rows, n, seed=n + i, dtype=kind) for i, n in enumerate((5, hidden, hidden)))
    arguments = (dy, randn(5, hidden, seed=7, dtype=kind), h1, h2, act, 0.5)
    kept = [t.clone() for t in arguments[:4]]
    actual = product_dgated(*arguments)
    assert [kernel for kernel, _, _ in launches] == ["star_grad"]
    exact = product_dgated.plain(*(t.double() for t in kept), act, 0.5)
    assert_as_exact_as_eager(actual, product_dgated.plain(*arguments), exact)
    assert all(torch.equal(a, b) for a, b in zip(arguments[:4], kept, strict=True))
