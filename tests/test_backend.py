"""Backend switch, and every condition under which a layer runs fused."""

import contextlib
import re
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from starlayers import (
    ACTIVATIONS,
    StarMLP,
    backend_name,
    dispatch,
    register_activation,
    use_backend,
)
from starlayers.backend import (
    BACKENDS,
    ENV_VAR,
    recomputed,
    with_this_backend,
)
from starlayers.dispatch import is_plain, plain_weights
from starlayers.kernels import registration
from starlayers.kernels.registration import needs_gradients
from tests.helpers import RecordOps, randn, star_mlp_formula


def test_blocks_nest_and_end():
    assert backend_name() == "auto"
    with use_backend("eager"):
        assert backend_name() == "eager"
        with use_backend("auto"):
            assert backend_name() == "auto"
            with use_backend("triton"):
                assert backend_name() == "triton"
            assert backend_name() == "auto"
        assert backend_name() == "eager"
    assert backend_name() == "auto"


def test_an_exception_restores_the_outer_backend():
    with use_backend("eager"):
        with contextlib.suppress(KeyError), use_backend("triton"):
            raise KeyError
        assert backend_name() == "eager"
        with (
            pytest.raises(ValueError, match="use_backend: unknown backend 'gpu'"),
            use_backend("gpu"),
        ):
            pass
        assert backend_name() == "eager"


def test_as_a_decorator():
    assert use_backend("eager")(backend_name)() == "eager"
    assert backend_name() == "auto"


@pytest.mark.parametrize("name", BACKENDS)
def test_environment_is_read_at_call_time_and_a_block_wins(monkeypatch, name):
    monkeypatch.setenv(ENV_VAR, name)
    assert backend_name() == name
    for inner in BACKENDS:
        with use_backend(inner):
            assert backend_name() == inner
    assert backend_name() == name
    monkeypatch.delenv(ENV_VAR)
    assert backend_name() == "auto"
    monkeypatch.setenv(ENV_VAR, "")
    assert backend_name() == "auto"


def test_bad_environment_is_named_where_it_is_used(monkeypatch):
    monkeypatch.setenv(ENV_VAR, "cuda")
    mlp, x = StarMLP(4), randn(2, 4)
    words = "STARLAYERS_BACKEND: unknown backend 'cuda', choose one of auto, eager, cpu, triton"
    for call in (backend_name, lambda: mlp(x)):
        with pytest.raises(ValueError, match=words):
            call()
    with use_backend("eager"):
        torch.testing.assert_close(mlp(x), star_mlp_formula(mlp, x))


def on_another_thread(call):
    result = []
    thread = threading.Thread(target=lambda: result.append(call()))
    thread.start()
    thread.join()
    return result[0]


def test_a_wrapped_call_keeps_its_backend_on_every_thread():
    with use_backend("eager"):
        name = with_this_backend(backend_name)
        assert on_another_thread(backend_name) == "auto"  # which does not see the block
    assert (backend_name(), name(), on_another_thread(name)) == ("auto", "eager", "eager")
    assert with_this_backend(lambda a, *, b: (a, b))(1, b=2) == (1, 2)


def test_a_recomputed_call_runs_twice_on_one_backend():
    names, x = [], torch.ones(2, requires_grad=True)

    def call(x, factor):
        names.append(backend_name())
        return factor * x.exp()

    with use_backend("eager"):
        y = recomputed(call, x, factor=2)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert names == ["eager", "eager"]
    torch.testing.assert_close(dx, 2 * x.exp())


@pytest.mark.usefixtures("eligible")
def test_environment_decides_the_path(monkeypatch):
    mlp, x = StarMLP(4), randn(70, 4)
    ran = {}
    for name in ("auto", "eager"):
        monkeypatch.setenv(ENV_VAR, name)
        with RecordOps() as ops:
            torch.testing.assert_close(mlp(x), star_mlp_formula(mlp, x))
        ran[name] = ops.counts.get("starlayers::star_mlp", 0)
    assert ran == {"auto": 1, "eager": 0}


def with_mlp(change, **options):
    def make():
        mlp = StarMLP(4, **options)
        change(mlp)
        return mlp

    return make


class Wrapped(torch.Tensor):
    pass


class OwnLinear(nn.Linear):
    pass


def nothing(*_):
    return None


@contextlib.contextmanager
def global_hook():
    handle = nn.modules.module.register_module_forward_hook(nothing)
    try:
        yield
    finally:
        handle.remove()


ANY = contextlib.nullcontext
BRANCH = "a branch is hooked, parametrised, quantised or not nn.Linear"
PLAIN = with_mlp(nothing)
X = randn(70, 4)
# id, layer, input, context, reason
BLOCKED = [
    (
        "device",
        with_mlp(nothing, device="meta"),
        X.to("meta"),
        ANY,
        "no Triton kernel for device 'meta'",
    ),
    ("tensor-subclass", PLAIN, X.as_subclass(Wrapped), ANY, "input is a Wrapped"),
    ("sum", with_mlp(nothing, combine="sum"), X, ANY, "combine='sum', rank=1"),
    ("rank", with_mlp(nothing, rank=2), X, ANY, "combine='mul', rank=2"),
    ("hook", with_mlp(lambda m: m.f1.register_forward_hook(nothing)), X, ANY, BRANCH),
    ("hook-on-g", with_mlp(lambda m: m.g.register_forward_pre_hook(nothing)), X, ANY, BRANCH),
    ("parametrised", with_mlp(lambda m: parametrizations.weight_norm(m.f2)), X, ANY, BRANCH),
    ("subclass", with_mlp(lambda m: setattr(m, "f2", OwnLinear(4, 16))), X, ANY, BRANCH),
    ("not-linear", with_mlp(lambda m: setattr(m, "f1", nn.Identity())), X, ANY, BRANCH),
    ("global-hook", PLAIN, X, global_hook, BRANCH),
    ("double", with_mlp(nothing, dtype=torch.float64), X.double(), ANY, "dtype torch.float64"),
    ("half-input", PLAIN, X.half(), ANY, "dtype torch.float16 .*needs float32"),
    ("one-branch-double", with_mlp(lambda m: m.g.double()), X, ANY, r"needs float32"),
    ("parameters-elsewhere", with_mlp(lambda m: m.g.to("meta")), X, ANY, "on another device"),
    ("coefficients", with_mlp(nothing, coefficients="dynamic"), X, ANY, "coefficients='dynamic'"),
    ("autocast", PLAIN, X, lambda: torch.autocast("cpu", dtype=torch.bfloat16), "autocast is on"),
    ("forward-ad", PLAIN, X, torch.autograd.forward_ad.dual_level, "transform or tracer"),
]


@pytest.mark.usefixtures("eligible")
@pytest.mark.parametrize(
    ("make", "x", "context", "words"), [row[1:] for row in BLOCKED], ids=[r[0] for r in BLOCKED]
)
def test_reason_is_silent_on_auto_and_aloud_on_triton(make, x, context, words):
    assert PLAIN().plan(X).reason == ""
    mlp = make()
    with context():
        assert re.search(words, mlp.plan(x).reason)
        aloud = f"triton backend cannot serve this StarMLP: .*({words}|no Triton kernel for device)"
        with use_backend("triton"), pytest.raises(RuntimeError, match=aloud):
            mlp(x)
        with use_backend("eager"):
            assert mlp.plan(x).reason == "the eager backend was asked for"


@pytest.mark.usefixtures("eligible")
def test_triton_says_that_it_has_no_kernel_even_where_nothing_blocks():
    words = r"cannot serve this StarMLP: no Triton kernel for device 'cpu'.*use_backend\('auto'\)"
    with use_backend("triton"), pytest.raises(RuntimeError, match=words):
        StarMLP(4)(X)


TRANSFORMS = {
    "vmap": lambda f: torch.func.vmap(f)(X),
    "grad": lambda f: torch.func.grad(lambda x: f(x).square().sum())(X),
    "jvp": lambda f: torch.func.jvp(f, (X,), (X.flip(0),))[1],
    "jacrev": lambda f: torch.func.jacrev(f)(X[0]),
    "trace": lambda f: torch.jit.trace(f, (X,), check_trace=False)(X),
}


@pytest.mark.usefixtures("eligible")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_functional_transforms_run_eager(transform):
    # frozen, because the old tracer takes no constants that need gradients
    mlp, reasons = StarMLP(4, act="tanh").requires_grad_(False), []

    def watched(x):
        reasons.append(mlp.plan(x).reason)
        return mlp(x)

    y = transform(watched)
    torch.testing.assert_close(y, transform(lambda x: star_mlp_formula(mlp, x)))
    assert all(re.search("transform or tracer|input is a", reason) for reason in reasons)
    assert reasons
    assert mlp.plan(X).reason == ""


@pytest.mark.usefixtures("eligible")
def test_compiler_fuses_the_plain_definition(fresh_compiler):
    mlp, seen = StarMLP(4), []

    def keep_graph(graph, inputs):
        seen.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph

    y = torch.compile(mlp, backend=keep_graph, fullgraph=True)(X)
    torch.testing.assert_close(y, star_mlp_formula(mlp, X))
    assert seen
    assert not any("starlayers" in target for target in seen)
    reason = torch.compile(lambda x: (x, mlp.plan(x).reason), backend="eager")(X)[1]
    assert reason == "being compiled or exported"


BYTES = X.shape[0] * 16 * 4
SIZES = [
    ("training", lambda m, x: m(x), "TRAINING"),
    ("input-needs-grad", lambda m, x: m.requires_grad_(False)(x.requires_grad_()), "TRAINING"),
    ("frozen", lambda m, x: m.requires_grad_(False)(x), "INFERENCE"),
    ("no-grad", torch.no_grad()(lambda m, x: m(x)), "INFERENCE"),
    ("inference-mode", torch.inference_mode()(lambda m, x: m(x)), "INFERENCE"),
]


@pytest.mark.usefixtures("eligible")
@pytest.mark.parametrize(("call", "kind"), [row[1:] for row in SIZES], ids=[r[0] for r in SIZES])
def test_small_layers_run_eager(monkeypatch, call, kind):
    for limit, expected in ((BYTES, 1), (BYTES + 1, 0)):
        monkeypatch.setattr(dispatch, f"MIN_HIDDEN_BYTES_{kind}", limit)
        dispatch.forget_plans()
        mlp = StarMLP(4)
        with RecordOps() as ops:
            y = call(mlp, X.clone())
        torch.testing.assert_close(y.detach(), star_mlp_formula(mlp, X).detach())
        assert ops.counts.get("starlayers::star_mlp", 0) == expected
    monkeypatch.setattr(dispatch, "MIN_HIDDEN_BYTES_INFERENCE", BYTES + 1)
    monkeypatch.setattr(dispatch, "MIN_HIDDEN_BYTES_TRAINING", BYTES + 1)
    assert f"hidden activation of {BYTES} bytes" in StarMLP(4).plan(X).reason


MIB = 2**20


@pytest.mark.parametrize(("training", "limit"), [(False, 2 * MIB), (True, 16 * MIB)])
def test_hidden_bytes_from_which_a_cpu_runs_fused(training, limit):
    mlp = StarMLP(4, 8).requires_grad_(training)  # 32 hidden bytes a row
    for rows, fused in ((limit // 32, True), (limit // 32 - 1, False)):
        x = torch.zeros(1, 4).expand(rows, 4)
        small = f"hidden activation of {32 * rows} bytes is small enough for eager"
        assert mlp.plan(x).reason == ("" if fused else small)
    x = torch.zeros(1, 4, dtype=torch.float64).expand(2 * MIB // 64, 4)  # 64 bytes a row
    assert "small enough" not in mlp.plan(x).reason


@pytest.mark.usefixtures("eligible")
def test_an_activation_without_a_derivative_has_no_fused_op():
    register_activation("sine", torch.sin)
    try:
        reason = StarMLP(4, act="sine").plan(X).reason
        assert reason == "activation 'sine' was registered without a derivative"
    finally:
        del ACTIVATIONS["sine"]


@pytest.mark.usefixtures("eligible")
def test_the_interpreter_replaces_the_cpus_own_op(monkeypatch):
    monkeypatch.setattr(registration, "INTERPRET", True)
    assert "interpreter replaces" in StarMLP(4).plan(X).reason
    with use_backend("triton"):  # where the conditions are those of a GPU
        assert StarMLP(4).plan(X).reason == ""
        assert StarMLP(4).plan(X, torch.zeros(4)).reason == ""
        with pytest.raises(RuntimeError, match="residual is a Wrapped on cpu"):
            StarMLP(4).plan(X, torch.zeros(4).as_subclass(Wrapped))


def test_gradients_are_needed_by_any_tensor_while_they_are_recorded():
    frozen, trained = torch.ones(1), torch.ones(1, requires_grad=True)
    assert needs_gradients() is needs_gradients(None, frozen) is False
    assert needs_gradients(frozen, trained) is needs_gradients(None, trained) is True
    with torch.no_grad():
        assert needs_gradients(trained) is False


def test_is_plain_asks_for_the_exact_class():
    assert is_plain(nn.Identity(), nn.Identity) is True
    assert is_plain(OwnLinear(2, 2), nn.Linear) is False
    assert is_plain(OwnLinear(2, 2), OwnLinear) is True
    assert is_plain(nn.Linear(2, 2), nn.Module) is False


def changed(change):
    linear = nn.Linear(4, 4)
    change(linear)
    return linear


LINEARS = [
    ("plain", nn.Linear(4, 4), True),
    ("no-bias", nn.Linear(4, 4, bias=False), True),
    ("frozen", nn.Linear(4, 4).requires_grad_(False), True),
    ("double", nn.Linear(4, 4).double(), True),
    ("prune-removed", changed(lambda m: prune.remove(prune.identity(m, "weight"), "weight")), True),
    ("hook-removed", changed(lambda m: m.register_forward_hook(nothing).remove()), True),
    ("weight-hook", changed(lambda m: m.weight.register_hook(nothing)), True),
    ("subclass", OwnLinear(4, 4), False),
    ("lazy", nn.LazyLinear(4), False),
    ("identity", nn.Identity(), False),
    ("conv", nn.Conv1d(4, 4, 1), False),
    ("quantisable", nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4), False),
    ("forward-hook", changed(lambda m: m.register_forward_hook(nothing)), False),
    ("pre-hook", changed(lambda m: m.register_forward_pre_hook(nothing)), False),
    ("backward-hook", changed(lambda m: m.register_full_backward_hook(nothing)), False),
    ("backward-pre", changed(lambda m: m.register_full_backward_pre_hook(nothing)), False),
    ("own-forward", changed(lambda m: setattr(m, "forward", nothing)), False),
    ("weight-norm", changed(parametrizations.weight_norm), False),
    ("spectral-norm", changed(nn.utils.spectral_norm), False),
    (
        "parametrised-bias",
        changed(lambda m: parametrize.register_parametrization(m, "bias", nn.Identity())),
        False,
    ),
    ("pruned", changed(lambda m: prune.l1_unstructured(m, "weight", amount=1)), False),
    ("pruned-bias", changed(lambda m: prune.l1_unstructured(m, "bias", amount=1)), False),
]


@pytest.mark.parametrize(
    ("module", "plain"), [row[1:] for row in LINEARS], ids=[r[0] for r in LINEARS]
)
def test_weights_are_those_of_three_plain_linear_layers(module, plain):
    linear = nn.Linear(4, 4)
    for i in range(3):
        layers = [linear] * 3
        layers[i] = module
        weights = plain_weights(*layers)
        assert (weights is not None) is plain
        if weights is not None:
            expected = [p for m in layers for p in (m.weight, m.bias)]
            assert [id(w) for w in weights] == [id(p) for p in expected]


def test_no_linear_is_plain_under_a_global_hook():
    with global_hook():
        assert plain_weights(*[nn.Linear(4, 4)] * 3) is None
    assert plain_weights(*[nn.Linear(4, 4)] * 3) is not None
