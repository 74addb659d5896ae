"""Dispatch of a StarMLP on a GPU, condition by condition, with CPU tensors."""

import contextlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from starlayers import StarMLP, use_backend
from starlayers.dispatch import plain_weights
from starlayers.kernels import layer, registration, tiles
from starlayers.kernels.layer import run_mlp
from starlayers.kernels.registration import multiprocessors
from starlayers.kernels.tiles import (
    FAMILIES,
    MLP_BACKWARD,
    MLP_FORWARD,
    Tile,
    family,
    mlp_backward_tiles,
    mlp_tile,
    next_power_of_2,
    split_columns,
)
from starlayers.plans import too_few, too_wide
from tests.helpers import randn, star_mlp_formula

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
CPU = torch.device("cpu")
AUTOCAST = {"f32": contextlib.nullcontext, "bf16": lambda: torch.autocast("cpu", dtype=BF16)}


def rows_of(number, width, dtype=F32):
    """Return an input of `number` rows that takes the memory of one."""
    return torch.zeros(1, width, dtype=dtype).expand(number, width)


# rows, in, out, dtype, autocast, few?
FEW = [
    (4095, 64, 64, F32, "f32", True),
    (4096, 64, 64, F32, "f32", False),
    (4095, 1000, 8, F32, "f32", True),
    (4096, 1000, 8, F32, "f32", False),
    # rows of at most 128 bytes: 32 float32, 64 16-bit channels, of whichever side is wider
    (1, 32, 32, F32, "f32", False),
    (1, 33, 33, F32, "f32", True),
    (1, 32, 33, F32, "f32", True),
    (1, 33, 32, F32, "f32", True),
    (1, 64, 64, BF16, "f32", False),
    (1, 65, 65, F16, "f32", True),
    (1, 64, 64, F32, "bf16", False),
    (1, 65, 64, F32, "bf16", True),
]


@pytest.mark.parametrize(("rows", "width", "out", "dtype", "autocast", "few"), FEW)
def test_too_few_rows(rows, width, out, dtype, autocast, few):
    x = rows_of(rows, width, dtype)
    reason = f"{rows} rows of {max(width, out)} channels would leave most of a GPU idle"
    with AUTOCAST[autocast]():
        computed = registration.compute_dtype(x)
    assert too_few("auto", computed, rows, (width, 8, out)) == (reason if few else "")
    assert too_few("triton", computed, rows, (width, 8, out)) == ""


# in, out, dtype, training, table that is too narrow
WIDE = [
    (384, 384, BF16, False, None),
    (385, 384, BF16, False, "forward"),
    (384, 385, F16, False, "forward"),
    (385, 8, BF16, True, "forward"),
    (256, 256, F16, True, None),
    (257, 8, BF16, True, "backward"),
    (8, 257, BF16, True, "backward"),
    (257, 8, BF16, False, None),
    (128, 128, F32, False, None),
    (129, 128, F32, False, "forward"),
    (64, 64, F32, True, None),
    (65, 64, F32, True, "backward"),
    (65, 64, F32, False, None),
]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("width", "out", "dtype", "training", "table"), WIDE)
def test_too_wide(width, out, dtype, training, table, name, on_family):
    on_family(name)
    reason = f"{width} -> {out} channels are too wide for a {table} tile in {dtype}"
    assert too_wide(CPU, dtype, (width, 3, out), training) == (reason if table else "")


def test_hidden_channels_never_make_a_layer_too_wide():
    assert too_wide(CPU, F32, (64, 10**6, 64), True) == ""


# shared memory in bytes, HIP version, family
GPUS = [
    (227 * 1024, None, "sm_90"),
    (227 * 1024 - 1, None, "sm_80"),
    (163 * 1024, None, "sm_80"),
    (163 * 1024 - 1, None, "small"),
    (227 * 1024, "6.0", "small"),
    (163 * 1024, "6.0", "small"),
    (None, None, "small"),
]


@pytest.mark.parametrize(("shared", "hip", "expected"), GPUS)
def test_family_by_shared_memory(shared, hip, expected, monkeypatch):
    gpu = SimpleNamespace(multi_processor_count=7)
    if shared is not None:
        gpu.shared_memory_per_block_optin = shared
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert family(torch.device("cuda")) == expected
    assert multiprocessors(torch.device("cuda")) == 7
    # without a GPU to ask, as when a compiler traces, it is an H100
    assert (family(CPU), multiprocessors(CPU)) == ("sm_90", 132)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert family(torch.device("cuda")) == "sm_90"
    assert multiprocessors(torch.device("cuda")) == 132


def test_tile_is_the_narrowest_that_fits(monkeypatch):
    table = MLP_FORWARD["sm_90"]
    actual = [mlp_tile(MLP_FORWARD, CPU, width) for width in (1, 32, 33, 64, 65, 384, 385)]
    assert actual == [table[n] for n in (32, 32, 64, 64, 96, 384)] + [None]
    assert mlp_tile(MLP_FORWARD, CPU, 128, 4) == MLP_FORWARD["sm_90 float32"][128]
    assert mlp_tile(MLP_FORWARD, CPU, 129, 4) is None
    # the interpreter takes any type by the tables of 16 bits
    monkeypatch.setattr(tiles, "INTERPRET", True)
    assert mlp_tile(MLP_FORWARD, CPU, 129, 4) == table[192]
    assert mlp_tile({}, CPU, 1) is None


def each_tile(table):
    for key, value in table.items():
        if isinstance(value, Tile):
            yield key, value
        else:
            yield from each_tile(value)


def test_tiles_are_what_triton_can_launch():
    shipped = [*each_tile(MLP_FORWARD), *each_tile(MLP_BACKWARD)]
    assert {channels for channels, _ in shipped} == {32, 64, 96, 128, 192, 256, 384}
    for _, tile in shipped:
        for size in (tile.rows, tile.hidden):
            assert size == next_power_of_2(size) >= 16
        assert tile.warps in (4, 8)
        assert 1 <= tile.stages <= 3
    depths = {
        kernel: {tile.depth for _, tile in each_tile(MLP_BACKWARD[kernel])}
        for kernel in MLP_BACKWARD
    }
    assert depths.pop("hidden") == {32, 64}
    assert {tile.depth for _, tile in each_tile(MLP_FORWARD)}.union(*depths.values()) == {0}


# channels, hidden, kernels of the backward for 16 bits on an H100, and of float32
BACKWARD = [
    (32, 128, {"all"}, {"dx", "dw"}),
    (32, 129, {"dx", "dw"}, {"dx", "dw"}),
    (64, 64, {"dx", "dw"}, {"hidden"}),
    (96, 384, {"dx", "dw"}, set()),
    (97, 16, {"hidden"}, set()),
    (256, 1024, {"hidden"}, set()),
    (257, 16, set(), set()),
]


@pytest.mark.parametrize(("width", "hidden", "half", "single"), BACKWARD)
def test_kernels_of_the_backward(width, hidden, half, single):
    assert set(mlp_backward_tiles(CPU, width, hidden)) == half
    assert set(mlp_backward_tiles(CPU, width, hidden, 4)) == single


# channels -> column parts
PARTS = {1: (16, 0), 16: (16, 0), 17: (32, 0), 24: (32, 0), 32: (32, 0), 33: (32, 16)}
PARTS |= {48: (32, 16), 49: (64, 0), 96: (64, 32), 97: (128, 0), 160: (128, 32), 384: (256, 128)}


@pytest.mark.parametrize(("n", "power"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (96, 128)])
def test_next_power_of_2(n, power):
    assert next_power_of_2(n) == power


@pytest.mark.parametrize(("width", "parts"), PARTS.items())
def test_column_parts(width, parts):
    assert split_columns(width) == parts


# in, hidden, out, dtype, compute capability, HIP version, can star_linear and dgated run?
DESCRIPTORS = [
    (64, 72, 80, BF16, (9, 0), None, True),
    (64, 72, 80, F16, (9, 1), None, True),
    (64, 72, 80, F32, (9, 0), None, False),
    (64, 72, 80, F64, (9, 0), None, False),
    (68, 72, 80, BF16, (9, 0), None, False),
    (64, 68, 80, BF16, (9, 0), None, False),
    (64, 72, 84, BF16, (9, 0), None, False),
    (64, 72, 80, BF16, (8, 9), None, False),
    (64, 72, 80, BF16, (10, 0), None, False),
    (64, 72, 80, BF16, (9, 0), "6.0", False),
]


@pytest.mark.parametrize(("width", "hidden", "out", "dtype", "gpu", "hip", "serve"), DESCRIPTORS)
def test_descriptors(width, hidden, out, dtype, gpu, hip, serve, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpu)
    monkeypatch.setattr(torch.version, "hip", hip)
    mlp, x = StarMLP(width, hidden, out_features=out), torch.zeros(2, width, dtype=dtype)
    weights = plain_weights(mlp.f1, mlp.f2, mlp.g)
    assert layer._descriptors_serve(x, weights) is serve
    monkeypatch.setattr(layer, "INTERPRET", True)
    assert layer._descriptors_serve(x, weights) is True


@pytest.fixture
def wide_layer(monkeypatch):
    """Return input, parameters and layer that fused products serve; nothing is measured yet."""
    monkeypatch.setattr(layer, "_descriptors_serve", lambda x, weights: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(layer, "winner", lambda key: None)
    monkeypatch.delenv("STARLAYERS_TUNE", raising=False)
    mlp = StarMLP(5, 7, out_features=3, act="silu", offset=0.5)
    return randn(4, 5), plain_weights(mlp.f1, mlp.f2, mlp.g), mlp.act, mlp.offset


def never(*_):
    raise AssertionError("nothing may be timed here")


def test_gemm_is_the_librarys_by_default_and_tritons_where_forced(wide_layer, monkeypatch):
    monkeypatch.setattr(layer, "choose", never)
    assert layer._gemm(*wide_layer) == "library"
    with use_backend("triton"):
        assert layer._gemm(*wide_layer) == "triton"
        monkeypatch.setattr(layer, "_descriptors_serve", lambda x, weights: False)
        assert layer._gemm(*wide_layer) == "library"
    monkeypatch.setenv("STARLAYERS_TUNE", "1")
    assert layer._gemm(*wide_layer) == "library"


def test_gemm_is_not_timed_while_compiling_or_capturing_or_twice(wide_layer, monkeypatch):
    monkeypatch.setenv("STARLAYERS_TUNE", "1")
    monkeypatch.setattr(layer, "choose", never)
    with monkeypatch.context() as m:
        m.setattr(torch.compiler, "is_compiling", lambda: True)
        assert layer._gemm(*wide_layer) == "library"
    with monkeypatch.context() as m:
        m.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert layer._gemm(*wide_layer) == "library"
    monkeypatch.setattr(layer, "winner", lambda key: "triton")
    assert layer._gemm(*wide_layer) == "triton"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert layer._gemm(*wide_layer) == "triton"


def test_gemm_is_timed_on_both_programs_forward_and_backward(wide_layer, monkeypatch):
    monkeypatch.setenv("STARLAYERS_TUNE", "1")
    asked = []

    def choose(key, candidates):
        asked.append(key)
        results = {name: run() for name, run in candidates.items()}
        assert list(results) == ["library", "triton"]
        for ours, theirs in zip(*results.values(), strict=True):
            torch.testing.assert_close(ours, theirs)
        d1, d2, s = results["library"]
        assert not d1.any()  # the upstream gradient is zero
        assert not d2.any()
        x, (w1, b1, w2, b2, _, _), *_ = wide_layer
        h1, h2 = x @ w1.T + b1, x @ w2.T + b2
        torch.testing.assert_close(s, torch.nn.functional.silu(h1) * (0.5 + h2))
        return "triton"

    monkeypatch.setattr(layer, "choose", choose)
    assert layer._gemm(*wide_layer) == "triton"
    assert asked == [(CPU, F32, 4, 5, 7, 3)]


class Branches(TorchDispatchMode):
    """Record of the star MLP ops that ran: name and shapes of their further outputs."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("starlayers::")
        if name in ("star_mlp", "star_mlp_wide"):
            self.seen.append((name, *(tuple(t.shape) for t in out[1:])))
        return out


NARROW, KEPT = ("star_mlp", (0,), (0,)), ("star_mlp_wide", (6, 9), (6, 9))
DROPPED = ("star_mlp_wide", (0,), (0,))
# channels, what requires gradients, recompute, op that runs
PATHS = [
    (64, "all", False, NARROW),
    (65, "all", False, KEPT),
    (65, "x", False, KEPT),
    (65, "parameters", False, KEPT),
    (65, "none", False, NARROW),
    (65, "no-grad", False, NARROW),
    (65, "all", True, DROPPED),
    (128, "none", False, NARROW),
    (129, "none", False, DROPPED),
    (129, "no-grad", True, DROPPED),
]


def run(mlp, x, residual, path):
    weights = plain_weights(mlp.f1, mlp.f2, mlp.g)
    options = (mlp.act, mlp.offset, residual)
    return run_mlp(path, x, weights, *options, recompute=mlp.recompute)


@pytest.mark.parametrize(("channels", "needs", "recompute", "path"), PATHS)
def test_op_by_width_and_training(channels, needs, recompute, path, monkeypatch):
    monkeypatch.setattr(layer, "INTERPRET", True)  # dispatches a CPU tensor as on a GPU
    mlp = StarMLP(channels, 9, act="silu", recompute=recompute)
    mlp.requires_grad_(needs in ("all", "parameters", "no-grad"))
    x = randn(2, 3, channels, grad=needs in ("all", "x", "no-grad"))
    residual = randn(2, 3, channels, seed=1)
    with torch.set_grad_enabled(needs != "no-grad"), Branches() as ran:
        y = run(mlp, x, residual, "star_mlp" if path is NARROW else "star_mlp_wide")
    assert ran.seen == [path]
    assert y.requires_grad is (needs in ("all", "x", "parameters"))
    torch.testing.assert_close(y, residual + star_mlp_formula(mlp, x))
    if needs == "all":
        (dx,) = torch.autograd.grad(y.sum(), x)
        (expected,) = torch.autograd.grad(star_mlp_formula(mlp, x).sum(), x)
        torch.testing.assert_close(dx, expected)


def test_a_cpu_has_one_op_for_every_width():
    mlp = StarMLP(500, 9)
    with Branches() as ran:
        y = run(mlp, x := randn(6, 500), None, "cpu")
    assert ran.seen == [NARROW]
    torch.testing.assert_close(y, star_mlp_formula(mlp, x))


def residuals():
    return {
        "same": (randn(6, 4), True),
        "broadcast": (randn(4), False),
        "double": (randn(6, 4, dtype=F64), False),
    }


@pytest.mark.parametrize("name", residuals())
def test_residual_is_added_inside_the_op_if_shape_and_dtype_agree(name, monkeypatch):
    residual, inside = residuals()[name]
    seen = []
    op = layer.star_mlp
    monkeypatch.setattr(layer, "star_mlp", lambda *args: seen.append(args[7]) or op(*args))
    mlp, x = StarMLP(4, 9), randn(6, 4, seed=1)
    y = run(mlp, x, residual, "cpu")
    assert [t is not None for t in seen] == [inside]
    torch.testing.assert_close(y, residual + star_mlp_formula(mlp, x).to(residual.dtype))


def test_ieee_precision_for_other_types_and_on_hip(monkeypatch):
    x = torch.ones(1)
    assert registration.precision(x) == "tf32x3"
    assert registration.precision(x.bfloat16()) == registration.precision(x.double()) == "ieee"
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert registration.precision(x) == "ieee"


@pytest.mark.parametrize("setting", ["tf32", "ieee"])
def test_float32_precision_is_the_users(setting):
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = setting
        assert registration.precision(torch.ones(1)) == {"tf32": "tf32", "ieee": "tf32x3"}[setting]
    finally:
        matmul.fp32_precision = before


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        "torch.backends.cuda.matmul.allow_tf32 = True",
        "torch.backends.fp32_precision = 'tf32'",
        "torch.set_float32_matmul_precision('high')",
    ],
)
def test_float32_precision_by_every_way_to_set_it(code):
    # a process each, because torch refuses to mix its old and new settings
    script = f"""import torch
from starlayers.kernels.registration import precision
assert precision(torch.ones(1)) == "tf32x3"
{code}
assert precision(torch.ones(1)) == "tf32"
assert precision(torch.ones(1, dtype=torch.bfloat16)) == "ieee"
"""
    subprocess.run([sys.executable, "-c", script], check=True)
