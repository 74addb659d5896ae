"""Questions that a forward asks of its tensors and layers, whose answers no graph shows."""

import dis
import sys
from collections.abc import Callable, Iterable, Iterator
from types import CellType, FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from starlayers.surgery.entries import functions_of
from starlayers.surgery.trial_run import MismatchError

#: questions of a tensor that the contexts of a graph answer
ANSWERED = frozenset(
    [
        "__len__",
        "device",
        "dim",
        "dtype",
        "element_size",
        "is_complex",
        "is_floating_point",
        "itemsize",
        "ndim",
        "ndimension",
        "nelement",
        "numel",
        "shape",
        "size",
    ]
)
#: files whose code belongs to a call of a layer
CALLS = (__file__, nn.Module.__call__.__code__.co_filename)


class Questions(TorchFunctionMode):
    """Record of the first question that is not answered by a graph.

    Any method or property of a tensor that returns no tensor is a question.

    Example:
        >>> import torch
        >>> with Questions() as questions:
        ...     x = torch.ones(2)
        ...     x.shape, x.is_leaf
        (torch.Size([2]), True)
        >>> questions.first
        'is_leaf'
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = ""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if not self.first and args and isinstance(args[0], Tensor):
            name = getattr(getattr(function, "__self__", None), "__name__", function.__name__)
            asked = hasattr(Tensor, name) and name not in ANSWERED
            if asked and not _made_of_tensors(result):
                self.first = name
        return result


def _made_of_tensors(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_made_of_tensors, value))
    return isinstance(value, Tensor)


def answered(call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a call that raises a MismatchError if it asks a tensor for what no graph shows."""

    def wrapped(x: Tensor) -> Tensor:
        with Questions() as questions:
            y = call(x)
        if questions.first:
            raise MismatchError(f"its forward asks a tensor for {questions.first!r}, or sets it")
        return y

    return wrapped


class LayerProbe(nn.Module):
    """Linear layer that records which of its attributes the code around it asks for.

    It is no `nn.Linear`, so that a question for its class is one for its attribute `__class__`.
    """

    def __init__(self, layer: nn.Linear, name: str) -> None:
        super().__init__()
        self.name = name
        self.asked: set[str] = set()
        self.weight, self.bias = layer.weight, layer.bias
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def forget(self) -> None:
        """Forget what was asked so far."""
        self.asked.clear()

    def __getattribute__(self, name: str) -> Any:
        if sys._getframe(1).f_code.co_filename not in CALLS:
            vars_of = object.__getattribute__(self, "__dict__")
            if "asked" in vars_of:
                vars_of["asked"].add(name)
        return super().__getattribute__(name)

    def __dir__(self) -> Any:
        object.__getattribute__(self, "asked").add("__dir__")
        return super().__dir__()  # type: ignore[no-untyped-call]


def require_answered(probe: LayerProbe, *, last: bool) -> bool:
    """Return True if a forward asked for the weight of its last layer, as T5 does for its dtype.

    Raises:
        MismatchError: it asked a layer for anything else.
    """
    state = object.__getattribute__(probe, "__dict__")
    asked = state["asked"]
    if other := asked - ({"weight"} if last else set()):
        name = min(other)
        words = {"__class__": "the class"}.get(name, repr(name))
        raise MismatchError(
            f"its forward asks for {words} of {state['name']!r}, which was not verified: a star "
            "only calls its layers"
        )
    return "weight" in asked


def _with_helpers(functions: Iterable[Any]) -> Iterator[Any]:
    """Yield functions, those in their closures, and helpers in the same file."""
    seen: set[int] = set()
    waiting = list(functions)
    while waiting:
        function = waiting.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        yield function
        scope = function.__globals__
        near = [scope.get(name) for name in function.__code__.co_names]
        near = [f for f in near if getattr(f, "__globals__", None) is scope]
        near += [c.cell_contents for c in function.__closure__ or () if c != CellType()]
        waiting += [f for f in near if isinstance(f, FunctionType)]


def require_no_types(kind: type) -> None:
    """Raise a MismatchError if methods ask for `type(x)` of anything but `self`."""
    for function in _with_helpers(functions_of(kind)):
        steps = [s for s in dis.get_instructions(function) if s.opname not in ("CACHE", "PRECALL")]
        for i, step in enumerate(steps):
            if step.opname == "LOAD_GLOBAL" and step.argval == "type":
                after = [s for s in steps[i + 1 : i + 4] if s.opname != "PUSH_NULL"]
                own = after and str(after[0].argval) == "self" and "FAST" in after[0].opname
                if not (own and after[1].opname.startswith("CALL")):
                    raise MismatchError(
                        f"{function.__qualname__} asks for the type of a part, which was not "
                        "verified"
                    )
