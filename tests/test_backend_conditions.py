"""Conditions of the kernels on a GPU, one by one, with CPU tensors."""

import contextlib
import re

import pytest
import torch
from torch import nn

from starlayers import ACTIVATIONS, StarMLP, backend, register_activation, use_backend
from starlayers.backend import compute_dtype, kernel_blocker, star_blocker
from starlayers.kernels import registration
from tests.helpers import randn

ANY = contextlib.nullcontext
X = randn(70, 4)


class Wrapped(torch.Tensor):
    pass


@pytest.fixture
def gpu(monkeypatch):
    """CPU tensors pass as those of a GPU with Triton."""
    monkeypatch.setattr(backend, "kernel_blocker", lambda tensors, act: None)


ROWS = 4096
# rows, channels, what requires gradients, layer options, environment, backend, reason
GPU = [
    (ROWS, 64, "all", {}, {}, "auto", None),
    (ROWS - 1, 64, "all", {}, {}, "auto", "4095 rows of 64 channels"),
    (ROWS - 1, 65, "all", {"recompute": True}, {}, "auto", "4095 rows of 65 channels"),
    (ROWS - 1, 64, "all", {}, {}, "triton", None),
    (ROWS, 65, "all", {}, {}, "auto", "too wide for a backward tile"),
    (ROWS, 65, "x", {}, {}, "auto", "too wide for a backward tile"),
    (ROWS, 65, "parameters", {}, {}, "auto", "too wide for a backward tile"),
    (ROWS, 65, "none", {}, {}, "auto", None),
    (ROWS, 129, "none", {}, {}, "auto", "too wide for a forward tile"),
    (ROWS, 129, "all", {"recompute": True}, {}, "auto", None),
    (ROWS, 129, "all", {}, {"STARLAYERS_TUNE": "1"}, "auto", None),
    (ROWS, 129, "all", {}, {"STARLAYERS_TUNE": "0"}, "auto", "too wide"),
    (ROWS, 129, "all", {}, {}, "triton", None),
    (ROWS, 64, "all", {"rank": 2}, {}, "auto", "rank=2"),
    (ROWS, 64, "all", {"rank": 2}, {}, "triton", "rank=2"),
    (ROWS, 64, "all", {"combine": "sum"}, {}, "auto", "combine='sum'"),
    (ROWS, 64, "all", {"coefficients": "scale"}, {}, "auto", r"coefficients='scale'.*fold\(\)"),
]


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("rows", "channels", "needs", "options", "env", "name", "words"), GPU)
def test_conditions_on_a_gpu(rows, channels, needs, options, env, name, words, monkeypatch):
    for variable, value in env.items():
        monkeypatch.setenv(variable, value)
    mlp = StarMLP(channels, 8, **options).requires_grad_(needs in ("all", "parameters"))
    x = torch.zeros(1, channels, requires_grad=needs in ("all", "x")).expand(rows, channels)
    with use_backend(name):
        reason = backend._gpu_blocker(mlp, x)
    assert reason is None if words is None else re.search(words, reason)


def test_kernels_see_every_parameter_and_the_activation(monkeypatch):
    seen = []
    monkeypatch.setattr(
        backend, "kernel_blocker", lambda tensors, act: seen.append((tensors, act)) or "no"
    )
    mlp = StarMLP(4, act="silu")
    assert backend._gpu_blocker(mlp, X) == "no"
    ((tensors, act),) = seen
    assert act == "silu"
    assert [id(t) for t in tensors] == [id(t) for t in (X, *mlp.parameters())]


MILLION = 2**20
# elements, backend, compiling, reason
STARS = [
    (MILLION, "auto", False, None),
    (MILLION - 1, "auto", False, "1048575 elements are few enough for eager"),
    (MILLION, "auto", True, "being compiled: the compiler fuses the product itself"),
    (1, "triton", False, None),
    (1, "triton", True, None),
    (MILLION, "eager", False, "the eager backend was asked for"),
]


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("elements", "name", "compiling", "reason"), STARS)
def test_conditions_of_the_stateless_star_on_a_gpu(elements, name, compiling, reason, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    x = torch.zeros(1).expand(elements)
    with use_backend(name):
        assert star_blocker(x, x, "relu6") == reason


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("other", [torch.ones(3, 2), torch.ones(2, 3).half()])
def test_branches_of_one_star_kernel_agree_in_shape_and_dtype(other):
    x = torch.ones(2, 3)
    assert star_blocker(x, other, None).startswith("shapes (2, 3), ")
    with use_backend("triton"), pytest.raises(RuntimeError, match="cannot serve this star: shapes"):
        star_blocker(x, other, None)


@contextlib.contextmanager
def exporting():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "_is_exporting_flag", True)
        yield


@contextlib.contextmanager
def compiling():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        patch.setattr(backend, "_transformed", lambda: True)
        yield


def bf16():
    return torch.autocast("cpu", dtype=torch.bfloat16)


ONE = torch.ones(2)
# id, tensors, activation, context, reason
KERNELS = [
    ("float32", [ONE, ONE], "relu6", ANY, None),
    ("float16", [ONE.half()], "relu6", ANY, None),
    ("bfloat16", [ONE.bfloat16()], "relu6", ANY, None),
    ("float64", [ONE.double()], "relu6", ANY, r"dtype torch.float64 \(needs float32, float16 or"),
    ("integer", [ONE.int()], "relu6", ANY, "dtype torch.int32"),
    ("parameter", [ONE, nn.Parameter(ONE)], "relu6", ANY, None),
    ("subclass", [ONE, ONE.as_subclass(Wrapped)], "relu6", ANY, "an input is a Wrapped"),
    ("exported", [ONE, ONE.as_subclass(Wrapped)], "relu6", exporting, None),
    ("devices", [ONE, ONE.to("meta")], "relu6", ANY, "on several devices"),
    ("dtypes", [ONE, ONE.half()], "relu6", ANY, "differ in dtype and autocast is off"),
    ("autocast", [ONE, ONE.half()], "relu6", bf16, None),
    ("autocast-double", [ONE.double(), ONE], "relu6", bf16, "dtype torch.float64"),
    ("no-activation", [ONE], None, ANY, None),
    ("alias", [ONE], "swiglu", ANY, None),
    ("meta", [ONE.to("meta")], None, ANY, "no Triton kernel for device 'meta'"),
    ("forward-ad", [ONE], None, torch.autograd.forward_ad.dual_level, "transform or tracer"),
    ("compiled", [ONE], None, compiling, None),
]


@pytest.mark.parametrize(
    ("tensors", "act", "context", "words"),
    [row[1:] for row in KERNELS],
    ids=[r[0] for r in KERNELS],
)
def test_conditions_of_every_kernel(tensors, act, context, words, monkeypatch):
    assert kernel_blocker(tensors, act).startswith("no Triton kernel for device")
    monkeypatch.setattr(registration, "INTERPRET", True)
    with use_backend("triton"), context():
        reason = kernel_blocker(tensors, act)
    assert reason is None if words is None else re.search(words, reason)


def test_kernels_need_triton_and_on_a_cpu_its_interpreter(monkeypatch):
    monkeypatch.setattr(registration, "INTERPRET", True)
    for name in ("auto", "eager"):
        with use_backend(name):
            assert "interpreter is for testing" in kernel_blocker([ONE], None)
    monkeypatch.setattr(registration, "HAS_TRITON", False)
    with use_backend("triton"):
        assert kernel_blocker([ONE], None) == "Triton is not installed"


def test_an_activation_of_ones_own_has_no_triton_form(monkeypatch):
    monkeypatch.setattr(registration, "INTERPRET", True)
    register_activation("sine", torch.sin, torch.cos)
    try:
        with use_backend("triton"):
            assert kernel_blocker([ONE], "sine") == "activation 'sine' has no Triton form"
    finally:
        del ACTIVATIONS["sine"]


@pytest.mark.usefixtures("gpu")
def test_exported_graphs_are_portable_unless_triton_is_forced():
    with exporting():
        assert backend._traced_blocker() == "being exported: the graph stays portable"
        with use_backend("triton"):
            assert backend._traced_blocker() is None
    assert backend._traced_blocker() is None


def test_compute_dtype_is_autocasts_except_for_float64():
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        assert compute_dtype(torch.ones(1, dtype=dtype)) == dtype
        with bf16():
            expected = torch.float64 if dtype == torch.float64 else torch.bfloat16
            assert compute_dtype(torch.ones(1, dtype=dtype)) == expected
