"""Verify that the gate of experts is a star: by its graph, then by values."""

from collections.abc import Iterable
from functools import partial
from itertools import product
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from starlayers.backend import use_backend
from starlayers.functional import star_packed_product
from starlayers.surgery.contexts import Context
from starlayers.surgery.entries import OWN
from starlayers.surgery.formula import Formula, activation_name, read_formula
from starlayers.surgery.graph import trace
from starlayers.surgery.reads import Reads, recorded_reads
from starlayers.surgery.sandbox import default_state, sandbox_copy
from starlayers.surgery.site import Site
from starlayers.surgery.trial_run import MismatchError, first_line
from starlayers.surgery.verify_gated import MODES, SCALES, TOLERANCES, require_close, values_of

#: dtypes in which the gate is traced; in others it is the model's own
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CONTEXTS = [
    Context(train, grad, dtype, 2)
    for train, grad, dtype in product((False, True), (True, False), DTYPES)
]
#: the gate's input holds both branches, its output is the product
SITE = Site("experts", "packed", inp="", act=None, out=None)

#: rows of the samples: the graph holds for two or more
ROWS = (6, 1, 0)


class Gate(NamedTuple):
    """Result of `verify_gate`.

    Args:
        act_name: name of the activation in `ACTIVATIONS`, "" if the gate is no star.
        reason: why the gate is no star, `None` if it is one.
        reads: names of the attributes of the experts that the gate reads.
        autocast: True if autocast leaves the gate as it is.
        width: the only number of channels for which the gate is a star, 0 for any.
    """

    act_name: str
    reason: str | None
    reads: tuple[str, ...] = ()
    autocast: bool = False
    width: int = 0


def verify_gate(experts: nn.Module) -> Gate:
    """Return the activation of a star gate, or the reason why the gate is no star.

    The gate is `experts._apply_gate`, a map (rows, 2 f) -> (rows, f). Its graph has to be
    `act(h[:, :f]) * h[:, f:]` with an activation of the table, for any number of rows and under
    all `CONTEXTS`, and values and gradients those of the star at all `SCALES`. The weights of the
    experts are not read: quantised, sharded and meta ones will do.
    """
    if reason := _unfit(experts):
        return Gate("", reason)
    shell = sandbox_copy(without_weights(experts))
    shell.forward = shell._apply_gate
    width, recorded = gate_width(experts), Reads()
    try:
        with default_state(torch.device("cpu"), grad=True), recorded_reads(shell) as recorded:
            formula, act_name = _read(shell, width)
            _compare(shell, act_name, width)
            any_width = _has_any_width(shell, formula, width)
            autocast = act_name != "softplus" and _ignores_autocast(shell, width)
    except MismatchError as error:
        reason = str(error).replace("its forward", "its gate")
    except Exception as error:  # a foreign module may raise anything
        reason = f"its gate cannot be tried: {first_line(error)}"
    reads = own_attributes(experts, recorded)
    if reason := reason or _unstable(experts, reads):
        return Gate("", reason, reads)
    return Gate(act_name, None, reads, autocast, 0 if any_width else width)


def _unfit(experts: nn.Module) -> str:
    """Return what the options of the experts interface say against a star, "" if nothing."""
    options = vars(experts)
    if not options.get("has_gate", True):
        return "its experts are plain, act(x W1) W2: they have no second branch"
    if not options.get("is_concatenated", True):
        return "its branches are interleaved in alternate channels, and its class gates them itself"
    if "_apply_gate" in options:
        return "its gate is replaced on the instance: starify before that"
    if is_parametrized(experts):
        return "its weights are parametrised: starify before that"
    if (width := gate_width(experts)) % 2:
        return f"its branches have {width} channels together, an odd number"
    return ""


def gate_width(experts: nn.Module) -> int:
    """Return the number of channels of both branches, 32 if the weights do not tell."""
    weight: Any = getattr(experts, "gate_up_proj", None)
    if not isinstance(weight, Tensor) or weight.ndim != 3:
        return 32
    return weight.shape[-1] if getattr(experts, "is_transposed", False) else weight.shape[-2]


def without_weights(experts: nn.Module) -> nn.Module:
    """Return experts with the same attributes and children, but without own weights.

    FSDP2 keeps its state under keys that are no names, which no gate reads.
    """
    light: nn.Module = object.__new__(type(experts))
    vars(light).update({k: v for k, v in vars(experts).items() if k.isidentifier()})
    vars(light).update(_parameters={}, _buffers={})
    return light


def own_attributes(experts: nn.Module, reads: Reads) -> tuple[str, ...]:
    """Return the names of the experts' own attributes among what was read, sorted."""
    own = {*vars(experts), *experts._modules, *experts._parameters, *experts._buffers} - OWN
    return tuple(sorted(own & {name for part, name in reads if not part}))


def _unstable(experts: nn.Module, names: Iterable[str]) -> str:
    """Return what the gate reads that could change unnoticed, "" if nothing does."""
    inside: dict[str, Any] = {}
    for name in names:
        value = getattr(experts, name)
        if not isinstance(value, nn.Module):
            inside[name] = value
            continue
        for path, part in value.named_modules(prefix=name):
            inside |= {f"{path}.{k}": v for k, v in vars(part).items() if k not in OWN}
    for name, value in inside.items():
        if isinstance(value, Tensor):
            return f"its gate reads the tensor {name!r}"
        if not _is_settled(value):
            return f"its gate reads {name!r}, whose contents may change"
    return ""


def _is_settled(value: Any) -> bool:
    """Return True for numbers, strings and functions: no containers, no closures."""
    if isinstance(value, FunctionType):
        return value.__closure__ is None or hasattr(value, "__wrapped__")
    return value is None or isinstance(
        value, (bool, int, float, str, BuiltinFunctionType, MethodType, partial)
    )


# by graph


def _read(shell: nn.Module, width: int) -> tuple[Formula, str]:
    """Return the formula of a star gate, the same under all contexts, and its activation."""
    first: tuple[Formula, Any] | None = None
    for context in CONTEXTS:
        shell.train(context.train)
        x = torch.ones(ROWS[0], width, dtype=context.dtype)
        try:
            with torch.set_grad_enabled(context.grad):
                formula, chain = read_formula(trace(shell, x, ()), SITE)
        except MismatchError as error:
            if first is None:
                raise
            raise MismatchError(f"in {context}: {error}") from error
        if first is None:
            first = formula, chain
        elif formula != first[0]:
            raise MismatchError(f"it applies {formula.act} in {context}, {first[0].act} otherwise")
    assert first is not None
    formula, chain = first
    if formula.site.gate_last:
        raise MismatchError(
            f"it applies {formula.act} to the second half of its input, not to the first"
        )
    act_name = activation_name(chain)
    if act_name is None:
        raise MismatchError(f"it applies {formula.act}, which no row of ACTIVATIONS equals")
    return formula, act_name


def _has_any_width(shell: nn.Module, formula: Formula, width: int) -> bool:
    """Return True if a gate has the same formula for any number of channels."""
    x = torch.ones(ROWS[0], width)
    try:
        return read_formula(trace(shell, x, (), any_width=True), SITE)[0] == formula
    except MismatchError:  # sizes are compared with numbers
        return False


# by value


def _sample(rows: int, width: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(int(scale * 100) + 1)
    return (torch.randn(rows, width, generator=generator, dtype=torch.float64) * scale).to(dtype)


def _compare(shell: nn.Module, act_name: str, width: int) -> None:
    """Raise unless values and gradients of a gate are those of the star that replaces it."""
    star = partial(star_packed_product, act=act_name)
    for dtype, scale, rows in product(TOLERANCES, SCALES, ROWS):
        x = _sample(rows, width, dtype, scale)
        for train, mode in product((False, True), MODES):
            shell.train(train)
            x = x.t().contiguous().t() if mode == "inference" else x  # other strides
            where = f"for {tuple(x.shape)} of {dtype}, {'train' if train else 'eval'}, {mode}"
            with use_backend("eager"):
                expected, actual = (values_of(shell, call, x, mode) for call in (shell, star))
            require_close(expected, actual, TOLERANCES[dtype], where)


def _ignores_autocast(shell: nn.Module, width: int) -> bool:
    """Return True if a gate computes the same under autocast, in the same dtype."""
    for dtype, scale in product(DTYPES[:2], SCALES):
        x = _sample(ROWS[0], width, dtype, scale)
        with torch.autocast("cpu", torch.bfloat16):
            y = shell(x)
        if y.dtype != dtype or not torch.equal(y, shell(x)):
            return False
    return True
