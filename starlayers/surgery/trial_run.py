"""Run a module by itself on random input, and record the calls of its parts."""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from starlayers.surgery.sandbox import seed_generators
from starlayers.surgery.site import attribute, put


class MismatchError(Exception):
    """Difference between what a module computes and the formula of its site."""


class CannotRunError(MismatchError):
    """Failure of a module to run by itself on one input."""


class Call(NamedTuple):
    """Call of a part, with copies of its input and output (empty if no tensors)."""

    name: str
    input: Tensor
    output: Tensor


@dataclass
class CallLog:
    """Calls of a module's parts in the order of their returns, and its output."""

    calls: list[Call] = field(default_factory=list)
    output: Any = None

    def of(self, name: str) -> list[Call]:
        """Return the calls of the part with a dotted name."""
        return [call for call in self.calls if call.name == name]


def run(body: nn.Module, x: Tensor, *, train: bool = False, log: CallLog | None = None) -> Any:
    """Return `body(x)` with seeded random generators; buffers are put back afterwards.

    If the forward needs more arguments, they are all `None`; if that fails all `x`; and if that
    fails what their names say: sizes of a map, masks, boundaries of sequences. `log` records this
    run; it is emptied before each attempt. Hooks of `body` itself are not called.
    """
    body.train(train)
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    others = list(inspect.signature(body.forward).parameters.values())[1:]
    needed = [p.name for p in others if p.default is p.empty and p.kind not in variadic]
    error: Exception | None = None
    for arguments in _arguments(needed, x):
        seed_generators(x.device)
        if log is not None:
            log.calls.clear()
        try:
            with _restored_buffers(body):
                y = body.forward(x.clone(), **arguments)
        except Exception as problem:  # a foreign module may raise anything
            error = error or problem
            continue
        if log is not None:
            log.output = y
        return y
    also = f" (it needs {' and '.join(map(repr, needed))} too)" if needed else ""
    kind = type(body).__name__
    raise CannotRunError(f"{kind} does not run by itself{also}: {first_line(error)}")


def _arguments(needed: list[str], x: Tensor) -> Iterator[dict[str, Any]]:
    """Yield values for the arguments that a forward needs beside its input `x`."""
    yield dict.fromkeys(needed, None)
    if needed:
        yield dict.fromkeys(needed, x)
        yield {name: _named_value(name, x) for name in needed}


def _named_value(name: str, x: Tensor) -> Any:
    """Return what an argument of this name usually holds beside an input of shape (..., t, n)."""
    t = x.shape[-2]
    if name.lower() in ("height", "h"):
        return 1
    if name.lower() in ("width", "w"):
        return t
    if name == "cu_seqlens":
        return torch.tensor([0, t], dtype=torch.int32, device=x.device)
    return x.new_zeros(x.shape[:-1]) if "mask" in name else x


@contextmanager
def _restored_buffers(body: nn.Module) -> Iterator[None]:
    """Restore running statistics and counters when the block ends."""
    saved = [
        (m, {k: None if b is None else b.clone() for k, b in m._buffers.items()})
        for m in body.modules()
    ]
    try:
        yield
    finally:
        for module, buffers in saved:
            module._buffers.update(buffers)


@contextmanager
def recorded(body: nn.Module, names: list[str]) -> Iterator[CallLog]:
    """Record the calls of the named parts of `body` while the block runs."""
    log = CallLog()
    with ExitStack() as undo:
        for name in names:
            part = attribute(body, name)
            if not isinstance(part, nn.Module):
                undo.callback(put, body, name, part)
                function, part = part, nn.Module()  # a module, because these have hooks
                part.forward = function
                put(body, name, part)
            for handle in _record_module(part, name, log):
                undo.callback(handle.remove)
        yield log


def _record_module(part: nn.Module, name: str, log: CallLog) -> list[Any]:
    """Log the calls of a module, and return the handles of the hooks."""
    inputs: list[Tensor] = []

    # copied before the call: the module may work in place
    def before(_: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(_copy(args[0] if args else None))

    def after(_: nn.Module, args: tuple[Any, ...], y: Any) -> None:
        log.calls.append(Call(name, inputs.pop(), _copy(y)))

    return [part.register_forward_pre_hook(before), part.register_forward_hook(after)]


def _copy(value: Any) -> Tensor:
    return value.clone() if isinstance(value, Tensor) else torch.empty(0)


def first_line(error: Exception | None) -> str:
    """Return the type of an error and up to 120 characters of its first line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__} {lines[0][:120]}"
