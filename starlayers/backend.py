"""The one place that decides whether a star layer runs fused or eager."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from starlayers.activations import get_activation

if TYPE_CHECKING:
    from starlayers.modules import StarMLP

__all__ = ["BACKENDS", "backend_name", "fused_mlp_blocker", "use_backend"]

BACKENDS = ("auto", "eager", "triton")
ENV_VAR = "STARLAYERS_BACKEND"

# Measured on 2 AMD EPYC cores (benchmarks/vision.py speed): below these the op overhead, or the
# two recomputed matrix products of the backward, cost more than the memory traffic they save.
# glibc maps and unmaps every allocation past 32 MiB, so each use of a larger hidden activation
# pays for its page faults again: that is where recomputing starts to win in training.
MIN_HIDDEN_BYTES_INFERENCE = 2 * 2**20
MIN_HIDDEN_BYTES_TRAINING = 16 * 2**20

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
    return _forced.get() or _checked(os.environ.get(ENV_VAR) or "auto", ENV_VAR)


def _checked(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{where}: unknown backend {name!r}, choose one of {', '.join(BACKENDS)}")
    return name


def fused_mlp_blocker(mlp: "StarMLP", x: Tensor) -> str | None:
    """The predicate: why `mlp(x)` must run eager, or `None` when the fused op serves.

    The fused op (`starlayers/kernels/star_mlp.py`) today has a CPU implementation only; the
    Triton kernels plug in here.

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
    reason = _blocker(mlp, x)
    if name == "triton":
        raise RuntimeError(
            "the triton backend cannot serve this StarMLP: "
            + (reason or "no Triton kernel for it in this version")
            + "; use_backend('auto') falls back to PyTorch"
        )
    return reason


def _blocker(mlp: "StarMLP", x: Tensor) -> str | None:
    if torch.compiler.is_compiling():
        # A compiler fuses the plain definition itself, and an exported graph stays portable.
        return "being compiled or exported"
    if x.device.type != "cpu":
        return f"no fused kernel for device {x.device.type!r}"
    hidden_bytes = x.shape[:-1].numel() * mlp.hidden_features * x.element_size()
    small = f"hidden activation of {hidden_bytes} bytes is small enough for eager"
    if hidden_bytes < min(MIN_HIDDEN_BYTES_INFERENCE, MIN_HIDDEN_BYTES_TRAINING):
        return small  # first, because small layers are the ones that would notice the rest
    if type(x) not in (Tensor, nn.Parameter):
        return f"input is a {type(x).__name__}"
    if mlp.combine != "mul" or mlp.rank != 1:
        return f"combine={mlp.combine!r}, rank={mlp.rank} (needs 'mul', 1)"
    linears = (mlp.f1, mlp.f2, mlp.g)
    if not all(is_plain_linear(m) for m in linears):
        return "a branch is hooked, parametrised, quantised or not nn.Linear"
    parameters = [p for m in linears for p in m.parameters()]
    if any(t.dtype != torch.float32 for t in (x, *parameters)):
        return f"dtype {x.dtype} (needs float32)"
    if any(p.device != x.device for p in parameters):
        return "the parameters are on another device"
    if not get_activation(mlp.act).closed_form:
        return f"activation {mlp.act!r} was registered without a derivative"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if torch._C._get_tracing_state() is not None or _transformed():
        return "a functional transform or tracer is active"
    training = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters))
    needed = MIN_HIDDEN_BYTES_TRAINING if training else MIN_HIDDEN_BYTES_INFERENCE
    return small if hidden_bytes < needed else None


def is_plain_linear(m: nn.Module) -> bool:
    """Whether `m` is exactly `nn.Linear`, with nothing attached that a fused path would skip.

    Example:
        >>> is_plain_linear(nn.Linear(2, 2)), is_plain_linear(nn.Identity())
        (True, False)
    """
    return type(m) is nn.Linear and not (
        m._forward_hooks
        or m._forward_pre_hooks
        or m._backward_hooks
        or m._backward_pre_hooks
        or "forward" in m.__dict__
        or torch.nn.modules.module._has_any_global_hook()
        or type(m.weight) is not nn.Parameter
    )


def _transformed() -> bool:
    # vmap, grad, jvp: PyTorch has no public question for "is a transform active".
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )
