"""Verify that the gate of experts is a star, by graph and by value."""

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from starlayers.activations import ACTIVATIONS, Activation
from starlayers.surgery.gate_graph import GateGraphError, activation_of, gate_formula, written
from starlayers.surgery.sandbox import sandbox_copy

#: dtypes in which the gate is traced; in others it is the model's own
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: factors of the branches: limits and guards only act far from zero
SCALES = (1e-2, 1.0, 30.0, 1e3, 1e6)
#: rows of the sample; the graph holds for any number of them
ROWS = 6

#: attributes that the decorator of the experts interface sets
OPTIONS = ("has_gate", "is_concatenated", "is_transposed", "has_bias", "has_post_expert_norm")

#: key of a class's forward among the settings of a module
FORWARD = "forward()"

#: marks that transformers' loading and FSDP2 leave on every module
MARKS = ("_is_hf_initialized", "_is_fsdp_managed_module", "_fsdp_use_orig_params")
#: attributes that say nothing about what a module computes
BASE = frozenset((*vars(nn.Module()), *MARKS))


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

    The gate is `experts._apply_gate`, a map (rows, 2 f) -> (rows, f). It has to be
    `act(h[:, :f]) * h[:, f:]` with an activation of the table in its graph (any number of rows,
    `DTYPES`, eval and train mode, with and without gradients), and in its values and gradients
    at all `SCALES`. The weights of the experts are not read: quantised, sharded and meta ones will
    do.
    """
    if reason := _unfit(experts):
        return Gate("", reason)
    shell, reads = recording_shell(experts)
    try:
        with _default_state():
            act_name, autocast, width = _verified(shell, gate_width(experts))
    except GateGraphError as error:
        return Gate("", str(error), own_attributes(experts, reads))
    except Exception as error:  # a foreign module may raise anything
        lines = str(error).strip().splitlines() or [""]
        reason = f"its gate cannot be tried: {type(error).__name__} {lines[0][:120]}"
        return Gate("", reason, own_attributes(experts, reads))
    names = own_attributes(experts, reads)
    if reason := _unstable(experts, names):
        return Gate("", reason, names)
    return Gate(act_name, None, names, autocast, width)


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
    return ""


def gate_width(experts: nn.Module) -> int:
    """Return the number of channels of both branches, 32 if the weights do not tell."""
    weight: Any = getattr(experts, "gate_up_proj", None)
    if not isinstance(weight, Tensor) or weight.ndim != 3:
        return 32
    return weight.shape[-1] if getattr(experts, "is_transposed", False) else weight.shape[-2]


def recording_shell(experts: nn.Module) -> tuple[Any, set[str]]:
    """Return a copy of the experts without weights, and the names that are read of it."""
    base, names = type(experts), set[str]()
    light = object.__new__(base)
    vars(light).update(vars(experts), _parameters={}, _buffers={})
    shell = sandbox_copy(light)

    def read(self: nn.Module, name: str) -> Any:
        names.add(name)
        return base.__getattribute__(self, name)

    shell.__class__ = type("Recorded" + base.__name__, (base,), {"__getattribute__": read})
    return shell, names


def own_attributes(experts: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """Return those of the names that are the experts' own attributes, sorted."""
    own = {*vars(experts), *experts._modules, *experts._parameters, *experts._buffers} - BASE
    return tuple(sorted(own & set(names)))


def _unstable(experts: nn.Module, names: Iterable[str]) -> str:
    """Return what the gate reads that could change unnoticed, "" if nothing does."""
    for name in names:
        value = getattr(experts, name)
        if isinstance(value, Tensor):
            return f"its gate reads the tensor {name!r}"
        if isinstance(value, nn.Module):
            if value._modules or value._parameters or value._buffers:
                return f"its activation {name!r} has modules or tensors inside"
            inside = {f"{name}.{key}": v for key, v in settings(value).items()}
        else:
            inside = {name: value} if not isinstance(value, MethodType) else {name: experts}
        if loose := [key for key, v in inside.items() if not _is_settled(v)]:
            return f"its gate reads {loose[0]!r}, whose contents may change"
    return ""


def _is_settled(value: Any) -> bool:
    """Return True for numbers, strings and functions: no containers, no closures."""
    if isinstance(value, FunctionType):
        return value.__closure__ is None or hasattr(value, "__wrapped__")
    return value is None or isinstance(
        value, (bool, int, float, str, BuiltinFunctionType, MethodType, partial)
    )


@contextmanager
def _default_state() -> Iterator[None]:
    """Run the block on the CPU without the user's device, modes and autocast."""
    with (
        torch.device("cpu"),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        yield


def _verified(shell: Any, width: int) -> tuple[str, bool, int]:
    """Return activation, autocast and width of a star gate, or raise with the reason."""
    if width % 2:
        raise GateGraphError(f"its branches have {width} channels together, an odd number")
    formula = None
    for dtype, train, gradients in product(DTYPES, (False, True), (True, False)):
        shell.train(train)
        with torch.set_grad_enabled(gradients):
            h = torch.ones(ROWS, width, dtype=dtype)
            traced = gate_formula(shell._apply_gate, h)
        if formula not in (None, traced):
            raise GateGraphError(
                f"its gate depends on dtype, mode or gradients: it computes {written(formula)}, "
                f"but {written(traced)} in {dtype}, training={train}, gradients={gradients}"
            )
        formula = traced
    act_name = activation_of(formula, _candidates(shell, width))
    autocast = act_name != "softplus"  # which it computes in float32, on GPUs too
    for train, scale, dtype in product((False, True), SCALES, DTYPES[:2]):
        shell.train(train)
        h = _sample(width, scale, dtype)
        _compare(shell, ACTIVATIONS[act_name], h)
        with torch.autocast("cpu", torch.bfloat16):
            y = shell._apply_gate(h)
        autocast &= y.dtype == dtype and torch.equal(y, shell._apply_gate(h))
    for rows in (0, 1):  # for which no graph holds
        _compare(shell, ACTIVATIONS[act_name], _sample(width, 1.0, torch.float32)[:rows])
    return act_name, autocast, 0 if _any_width(shell, width, formula) else width


def _any_width(shell: Any, width: int, formula: Any) -> bool:
    """Return True if a gate has the same formula for any number of channels."""
    try:
        h = torch.ones(ROWS, width, dtype=torch.float32)
        return bool(gate_formula(shell._apply_gate, h, any_width=True) == formula)
    except Exception:  # sizes are compared with numbers
        return False


def _sample(width: int, scale: float, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(int(scale * 100) + 1)
    return (torch.randn(ROWS, width, generator=generator, dtype=torch.float32) * scale).to(dtype)


def _candidates(shell: Any, width: int) -> list[Activation]:
    """Return the rows of the table whose values agree with the activation of the gate."""
    x = torch.linspace(-8, 8, width // 2, dtype=torch.float32).expand(ROWS, -1)
    with torch.no_grad():
        y = shell._apply_gate(torch.cat([x, torch.ones_like(x)], -1))
    if y.shape != x.shape:
        return []
    rows = {id(row): row for row in ACTIVATIONS.values()}.values()
    return [row for row in rows if torch.allclose(row.fn(x), y, rtol=1e-5, atol=1e-5)]


def _compare(shell: Any, row: Activation, h: Tensor) -> None:
    """Raise unless values and gradients of the gate are those of the star, to rounding.

    The star is computed in float32, as kernels do. Errors count against the size of the factors.
    """
    own, star = (h.clone().requires_grad_() for _ in range(2))
    x1, x2 = star.float().chunk(2, -1)
    y = shell._apply_gate(own)
    if y.dtype != h.dtype or y.shape != x1.shape:
        raise GateGraphError(f"its gate returns {y.dtype} of shape {tuple(y.shape)}")
    g = _sample(h.shape[1], 1.0, h.dtype)[: len(y), : y.shape[1]]
    y_star = row.fn(x1) * x2
    (dh,) = torch.autograd.grad(y, own, g)
    (dh_star,) = torch.autograd.grad(y_star, star, g.float())
    factors = (x1.abs() + 1) * (x2.abs() + 1)
    both = g.float().abs() * (x2.abs() + 1), g.float().abs() * (x1.abs() + 1)
    eps = 8 * torch.finfo(h.dtype).eps
    for what, a, b, size in (
        ("value", y, y_star, factors),
        ("gradient", dh, dh_star, torch.cat(both, -1)),
    ):
        off = (a.detach().float() - b.detach().float()).abs()
        if not (off <= eps * (size + b.abs()).detach()).all():
            worst = float(off.nan_to_num(torch.inf).max())
            raise GateGraphError(
                f"the {what} of its gate differs by {worst:.2g} from that of {row.name}(gate) * up "
                f"in {h.dtype}, {len(h)} rows up to {float(h.detach().abs().max()):.2g}"
            )


# settings of a module, for comparison


def settings(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module without children, and its class's forward."""
    own = {name: value for name, value in vars(module).items() if name not in BASE}
    return own | {FORWARD: type(module).forward}


def same_settings(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Return True if two results of `settings` agree, values by identity or equality."""
    return len(a) == len(b) and all(k in b and same_value(v, b[k]) for k, v in a.items())


def same_value(a: Any, b: Any) -> bool:
    """Return True for one object, or for equal numbers, strings and bound methods of one type."""
    plain = (bool, int, float, str, MethodType)
    return a is b or (type(a) is type(b) and isinstance(a, plain) and a == b)


def code_print(function: Any) -> str:
    """Return a hash of a function's code, which differs between versions of Python."""
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None)
    text = repr(_code(code)) if code else f"{type(function)} {getattr(function, '__name__', '')}"
    return hashlib.sha256(text.encode()).hexdigest()


def _code(code: CodeType) -> tuple[Any, ...]:
    constants = tuple(
        _code(c)
        if isinstance(c, CodeType)
        else sorted(map(repr, c))
        if isinstance(c, frozenset)
        else c
        for c in code.co_consts
    )
    return code.co_code, constants, code.co_names, code.co_varnames, code.co_freevars


def restored(function: Any, known: str) -> Any:
    """Return a function if its code has the hash `known`, or `None`."""
    return function if function is not None and code_print(function) == known else None


def setting_key(value: Any, owner: nn.Module) -> Any:
    """Return a key that equal settings of two modules share."""
    if isinstance(value, nn.Module):
        return type(value), tuple((k, setting_key(v, value)) for k, v in settings(value).items())
    if isinstance(value, partial):
        words = tuple(sorted((k, setting_key(v, owner)) for k, v in value.keywords.items()))
        return setting_key(value.func, owner), tuple(map(repr, value.args)), words
    if isinstance(value, MethodType) and value.__self__ is owner:
        return "method", value.__func__
    if value is None or isinstance(value, (bool, int, float, str)):
        return type(value), value
    return id(value)


def module_key(experts: nn.Module, names: Iterable[str]) -> Any:
    """Return a key of all that decides about the gate of experts, given what it reads."""
    reads = tuple((name, setting_key(getattr(experts, name, None), experts)) for name in names)
    options = [vars(experts).get(name) for name in OPTIONS]
    return reads, gate_width(experts), tuple(options), _unfit(experts)


def cached_verification(
    verify: Callable[[nn.Module], Any],
) -> Callable[[nn.Module], Any]:
    """Return `verify` with a memory: modules that agree in all that was read get one result.

    The results of `verify` have the names of what was read in `reads`.
    """
    known: dict[type[nn.Module], list[tuple[tuple[str, ...], Any, Any]]] = {}

    def cached(experts: nn.Module) -> Any:
        entries = known.setdefault(type(experts), [])
        for names, key, result in entries:
            if key == module_key(experts, names):
                return result
        result = verify(experts)
        entries.append((result.reads, module_key(experts, result.reads), result))
        return result

    return cached
