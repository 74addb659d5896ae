"""Registration of kernels as library ops, and small helpers of their launches."""

import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "HAS_TRITON",
    "INTERPRET",
    "KERNEL_DEVICES",
    "Launch",
    "MLPGradients",
    "MLPWeights",
    "autocasts",
    "cast",
    "ceil_div",
    "compute_dtype",
    "define_gradient",
    "define_op",
    "first_misfit",
    "flattened",
    "launch",
    "library_gradients",
    "multiprocessors",
    "needs_gradients",
    "no_autocast",
    "pointer",
    "precision",
    "recorded_launches",
    "tap_rows",
    "unit_stride",
]

#: True if kernels run in Triton's interpreter, on CPU tensors; read once, as Triton itself does
INTERPRET = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")
#: types of devices on which kernels run
KERNEL_DEVICES = {"cuda", "cpu"} if INTERPRET else {"cuda"}
#: True if Triton is installed; importing it would cost more than looking for it
HAS_TRITON = find_spec("triton") is not None

#: names in `ACTIVATIONS` that have a Triton form, in `device/activation.py`

#: implementation of an op: kernel launch, definition or fake
Impl = Callable[..., Any]


class MLPWeights(NamedTuple):
    """Parameters of a star MLP in the order of an op's arguments; a missing bias is `None`."""

    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    w3: Tensor
    b3: Tensor | None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Channels of the input, of the product and of the result."""
        return self.w1.shape[1], self.w1.shape[0], self.w3.shape[0]

    @property
    def misfit(self) -> str:
        """Say which parameter has a shape that its layer has not, as one that is broadcast has."""
        width, hidden, out = self.sizes
        shapes = ((hidden, width), (hidden,), (hidden, width), (hidden,), (out, hidden), (out,))
        return first_misfit(zip(self._fields, self, shapes, strict=True))

    def cast(self, dtype: torch.dtype) -> "MLPWeights":
        """Return all parameters in `dtype`."""
        return MLPWeights(*(cast(t, dtype) for t in self))


def first_misfit(expected: Iterable[tuple[str, Tensor | None, tuple[int, ...]]]) -> str:
    """Say which of the tensors, by name, has another shape than expected; empty if none has.

    Example:
        >>> first_misfit([("bias", torch.ones(1), (4,))])
        'bias has shape (1,), not (4,)'
    """
    for name, t, shape in expected:
        if t is not None and t.shape != shape:
            return f"{name} has shape {tuple(t.shape)}, not {shape}"
    return ""


#: gradients of x and of the six weights; a missing bias has one too, which nobody reads
MLPGradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def flattened(call: Impl) -> Impl:
    """Return `call` with the fields of its NamedTuples as arguments of their own.

    An op takes tensors and plain values; its implementation may group them.
    """
    signature = inspect.signature(call)
    arguments: list[inspect.Parameter] = []
    groups: list[tuple[int, int, Impl]] = []
    for parameter in signature.parameters.values():
        kind, first = parameter.annotation, len(arguments)
        if not hasattr(kind, "_fields"):
            arguments.append(parameter)
            continue
        fields = kind.__annotations__.items()
        arguments += [parameter.replace(name=name, annotation=t) for name, t in fields]
        groups.append((first, len(arguments), kind))

    def flat(*args: Any) -> Any:
        grouped = list(args)
        for first, last, group in reversed(groups):
            grouped[first:last] = [group(*args[first:last])]
        return call(*grouped)

    flat.__signature__ = signature.replace(parameters=arguments)  # type: ignore[attr-defined]
    return flat


#: ops are defined and implemented one level below `torch.library.custom_op`, whose first call
#: imports the compiler: 900 modules, a second. A compiler sees each op as one opaque call.
LIBRARY = torch.library.Library("starlayers", "FRAGMENT")


def define_op(name: str, kernel: Impl | None, *, plain: Impl, fake: Impl) -> Any:
    """Register `starlayers::name` and return the op.

    The implementations write into no input and have the signature of the op, in which the fields
    of a NamedTuple are arguments of their own.

    Args:
        name: of the op in the namespace `starlayers`.
        kernel: launches Triton kernels, on GPUs and under TRITON_INTERPRET=1 on CPUs; `None` for an
            op that consists of others and runs `plain` everywhere.
        plain: the definition in torch ops, for any device and dtype. It runs on CPUs, for float64
            and without Triton, and remains available as `op.plain`.
        fake: empty outputs of the right shapes and dtypes.
    """
    plain, fake = flattened(plain), flattened(fake)
    schema = torch.library.infer_schema(plain, mutates_args=(), op_name=name)
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, plain, "CompositeExplicitAutograd")
    if kernel is not None and HAS_TRITON:
        kernel = flattened(kernel)
        call = _interpreted(kernel, plain, fake) if INTERPRET else _on_gpu(kernel, plain)
        LIBRARY.impl(name, call, "CPU" if INTERPRET else "CUDA")
    # tracing the definition instead would fix the number of rows
    torch.library.register_fake(f"starlayers::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.starlayers, name).default
    op.plain = plain
    return op


def define_gradient(op: Any, backward: Impl, save: Impl) -> None:
    """Register the backward of an op: `backward(ctx, *grads)` after `save(ctx, inputs, output)`."""
    torch.library.register_autograd(op.name(), backward, setup_context=save, lib=LIBRARY)


def _on_gpu(kernel: Impl, plain: Impl) -> Impl:
    """Return `kernel` on the device of its first argument, or `plain` for float64."""

    def on_gpu(*args: Any) -> Any:
        first: Tensor = args[0]
        if first.dtype == torch.float64:  # for checking
            return plain(*args)
        with _device_of(first):
            return kernel(*args)

    return on_gpu


def _interpreted(kernel: Impl, plain: Impl, fake: Impl) -> Impl:
    """Wrap `kernel` for Triton's interpreter: float64 by `plain`, bfloat16 as float32.

    The interpreter computes on the raw bits of a bfloat16. The wrapper casts such inputs to float32
    and the outputs back to the dtypes that `fake` returns.
    """

    def interpreted(*args: Any) -> Any:
        tensors = [a for a in args if isinstance(a, Tensor)]
        if tensors[0].dtype == torch.float64:
            return plain(*args)
        if not any(t.dtype == torch.bfloat16 for t in tensors):
            return kernel(*args)
        expected = fake(*(a.to("meta") if isinstance(a, Tensor) else a for a in args))
        outputs = kernel(*(_widened(a) if isinstance(a, Tensor) else a for a in args))
        if isinstance(outputs, Tensor):
            return outputs.to(expected.dtype)
        return tuple(o.to(e.dtype) for o, e in zip(outputs, expected, strict=True))

    return interpreted


def _widened(t: Tensor) -> Tensor:
    return t.float() if t.dtype == torch.bfloat16 else t


class Launch(NamedTuple):
    """Launch of a Triton kernel that was recorded."""

    kernel: Any
    #: `None` in Triton's interpreter
    compiled: Any
    grid: tuple[int, ...]
    #: in the order of the kernel's own arguments
    arguments: tuple[Any, ...]
    #: of the compiler, such as `num_warps`
    options: dict[str, Any]


_recording: ContextVar[list[Launch] | None] = ContextVar("starlayers_launches", default=None)


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Record all launches of this thread inside the `with` block, which run as ever."""
    launches: list[Launch] = []
    token = _recording.set(launches)
    try:
        yield launches
    finally:
        _recording.reset(token)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a Triton kernel on a grid of programs."""
    if INTERPRET:
        compiled = kernel[grid](*args, **options)
    else:
        from starlayers.kernels.device.compiled import launch_compiled  # which needs Triton

        compiled = launch_compiled(kernel, grid, args, options)
    launches = _recording.get()
    if launches is not None:
        named = [options.pop(name) for name in kernel.arg_names[len(args) :]]
        launches.append(Launch(kernel, compiled, grid, (*args, *named), options))


@contextmanager
def _device_of(x: Tensor) -> Iterator[None]:
    # Triton launches on the current device, which may not be that of the tensors
    if x.is_cuda and torch.cuda.device_count() > 1:
        with torch.cuda.device(x.device):
            yield
    else:
        yield


@contextmanager
def no_autocast(x: Tensor) -> Iterator[None]:
    """Switch autocast off on the device of `x`, inside the `with` block."""
    if autocasts(x):  # else a traced graph would hold a useless switch
        with torch.autocast(x.device.type, enabled=False):
            yield
    else:
        yield


def library_gradients(
    reference: Impl, inputs: list[Any], needs: tuple[bool, ...], grads: list[Tensor]
) -> tuple[Tensor | None, ...]:
    """Return differentiable gradients of `reference(*inputs)` by autograd.

    The backward of every op returns these under `create_graph=True`: all higher derivatives are
    those of the definition.

    Args:
        reference: the definition, a function of `inputs` to one tensor or several.
        inputs: tensors and `None` for those that are missing.
        needs: for each input, True if its gradient is needed.
        grads: upstream gradient of each output.

    Returns:
        One gradient per input, `None` where none is needed.
    """
    # a view of each, so that a weight used twice gets one gradient per use
    inputs = [t.view_as(t) if isinstance(t, Tensor) else t for t in inputs]
    with no_autocast(inputs[0]):
        outputs = reference(*inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    needed = [t for t, need in zip(inputs, needs, strict=True) if need]
    gradients = iter(
        torch.autograd.grad(outputs, needed, grads, create_graph=True, materialize_grads=True)
    )
    return tuple(next(gradients) if need else None for need in needs)


def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of `device`; an H100's 132 without a GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def unit_stride(t: Tensor) -> Tensor:
    """Return `t` with a last dimension of stride 1; a copy only if it has none."""
    return t if t.shape[-1] == 1 or t.stride(-1) == 1 else t.contiguous()


def precision(x: Tensor) -> str:
    """Return the `input_precision` of `tl.dot` for `x`, as the user set it in torch."""
    if x.dtype != torch.float32 or torch.version.hip:
        return "ieee"
    setting = torch.backends.cuda.matmul.fp32_precision
    if setting == "none":
        setting = torch.backends.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if setting == "tf32" else "tf32x3"


def cast(t: Tensor | None, dtype: torch.dtype) -> Any:
    """Return `t` in `dtype`; the same object if it has that dtype or is None."""
    return t if t is None or t.dtype == dtype else t.to(dtype)


def autocasts(x: Tensor) -> bool:
    """Return True if autocast is on for the device of `x`; "meta" has none."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer computes `x`: autocast's if it is on."""
    if x.dtype != torch.float64 and autocasts(x):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def needs_gradients(*tensors: Tensor | None) -> bool:
    """Return True if autograd needs a gradient through any of these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def pointer(t: Tensor | None, other: Tensor) -> Tensor:
    """Return `t` with unit column stride, or `other` if there is no `t`.

    A kernel needs a pointer for each argument, also for a missing one that it never reads. `other`
    should be a weight: a computed activation would be copied by Inductor for each such use.
    """
    return other if t is None else unit_stride(t)


def tap_rows(k: Tensor) -> Tensor:
    """Return depthwise kernels (C, 1, K, K) as (K K, C) in float32.

    Channels are then neighbours in memory, so that a warp reads one tap of many in one go.
    """
    return k.reshape(k.shape[0], -1).t().contiguous().float()


def ceil_div(a: int, b: int) -> int:
    """Return `a / b`, rounded up."""
    return -(-a // b)
