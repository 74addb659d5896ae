"""Starified models and networks of policies under Triton's kernels: interpreted, or on a GPU."""

import copy

import pytest
import torch
from torch import nn

from starlayers import use_backend
from starlayers.rl.stack import PackedStar, StarStack
from starlayers.surgery import gate_parameters, starify
from tests.helpers import (
    RecordOps,
    assert_as_exact_as_eager,
    assert_close_in_scale,
    gradients,
    randn,
)
from tests.surgery.small import MLP, Gated, Packed, train_gates


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


def held_to_eager(module, x, ops):
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
    held_to_eager(make(), randn(5, 8), ops)


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
    held_to_eager(network, x, ops)
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
