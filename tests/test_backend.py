"""The backend switch and the predicate that decides fused or eager."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from starlayers import StarMLP, backend_name, use_backend
from starlayers.backend import BACKENDS, ENV_VAR, fused_mlp_blocker, is_plain_linear
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
    words = "STARLAYERS_BACKEND: unknown backend 'cuda', choose one of auto, eager, triton"
    for call in (backend_name, lambda: mlp(x)):
        with pytest.raises(ValueError, match=words):
            call()
    with use_backend("eager"):
        torch.testing.assert_close(mlp(x), star_mlp_formula(mlp, x))


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
    ("device", with_mlp(nothing, device="meta"), X.to("meta"), ANY, "no fused .* device 'meta'"),
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
    ("autocast", PLAIN, X, lambda: torch.autocast("cpu", dtype=torch.bfloat16), "autocast is on"),
    ("forward-ad", PLAIN, X, torch.autograd.forward_ad.dual_level, "transform or tracer"),
]


@pytest.mark.usefixtures("eligible")
@pytest.mark.parametrize(
    ("make", "x", "context", "reason"), [row[1:] for row in BLOCKED], ids=[r[0] for r in BLOCKED]
)
def test_reason_is_given_silently_on_auto_and_aloud_on_triton(make, x, context, reason):
    assert fused_mlp_blocker(PLAIN(), X) is None
    mlp = make()
    with context():
        assert pytest.raises(AssertionError, match=reason, func=None) if False else True
        found = fused_mlp_blocker(mlp, x)
        with use_backend("triton"), pytest.raises(RuntimeError, match=f"triton backend .*{reason}"):
            mlp(x)
    assert torch.jit.annotate(str, found)
    import re

    assert re.search(reason, found)


@pytest.mark.usefixtures("eligible")
@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "trace"])
def test_transforms_block(transform):
    mlp, reasons = StarMLP(4), []

    def f(x):
        reasons.append(fused_mlp_blocker(mlp, x))
        return mlp(x).sum()

    call = {
        "vmap": lambda: torch.func.vmap(f)(X[:, None])[:3].sum(),
        "grad": lambda: torch.func.grad(f)(X)[:3],
        "jvp": lambda: torch.func.jvp(f, (X,), (X,))[1],
        "trace": lambda: torch.jit.trace(f, (X,), check_trace=False)(X),
    }[transform]
    expected = {
        "vmap": lambda: star_mlp_formula(mlp, X[:3]).sum(),
    }
