"""Decision which path computes a star: a fused kernel, the CPU's own op, or the definition.

Decisions take tensors and plain values and return a `Plan`. Every layer asks here and nowhere else.
Plans are cached under all values that decide.
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from starlayers.activations import Activation, get_activation
from starlayers.backend import backend_name
from starlayers.kernels import registration
from starlayers.kernels.registration import MLPWeights, autocasts, compute_dtype, needs_gradients
from starlayers.kernels.tiles import MLP_BACKWARD, MLP_FORWARD, mlp_tile, split_columns
from starlayers.kernels.tuning import tuning

__all__ = [
    "Plan",
    "declined",
    "exporting",
    "forget_plans",
    "is_plain",
    "is_small",
    "plain_weights",
    "plan_block",
    "plan_early",
    "plan_mlp",
    "plan_star",
]

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

#: channels of the input, of the product and of the result
Sizes = tuple[int, int, int]

#: exact types of the tensors that kernels accept: a subclass may compute something else
PLAIN = (Tensor, nn.Parameter)


class Plan(NamedTuple):
    """Path of a call: "eager" for a reason, or one of the fused paths and its weights.

    Fused paths are "cpu" (blocks of rows on a CPU), "star", "star_mlp", "star_mlp_wide" and
    "block" (a whole StarBlock2d), the others by Triton kernels.

    Example:
        >>> print(plan_star(torch.ones(2), torch.ones(2), "relu6"))
        runs eager: no Triton kernel for device 'cpu'
    """

    path: str
    reason: str = ""
    weights: MLPWeights | None = None

    @property
    def fused(self) -> bool:
        """True unless the definition computes the call."""
        return self.path != "eager"

    def __str__(self) -> str:
        return f"runs eager: {self.reason}" if self.reason else f"runs fused: {self.path}"


ASKED_FOR = Plan("eager", "the eager backend was asked for")
COMPILED = Plan("eager", "being compiled or exported")
ON_CPU = Plan("eager", "no Triton kernel for device 'cpu'")
CPU_ASKED_FOR = Plan("eager", "the cpu backend was asked for, which has no op of this kind")
TRANSFORMED = "a functional transform or tracer is active"
NOT_LINEAR = "a branch is hooked, parametrised, quantised or not nn.Linear"


class Call(NamedTuple):
    """All that decides about the kernels of a call but its sizes."""

    backend: str
    activation: Activation
    #: dtype in which the call is computed
    dtype: torch.dtype
    autocast: bool
    #: "compile", "export" or "transform" while one of them is active
    tracer: str
    interpret: bool
    #: class, device and dtype of the input and of each parameter
    tensors: tuple[tuple[type, torch.device, torch.dtype], ...]


def plan_star(x1: Tensor, x2: Tensor, act: str | None) -> Plan:
    """Return the plan for `star(x1, x2, act)`.

    Raises:
        RuntimeError: the backend is "triton" and no kernel applies; the message gives the reason.

    Example:
        >>> plan_star(torch.ones(2), torch.ones(2), "relu6").path
        'eager'
    """
    plan = plan_early(x1)
    if plan is not None:
        return plan
    backend = backend_name()
    reason = _kernel_reason(_call(backend, act, (x1, x2)))
    if x1.shape != x2.shape or x1.dtype != x2.dtype:
        reason = f"shapes {tuple(x1.shape)}, {tuple(x2.shape)} or dtypes {x1.dtype}, {x2.dtype}"
    if not reason and backend == "auto":
        if torch.compiler.is_compiling():
            reason = "being compiled: the compiler fuses the product itself"
        elif x1.numel() < MIN_ELEMENTS_STAR:
            reason = f"{x1.numel()} elements are few enough for eager"
    return declined(reason, "this star") if reason else Plan("star")


def plan_early(x: Tensor) -> Plan | None:
    """Return the plan where the backend and the device of `x` alone rule Triton kernels out.

    Stars and blocks ask this first: calls on a CPU should not pay for the other conditions.
    """
    backend = backend_name()
    if backend == "eager":
        return ASKED_FOR
    if backend == "cpu":
        return CPU_ASKED_FOR
    return ON_CPU if backend == "auto" and x.is_cpu else None


def _rows(x: Tensor) -> int:
    return x.numel() // (x.shape[-1] or 1)


def is_small(x: Tensor, hidden: int) -> bool:
    """Return True if "auto" runs a star MLP eager for its size alone, on a CPU.

    Layers ask this first: calls of small layers should not pay for the other conditions.
    """
    if not x.is_cpu or backend_name() != "auto" or torch.compiler.is_compiling():
        return False
    hidden_bytes = _rows(x) * hidden * x.element_size()
    return hidden_bytes < MIN_HIDDEN_BYTES_INFERENCE and hidden_bytes < MIN_HIDDEN_BYTES_TRAINING


def plan_mlp(
    x: Tensor,
    weights: MLPWeights,
    act: str | None,
    residual: Tensor | None = None,
    *,
    recompute: bool = False,
) -> Plan:
    """Return the plan for a star MLP on `x`, plus `residual` if there is one.

    With `recompute` a backward must save the input alone.

    Raises:
        RuntimeError: the backend is "triton" or "cpu" and its kernel does not apply; the message
            gives the reason.

    Example:
        >>> w = torch.ones(4, 4)
        >>> plan_mlp(torch.ones(2, 4), MLPWeights(w, None, w, None, w, None), "relu6").reason
        'hidden activation of 32 bytes is small enough for eager'
    """
    backend = backend_name()
    if backend == "eager":
        return ASKED_FOR
    if backend == "auto" and x.device.type == "cpu" and torch.compiler.is_compiling():
        return COMPILED  # a compiler fuses the definition itself; an exported graph stays portable
    rows, (_, hidden, _) = _rows(x), weights.sizes
    if is_small(x, hidden):
        return Plan("eager", _small(rows * hidden * x.element_size()))
    parameters = tuple(w for w in weights if w is not None)
    call = _call(backend, act, (x, *parameters))
    decide = _decide_mlp if torch.compiler.is_compiling() else _cached_mlp_plan
    plan = decide(
        call,
        rows,
        weights.sizes,
        needs_gradients(x, *parameters),
        recompute or tuning(),
        None if residual is None else (type(residual), residual.device),
    )
    if plan.reason:
        return declined(plan.reason, "this StarMLP")
    return Plan(plan.path, weights=weights)


def plan_block(
    x: Tensor, weights: MLPWeights, parameters: Iterable[Tensor], act: str | None
) -> Plan:
    """Return the plan for a whole StarBlock2d on `x` (N, H, W, C).

    `weights` are those of its star MLP, `parameters` all that it has.

    Raises:
        RuntimeError: the backend is "triton" and no kernel applies; the message gives the reason.
    """
    plan = plan_early(x)
    if plan is not None:
        return plan
    tensors = (x, *parameters)
    call = _call(backend_name(), act, tensors)
    reason = "the batch is empty" if x.numel() == 0 else _kernel_reason(call)
    reason = reason or _too_few(call.backend, call.dtype, _rows(x), weights.sizes)
    reason = reason or _too_wide(x.device, call.dtype, weights.sizes, needs_gradients(*tensors))
    return declined(reason, "this StarBlock2d") if reason else Plan("block", weights=weights)


def declined(reason: str, what: str) -> Plan:
    """Return an eager plan, or raise its reason if a fused path was asked for.

    `what` names the layer in the error message.

    Raises:
        RuntimeError: the backend is "triton" or "cpu".
    """
    backend = backend_name()
    if backend == "eager":
        return ASKED_FOR
    if backend in ("triton", "cpu"):
        raise RuntimeError(
            f"the {backend} backend cannot serve {what}: {reason}; use_backend('auto') falls back "
            "to PyTorch"
        )
    return Plan("eager", reason)


def _call(backend: str, act: str | None, tensors: tuple[Tensor, ...]) -> Call:
    x = tensors[0]
    return Call(
        backend,
        get_activation(act),
        compute_dtype(x),
        autocasts(x),
        _tracer(),
        registration.INTERPRET,
        tuple((type(t), t.device, t.dtype) for t in tensors),
    )


def _tracer() -> str:
    if exporting():
        return "export"
    if torch.compiler.is_compiling():
        return "compile"
    return "transform" if torch._C._get_tracing_state() is not None or _transformed() else ""


def _kernel_reason(call: Call) -> str:
    """Return why no Triton kernel may take the tensors of a call; empty if one may."""
    device = call.tensors[0][1]
    if device.type != "cuda" and not (call.interpret and device.type == "cpu"):
        return f"no Triton kernel for device {device.type!r}"
    if not registration.HAS_TRITON:
        return "Triton is not installed"
    if call.interpret and call.backend != "triton":
        return "the interpreter is for testing: it serves where use_backend('triton') asks for it"
    other = next((kind for kind, _, _ in call.tensors if kind not in PLAIN), None)
    if other is not None and call.tracer != "export":
        return f"an input is a {other.__name__}"
    if any(place != device for _, place, _ in call.tensors):
        return "the tensors are on several devices"
    if call.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"dtype {call.dtype} (needs float32, float16 or bfloat16)"
    if not call.autocast and any(dtype != call.dtype for _, _, dtype in call.tensors):
        return "input and parameters differ in dtype and autocast is off"
    if call.activation.name not in registration.TRITON_ACTIVATIONS:
        return f"activation {call.activation.name!r} has no Triton form"
    if call.tracer == "export" and call.backend == "auto":
        return "being exported: the graph stays portable"
    return TRANSFORMED if call.tracer == "transform" else ""


def _decide_mlp(
    call: Call,
    rows: int,
    sizes: Sizes,
    training: bool,
    takes_wide: bool,
    residual: tuple[type, torch.device] | None,
) -> Plan:
    _, device, _ = call.tensors[0]
    on_cpu = device.type == "cpu" and not (call.backend == "triton" and call.interpret)
    if residual is not None and (residual[0] not in PLAIN or residual[1] != device):
        return Plan("eager", f"residual is a {residual[0].__name__} on {residual[1]}")
    if call.backend == "cpu" or (on_cpu and call.backend == "auto"):
        reason = _cpu_reason(call, rows * sizes[1], training)
        return Plan("eager", reason) if reason else Plan("cpu")
    reason = _kernel_reason(call) or _too_few(call.backend, call.dtype, rows, sizes)
    if reason:
        return Plan("eager", reason)
    reason = _too_wide(device, call.dtype, sizes, training)
    if not reason:
        return Plan("star_mlp")
    wide = takes_wide or call.backend == "triton"
    return Plan("star_mlp_wide") if wide else Plan("eager", reason)


_cached_mlp_plan = lru_cache(maxsize=1024)(_decide_mlp)


def forget_plans() -> None:
    """Empty the cache of plans, for example after a threshold of this module was changed."""
    _cached_mlp_plan.cache_clear()


def _cpu_reason(call: Call, hidden_elements: int, training: bool) -> str:
    """Return why the row-blocked op for CPUs may not run; empty if it may."""
    kind, device, dtype = call.tensors[0]
    if device.type != "cpu":
        return f"input is on {device.type!r}"
    if call.tracer in ("compile", "export"):
        return COMPILED.reason
    if call.interpret:
        return "Triton's interpreter replaces the CPU's own kernel"
    if kind not in PLAIN:
        return f"input is a {kind.__name__}"
    other = next((kept for _, _, kept in call.tensors if kept != torch.float32), None)
    if other is not None:
        return f"dtype {other} (needs float32)"
    if any(place != device for _, place, _ in call.tensors):
        return "the parameters are on another device"
    if not call.activation.closed_form:
        return f"activation {call.activation.name!r} was registered without a derivative"
    if call.autocast:
        return "autocast is on"
    if call.tracer:
        return TRANSFORMED
    least = MIN_HIDDEN_BYTES_TRAINING if training else MIN_HIDDEN_BYTES_INFERENCE
    hidden_bytes = hidden_elements * dtype.itemsize
    return _small(hidden_bytes) if call.backend == "auto" and hidden_bytes < least else ""


def _small(hidden_bytes: int) -> str:
    return f"hidden activation of {hidden_bytes} bytes is small enough for eager"


def _too_few(backend: str, dtype: torch.dtype, rows: int, sizes: Sizes) -> str:
    """Return why there are too few rows for a fused star MLP; empty if enough."""
    width = max(sizes[0], sizes[2])
    if backend == "triton" or rows >= MIN_ROWS:
        return ""
    if width * dtype.itemsize <= MAX_BYTES_ANY_ROWS:
        return ""
    return f"{rows} rows of {width} channels would leave most of a GPU idle"


def _too_wide(device: torch.device, dtype: torch.dtype, sizes: Sizes, training: bool) -> str:
    """Return why no tile keeps the hidden activation on chip; empty if one does.

    Input and output channels decide, since a program holds whole rows; training needs a tile of
    the backward too.
    """
    width = max(sum(split_columns(w)) for w in (sizes[0], sizes[2]))
    needed = {"forward": MLP_FORWARD, **({"backward": MLP_BACKWARD["dx"]} if training else {})}
    for name, table in needed.items():
        if mlp_tile(table, device, width, dtype.itemsize) is None:
            channels = f"{sizes[0]} -> {sizes[2]} channels"
            return f"{channels} are too wide for a {name} tile in {dtype}"
    return ""


def plain_weights(f1: nn.Module, f2: nn.Module, g: nn.Module) -> MLPWeights | None:
    """Return weights and biases of three plain `nn.Linear`, `None` if one is not plain.

    A fused path would skip hooks, parametrisations and another class's forward.

    Example:
        >>> f = nn.Linear(2, 2)
        >>> plain_weights(f, f, f).sizes, plain_weights(f, f, nn.Identity())
        ((2, 2, 2), None)
    """
    for layer in (f1, f2, g):
        # torch.export replaces parameters by fake tensors while it traces
        plain = is_plain(layer, nn.Linear)
        if not plain or not (type(layer.weight) is nn.Parameter or exporting()):
            return None
    return MLPWeights(f1.weight, f1.bias, f2.weight, f2.bias, g.weight, g.bias)  # type: ignore[arg-type]


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


def exporting() -> bool:
    """Return True if torch.export is tracing.

    `torch.compiler.is_exporting()` is True in all compiled code of PyTorch 2.11, hence the flag
    behind it.
    """
    return torch.compiler._is_exporting_flag


def _transformed() -> bool:
    # vmap, grad or jvp: PyTorch has no public function that tells whether one is active
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )
