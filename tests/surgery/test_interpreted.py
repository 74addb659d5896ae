"""Star layers of starify on Triton kernels: in the interpreter, or on a GPU."""

import copy

import pytest
import torch
from torch import nn

from starlayers import starify, use_backend
from tests.helpers import assert_as_exact_as_eager, gradients, randn
from tests.kernels.conftest import _own_process, launches  # noqa: F401
from tests.surgery.small import MLP, Gated, Packed, train_gates

pytestmark = pytest.mark.interpret


def fused(model, **options):
    return starify(model, mode="fuse", **options)


def grown(model):
    return fused(train_gates(starify(model, grow=2)))


def gated_plain(gate):
    return fused(train_gates(starify(MLP(act=nn.SiLU()), gate=gate)))


#: name -> how the model is made, kernels of its forward
CASES = {
    "gated": (lambda: fused(Gated()), ["mlp_forward"]),
    "gated, recompute": (lambda: fused(Gated(), recompute=True), ["mlp_forward"]),
    "packed": (lambda: fused(Packed()), ["star_forward"]),
    "packed, gate last": (lambda: fused(Packed(gate_last=True)), ["star_forward"]),
    "grown": (lambda: grown(Gated()), ["star_forward"] * 2),
    "full gate": (lambda: gated_plain("full"), ["star_forward"]),
}


@pytest.mark.parametrize("name", CASES)
def test_star_layers_launch_kernels_and_agree_with_eager(name, launches):  # noqa: F811
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


def test_a_scale_gate_has_no_kernel():
    model = gated_plain("scale")
    with (
        use_backend("triton"),
        pytest.raises(RuntimeError, match=r"cannot serve this star: shapes \(5, 16\), \(16,\)"),
    ):
        model(randn(5, 8))
