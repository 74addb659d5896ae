"""How a kernel becomes a library op: one registration for GPUs, CPUs and the Triton interpreter."""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "HAS_TRITON",
    "INTERPRET",
    "TRITON_ACTIVATIONS",
    "cast",
    "ceil_div",
    "define_op",
    "given",
    "launch",
    "library_gradients",
    "multiprocessors",
    "no_autocast",
    "precision",
    "tap_rows",
    "unit_stride",
]

#: whether kernels run in Triton's interpreter, on CPU tensors; read once, as Triton itself does
INTERPRET = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")
HAS_TRITON = find_spec("triton") is not None

#: rows of `ACTIVATIONS` that have a Triton form, in `device/activation.py`
TRITON_ACTIVATIONS = frozenset(
    (
        "identity",
        "relu",
        "relu6",
        "gelu",
        "gelu_tanh",
        "silu",
        "quick_gelu",
        "sigmoid",
        "tanh",
        "softplus",
        "squared_relu",
        "hardswish",
    )
)

Impl = Callable[..., Any]


def define_op(name: str, kernel: Impl, *, plain: Impl, fake: Impl, traced: bool = True) -> Any:
    """Register `starlayers::name`, whose definition is `plain` (torch ops, any device and dtype).

    `kernel(*args)` launches Triton; it serves GPUs, and CPUs too under TRITON_INTERPRET=1.
    Without Triton, and for float64, `plain` serves. `fake` gives shapes and dtypes. All three
    have one signature, and no op writes into its inputs.

    The definition stays at hand as `op.plain`. Compiled graphs see the Triton kernels themselves
    (`triton_op`), except where `traced` is False (kernels over tensor descriptors, which a tracer
    cannot carry) and under the interpreter, which cannot run on fake tensors.
    """
    schema = torch.library.infer_schema(plain, mutates_args=())
    qualified = f"starlayers::{name}"
    if not HAS_TRITON:
        op: Any = torch.library.custom_op(qualified, plain, mutates_args=(), schema=schema)
        op.register_fake(fake)
    elif INTERPRET:
        op = torch.library.custom_op(
            qualified, _interpreted(kernel, plain, fake), mutates_args=(), schema=schema
        )
        op.register_fake(fake)
    else:

        def serve(*args: Any) -> Any:
            first: Tensor = args[0]
            # float64 is for checking; CPU tensors arrive here only while a compiler traces
            if first.device.type == "cpu" or first.dtype == torch.float64:
                return plain(*args)
            with _device_of(first):
                return kernel(*args)

        # triton_op reads it before PyTorch 2.12 or so, whatever schema it is given
        serve.__signature__ = inspect.signature(plain)  # type: ignore[attr-defined]
        define = torch.library.triton_op if traced else torch.library.custom_op
        op = define(qualified, serve, mutates_args=(), schema=schema)
        op.register_kernel("cpu")(plain)
        op.register_fake(fake)  # shapes alone, where tracing `plain` would fix the number of rows
    op.plain = plain
    return op


def _interpreted(kernel: Impl, plain: Impl, fake: Impl) -> Impl:
    """The interpreter computes bfloat16 on its raw bits, so it is given float32 instead."""

    def serve(*args: Any) -> Any:
        tensors = [a for a in args if isinstance(a, Tensor)]
        if tensors[0].dtype == torch.float64:
            return plain(*args)
        if not any(t.dtype == torch.bfloat16 for t in tensors):
            return kernel(*args)
        wanted = fake(*(a.to("meta") if isinstance(a, Tensor) else a for a in args))
        found = kernel(*(_widened(a) if isinstance(a, Tensor) else a for a in args))
        if isinstance(found, Tensor):
            return found.to(wanted.dtype)
        return tuple(f.to(w.dtype) for f, w in zip(found, wanted, strict=True))

    return serve


def _widened(t: Tensor) -> Tensor:
    return t.float() if t.dtype == torch.bfloat16 else t


def launch(kernel: Any, grid: tuple[Any, ...], *args: Any, **options: Any) -> None:
    """Run a Triton kernel so that a tracing compiler can see it."""
    torch.library.wrap_triton(kernel)[grid](*args, **options)


@contextmanager
def _device_of(x: Tensor) -> Iterator[None]:
    # Triton launches on the current device, whichever device the tensors are on.
    if x.is_cuda and torch.cuda.device_count() > 1:
        with torch.cuda.device(x.device):
            yield
    else:
        yield


@contextmanager
def no_autocast(x: Tensor) -> Iterator[None]:
    """The op's own arithmetic, whatever autocast the caller is under."""
    if torch.is_autocast_enabled(x.device.type):  # otherwise nothing for a traced graph to carry
        with torch.autocast(x.device.type, enabled=False):
            yield
    else:
        yield


def library_gradients(
    reference: Impl, inputs: list[Any], needs: tuple[bool, ...], grads: list[Tensor]
) -> tuple[Tensor | None, ...]:
    """Gradients of `reference(*inputs)` as torch sees them, themselves differentiable.

    This is what an op's backward returns under `create_graph=True`: the definition supplies every
    higher derivative.
    """
    # one view each, so that tied weights still get one gradient per role
    inputs = [t.view_as(t) if isinstance(t, Tensor) else t for t in inputs]
    with no_autocast(inputs[0]):
        outputs = reference(*inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    found = iter(
        torch.autograd.grad(outputs, wanted, grads, create_graph=True, materialize_grads=True)
    )
    return tuple(next(found) if need else None for need in needs)


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; an H100's where there is none to ask."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def unit_stride(t: Tensor) -> Tensor:
    """`t` with its last dimension dense: a view where it is one already."""
    return t if t.shape[-1] == 1 or t.stride(-1) == 1 else t.contiguous()


def precision(x: Tensor) -> str:
    """How a kernel multiplies float32: as accurately as torch would under the user's setting."""
    if x.dtype != torch.float32 or torch.version.hip:
        return "ieee"
    chosen = torch.backends.cuda.matmul.fp32_precision
    if chosen == "none":
        chosen = torch.backends.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if chosen == "tf32" else "tf32x3"


def cast(t: Tensor | None, dtype: torch.dtype) -> Any:
    """`t` in `dtype`: itself where it already is, or is None."""
    return t if t is None or t.dtype == dtype else t.to(dtype)


def given(t: Tensor | None, other: Tensor) -> Tensor:
    """`t`, dense but for its rows, or `other` as a pointer that the kernel will not follow.

    `other` is a weight: were it a computed activation, Inductor would copy it for each such use.
    """
    return other if t is None else unit_stride(t)


def tap_rows(k: Tensor) -> Tensor:
    """Depthwise kernels (C, 1, K, K) as (K K, C) in float32: a warp reads neighbouring channels."""
    return k.reshape(k.shape[0], -1).t().contiguous().float()


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)
