"""Launches of compiled kernels, without what Triton's JIT does before each.

It binds and specialises all arguments anew, 30 us for 30 of them. A compiled kernel takes 1 us. It
may be launched again with arguments of the same kind: equal integers and constants, and tensors of
the same dtype, whose addresses are as well aligned.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

__all__ = ["launch_compiled", "repeated", "stream"]

#: bytes to which Triton specialises the addresses of tensors
ALIGNMENT = 16

#: compiled kernels by all that Triton specialises on; emptied when there are MOST_COMPILED
_compiled: dict[Any, Any] = {}
MOST_COMPILED = 4096


def launch_compiled(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]
) -> Any:
    """Launch a kernel on a grid as `kernel[grid](*args, **options)` does; return it compiled.

    `args` are its tensors and integers, `options` its constants and those of the compiler.
    """
    key = _kind(kernel, args, options)
    compiled = None if key is None else _compiled.get(key)
    if compiled is None:
        compiled = kernel[grid](*args, **options)
        if key is not None:
            if len(_compiled) >= MOST_COMPILED:
                _compiled.clear()
            _compiled[key] = compiled
        return compiled
    x, y, z = (*grid, 1, 1)[:3]
    constants = [options[name] for name in kernel.arg_names[len(args) :]]
    compiled.run(
        x, y, z, stream(), compiled.function, compiled.packed_metadata, None, None, None,
        *args, *constants,
    )  # fmt: skip
    return compiled


def _kind(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Return all that a launch was compiled for; `None` where Triton is to look at it itself."""
    if torch.version.hip or kernel.pre_run_hooks or _hooked():
        return None
    kinds: list[Any] = [kernel.fn, driver.active.get_current_device()]
    for a in args:
        if isinstance(a, Tensor):
            kinds += (a.dtype, a.data_ptr() % ALIGNMENT)
        elif type(a) is int:
            kinds.append(a)  # of which Triton knows less: whether it is 1, and divisible by 16
        else:
            return None
    # 1, 1.0 and True are equal, but not as constants
    return (*kinds, *options.items(), *map(type, options.values()))


def _hooked() -> bool:
    """Return True if a profiler has hooks in launches, which want more than is passed here."""
    enter = knobs.runtime.launch_enter_hook
    return enter is not None and bool(getattr(enter, "calls", True))


def repeated(compiled: Any, grid: tuple[int, ...]) -> Callable[[int, list[Any]], object]:
    """Return a function of a stream and all arguments that launches a compiled kernel again."""
    x, y, z = (*grid, 1, 1)[:3]
    run, handle, metadata = compiled.run, compiled.function, compiled.packed_metadata

    def launch(stream: int, arguments: list[Any]) -> None:
        if _hooked():
            compiled[x, y, z](*arguments, stream=stream)
        else:
            run(x, y, z, stream, handle, metadata, None, None, None, *arguments)

    return launch


def stream() -> int:
    """Return PyTorch's current stream on the current device."""
    active = driver.active
    return active.get_current_stream(active.get_current_device())  # type: ignore[no-any-return]
