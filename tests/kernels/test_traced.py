"""Ops as a compiler sees them on a GPU: Triton's kernels, traced without a GPU."""

import pytest
import torch
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._subclasses.fake_tensor import FakeTensorMode

from starlayers.kernels import registration
from starlayers.kernels.tiles import MLP_BACKWARD, mlp_tile
from tests.kernels.cases import calls

MERGE = ("merge_statistics", {"mean", "var"})
WRAPPER = "triton_kernel_wrapper_functional"
#: op -> (kernel, arguments that it writes) by launch, where no table of tiles decides
KERNELS = {
    "star": [("star_forward", {"y"})],
    "star packed, clamped": [("star_forward", {"y"})],
    "star_backward": [("star_grad", {"d1", "d2", "s"})],
    "star_backward packed, clamped": [("star_grad", {"d1", "d2"})],
    "star_mlp": [("mlp_forward", {"y", "parts"}), MERGE],
    "star_mlp bare": [("mlp_forward", {"y"})],
    "dwconv": [("dw_convolve", {"y", "parts"}), MERGE],
    "dwconv bare": [("dw_convolve", {"y"})],
    "dwconv_backward": [("dw_convolve", {"y", "parts"}), ("dw_weights", {"parts"})],
    "dwconv_backward bare": [("dw_convolve", {"y"}), ("dw_weights", {"parts"})],
}


def expected(name, dtype):
    if not name.startswith("star_mlp_backward"):
        return KERNELS[name]
    # 17 and 24 channels are padded to 32
    tiles = [
        mlp_tile(MLP_BACKWARD[kernel], torch.device("cuda"), 32, dtype.itemsize)
        for kernel in ("all", "dw")
    ]
    if tiles[0]:
        return [("mlp_dw", {"dx", "parts", "parts3"})]
    dx = {"dx"} if "bare" in name else {"dx", "g"}
    if tiles[1]:
        return [("mlp_dx", dx), ("mlp_dw", {"parts", "parts3"})]
    return [("mlp_dx", dx | {"d1", "d2", "s", "sums"})]


@pytest.fixture
def imagined_gpu(monkeypatch):
    """Pretend that there is an H100, for Triton's analysis; nothing can run on it."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    class Imagined(CudaDriver):
        def __init__(self):
            pass

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    assert not registration.INTERPRET
    monkeypatch.setattr(driver, "_active", Imagined())


def traced(name, dtype):
    op, arguments = calls(dtype=dtype)[name]

    def f(*tensors):
        rest = iter(tensors)
        outputs = op(*(next(rest) if isinstance(a, torch.Tensor) else a for a in arguments))
        return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)

    with FakeTensorMode():
        tensors = [
            torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="cuda")
            for a in arguments
            if isinstance(a, torch.Tensor)
        ]
        return aot_export_joint_simple(f, tensors, trace_joint=False)


QUICK = ("star packed, clamped", "star_mlp", "star_mlp_backward", "dwconv_backward bare")
TRACED = [
    pytest.param(
        name,
        dtype,
        marks=() if name in QUICK and dtype == torch.bfloat16 else pytest.mark.slow,
    )
    for name in calls()
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.usefixtures("imagined_gpu")
@pytest.mark.parametrize(("name", "dtype"), TRACED)
def test_a_compiler_sees_the_kernels_and_what_they_write(name, dtype):
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    graph = traced(name, dtype).graph
    launches = [n for n in graph.nodes if str(n.target) == WRAPPER]
    kernels = [
        (
            kernel_side_table.get_kernel(n.kwargs["kernel_idx"]).fn.__name__,
            set(n.kwargs["tensors_to_clone"]),
        )
        for n in launches
    ]
    assert kernels == expected(name, dtype)
    assert not [n for n in graph.nodes if str(n.target).startswith("starlayers.")]


@pytest.mark.usefixtures("imagined_gpu")
def test_float64_is_traced_as_its_definition():
    graph = traced("star_mlp", torch.float64).graph
    assert not [n for n in graph.nodes if str(n.target) == WRAPPER]
    assert [n for n in graph.nodes if "mm" in str(n.target)]
