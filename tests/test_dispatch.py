"""Decisions: the conditions of the kernels on a GPU, one by one, with CPU tensors."""

import contextlib
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from starlayers import (
    ACTIVATIONS,
    StarMLP,
    StarOp,
    backend_name,
    dispatch,
    plans,
    register_activation,
    star,
    use_backend,
)
from starlayers.coefficients.modules import DynamicStarMLP, ScaledStarMLP, SumMLP
from starlayers.dispatch import Plan, plain_weights, plan_star
from starlayers.kernels import registration
from starlayers.kernels.registration import MLPWeights, compute_dtype
from starlayers.kernels.versions import folded_weights_stay
from starlayers.reference import star_reference
from tests.helpers import RecordOps, randn, star_mlp_formula, star_op_formula

ANY = contextlib.nullcontext


class Wrapped(torch.Tensor):
    pass


CUDA = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    """Tensors without memory pass as those of a GPU."""
    make = dispatch.call_of

    def on_gpu(*args):
        call = make(*args)
        return call._replace(tensors=tuple((kind, CUDA, dtype) for kind, _, dtype in call.tensors))

    monkeypatch.setattr(dispatch, "call_of", on_gpu)


ROWS = 4096
# rows, channels, what requires gradients, layer options, environment, backend, path or reason
GPU = [
    (ROWS, 64, "all", {}, {}, "auto", "star_mlp"),
    (ROWS - 1, 64, "all", {}, {}, "auto", "4095 rows of 64 channels"),
    (ROWS - 1, 65, "all", {"recompute": True}, {}, "auto", "4095 rows of 65 channels"),
    (ROWS - 1, 64, "all", {}, {}, "triton", "star_mlp"),
    (ROWS, 65, "all", {}, {}, "auto", "too wide for a backward tile"),
    (ROWS, 65, "x", {}, {}, "auto", "too wide for a backward tile"),
    (ROWS, 65, "parameters", {}, {}, "auto", "too wide for a backward tile"),
    (ROWS, 65, "none", {}, {}, "auto", "star_mlp"),
    (ROWS, 129, "none", {}, {}, "auto", "too wide for a forward tile"),
    (ROWS, 129, "all", {"recompute": True}, {}, "auto", "star_mlp_wide"),
    (ROWS, 129, "all", {}, {"STARLAYERS_TUNE": "1"}, "auto", "star_mlp_wide"),
    (ROWS, 129, "all", {}, {"STARLAYERS_TUNE": "0"}, "auto", "too wide"),
    (ROWS, 129, "all", {}, {}, "triton", "star_mlp_wide"),
]


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("rows", "channels", "needs", "options", "env", "name", "words"), GPU)
def test_conditions_on_a_gpu(rows, channels, needs, options, env, name, words, monkeypatch):
    for variable, value in env.items():
        monkeypatch.setenv(variable, value)
    mlp = StarMLP(channels, 8, device="meta", **options)
    mlp.requires_grad_(needs in ("all", "parameters"))
    x = torch.zeros(rows, channels, device="meta", requires_grad=needs in ("all", "x"))
    with use_backend(name):
        plan = mlp.plan(x)
    if plan.fused:
        assert (plan.path, plan.reason) == (words, "")
        assert [id(w) for w in plan.weights] == [id(p) for p in mlp.parameters()]
    else:
        assert re.search(words, plan.reason)
        assert plan.weights is None


class Squared(StarMLP):
    def products(self, x):
        return super().products(x) ** 2


class Twice(StarMLP):
    def _definition(self, x):
        return 2 * super()._definition(x)


# class of a layer, reason
OTHERS = [
    (SumMLP, "SumMLP computes its products by a method of its own"),
    (ScaledStarMLP, r"ScaledStarMLP has factors of its own; fold\(\) makes it a StarMLP"),
    (DynamicStarMLP, "DynamicStarMLP computes its products by a method of its own"),
    (Squared, "Squared computes its products by a method of its own"),
    (Twice, "Twice computes its products by a method of its own"),
]


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("kind", "words"), OTHERS)
def test_layers_of_other_definitions_run_eager(kind, words):
    mlp, x = kind(64, 8, device="meta"), torch.zeros(ROWS, 64, device="meta")
    assert re.search(words, mlp.plan(x).reason)
    with use_backend("triton"), pytest.raises(RuntimeError, match=words):
        mlp.plan(x)


def test_layers_of_other_definitions_compute_them_where_a_star_mlp_would_run_fused(eligible):
    x = randn(70, 4)
    for kind in (Squared, Twice):
        mlp = kind(4, 8)
        h = star_op_formula(mlp, x)
        want = mlp.g(h**2) if kind is Squared else 2 * mlp.g(h)
        with RecordOps() as ops:
            torch.testing.assert_close(mlp(x), want)
        assert "starlayers::star_mlp" not in ops.counts


def test_a_subclass_that_changes_neither_runs_fused(eligible):
    class Named(StarMLP):
        pass

    assert Named(4).plan(randn(70, 4)).path == "cpu"


def test_kernels_see_every_parameter_and_the_activation(monkeypatch):
    seen = []
    monkeypatch.setattr(plans, "kernel_reason", lambda call: seen.append(call) or "no")
    mlp = StarMLP(4, act="silu", device="meta", dtype=torch.float16)
    assert mlp.plan(torch.zeros(70, 4, device="meta")).reason == "no"
    (call,) = seen
    meta = torch.device("meta")
    assert call.activation is ACTIVATIONS["silu"]
    assert call.tensors == (
        (torch.Tensor, meta, torch.float32),
        *[(nn.Parameter, meta, torch.float16)] * 6,
    )


def test_plans_are_kept_by_all_that_decides(monkeypatch):
    asked = []
    decide = plans.kernel_reason
    monkeypatch.setattr(plans, "kernel_reason", lambda call: asked.append(1) or decide(call))
    mlp, x = StarMLP(4, device="meta"), torch.zeros(70, 4, device="meta")
    for _ in range(3):
        mlp.plan(x)
    assert len(asked) == 1
    changes = [
        lambda: mlp.plan(x[1:]),
        lambda: mlp.plan(x.half()),
        lambda: mlp.requires_grad_(False).plan(x),
        lambda: setattr(mlp, "act", "silu") or mlp.plan(x),
        lambda: mlp.half().plan(x),
        lambda: setattr(mlp, "recompute", True) or mlp.plan(x),
    ]
    for change in changes:
        before = len(asked)
        change()
        assert len(asked) == before + 1


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
    x = torch.zeros(1, device="meta").expand(elements)
    with use_backend(name):
        plan = plan_star(x, x, "relu6")
    assert plan == (dispatch.Plan("star") if reason is None else dispatch.Plan("eager", reason))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("other", [torch.ones(3, 2), torch.ones(2, 3).half()])
def test_branches_of_one_star_kernel_agree_in_shape_and_dtype(other):
    x, other = torch.ones(2, 3, device="meta"), other.to("meta")
    assert plan_star(x, other, None).reason.startswith("shapes (2, 3), ")
    with use_backend("triton"), pytest.raises(RuntimeError, match="cannot serve this star: shapes"):
        plan_star(x, other, None)


@contextlib.contextmanager
def exporting():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "_is_exporting_flag", True)
        yield


@contextlib.contextmanager
def compiling():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        patch.setattr(dispatch, "is_transformed", lambda: True)
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


def kernel_reason(tensors, act):
    return plans.kernel_reason(
        dispatch.call_of(backend_name(), act, dispatch._tracer(), tuple(tensors))
    )


@pytest.mark.parametrize(
    ("tensors", "act", "context", "words"),
    [row[1:] for row in KERNELS],
    ids=[r[0] for r in KERNELS],
)
def test_conditions_of_every_kernel(tensors, act, context, words, monkeypatch):
    assert kernel_reason(tensors, act).startswith("no Triton kernel for device")
    monkeypatch.setattr(registration, "INTERPRET", True)
    monkeypatch.setattr(registration, "KERNEL_DEVICES", {"cpu", "cuda"})
    with use_backend("triton"), context():
        reason = kernel_reason(tensors, act)
    assert reason == "" if words is None else re.search(words, reason)


def test_kernels_need_triton_and_on_a_cpu_its_interpreter(monkeypatch):
    monkeypatch.setattr(registration, "INTERPRET", True)
    monkeypatch.setattr(registration, "KERNEL_DEVICES", {"cpu", "cuda"})
    for name in ("auto", "eager"):
        with use_backend(name):
            assert "interpreter is for testing" in kernel_reason([ONE], None)
    monkeypatch.setattr(registration, "HAS_TRITON", False)
    with use_backend("triton"):
        assert kernel_reason([ONE], None) == "Triton is not installed"


def test_an_activation_of_ones_own_has_no_triton_form(monkeypatch):
    monkeypatch.setattr(registration, "INTERPRET", True)
    monkeypatch.setattr(registration, "KERNEL_DEVICES", {"cpu", "cuda"})
    register_activation("sine", torch.sin, torch.cos)
    try:
        with use_backend("triton"):
            assert kernel_reason([ONE], "sine") == "activation 'sine' has no Triton form"
    finally:
        del ACTIVATIONS["sine"]


def test_exported_graphs_are_portable_unless_triton_is_forced():
    on_gpu = [(torch.Tensor, CUDA, torch.float32)]
    for name, context, words in (
        ("auto", exporting, "being exported: the graph stays portable"),
        ("triton", exporting, ""),
        ("auto", ANY, ""),
    ):
        with context():
            call = dispatch.call_of(name, None, dispatch._tracer(), (ONE,))._replace(
                tensors=tuple(on_gpu)
            )
            assert plans.kernel_reason(call) == words


def test_compute_dtype_is_autocasts_except_for_float64():
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        assert compute_dtype(torch.ones(1, dtype=dtype)) == dtype
        with bf16():
            expected = torch.float64 if dtype == torch.float64 else torch.bfloat16
            assert compute_dtype(torch.ones(1, dtype=dtype)) == expected


def test_the_cpus_own_op_can_be_asked_for_at_any_size():
    mlp, x = StarMLP(4), torch.ones(1, 4)
    assert mlp.plan(x).reason == "hidden activation of 64 bytes is small enough for eager"
    with use_backend("cpu"), RecordOps() as ops:
        assert mlp.plan(x) == Plan("cpu", weights=plain_weights(mlp.f1, mlp.f2, mlp.g))
        y = mlp(x)
    assert ops.counts["starlayers::star_mlp"] == 1
    torch.testing.assert_close(y, star_mlp_formula(mlp, x))


#: layer and input, reason for which the CPU's own op cannot run it
NOT_ON_A_CPU = [
    (lambda: Twice(4), torch.ones(1, 4), "Twice computes its products by a method of its own"),
    (lambda: StarMLP(4).double(), torch.ones(1, 4).double(), "dtype torch.float64"),
    (lambda: StarMLP(4).half(), torch.ones(1, 4), "dtype torch.float16"),
    (lambda: StarMLP(4, device="meta"), torch.ones(1, 4, device="meta"), "input is on 'meta'"),
]


@pytest.mark.parametrize(("make", "x", "words"), NOT_ON_A_CPU)
def test_the_cpus_own_op_says_why_it_cannot_run(make, x, words):
    error = f"the cpu backend cannot serve this (StarMLP|Twice): .*{words}.*use_backend\\('auto'\\)"
    with use_backend("cpu"), pytest.raises(RuntimeError, match=error):
        make()(x)


def test_stars_without_an_op_of_the_cpu_run_their_definition_there():
    x1, x2 = randn(6), randn(6, seed=1)
    with use_backend("cpu"):
        for device in ("cpu", "meta"):  # whatever the device: the CPU's backend launches no kernel
            plan = plan_star(x1.to(device), x2.to(device), "relu6")
            assert "the cpu backend was asked for" in plan.reason
        assert torch.equal(star(x1, x2), star_reference(x1, x2))
        assert StarOp(4, 3)(torch.ones(2, 4)).shape == (2, 3)


def test_captures_launch_nothing_directly_unless_folded_weights_stay(monkeypatch):
    x = torch.ones(2, 4)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: x.device.index)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not dispatch.launches_directly(x, ())
    assert dispatch.launches_directly(x, (), gradients=True)  # which folds at every step
    with folded_weights_stay():
        assert dispatch.launches_directly(x, ())
        with ThreadPoolExecutor(1) as other:
            assert not other.submit(dispatch.launches_directly, x, ()).result()
    assert not dispatch.launches_directly(x, ())


@pytest.mark.parametrize(
    ("name", "shape"),
    [("w2", (1, 8)), ("b1", (1,)), ("b2", (16, 1)), ("w3", (8, 1)), ("b3", (1,))],
)
def test_parameters_that_are_broadcast_are_left_to_the_definition(name, shape):
    shapes = ((16, 8), (16,), (16, 8), (16,), (8, 16), (8,))
    weights = MLPWeights(*(randn(*s) for s in shapes))
    x = randn(2**16, 8)
    assert not dispatch.plan_mlp(x, weights, "relu6").reason
    changed = weights._replace(**{name: randn(*shape)})
    assert f"{name} has shape {shape}, not" in dispatch.plan_mlp(x, changed, "relu6").reason
