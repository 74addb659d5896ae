"""Backend switch, and the conditions under which a star layer runs fused."""

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
    "fused_mlp_blocker",
    "star_blocker",
    "use_backend",
]

#: names that `use_backend` and the environment variable accept
BACKENDS = ("auto", "eager", "triton")
ENV_VAR = "STARLAYERS_BACKEND"

# Least bytes of one hidden branch for the row-blocked CPU op. Measured on 2 AMD EPYC cores (vision
# speed benchmark): below, the op's overhead or the two matrix products that its backward recomputes
# cost more than the memory traffic they save. glibc returns allocations above 32 MiB to the system,
# so a larger hidden activation pays for its page faults at every use: recomputing wins from there.
MIN_HIDDEN_BYTES_INFERENCE = 2 * 2**20
MIN_HIDDEN_BYTES_TRAINING = 16 * 2**20

# Least elements for the fused star (K1) on a GPU: for fewer, the two or three launches of eager
# PyTorch cost less than dispatching one op. Not measured: a launch takes about 5 us, the time in
# which an H100 moves this many elements.
MIN_ELEMENTS_STAR = 2**20

# Least rows for the fused star MLP on a GPU. Each tile of rows runs on one multiprocessor, so with
# few rows most multiprocessors idle, while cuBLAS splits the columns too. On an H100 a star MLP of
# 128 channels in bfloat16 takes 23 us fused and 20 us eager for 1024 rows, and 22 us and 60 us for
# 16384. Rows of at most MAX_BYTES_ANY_ROWS bytes are fast enough at any number of rows.
MIN_ROWS = 4096
MAX_BYTES_ANY_ROWS = 128

#: exact types of the tensors that kernels accept: a subclass may compute something else
PLAIN = (Tensor, nn.Parameter)
T = TypeVar("T")

_forced: ContextVar[str | None] = ContextVar("starlayers_backend", default=None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose how star layers compute inside a `with` block.

    The environment variable `STARLAYERS_BACKEND` does the same outside of blocks.

    `"auto"` uses a fused path where one applies and falls back silently; `"eager"` always runs
    the PyTorch definition; `"triton"` requires the fused GPU kernels and raises where they do not
    apply. Blocks nest, and a block overrides the environment variable, which is read at every
    call. A compiled function keeps the backend it was traced with.

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
    """Return the backend in effect: "auto", "eager" or "triton".

    Raises:
        ValueError: `STARLAYERS_BACKEND` holds an unknown name.

    Example:
        >>> backend_name()
        'auto'
    """
    return _forced_name() or _checked(os.environ.get(ENV_VAR) or "auto", ENV_VAR)


def _forced_name() -> str | None:
    return _forced.get()


# Dynamo cannot trace a context variable before PyTorch 2.12. This mark makes it call the function
# once while tracing and keep the result. It is what torch.compiler.assume_constant_result sets; the
# decorator itself would import the compiler.
_forced_name._dynamo_marked_constant = True  # type: ignore[attr-defined]


def with_this_backend(call: Callable[..., T]) -> Callable[..., T]:
    """Wrap `call` so that it always runs on the backend that is in effect now.

    A checkpoint repeats the forward during the backward. That may happen outside of the
    `use_backend` block, and on a thread of autograd, which does not see context variables.

    Example:
        >>> with use_backend("eager"):
        ...     name = with_this_backend(backend_name)
        >>> backend_name(), name()
        ('auto', 'eager')
    """
    if torch.compiler.is_compiling():  # a compiled function keeps its backend anyway
        return call
    name = backend_name()

    def wrapped(*args: object, **kwargs: object) -> T:
        with use_backend(name):
            return call(*args, **kwargs)

    return wrapped


def recomputed(call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Run `call(*args)` as a checkpoint: save the inputs, repeat it in the backward.

    The repetition runs on the backend that is in effect now. `kwargs` go to
    `torch.utils.checkpoint.checkpoint`, which passes those it does not know on to `call`.

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
    """Return why `mlp(x, residual)` must run eager, or None if a fused op applies.

    On a GPU the fused op is the Triton kernel, on a CPU the row-blocked op. docs/backends.md lists
    all conditions and reasons.

    Raises:
        RuntimeError: the backend is "triton" and no kernel applies; the message gives the reason.

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
    """Return why `star(x1, x2, act)` must run eager, or None if its kernel applies.

    Raises:
        RuntimeError: the backend is "triton" and no kernel applies; the message gives the reason.

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
    """Return `reason`, or raise it as an error if the backend is "triton".

    `what` names the layer in the error message.

    Raises:
        RuntimeError: the backend is "triton" and `reason` is not None.

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
    """Return why no Triton kernel may take `tensors`, or None if one may.

    The first tensor is the input of the layer; the others are its parameters or further inputs.

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
    dtype = compute_dtype(x)
    if INTERPRET and backend_name() != "triton":
        return "the interpreter is for testing: it serves where use_backend('triton') asks for it"
    if any(type(t) not in PLAIN for t in tensors) and not exporting():
        return f"an input is a {next(type(t).__name__ for t in tensors if type(t) not in PLAIN)}"
    if any(t.device != x.device for t in tensors):
        return "the tensors are on several devices"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"dtype {dtype} (needs float32, float16 or bfloat16)"
    if not torch.is_autocast_enabled(x.device.type) and any(t.dtype != dtype for t in tensors):
        return "input and parameters differ in dtype and autocast is off"
    if get_activation(act).name not in TRITON_ACTIVATIONS:
        return f"activation {act!r} has no Triton form"
    return _traced_blocker()


def exporting() -> bool:
    """Return True if torch.export is tracing.

    `torch.compiler.is_exporting()` is True in all compiled code of PyTorch 2.11, hence the flag
    behind it.

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
    """Return the dtype in which a linear layer computes `x`: autocast's if it is on.

    Example:
        >>> compute_dtype(torch.ones(2))
        torch.float32
    """
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def needs_gradients(*tensors: Tensor | None) -> bool:
    """Return True if autograd needs a gradient through any of these tensors.

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
        return None  # too wide for K3, but then the op for wide layers runs
    return reason


def definition_blocker(mlp: "StarMLP") -> str | None:
    """Return why the options or branches of `mlp` rule a fused op out, or None.

    The input does not matter here: the fused ops compute one product of two plain linear branches.

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
        # a compiler fuses the plain definition itself, and an exported graph stays portable
        return "being compiled or exported"
    hidden_bytes = x.shape[:-1].numel() * mlp.hidden_features * x.element_size()
    small = f"hidden activation of {hidden_bytes} bytes is small enough for eager"
    if hidden_bytes < min(MIN_HIDDEN_BYTES_INFERENCE, MIN_HIDDEN_BYTES_TRAINING):
        return small  # tested first: the other tests would slow a small layer down
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
    """Return True if `m` is exactly a `kind` and nothing is attached to it.

    Hooks and a replaced `forward` count as attached: a fused path would skip them.

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
    """Return True if `m` is a plain `nn.Linear` whose weight is a parameter.

    Example:
        >>> is_plain_linear(nn.Linear(2, 2)), is_plain_linear(nn.Identity())
        (True, False)
    """
    # torch.export replaces parameters by fake tensors while it traces
    return is_plain(m, nn.Linear) and (type(m.weight) is nn.Parameter or exporting())


def _transformed() -> bool:
    # vmap, grad or jvp: PyTorch has no public function that tells whether one is active
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )
