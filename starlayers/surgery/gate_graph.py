"""Formula of a gate, read from its graph."""

import operator
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from starlayers.activations import Activation

#: ops that return the values of their input
IDENTITIES = ("contiguous", "clone", "alias")

#: a name, a number or the like, or an op's name with the formulas of its arguments
Formula = Any


class GateGraphError(Exception):
    """Difference between what a gate computes and a star."""


def gate_formula(
    gate: Callable[[Tensor], Tensor], h: Tensor, *, any_width: bool = False
) -> Formula:
    """Return what a gate computes of `h` (rows, 2 f), as nested tuples (op, arguments).

    It holds for two rows or more, and for any number of channels if `any_width`.

    "gate" and "up" stand for the halves of `h`. Casts to the dtype of `h` or to float32 are left
    out, because kernels compute in float32 and round once.

    Raises:
        GateGraphError: the graph depends on the number of rows, on values, or on other tensors, or
            it works in place.
    """
    sizes: dict[int, Any] = {0: torch.export.Dim("rows", min=2)}
    if any_width:
        sizes[1] = 2 * torch.export.Dim("half", min=2)
    return _formula(_graph(gate, h, sizes), h)


def activation_of(formula: Formula, candidates: Iterable[Activation]) -> str:
    """Return the name of the activation in a star formula.

    Raises:
        GateGraphError: the formula is none of `act(gate) * up` with the candidates for `act`.
    """
    for row in candidates:
        star = _ordered(("mul.Tensor", activation_formula(row), "up"))
        if formula == star:
            return row.name
    text = written(formula)
    if "slice" in text or "strided" in text or "index" in text:
        raise GateGraphError(f"its branches are not two halves side by side: it computes {text}")
    if "clamp" in text or "clip" in text or "minimum" in text or "maximum" in text:
        raise GateGraphError(f"its branches are clamped: it computes {text}, not act(gate) * up")
    raise GateGraphError(f"it computes {text}, not act(gate) * up with an act of the table")


@lru_cache(maxsize=256)
def activation_formula(row: Activation) -> Formula:
    """Return the formula of `row.fn("gate")`."""
    x = torch.ones(2, 4, dtype=torch.float32)
    return _formula(_graph(row.fn, x, {}), x, whole="gate")


def written(formula: Formula) -> str:
    """Return a formula as text, as `mul(silu(gate), up)`.

    Example:
        >>> written(("mul.Tensor", ("silu.default", "gate"), "up"))
        'mul(silu(gate), up)'
    """
    if isinstance(formula, tuple) and formula and isinstance(formula[0], str):
        op = formula[0].partition(".")[0]
        return f"{op}({', '.join(map(written, formula[1:]))})"
    return str(formula)


class _Called(nn.Module):
    """Module that calls a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, h: Tensor) -> Tensor:
        return self.function(h)


def _graph(function: Callable[[Tensor], Tensor], h: Tensor, sizes: dict[int, Any]) -> fx.Graph:
    try:
        program = torch.export.export(_Called(function), (h,), dynamic_shapes=(sizes,))
    except Exception as error:  # a foreign function may raise anything
        lines = str(error).strip().splitlines() or [""]
        raise GateGraphError(
            "its gate has no graph that holds for all values and any number of rows: "
            f"{type(error).__name__} {lines[0][:120]}"
        ) from error
    ranges = [r for size, r in program.range_constraints.items() if size.is_symbol]
    if not all(r.lower <= 2 and r.upper > 2**62 for r in ranges):  # a branch has narrowed them
        raise GateGraphError("its gate has no graph that holds for inputs of any size")
    inputs = [node for node in program.graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        raise GateGraphError("its gate depends on tensors other than its input")
    return cast(fx.Graph, program.graph)


def _formula(graph: fx.Graph, h: Tensor, whole: str = "h") -> Formula:
    """Return the formula of a graph's only output; `whole` names its input."""
    terms: dict[fx.Node, Formula] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            terms[node] = whole
        elif node.op == "output":
            (outputs,) = node.args
            if len(cast("tuple[Any, ...]", outputs)) != 1:
                raise GateGraphError("its gate returns more than one tensor")
            return _term(cast("tuple[Any, ...]", outputs)[0], terms)
        else:
            terms[node] = _node_term(node, terms, h)
    raise GateGraphError("its gate returns nothing")


def _term(value: Any, terms: dict[fx.Node, Formula]) -> Formula:
    if isinstance(value, fx.Node):
        return terms[value]
    if isinstance(value, (list, tuple)):
        return tuple(_term(v, terms) for v in value)
    return value


def _node_term(node: fx.Node, terms: dict[fx.Node, Formula], h: Tensor) -> Formula:
    args = [_term(a, terms) for a in node.args]
    if node.target is operator.getitem:
        halves = ("gate", "up")
        return halves[args[1]] if args[0] == ("halves",) else ("item", *args)
    if not isinstance(node.target, torch._ops.OpOverload):
        raise GateGraphError(f"its gate calls {node.target}, which is no plain operation")
    packet, _, overload = str(node.target).removeprefix("aten.").partition(".")
    if node.target._schema.is_mutable:
        raise GateGraphError(f"its gate works in place, by {packet}")
    if packet in ("to", "_to_copy", "type_as", "float", "to_dtype"):
        return _cast(node, args, h)
    if packet in IDENTITIES:
        return args[0]
    part = _part(packet, args[1:], h) if args and args[0] == "h" else ""
    return part or _ordered((f"{packet}.{overload}", *_without_defaults(node, args, terms)))


def _without_defaults(node: fx.Node, args: list[Any], terms: dict[fx.Node, Formula]) -> list[Any]:
    """Return the arguments of a node without those that have their default values at the end."""
    arguments = cast("torch._ops.OpOverload", node.target)._schema.arguments
    for argument in arguments[len(args) :]:
        given = node.kwargs.get(argument.name, argument.default_value)
        args = [*args, _term(given, terms)]
    while args and arguments[len(args) - 1].has_default_value():
        if args[-1] != arguments[len(args) - 1].default_value:
            break
        args = args[:-1]
    return args


def _cast(node: fx.Node, args: list[Any], h: Tensor) -> Formula:
    """Return the term of a cast: that of its input where nothing is rounded twice."""
    dtype = node.meta["val"].dtype
    if dtype in (h.dtype, torch.float32):
        return args[0]
    return (f"to_{str(dtype).removeprefix('torch.')}", args[0])


def _part(packet: str, args: list[Any], h: Tensor) -> Formula:
    """Return the term of a part of the input, "" if it is neither the whole nor a half."""
    width = h.shape[1]
    if packet == "chunk" and args in ([2, -1], [2, 1]):
        return ("halves",)
    if packet in ("split", "split_with_sizes") and args[-1] in (1, -1) and len(args) == 2:
        return ("halves",) if args[0] in (width // 2, (width // 2, width // 2)) else ""
    if packet != "slice":
        return ""
    defaults: list[Any] = [0, 0, None, 1]
    dim, start, end, step = args + defaults[len(args) :]
    start, last = start or 0, dim in (1, -1)
    end = 2**63 - 1 if end is None else end
    if last:
        start, end = start + width * (start < 0), min(end + width * (end < 0), width)
    if step == 1 and start == 0 and end >= (width if last else 2**31):
        return "h"
    halves = {(0, width // 2): "gate", (width // 2, width): "up"}
    return halves.get((start, end), "") if last and step == 1 else ""


def _ordered(term: tuple[Any, ...]) -> Formula:
    """Return a term with the factors of a product in one order, and one name for ReLU6."""
    if term[0] == "hardtanh.default" and term[2:] == (0, 6):
        return ("relu6.default", term[1])
    if term[0] == "mul.Tensor" and len(term) == 3:
        return (term[0], *sorted(term[1:], key=repr))
    return term
