"""Backend switch, and every condition under which a layer runs fused."""

import asyncio
import contextlib
import contextvars
import itertools
import re
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from starlayers import (
    ACTIVATIONS,
    StarBlock,
    StarMLP,
    backend_name,
    dispatch,
    plans,
    register_activation,
    use_backend,
)
from starlayers.backend import BACKENDS, ENV_VAR
from starlayers.coefficients.modules import DynamicStarMLP, SumMLP
from starlayers.dispatch import is_plain, plain_weights
from starlayers.kernels import registration
from starlayers.kernels.registration import needs_gradients
from starlayers.recompute import recomputed, with_this_backend
from tests.helpers import RecordOps, randn, star_mlp_formula, star_op_formula


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


def within(name):
    """Yield the backend inside of a block, twice."""
    with use_backend(name):
        yield backend_name()
        yield backend_name()


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_interleaved_generators_leave_nothing_behind(order):
    names = ("eager", "triton", "cpu")
    generators = [within(name) for name in names]
    assert [next(g) for g in generators] == [*names]
    open_blocks = [*names]
    for i in order:
        assert backend_name() == open_blocks[-1]
        generators[i].close()
        open_blocks.remove(names[i])
    assert backend_name() == "auto"


def test_generators_that_are_exhausted_in_the_order_they_began():
    first, second = within("eager"), within("cpu")
    assert (next(first), next(second)) == ("eager", "cpu")
    assert list(first) == ["cpu"]  # the last block entered is in effect wherever one asks
    assert list(second) == ["cpu"]
    assert backend_name() == "auto"


def test_a_generator_left_to_the_collector_ends_its_block():
    generator = within("eager")
    next(generator)
    del generator
    assert backend_name() == "auto"


def test_one_block_can_be_entered_again_within_itself():
    block = use_backend("eager")
    with block:
        with use_backend("cpu"), block:
            assert backend_name() == "eager"
        assert backend_name() == "eager"
        with use_backend("cpu"):
            assert backend_name() == "cpu"
    assert backend_name() == "auto"
    with block:
        assert backend_name() == "eager"
    assert backend_name() == "auto"


def test_a_decorated_function_may_call_itself():
    @use_backend("eager")
    def descend(n):
        return [backend_name()] if n == 0 else [*descend(n - 1), backend_name()]

    assert descend(3) == ["eager"] * 4
    assert backend_name() == "auto"


async def task():
    return backend_name()


def generator():
    yield backend_name()


async def agenerator():
    yield backend_name()


@pytest.mark.parametrize("function", [task, generator, agenerator, StarMLP])
def test_only_functions_that_return_at_once_are_decorated(function):
    with pytest.raises(TypeError, match="use_backend decorates functions that return at once"):
        use_backend("eager")(function)


def test_threads_have_blocks_of_their_own_even_of_one_object():
    block, seen, entered, leave = use_backend("cpu"), {}, threading.Event(), threading.Event()

    def other():
        seen["before"] = backend_name()
        with block:
            seen["inside"] = backend_name()
            entered.set()
            leave.wait(10)
        seen["after"] = backend_name()

    thread = threading.Thread(target=other)
    with block:
        thread.start()
        assert entered.wait(10)
    assert backend_name() == "auto"
    leave.set()
    thread.join()
    assert seen == {"before": "auto", "inside": "cpu", "after": "auto"}


def test_tasks_have_blocks_of_their_own():
    async def task(name, others):
        with use_backend(name):
            await asyncio.sleep(0)
            inside = backend_name()
            await others.wait()
        return inside, backend_name()

    async def both():
        event = asyncio.Event()
        tasks = [asyncio.create_task(task(name, event)) for name in ("eager", "cpu")]
        await asyncio.sleep(0.01)
        assert backend_name() == "auto"
        event.set()
        return await asyncio.gather(*tasks)

    assert asyncio.run(both()) == [("eager", "auto"), ("cpu", "auto")]


def test_a_block_that_ends_in_another_context_changes_nothing_there():
    block = use_backend("eager")
    contextvars.copy_context().run(block.__enter__)
    assert backend_name() == "auto"
    with use_backend("cpu"):
        block.__exit__(None, None, None)
        assert backend_name() == "cpu"
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
    ("sum", lambda: SumMLP(4), X, ANY, "SumMLP computes its products by a method of its own"),
    ("hook", with_mlp(lambda m: m.f1.register_forward_hook(nothing)), X, ANY, "f1 has hooks"),
    (
        "hook-on-g",
        with_mlp(lambda m: m.g.register_forward_pre_hook(nothing)),
        X,
        ANY,
        "g has hooks",
    ),
    (
        "parametrised",
        with_mlp(lambda m: parametrizations.weight_norm(m.f2)),
        X,
        ANY,
        "f2 is parametrised",
    ),
    (
        "subclass",
        with_mlp(lambda m: setattr(m, "f2", OwnLinear(4, 16))),
        X,
        ANY,
        "f2 is an OwnLinear, not nn.Linear",
    ),
    (
        "not-linear",
        with_mlp(lambda m: setattr(m, "f1", nn.Identity())),
        X,
        ANY,
        "f1 is an Identity, not nn.Linear",
    ),
    (
        "own-forward",
        with_mlp(lambda m: setattr(m.g, "forward", nothing)),
        X,
        ANY,
        "g has a forward that was replaced",
    ),
    (
        "pruned",
        with_mlp(lambda m: prune.l1_unstructured(m.f1, "weight", amount=1)),
        X,
        ANY,
        "f1 has (hooks|its weight computed by a hook)",
    ),
    ("global-hook", PLAIN, X, global_hook, "f1 has hooks"),
    ("double", with_mlp(nothing, dtype=torch.float64), X.double(), ANY, "dtype torch.float64"),
    ("half-input", PLAIN, X.half(), ANY, "dtype torch.float16 .*needs float32"),
    ("one-branch-double", with_mlp(lambda m: m.g.double()), X, ANY, r"needs float32"),
    ("parameters-elsewhere", with_mlp(lambda m: m.g.to("meta")), X, ANY, "on another device"),
    (
        "factors",
        lambda: DynamicStarMLP(4),
        X,
        ANY,
        "DynamicStarMLP computes its products by a method of its own",
    ),
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
        aloud = f"triton backend cannot serve this \\w+MLP: .*({words}|no Triton kernel for device)"
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
        monkeypatch.setattr(plans, f"MIN_HIDDEN_BYTES_{kind}", limit)
        dispatch.forget_plans()
        mlp = StarMLP(4)
        with RecordOps() as ops:
            y = call(mlp, X.clone())
        torch.testing.assert_close(y.detach(), star_mlp_formula(mlp, X).detach())
        assert ops.counts.get("starlayers::star_mlp", 0) == expected
    monkeypatch.setattr(plans, "MIN_HIDDEN_BYTES_INFERENCE", BYTES + 1)
    monkeypatch.setattr(plans, "MIN_HIDDEN_BYTES_TRAINING", BYTES + 1)
    assert f"hidden activation of {BYTES} bytes" in StarMLP(4).plan(X).reason


MIB = 2**20


@pytest.mark.parametrize(
    ("channels", "training", "limit"),
    [
        (4, False, 4 * MIB),
        (256, False, 4 * MIB),
        (4, True, 16 * MIB),
        (32, True, 16 * MIB),
        (64, True, 32 * MIB),
        (128, True, 64 * MIB),
    ],
)
def test_hidden_bytes_from_which_a_cpu_runs_fused(channels, training, limit):
    mlp = StarMLP(channels, 8).requires_grad_(training)  # 32 hidden bytes a row
    for rows, fused in ((limit // 32, True), (limit // 32 - 1, False)):
        x = torch.zeros(1, channels).expand(rows, channels)
        small = f"hidden activation of {32 * rows} bytes is small enough for eager"
        assert mlp.plan(x).reason == ("" if fused else small)
    rows = 4 * MIB // 64  # 64 bytes a row
    x = torch.zeros(1, channels, dtype=torch.float64).expand(rows, channels)
    assert "small enough" not in mlp.plan(x).reason


def test_wide_layers_in_training_never_run_in_blocks_unasked():
    mlp, x = StarMLP(129, 8), torch.zeros(1, 129).expand(8 * MIB, 129)
    assert mlp.plan(x).reason == (
        "in training 129 channels are too many for what the op computes twice"
    )
    assert mlp.requires_grad_(False).plan(x).path == "cpu"
    with use_backend("cpu"):
        assert mlp.requires_grad_(True).plan(x).path == "cpu"


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
    monkeypatch.setattr(registration, "KERNEL_DEVICES", {"cpu", "cuda"})
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
    assert is_plain(nn.Linear(2, 2), nn.Module) is False


def test_is_plain_knows_the_forward_of_a_class(monkeypatch):
    assert is_plain(OwnLinear(2, 2), OwnLinear) is True  # nothing is known of its forward
    monkeypatch.setitem(dispatch.FORWARDS, OwnLinear, OwnLinear.forward)
    assert is_plain(OwnLinear(2, 2), OwnLinear) is True
    monkeypatch.setattr(OwnLinear, "forward", nothing)
    assert is_plain(OwnLinear(2, 2), OwnLinear) is False


@pytest.mark.usefixtures("eligible")
@pytest.mark.parametrize("kind", [nn.Linear, StarMLP])
def test_a_forward_that_was_replaced_in_its_class_runs(monkeypatch, kind):
    block, original = StarBlock(4), kind.forward
    assert block.mlp.plan(X).path == "cpu"
    before = block(X)
    assert block._ends_in_mlp()
    monkeypatch.setattr(kind, "forward", lambda self, *args: 3 * original(self, *args))
    h = star_op_formula(block.mlp, X)
    if kind is nn.Linear:
        f1, f2 = (3 * (X @ f.weight.T + f.bias) for f in (block.mlp.f1, block.mlp.f2))
        h = f1.clamp(0, 6) * f2
    want = X + 3 * (h @ block.mlp.g.weight.T + block.mlp.g.bias)
    torch.testing.assert_close(block(X), want)
    assert (want - before).abs().max() > 0.1
    assert block._ends_in_mlp() is (kind is nn.Linear)
    if kind is nn.Linear:
        assert block.mlp.plan(X).reason == "f1 has a forward that was replaced"


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
