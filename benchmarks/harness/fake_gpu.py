"""A GPU that computes nothing: the whole path to a kernel's launch runs on a machine without one.

`install()` must come before the first import of `starlayers`, in a process of its own. Triton then
binds, specialises and compiles kernels for an H100 as ever, and only the launch does nothing. CPU
tensors take the place of the GPU's; what kernels should have written is garbage.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["install", "launched", "operations"]

#: names of the kernels that were launched
_launched: list[str] = []
#: operations of PyTorch that launch no kernel
VIEWS = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "expand", "lift_fresh",
    "permute", "reshape", "select", "slice", "split", "split_with_sizes", "squeeze", "t",
    "transpose", "unbind", "unflatten", "unsqueeze", "view",
    "resolve_conj", "resolve_neg", "result_type", "set_", "to", "_has_compatible_shallow_copy_type",
    "contiguous", "chunk", "narrow", "view_as",
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
}  # fmt: skip


def install() -> None:
    """Let Triton and starlayers take the CPU for an H100.

    Raises:
        RuntimeError: starlayers was imported before.
    """
    if "starlayers" in sys.modules:
        raise RuntimeError("fake_gpu.install() must come before the first import of starlayers")
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Launcher:
        def __init__(self, source: Any, metadata: Any) -> None:
            self.name = metadata.name

        def __call__(self, *args: Any) -> None:
            _launched.append(self.name)

    class Utils:
        def load_binary(self, *_: Any) -> tuple[int, ...]:
            return 1, 1, 0, 0, 1024  # module, function, registers, spills, threads

        def unload_module(self, *_: Any) -> None:
            pass

        def get_device_properties(self, _: int) -> dict[str, int]:
            return {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536}

    class Driver:
        utils, launcher_cls = Utils(), Launcher

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, _: int | None = None) -> int:
            return 0

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def map_python_to_cpp_type(self, kind: str) -> str:
            return kind

    driver.set_active(Driver())
    register = torch.library.Library.impl

    def on_cpu(self: Any, op: Any, function: Any, key: str = "", **options: Any) -> Any:
        return register(self, op, function, "CPU" if key == "CUDA" else key, **options)

    torch.library.Library.impl = on_cpu  # type: ignore[method-assign]
    from starlayers.kernels import registration

    registration.KERNEL_DEVICES.add("cpu")
    from starlayers.surgery import verify_gated

    # starify compares values, and the op it would compare is a kernel now
    verify_gated._fits_cpu_op = lambda *_: False  # type: ignore[assignment]


@contextmanager
def launched() -> Iterator[list[str]]:
    """Collect the names of the kernels launched inside the `with` block."""
    before = len(_launched)
    names: list[str] = []
    yield names
    names += _launched[before:]


@contextmanager
def operations() -> Iterator[list[str]]:
    """Collect PyTorch's own operations inside the block that would launch a kernel on a GPU."""
    names: list[str] = []
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        yield names
    for event in profiled.events():
        namespace, _, name = event.name.partition("::")
        inner = any(child.name.startswith("aten::") for child in event.cpu_children)
        if namespace == "aten" and name not in VIEWS and not inner:
            names.append(name)
