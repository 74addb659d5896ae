"""Decision which path computes a star: a fused kernel, the CPU's own op, or the definition.

Decisions take tensors and plain values and return a `Plan`. Every layer asks here and nowhere else.
Plans are cached under all values that decide, so that a call that was met before is looked up.
"""

import os
import sys
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from starlayers import plans
from starlayers.activations import ACTIVATIONS, get_activation
from starlayers.backend import backend_name
from starlayers.kernels import registration
from starlayers.kernels.conv import Convolution
from starlayers.kernels.registration import MLPWeights, compute_dtype, needs_gradients
from starlayers.kernels.tuning import ENV_VAR as TUNING
from starlayers.kernels.tuning import tuning
from starlayers.kernels.versions import weights_stay
from starlayers.plans import PLAIN, Plan, call_of, rows_of
from starlayers.tracing import is_traced

__all__ = [
    "FORWARDS",
    "Plan",
    "calls_directly",
    "declined",
    "exporting",
    "forget_plans",
    "has_global_hooks",
    "is_plain",
    "is_transformed",
    "launches_directly",
    "linear",
    "plain_weights",
    "plan_block",
    "plan_convolution",
    "plan_early",
    "plan_mlp",
    "plan_star",
    "rules_blocks_out",
    "rules_convolution_out",
    "rules_kernels_out",
]


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
    reason = plans.kernel_reason(call_of(backend, act, _tracer(), (x1, x2)))
    if x1.shape != x2.shape or x1.dtype != x2.dtype:
        reason = f"shapes {tuple(x1.shape)}, {tuple(x2.shape)} or dtypes {x1.dtype}, {x2.dtype}"
    if not reason and backend == "auto":
        if torch.compiler.is_compiling():
            reason = "being compiled: the compiler fuses the product itself"
        elif x1.numel() < plans.MIN_ELEMENTS_STAR:
            reason = f"{x1.numel()} elements are few enough for eager"
    return declined(reason, "this star") if reason else Plan("star")


def plan_early(x: Tensor) -> Plan | None:
    """Return the plan where the backend and the device of `x` alone rule Triton kernels out.

    Stars and blocks ask this first: calls on a CPU should not pay for the other conditions.
    """
    backend = backend_name()
    if backend in plans.ASKED:
        return plans.ASKED[backend]
    if _recorded(x):
        return declined(plans.TRANSFORMED, "a star or block")
    if backend == "auto" and x.is_cpu and "cpu" not in registration.KERNEL_DEVICES:
        return plans.ON_CPU
    return None


def _recorded(x: Tensor) -> bool:
    """Return `is_traced(x)`; a plain tensor outside of `torch.jit.trace` does not pay for it."""
    plain = type(x) is Tensor and torch._C._get_tracing_state() is None
    return not plain and is_traced(x)


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
        return plans.ASKED_FOR
    if _recorded(x):
        return declined(plans.TRANSFORMED, "this StarMLP")
    if x.layout is not torch.strided:
        return declined(f"its input has the layout {x.layout}", "this StarMLP")
    if torch.compiler.is_compiling():
        if backend == "auto" and x.is_cpu:
            return plans.COMPILED  # a compiler fuses the definition; an export stays portable
        plan = _new_mlp_plan(backend, x, weights, act, residual, recompute)
    else:
        if backend == "auto" and x.is_cpu:
            hidden_bytes = x.numel() // (x.shape[-1] or 1) * weights.w1.shape[0] * x.element_size()
            if hidden_bytes < min(
                plans.MIN_HIDDEN_BYTES_INFERENCE, plans.MIN_HIDDEN_BYTES_TRAINING
            ):
                # an int of torch.fx is not hashable
                whole = type(hidden_bytes) is int
                return _small_plan(hidden_bytes) if whole else plans.COMPILED
        key = _key(backend, x, weights, act, residual, recompute)
        known = _mlp_plans.get(key)  # one look-up: another thread may empty the table
        plan = known or _new_mlp_plan(backend, x, weights, act, residual, recompute)
        if known is None:
            if len(_mlp_plans) >= MOST_PLANS:
                _mlp_plans.clear()
            _mlp_plans[key] = plan
    if plan.reason:
        return declined(plan.reason, "this StarMLP")
    return plan._replace(weights=weights)


#: plans by all that decides about them; emptied when it has MOST_PLANS
_mlp_plans: dict[Any, Plan] = {}
MOST_PLANS = 1024


@lru_cache(maxsize=1024)
def _small_plan(hidden_bytes: int) -> Plan:
    return Plan("eager", plans.small(hidden_bytes))


def forget_plans() -> None:
    """Empty the cache of plans, for example after a threshold of `plans` was changed."""
    _mlp_plans.clear()


def _key(
    backend: str,
    x: Tensor,
    weights: MLPWeights,
    act: str | None,
    residual: Tensor | None,
    recompute: bool,
) -> Any:
    """Return all that can change the plan of a star MLP."""
    kind = x.device.type
    autocast = kind != "meta" and torch.is_autocast_enabled(kind)
    row = ACTIVATIONS.get(act) or get_activation(act)  # which names an unknown one
    return (
        backend,
        # a row itself may not be hashable
        (row.name, row.closed_form, row.triton, ACTIVATIONS.get(row.name) is row),
        recompute,
        os.environ.get(TUNING),
        registration.INTERPRET,
        autocast and torch.get_autocast_dtype(kind),
        torch.is_grad_enabled(),
        is_transformed(),
        None if residual is None else (type(residual), residual.device),
        x.shape,
        *[
            None if t is None else (type(t), t.device, t.dtype, t.requires_grad, t.shape)
            for t in (x, *weights)
        ],
    )


def _new_mlp_plan(
    backend: str,
    x: Tensor,
    weights: MLPWeights,
    act: str | None,
    residual: Tensor | None,
    recompute: bool,
) -> Plan:
    parameters = tuple(w for w in weights if w is not None)
    misfit = "" if exporting() else weights.misfit
    if misfit:
        return Plan("eager", misfit)
    return plans.decide_mlp(
        call_of(backend, act, _tracer(), (x, *parameters)),
        rows_of(x),
        weights.sizes,
        needs_gradients(x, *parameters),
        recompute or tuning(),
        None if residual is None else (type(residual), residual.device),
    )


def rules_kernels_out(x: Tensor) -> bool:
    """Return True if the class and device of `x`, or the backend, alone keep convolutions from it.

    It is asked before all else: what a network declines should cost it next to nothing.
    """
    backend = backend_name()
    if type(x) is not Tensor or backend not in ("auto", "triton"):
        return True
    return backend == "auto" and x.is_cpu and "cpu" not in registration.KERNEL_DEVICES


def rules_blocks_out(x: Tensor) -> bool:
    """Return True if nothing but `x` (..., channels) keeps a block from its kernels.

    A tensor of another class has a plan, which says why it is declined.
    """
    if type(x) is not Tensor:
        return False
    if rules_kernels_out(x):
        return True
    return backend_name() == "auto" and plans.few(compute_dtype(x), rows_of(x), x.shape[-1])


def launches_directly(
    x: Tensor, tensors: Iterable[Tensor | None], *, gradients: bool = False
) -> bool:
    """Return True if kernels on `x` may be launched without PyTorch's dispatcher.

    Transforms, tracers and modes act through it, and it would record gradients: the caller records
    them itself with `gradients`. Without, nothing is launched so while a CUDA graph is captured:
    what is folded into weights beforehand would go stale, unless `folded_weights_stay`.
    """
    if type(x) is not Tensor or torch.compiler.is_compiling() or _tracer():
        return False
    # the interpreter computes bfloat16 in float32, which the ops see to
    if torch._C._len_torch_dispatch_stack() or (
        registration.INTERPRET and x.dtype == torch.bfloat16
    ):
        return False
    if not gradients and torch.is_grad_enabled() and needs_gradients(x, *tensors):
        return False
    if not x.is_cuda:
        return True
    # Triton launches on the current device
    here: bool = x.device.index == torch.cuda.current_device()
    return here and (gradients or weights_stay() or not torch.cuda.is_current_stream_capturing())


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
    call = call_of(backend_name(), act, _tracer(), tensors)
    reason = "the batch is empty" if x.numel() == 0 else weights.misfit
    reason = reason or plans.kernel_reason(call)
    reason = reason or plans.too_few(call.backend, call.dtype, rows_of(x), weights.sizes)
    reason = reason or plans.too_wide(
        x.device, call.dtype, weights.sizes, needs_gradients(*tensors)
    )
    return declined(reason, "this StarBlock2d") if reason else Plan("block", weights=weights)


def rules_convolution_out(x: Tensor, conv: Convolution) -> bool:
    """Return True if sizes or dtype keep a convolution of `x` (N, C, H, W) from its kernel."""
    return backend_name() == "auto" and plans.unsuited(conv, x) != ""


def plan_convolution(
    x: Tensor, conv: Convolution | None, tensors: Iterable[Tensor], act: str | None, reason: str
) -> Plan:
    """Return the plan for a convolution of `x` by `tensors`; a `reason` of its layer declines it.

    No backend asks for it alone, so none raises: the definition serves where it is declined.
    """
    backend = backend_name()
    if backend in plans.ASKED:
        return plans.ASKED[backend]
    call = call_of(backend, act, _tracer(), (x, *tensors))
    reason = plans.kernel_reason(call) or reason
    if not reason and conv is not None and backend == "auto":
        reason = plans.unsuited(conv, x)
    return Plan("eager", reason) if reason else Plan("convolution")


def declined(reason: str, what: str) -> Plan:
    """Return an eager plan, or raise its reason if a fused path was asked for.

    `what` names the layer in the error message.

    Raises:
        RuntimeError: the backend is "triton" or "cpu".
    """
    backend = backend_name()
    if backend == "eager":
        return plans.ASKED_FOR
    if backend in ("triton", "cpu"):
        raise RuntimeError(
            f"the {backend} backend cannot serve {what}: {reason}; use_backend('auto') falls back "
            "to PyTorch"
        )
    return Plan("eager", reason)


def _original_forward(kind: type[nn.Module]) -> object:
    """Return a class's forward, `None` if it was replaced before this library was imported."""
    forward: Any = kind.forward
    code = getattr(forward, "__code__", None)
    same = code is not None and code.co_filename == sys.modules[kind.__module__].__file__
    return forward if same else None


#: True if hooks on all modules are registered
has_global_hooks: Any = hooks._has_any_global_hook

#: class -> its own forward; a class whose forward was replaced is not plain
FORWARDS: dict[type[nn.Module], object] = {
    kind: _original_forward(kind) for kind in (nn.Linear, nn.Identity, nn.Conv2d, nn.BatchNorm2d)
}


def plain_weights(
    f1: nn.Module | None, f2: nn.Module | None, g: nn.Module | None
) -> MLPWeights | None:
    """Return weights and biases of three plain `nn.Linear`, `None` if one is not plain.

    A fused path would skip hooks, parametrisations and another class's forward.

    Example:
        >>> f = nn.Linear(2, 2)
        >>> plain_weights(f, f, f).sizes, plain_weights(f, f, nn.Identity())
        ((2, 2, 2), None)
    """
    weights: list[Tensor | None] = []
    for layer in (f1, f2, g):
        if layer is None or not is_plain(layer, nn.Linear):
            return None
        weight = layer._parameters.get("weight")
        # torch.export replaces parameters by fake tensors while it traces
        if not (type(weight) in PLAIN or exporting()) or "bias" not in layer._parameters:
            return None
        weights += [weight, layer._parameters["bias"]]
    sizes: list[Any] = [(layer.in_features, layer.out_features) for layer in (f1, f2, g)]  # type: ignore[union-attr]
    if sizes[0] != sizes[1] or sizes[2][0] != sizes[0][1]:
        return None
    return MLPWeights(*weights)  # type: ignore[arg-type]


def calls_directly(x: Tensor) -> bool:
    """Return True if plain layers may compute `x` without a call of the module, which costs.

    On GPUs the cost is hidden; compilers and tracers are to see the modules.
    """
    return type(x) is Tensor and x.is_cpu and not torch.compiler.is_compiling()


def linear(layer: nn.Module | None, x: Tensor) -> Tensor:
    """Call a linear layer, without the cost of a module's call where nothing is attached to it.

    Example:
        >>> f, x = nn.Linear(2, 3), torch.ones(1, 2)
        >>> torch.equal(linear(f, x), f(x))
        True
    """
    if calls_directly(x) and is_plain(layer, nn.Linear):
        parameters = layer._parameters  # type: ignore[union-attr]
        weight = parameters.get("weight")
        if weight is not None and "bias" in parameters:
            return F.linear(x, weight, parameters["bias"])
    return layer(x)  # type: ignore[misc, no-any-return]


def is_plain(m: nn.Module | None, kind: type[nn.Module]) -> bool:
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
        or kind.forward is not FORWARDS.get(kind, kind.forward)
        or has_global_hooks()
    )


def _tracer() -> str:
    if exporting():
        return "export"
    if torch.compiler.is_compiling():
        return "compile"
    return "transform" if torch._C._get_tracing_state() is not None or is_transformed() else ""


def exporting() -> bool:
    """Return True if torch.export is tracing.

    `torch.compiler.is_exporting()` is True in all compiled code of PyTorch 2.11, hence the flag
    behind it.
    """
    return torch.compiler._is_exporting_flag


def is_transformed() -> bool:
    """Return True inside of vmap, grad, jvp, PyTorch's FLOP counter or a function mode."""
    c = torch._C
    functions = map(c._get_function_stack_at, range(c._len_torch_function_stack()))
    modes = map(c._get_dispatch_stack_at, range(c._len_torch_dispatch_stack()))
    return (
        # PyTorch has no public function for these
        c._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or any(type(mode).__module__ == "torch.utils.flop_counter" for mode in modes)
        or any(type(mode).__module__ != "torch.utils._device" for mode in functions)
    )
