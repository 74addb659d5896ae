"""Whole layers, starified models and networks of policies under Triton's kernels."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from starlayers import StarBlock, StarMLP, StarOp, star, use_backend
from starlayers.coefficients.modules import RankStarMLP, RankStarOp, ScaledStarOp
from starlayers.dispatch import plan_star
from starlayers.functional import star_packed
from starlayers.rl.stack import PackedStar, StarStack
from starlayers.surgery import gate_parameters, starify
from tests.helpers import (
    RecordOps,
    assert_as_exact_as_eager,
    assert_close_in_scale,
    gradients,
    largest,
    randn,
    star_mlp_formula,
)
from tests.kernels.cases import DEVICE
from tests.surgery.small import MLP, Gated, Packed, train_gates

slow = pytest.mark.slow


def under(backend, module, x):
    with use_backend(backend):
        return gradients(module, x)


def held_to_eager(module, x, *, factor=2.0, floor=1e-6, elementwise=True):
    """Assert that output and gradients are at most `factor` times as wrong as eager's.

    The norms of the errors are compared, and the largest elements; `floor` is relative to the norm
    or the largest element of the exact tensor.
    """
    exact = under("eager", copy.deepcopy(module).double(), x.double())
    eager = under("eager", copy.deepcopy(module), x)
    with RecordOps() as ops:
        fused = under("triton", copy.deepcopy(module), x)
    for size in (torch.norm, largest) if elementwise else (torch.norm,):
        most = max(size(t) for t in exact[1:])
        for ours, theirs, truth in zip(fused, eager, exact, strict=True):
            assert ours.dtype == theirs.dtype
            assert ours.shape == theirs.shape
            # a bias before a BatchNorm has no gradient: relate its error to the other gradients
            scale = size(truth) if size(truth) > 1e-9 * most else most
            error, allowed = (size(t.double() - truth) / scale for t in (ours, theirs))
            assert error <= factor * allowed + floor, size.__name__
    return ops.counts


SHAPES = {
    "starformer": (lambda: StarMLP(64, 172, act="swiglu", bias=False), (2, 10, 64)),
    "starnet-s1": (lambda: StarMLP(24, 72), (50, 24)),
    "vector": (lambda: StarMLP(17, 35, out_features=40, act="gelu", offset=1), (17,)),
    "rl": (lambda: StarBlock(64, StarMLP(64, act="tanh"), pre=nn.LayerNorm(64)), (5, 64)),
    "tokens": (lambda: StarBlock(48, StarMLP(48, act="silu"), pre=nn.RMSNorm(48)), (2, 7, 48)),
    "scaled": (lambda: StarBlock(32, StarMLP(32, act="gelu"), layer_scale=0.1), (33, 32)),
    "wide": (lambda: StarMLP(400, 72, act="silu"), (6, 400)),
    "wide-recomputed": (lambda: StarMLP(400, 72, act="silu", recompute=True), (6, 400)),
    "op": (lambda: RankStarOp(20, 30, act="sigmoid", rank=2), (9, 20)),
    "packed": (lambda: StarOp(20, 30, act="silu", packed=True, offset=1), (9, 20)),
    "rank": (lambda: RankStarMLP(20, 30, act="gelu", rank=3), (9, 20)),
    "factors": (lambda: ScaledStarOp(20, 30, act="tanh", offset=0.5), (9, 20)),
}
OPS = {"wide": "star_mlp_wide", "wide-recomputed": "star_mlp_wide"}
OPS |= dict.fromkeys(("op", "packed", "rank", "factors"), "star")


def some(quick, names=SHAPES):
    """Return `names` as parameters; those not in `quick` are slow."""
    return [pytest.param(name, marks=() if name in quick else slow) for name in names]


@pytest.mark.interpret
@pytest.mark.parametrize("name", some(("vector", "rl", "wide", "wide-recomputed", "op", "packed")))
def test_layers_match_eager_in_output_and_every_gradient(name):
    make, shape = SHAPES[name]
    counts = held_to_eager(make(), randn(*shape))
    op = OPS.get(name, "star_mlp")
    assert counts[f"starlayers::{op}"] == 1
    backward = {"star_mlp_wide": "dgated"}.get(op, f"{op}_backward")
    assert counts[f"starlayers::{backward}"] == 1


HALF = [
    ("starnet-s1", torch.float16),
    ("wide", torch.bfloat16),
    pytest.param("starformer", torch.bfloat16, marks=slow),
    pytest.param("starnet-s1", torch.bfloat16, marks=slow),
    pytest.param("tokens", torch.float16, marks=slow),
    pytest.param("wide", torch.float16, marks=slow),
    pytest.param("op", torch.bfloat16, marks=slow),
    pytest.param("op", torch.float16, marks=slow),
]


@pytest.mark.interpret
@pytest.mark.parametrize(("name", "dtype"), HALF)
def test_layers_in_half_precision(name, dtype):
    make, shape = SHAPES[name]
    held_to_eager(make().to(dtype), randn(*shape, dtype=dtype), factor=2.0, floor=1e-3)


@pytest.mark.interpret
@pytest.mark.parametrize("name", some(("tokens",), ("starformer", "tokens", "wide")))
def test_autocast_computes_in_its_type_and_keeps_float32_gradients(name):
    make, shape = SHAPES[name]
    module, x = make(), randn(*shape)

    def cast(backend):
        with torch.autocast("cpu", dtype=torch.bfloat16), use_backend(backend):
            return gradients(copy.deepcopy(module), x)

    for ours, theirs in zip(cast("triton"), cast("eager"), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(
            ours, theirs, rtol=0.05, atol=0.02 * float(theirs.detach().abs().max())
        )


@pytest.mark.interpret
def test_second_gradients_are_those_of_the_definition():
    mlp = StarMLP(8, 12, act="tanh")
    x = randn(5, 8, grad=True)

    def second(backend):
        with use_backend(backend):
            (dx,) = torch.autograd.grad(mlp(x).square().sum(), x, create_graph=True)
            return [dx, *torch.autograd.grad(dx.square().sum(), [x, *mlp.parameters()])]

    for ours, theirs in zip(second("triton"), second("eager"), strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.detach().abs().max())
        )


@pytest.mark.interpret
@slow
def test_checkpointing_gives_the_same_gradients():
    mlp, x = StarMLP(16), randn(9, 16, grad=True)
    with use_backend("triton"):
        plain = torch.autograd.grad(mlp(x).sum(), [x, *mlp.parameters()])
        y = checkpoint(mlp, x, use_reentrant=False)
        for a, b in zip(torch.autograd.grad(y.sum(), [x, *mlp.parameters()]), plain, strict=True):
            assert torch.equal(a, b)


@pytest.mark.interpret
@pytest.mark.skipif(DEVICE == "cuda", reason="there is no interpreter")
def test_auto_leaves_cpu_tensors_alone_in_the_interpreter():
    mlp, x = StarMLP(16), randn(9, 16)
    assert "small enough for eager" in mlp.plan(x).reason
    assert "interpreter is for testing" in plan_star(x, x, "relu6").reason
    with RecordOps() as ops:
        torch.testing.assert_close(mlp(x), star_mlp_formula(mlp, x))
    assert not any(name.startswith("starlayers") for name in ops.counts)


def hooked(mlp):
    mlp.f1.register_forward_hook(lambda *_: None)


REFUSED = {
    "hook": (hooked, "f1 has hooks"),
    "parametrised": (lambda m: parametrizations.weight_norm(m.f2), "f2 is parametrised"),
    "double": (lambda m: m.double(), "dtype torch.float64"),
    "one-double": (lambda m: m.g.double(), "differ in dtype"),
}


@pytest.mark.interpret
@pytest.mark.parametrize("name", some(("double",), REFUSED))
def test_triton_says_why_it_cannot_serve_and_auto_falls_back(name):
    mlp, (change, words) = StarMLP(16), REFUSED[name]
    change(mlp)
    x = randn(4, 16, dtype=mlp.f1.weight.dtype)
    with use_backend("triton"), pytest.raises(RuntimeError, match=f"StarMLP: .*{words}"):
        mlp(x)
    if words != "differ in dtype":  # which eager refuses too
        torch.testing.assert_close(mlp(x), star_mlp_formula(mlp, x))


@pytest.mark.interpret
def test_triton_refuses_transforms():
    mlp, x = StarMLP(16), randn(4, 16)
    with use_backend("triton"), pytest.raises(RuntimeError, match="transform"):
        torch.func.vmap(mlp)(x)
    torch.testing.assert_close(torch.func.vmap(mlp)(x), star_mlp_formula(mlp, x))


@pytest.mark.interpret
def test_stateless_star_and_its_packed_form():
    h = randn(5, 6, 20, grad=True)
    limits = {"clamp1": (-float("inf"), 0.7), "clamp2": (-0.5, 0.5)}
    with use_backend("triton"), RecordOps() as ops:
        packed = star_packed(h, "silu", offset=1, **limits)
        (dh,) = torch.autograd.grad(packed.square().sum(), h)
    assert ops.counts["starlayers::star"] == ops.counts["starlayers::star_backward"] == 1
    with use_backend("eager"):
        expected = star(*h.chunk(2, -1), "silu", offset=1, **limits)
        (theirs,) = torch.autograd.grad(expected.square().sum(), h)
    torch.testing.assert_close(packed, expected)
    torch.testing.assert_close(dh, theirs)
    with use_backend("triton"), pytest.raises(ValueError, match="clamp1 must be"):
        star_packed(h, clamp1=(1.0, -1.0))
    with use_backend("triton"), pytest.raises(RuntimeError, match="this star: dtype"):
        star(h.double(), h.double())


@pytest.mark.interpret
@slow
@pytest.mark.parametrize("name", ["starformer", "tokens", "wide"])
def test_compiles_without_a_graph_break(name, fresh_compiler):
    make, shape = SHAPES[name]
    module, x = make(), randn(*shape)
    with use_backend("triton"):  # outside, because dynamo cannot set a context variable
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        values, expected = gradients_of(compiled, module, x), gradients(module, x)
    for ours, theirs in zip(values, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def gradients_of(call, module, x):
    x = x.detach().requires_grad_()
    y = call(x)
    loss = (y * randn(*y.shape, seed=9, dtype=y.dtype)).sum()
    return [y, *torch.autograd.grad(loss, [x, *module.parameters()])]


@pytest.mark.interpret
@slow
@pytest.mark.export
@pytest.mark.parametrize(("backend", "ops"), [("auto", 0), ("triton", 1)])
def test_export_is_portable_on_auto_and_holds_the_op_where_triton_is_forced(backend, ops):
    mlp, x = StarMLP(16), randn(4, 16)
    with use_backend(backend):
        program = torch.export.export(mlp, (x,))
    targets = [str(node.target) for node in program.graph.nodes]
    assert sum("starlayers.star_mlp" in target for target in targets) == ops
    torch.testing.assert_close(program.module()(x), star_mlp_formula(mlp, x))


@pytest.mark.interpret
def test_a_residual_alone_may_need_the_gradient():
    mlp = StarMLP(384, 32).requires_grad_(False)
    residual = randn(3, 384, grad=True)
    with use_backend("triton"):
        (d,) = torch.autograd.grad(mlp(randn(3, 384, seed=1), residual).sum(), residual)
    assert torch.equal(d, torch.ones(3, 384))


@pytest.mark.interpret
def test_a_residual_elsewhere_is_refused():
    mlp, x = StarMLP(16), randn(3, 16)
    with use_backend("triton"), pytest.raises(RuntimeError, match="residual is a Tensor on meta"):
        mlp(x, x.to("meta"))


@pytest.mark.interpret
def test_wide_layers_take_operands_at_any_address():
    mlp = StarMLP(512, 64, act="silu")
    x = randn(4 * 512 + 1)[1:].view(4, 512)
    assert x.data_ptr() % 16
    with use_backend("triton"):
        torch.testing.assert_close(mlp(x), star_mlp_formula(mlp, x), rtol=1e-4, atol=1e-5)


@pytest.mark.interpret
def test_wide_inference_keeps_no_branch():
    mlp, x = StarMLP(400, 64, act="silu"), randn(4, 400)
    shapes = []

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if "star_mlp_wide" in func._schema.name:
                shapes.extend(tuple(t.shape) for t in out)
            return out

    with torch.no_grad(), use_backend("triton"), Shapes():
        mlp(x)
    assert shapes == [(4, 400), (0,), (0,)]


@pytest.mark.interpret
def test_channels_last_branches_stay_so():
    x1, x2 = (
        randn(2, 3, 4, 5, seed=s).contiguous(memory_format=torch.channels_last) for s in (0, 1)
    )
    with use_backend("triton"):
        y = star(x1, x2, "silu")
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, star(x1, x2, "silu"))


# --- starified models and networks of policies under Triton's kernels: interpreted, or on a GPU


def projected():
    """Return a plain MLP as a star with a gate that is not zero, fused."""
    mlp = starify(torch.nn.Sequential(MLP()))
    with torch.no_grad():
        for i, p in enumerate(gate_parameters(mlp)):
            p.copy_(0.3 * randn(*p.shape, seed=i))
    return starify(mlp, mode="fuse")


def grown():
    mlp = starify(torch.nn.Sequential(Gated()), grow=2)
    with torch.no_grad():
        for i, p in enumerate(mlp.parameters()):
            p.copy_(0.3 * randn(*p.shape, seed=i))
    return starify(mlp, mode="fuse")


#: name -> (starified MLP, ops that one forward and backward call)
STARIFIED = {
    "gated": (lambda: starify(Gated(), mode="fuse"), {"star_mlp": 1}),
    "recomputed": (lambda: starify(Gated(), mode="fuse", recompute=True), {"star_mlp": 1}),
    "packed": (lambda: starify(Packed(), mode="fuse"), {"star": 1}),
    "packed, gate last": (lambda: starify(Packed(gate_last=True), mode="fuse"), {"star": 1}),
    "grown": (grown, {"star": 2}),
    "plain": (projected, {"star": 1}),
}


def gradients_held_to_eager(module, x, ops):
    with use_backend("eager"):
        expected = gradients(copy.deepcopy(module), x)
    with use_backend("triton"), RecordOps() as record:
        values = gradients(module, x)
    ran = {n.split("::")[1]: k for n, k in record.counts.items() if n.startswith("starlayers::")}
    assert ran == ops | {f"{name}_backward": count for name, count in ops.items()}
    assert_close_in_scale(values, expected, 1e-5)


@pytest.mark.interpret
@pytest.mark.parametrize("name", STARIFIED)
def test_starified_mlps(name):
    make, ops = STARIFIED[name]
    gradients_held_to_eager(make(), randn(5, 8), ops)


#: name -> (network, ops that one forward and backward call)
NETWORKS = {
    "layer": (lambda: PackedStar(6, 20, act="tanh"), {"star": 1}),
    "stack": (lambda: StarStack(2, 6, [20, 8], act="tanh"), {"star": 2}),
}


@pytest.mark.interpret
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_policies(name, monkeypatch):
    # a CPU computes these small products in torch code: only a GPU uses the kernel
    make, ops = NETWORKS[name]
    network, x = make(), randn(5, 6)
    expected = gradients(copy.deepcopy(network), x)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    gradients_held_to_eager(network, x, ops)
    assert_close_in_scale(gradients(network, x), expected, 1e-5)


# --- star layers of starify on Triton kernels: in the interpreter, or on a GPU


def fused(model, **options):
    return starify(model, mode="fuse", **options)


def grown_gated(model):
    return fused(train_gates(starify(model, grow=2)))


def gated_plain(gate):
    return fused(train_gates(starify(MLP(act=nn.SiLU()), gate=gate)))


#: name -> how the model is made, kernels of its forward
CASES = {
    "gated": (lambda: fused(Gated()), ["mlp_forward"]),
    "gated, recompute": (lambda: fused(Gated(), recompute=True), ["mlp_forward"]),
    "packed": (lambda: fused(Packed()), ["star_forward"]),
    "packed, gate last": (lambda: fused(Packed(gate_last=True)), ["star_forward"]),
    "grown": (lambda: grown_gated(Gated()), ["star_forward"] * 2),
    "full gate": (lambda: gated_plain("full"), ["star_forward"]),
}


@pytest.mark.interpret
@pytest.mark.parametrize("name", CASES)
def test_star_layers_launch_kernels_and_agree_with_eager(name, launches):
    make, kernels = CASES[name]
    torch.manual_seed(0)
    model, x = make(), randn(5, 8)
    with use_backend("eager"):
        eager = gradients(model, x)
        exact = gradients(copy.deepcopy(model).double(), x.double())
    assert launches == []
    with use_backend("triton"):
        with torch.no_grad():
            y = model(x)
        assert [kernel for kernel, _, _ in launches] == kernels
        launches.clear()
        ours = gradients(model, x)
    assert len(launches) > len(kernels)  # those of the backward, too
    assert_as_exact_as_eager([y], eager[:1], exact[:1], sums=True)
    assert_as_exact_as_eager(ours, eager, exact, sums=True)


@pytest.mark.interpret
def test_a_scale_gate_has_no_kernel():
    model = gated_plain("scale")
    with (
        use_backend("triton"),
        pytest.raises(RuntimeError, match=r"cannot serve this star: shapes \(5, 16\), \(16,\)"),
    ):
        model(randn(5, 8))
