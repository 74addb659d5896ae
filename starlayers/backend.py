"""The one place that decides whether a star layer runs fused or eager."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from starlayers.activations import get_activation

if TYPE_CHECKING:
    from starlayers.modules import StarMLP

__all__ = [
    "BACKENDS",
    "backend_name",
    "checked_reason",
    "compute_dtype",
    "definition_blocker",
    "exporting",
    "fused_mlp_blocker",
    "is_plain",
    "is_plain_linear",
    "kernel_blocker",
    "needs_gradients",
    "recomputed",
    "star_blocker",
    "use_backend",
    "with_this_backend",
]

BACKENDS = ("auto", "eager", "triton")
ENV_VAR = "STARLAYERS_BACKEND"

# Measured on 2 AMD EPYC cores (benchmarks/vision.py speed): below these the op overhead, or the
# two recomputed matrix products of the backward, cost more than the memory traffic they save.
# glibc maps and unmaps every allocation past 32 MiB, so each use of a larger hidden activation
# pays for its page faults again: that is where recomputing starts to win in training.
MIN_HIDDEN_BYTES_INFERENCE = 2 * 2**20
MIN_HIDDEN_BYTES_TRAINING = 16 * 2**20

# On a GPU, eager's two or three launches for a product this small cost less than one op's dispatch.
# Not measured yet: a launch takes about 5 us, in which an H100 moves this many elements.
MIN_ELEMENTS_STAR = 2**20

# A row tile keeps one multiprocessor busy. With few rows most of them idle, while cuBLAS divides
# columns too: on an H100 a star MLP of 128 channels in bfloat16 takes 23 us fused and 20 eager for
# 1024 rows, 22 and 60 for 16384. Rows of at most so many bytes are fast enough at any number.
MIN_ROWS = 4096
MAX_BYTES_ANY_ROWS = 128

PLAIN = (Tensor, nn.Parameter)
T = TypeVar("T")

_forced: ContextVar[str | None] = ContextVar("starlayers_backend", default=None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose how star layers compute inside a `with` block (also env `STARLAYERS_BACKEND`).

    `"auto"` takes a fused path where one serves and falls back silently; `"eager"` always runs
    the PyTorch definition; `"triton"` demands the fused GPU kernels and raises where they cannot
    serve. Blocks nest, and an enclosing block wins over the environment variable, which is read
    at call time. A compiled function keeps the backend it was traced with.

    Raises:
        ValueError: `name` is not one of the three.

    Example:
        >>> with use_backend("eager"):
        ...     backend_name()
        'eager'
    """
    token = _forced.set(_checked(name, "use_backend"))
    try:
        yield
    finally:
        _forced.reset(token)


def backend_name() -> str:
    """The backend asked for here and now: "auto", "eager" or "triton".

    Raises:
        ValueError: `STARLAYERS_BACKEND` holds an unknown name.

    Example:
        >>> backend_name()
        'auto'
    """
    return _forced_name() or _checked(os.environ.get(ENV_VAR) or "auto", ENV_VAR)


def _forced_name() -> str | None:
    return _forced.get()


# Dynamo asks once, while it traces, and reads no variable's code, which it cannot before PyTorch
# 2.12. The mark is all that torch.compiler.assume_constant_result sets, without what that imports.
_forced_name._dynamo_marked_constant = True  # type: ignore[attr-defined]


def with_this_backend(call: Callable[..., T]) -> Callable[..., T]:
    """`call`, always under the backend of here and now: whenever it runs, and on whatever thread.

    A checkpoint runs a forward again in the backward, which may be outside of the `use_backend`
    block and on a thread of autograd's, where context variables are not set.

    Example:
        >>> with use_backend("eager"):
        ...     name = with_this_backend(backend_name)
        >>> backend_name(), name()
        ('auto', 'eager')
    """
    if torch.compiler.is_compiling():  # a compiled function keeps its backend as it is
        return call
    name = backend_name()

    def under(*args: object, **kwargs: object) -> T:
        with use_backend(name):
            return call(*args, **kwargs)

    return under


def recomputed(call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """`call(*args)` that saves only its inputs, and runs again in the backward on this backend.

    Keywords go to `torch.utils.checkpoint.checkpoint`, which hands on to `call` what it does not
    know.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> recomputed(torch.exp, x).sum().backward()
        >>> x.grad
        tensor([2.7183, 2.7183])
    """
    y: T = checkpoint(with_this_backend(call), *args, use_reentrant=False, **kwargs)
    return y


def _checked(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{where}: unknown backend {name!r}, choose one of {', '.join(BACKENDS)}")
    return name


def fused_mlp_blocker(mlp: "StarMLP", x: Tensor, residual: Tensor | None = None) -> str | None:
    """The predicate: why `mlp(x, residual)` must run eager, or `None` when a fused op serves.

    On a GPU that op is Triton's, on a CPU the row-blocked one; docs/backends.md has the table of
    conditions and reasons.

    Raises:
        RuntimeError: the backend is "triton" and it cannot serve; the message says why.

    Example:
        >>> from starlayers import StarMLP
        >>> fused_mlp_blocker(StarMLP(4), torch.ones(1, 4))
        'hidden activation of 64 bytes is small enough for eager'
    """
    name = backend_name()
    if name == "eager":
        return "the eager backend was asked for"
    on_cpu = x.device.type == "cpu" and not (name == "triton" and _interpreting())
    reason = _cpu_blocker(mlp, x) if on_cpu and name == "auto" else _gpu_blocker(mlp, x)
    if residual is not None and (type(residual) not in PLAIN or residual.device != x.device):
        reason = f"residual is a {type(residual).__name__} on {residual.device}"
    return checked_reason(reason, "this StarMLP")


def star_blocker(x1: Tensor, x2: Tensor, act: str | None) -> str | None:
    """Why the product of two ready branches must run eager, or `None` when its kernel serves.

    Raises:
        RuntimeError: the backend is "triton" and it cannot serve; the message says why.

    Example:
        >>> star_blocker(torch.ones(2), torch.ones(2), "relu6")
        "no Triton kernel for device 'cpu'"
    """
    name = backend_name()
    if name == "eager":
        return "the eager backend was asked for"
    reason = kernel_blocker((x1, x2), act)
    if x1.shape != x2.shape or x1.dtype != x2.dtype:
        reason = f"shapes {tuple(x1.shape)}, {tuple(x2.shape)} or dtypes {x1.dtype}, {x2.dtype}"
    if reason is None and name == "auto":
        if torch.compiler.is_compiling():
            reason = "being compiled: the compiler fuses the product itself"
        elif x1.numel() < MIN_ELEMENTS_STAR:
            reason = f"{x1.numel()} elements are few enough for eager"
    return checked_reason(reason, "this star")


def checked_reason(reason: str | None, what: str) -> str | None:
    """`reason`, unless the backend is "triton": then a reason is an error.

    Raises:
        RuntimeError: the backend is "triton" and there is a reason.

    Example:
        >>> checked_reason("too wide", "this layer")
        'too wide'
    """
    if reason is not None and backend_name() == "triton":
        raise RuntimeError(
            f"the triton backend cannot serve {what}: {reason}; use_backend('auto') falls back to "
            "PyTorch"
        )
    return reason


def kernel_blocker(tensors: Sequence[Tensor], act: str | None) -> str | None:
    """Why no Triton kernel may take these tensors, the first of which is the input.

    Example:
        >>> kernel_blocker([torch.ones(2)], None)
        "no Triton kernel for device 'cpu'"
    """
    from starlayers.kernels.registration import HAS_TRITON, INTERPRET, TRITON_ACTIVATIONS

    x = tensors[0]
    if x.device.type != "cuda" and not (INTERPRET and x.device.type == "cpu"):
        return f"no Triton kernel for device {x.device.type!r}"
    if not HAS_TRITON:
        return "Triton is not installed"
    kind = compute_dtype(x)
    if INTERPRET and backend_name() != "triton":
        return "the interpreter is for testing: it serves where use_backend('triton') asks for it"
    if any(type(t) not in PLAIN for t in tensors) and not exporting():
        return f"an input is a {next(type(t).__name__ for t in tensors if type(t) not in PLAIN)}"
    if any(t.device != x.device for t in tensors):
        return "the tensors are on several devices"
    if kind not in (torch.float32, torch.float16, torch.bfloat16):
        return f"dtype {kind} (needs float32, float16 or bfloat16)"
    if not torch.is_autocast_enabled(x.device.type) and any(t.dtype != kind for t in tensors):
        return "input and parameters differ in dtype and autocast is off"
    if get_activation(act).name not in TRITON_ACTIVATIONS:
        return f"activation {act!r} has no Triton form"
    return _traced_blocker()


def exporting() -> bool:
    """Whether torch.export traces. Its own question is answered yes in all compiled code of 2.11.

    Example:
        >>> exporting()
        False
    """
    return torch.compiler._is_exporting_flag


def _traced_blocker() -> str | None:
    if exporting() and backend_name() == "auto":
        return "being exported: the graph stays portable"
    if torch.compiler.is_compiling():
        return None
    if torch._C._get_tracing_state() is not None or _transformed():
        return "a functional transform or tracer is active"
    return None


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type a linear layer would compute `x` in: autocast's where it is on.

    Example:
        >>> compute_dtype(torch.ones(2))
        torch.float32
    """
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def needs_gradients(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for a backward of something made of these tensors.

    Example:
        >>> needs_gradients(torch.ones(1), None), needs_gradients(torch.ones(1, requires_grad=True))
        (False, True)
    """
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _interpreting() -> bool:
    from starlayers.kernels.registration import INTERPRET

    return INTERPRET


def _gpu_blocker(mlp: "StarMLP", x: Tensor) -> str | None:
    linears = (mlp.f1, mlp.f2, mlp.g)
    reason = definition_blocker(mlp)
    if reason is not None:
        return reason
    parameters = [p for m in linears for p in m.parameters()]
    reason = kernel_blocker((x, *parameters), mlp.act)
    if reason is not None:
        return reason
    from starlayers.kernels.layer import too_few, too_wide
    from starlayers.kernels.tuning import tuning

    training = needs_gradients(x, *parameters)
    reason = too_few(x, mlp)
    if reason is not None:
        return reason
    reason = too_wide(x.device, compute_dtype(x), mlp, training=training)
    if reason is None or mlp.recompute or tuning() or backend_name() == "triton":
        return None  # the wide op serves where the narrow one does not
    return reason


def definition_blocker(mlp: "StarMLP") -> str | None:
    """Why the fused ops do not compute what `mlp` is made to compute, whatever its input.

    Example:
        >>> from starlayers import StarMLP
        >>> definition_blocker(StarMLP(4, rank=2))
        "combine='mul', rank=2 (needs 'mul', 1)"
    """
    if mlp.combine != "mul" or mlp.rank != 1:
        return f"combine={mlp.combine!r}, rank={mlp.rank} (needs 'mul', 1)"
    if mlp.coefficients != "fixed":
        advice = "; fold() makes it" if mlp.coefficients == "scale" else ""
        return f"coefficients={mlp.coefficients!r} (needs 'fixed'{advice})"
    if not all(is_plain_linear(m) for m in (mlp.f1, mlp.f2, mlp.g)):
        return "a branch is hooked, parametrised, quantised or not nn.Linear"
    return None


def _cpu_blocker(mlp: "StarMLP", x: Tensor) -> str | None:
    if torch.compiler.is_compiling():
        # A compiler fuses the plain definition itself, and an exported graph stays portable.
        return "being compiled or exported"
    hidden_bytes = x.shape[:-1].numel() * mlp.hidden_features * x.element_size()
    small = f"hidden activation of {hidden_bytes} bytes is small enough for eager"
    if hidden_bytes < min(MIN_HIDDEN_BYTES_INFERENCE, MIN_HIDDEN_BYTES_TRAINING):
        return small  # first, because small layers are the ones that would notice the rest
    if _interpreting():
        return "Triton's interpreter replaces the CPU's own kernel"
    if type(x) not in PLAIN:
        return f"input is a {type(x).__name__}"
    reason = definition_blocker(mlp)
    if reason is not None:
        return reason
    parameters = [p for m in (mlp.f1, mlp.f2, mlp.g) for p in m.parameters()]
    if any(t.dtype != torch.float32 for t in (x, *parameters)):
        return f"dtype {x.dtype} (needs float32)"
    if any(p.device != x.device for p in parameters):
        return "the parameters are on another device"
    if not get_activation(mlp.act).closed_form:
        return f"activation {mlp.act!r} was registered without a derivative"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    reason = _traced_blocker()
    if reason is not None:
        return reason
    training = needs_gradients(x, *parameters)
    needed = MIN_HIDDEN_BYTES_TRAINING if training else MIN_HIDDEN_BYTES_INFERENCE
    return small if hidden_bytes < needed else None


def is_plain(m: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `m` is exactly a `kind`, with nothing attached that a fused path would skip.

    Example:
        >>> is_plain(nn.Linear(2, 2), nn.Linear), is_plain(nn.Identity(), nn.Linear)
        (True, False)
    """
    return type(m) is kind and not (
        m._forward_hooks
        or m._forward_pre_hooks
        or m._backward_hooks
        or m._backward_pre_hooks
        or "forward" in m.__dict__
        or torch.nn.modules.module._has_any_global_hook()
    )


def is_plain_linear(m: nn.Module) -> bool:
    """Whether `m` is a plain `nn.Linear` whose weight is an ordinary parameter.

    Example:
        >>> is_plain_linear(nn.Linear(2, 2)), is_plain_linear(nn.Identity())
        (True, False)
    """
    # torch.export puts fake tensors in the place of parameters while it traces
    return is_plain(m, nn.Linear) and (type(m.weight) is nn.Parameter or exporting())


def _transformed() -> bool:
    # vmap, grad, jvp: PyTorch has no public question for "is a transform active".
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )
