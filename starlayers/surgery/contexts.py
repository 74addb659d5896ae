"""Conditions under which forwards are traced, once for each that makes a difference."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from starlayers.surgery.adopted import COMBINATIONS
from starlayers.surgery.graph import SIZES, Graph, trace
from starlayers.surgery.reads import EVERY, Reads, recorded_reads
from starlayers.surgery.snapshot import Snapshot
from starlayers.surgery.trial_run import MismatchError

#: function that makes the tensors of a copy
Make = Callable[[Tensor], Tensor]


class Context(NamedTuple):
    """Conditions under which a forward is traced; a forward may ask for any of them."""

    train: bool
    grad: bool
    dtype: torch.dtype
    ndim: int
    autocast: torch.dtype | None = None

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        words = ["train mode" if self.train else "eval mode", dtype]
        words += [] if self.grad else ["without gradients"]
        words += [f"under autocast to {self.autocast}"] if self.autocast else []
        return ", ".join([*words, f"{self.ndim} dimensions"])


CONTEXTS = [
    Context(train, grad, *kind)
    for train, grad in product((False, True), (True, False))
    for kind in sorted(COMBINATIONS, key=lambda kind: kind != (torch.float32, 3, None))
]


def graphs(
    copy: Callable[[Make], nn.Module],
    channels: int,
    device: torch.device,
    parts: Sequence[str],
    reads: Reads,
) -> Iterator[tuple[Context, Graph]]:
    """Yield the graphs of a module, one for all `CONTEXTS` in which it makes the same calls.

    A trace takes as long as thirty runs on fake tensors. So in each context the module runs once,
    and the functions that it calls and their arguments are written down; among them are questions
    for sizes and dtypes. It is traced where they are others than before, or autocast or the number
    of dimensions is another.

    Args:
        copy: function that returns a copy of the module, its tensors made by the given function.
        channels: number of input channels.
        device: device of the module.
        parts: names of the modules whose calls stay whole.
        reads: is given the names of the attributes that the forward reads.

    Raises:
        MismatchError: the forward has no graph in some context, or is changed by a run.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # heavy, as `torch.export` is

    known: set[Any] = set()
    for context in CONTEXTS:
        shape = (*SIZES[: context.ndim - 1], channels)
        body, other = None, None
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            body, other = (copy(fake_maker(context.dtype, device)) for _ in range(2))
            x = torch.empty(shape, dtype=context.dtype, device=device)
        with entered(context, body, device):
            calls = _calls(body, x, context, fake, reads)
        key = calls and (context.ndim, context.autocast, calls)
        if key is not None and key in known:
            continue
        try:
            with entered(context, other, device):
                graph = trace(other, x, parts)
        except MismatchError as error:
            if not known:
                raise
            raise MismatchError(f"in {context}: {error}") from error
        known.add(key)
        yield context, graph


@contextmanager
def entered(context: Context, body: nn.Module, device: torch.device) -> Iterator[None]:
    """Run the block with a module in the state of a context."""
    body.train(context.train)
    low = context.autocast or torch.bfloat16
    autocast = torch.autocast(device.type, low, enabled=context.autocast is not None)
    with torch.set_grad_enabled(context.grad), autocast:
        yield


def fake_maker(dtype: torch.dtype, device: torch.device) -> Make:
    """Return a function that makes fake tensors, the floating-point ones of one dtype."""

    def make(tensor: Tensor) -> Tensor:
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        return torch.empty(tensor.shape, dtype=kind, device=device)

    return make


def _calls(body: nn.Module, x: Tensor, context: Context, fake: Any, reads: Reads) -> Any:
    """Return all calls of a forward as a key, `None` if it fails or changes the module."""
    snapshot = Snapshot(body, type(body).forward)
    names = {id(t): name for name, t in (*body.named_parameters(), *body.named_buffers())}
    log = _Log(context.dtype, {**names, id(x): "x"})
    try:
        with fake, recorded_reads(body) as read:
            with _Operators(log), _Functions(log):
                body(x)
            if not context.grad:
                with torch.inference_mode():
                    body(x)
        reads |= read
    except Exception:  # a foreign module may raise anything
        reads.add(EVERY)
        return None
    return None if snapshot.change(body) else tuple(log.calls)


class _Log:
    """Calls of functions, with names for tensors that are the same in all contexts."""

    def __init__(self, dtype: torch.dtype, names: dict[int, Any]) -> None:
        self.dtype, self.names = dtype, names
        self.calls: list[Any] = []
        #: what has a number, so that no id is used again
        self.kept: list[Any] = []

    def key(self, value: Any) -> Any:
        """Return a key of an argument or result."""
        if isinstance(value, Tensor):
            if id(value) not in self.names:
                self.names[id(value)] = len(self.kept)
                self.kept.append(value)
            return self.names[id(value)]
        if isinstance(value, torch.dtype):  # conversions to wider and to narrower ones differ
            return (
                "its dtype"
                if value is self.dtype
                else (value, value.itemsize > self.dtype.itemsize)
            )
        if isinstance(value, (list, tuple)):
            return tuple(map(self.key, value))
        if isinstance(value, dict):
            return tuple((k, self.key(v)) for k, v in value.items())
        if isinstance(value, slice):
            return "slice", self.key((value.start, value.stop, value.step))
        try:
            hash(value)
        except TypeError:
            self.kept.append(value)
            return id(value)
        return type(value), value


class _Functions(TorchFunctionMode):
    """Log of the functions of PyTorch that Python code calls, properties among them."""

    def __init__(self, log: _Log) -> None:
        super().__init__()
        self.log = log

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        words = function, self.log.key(args), self.log.key(kwargs or {})
        result = function(*args, **(kwargs or {}))
        self.log.calls.append((*words, self.log.key(result)))
        return result


class _Operators(TorchDispatchMode):
    """Log of the names of the operators that run, also inside of compiled code."""

    def __init__(self, log: _Log) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.log = log

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if operator.namespace != "prim":  # what fake tensors ask themselves
            self.log.calls.append(str(operator))
        return operator(*args, **(kwargs or {}))
