"""Graph of a module's forward, made by `torch.export`, with its child modules as nodes."""

import io
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from starlayers.surgery.snapshot import Snapshot
from starlayers.surgery.trial_run import MismatchError, first_line

if TYPE_CHECKING:
    from torch.export import ExportedProgram

#: sizes of the dimensions before the channels; distinct, so that no two are taken for one
SIZES = (3, 5, 7)


@dataclass(eq=False)
class ModuleCall:
    """Call of a child module: its name, and its nodes in order."""

    name: str
    nodes: list[fx.Node] = field(default_factory=list)


@dataclass(eq=False)
class Graph:
    """Graph of the forward of a module that takes one tensor and returns one.

    Args:
        x: the input.
        output: node whose result is returned.
        calls: calls of child modules in order; what a grandchild computes belongs to the child.
        tensors: names of parameters, buffers and constants, by node.
    """

    x: fx.Node
    output: fx.Node
    calls: list[ModuleCall]
    tensors: dict[fx.Node, str]

    def __post_init__(self) -> None:
        self._call_of = {node: call for call in self.calls for node in call.nodes}

    def call_of(self, node: fx.Node) -> ModuleCall | None:
        """Return the call that computes a node, `None` if the module itself does."""
        return self._call_of.get(node)

    def calls_to(self, name: str) -> list[ModuleCall]:
        """Return the calls of the child with a dotted name."""
        return [call for call in self.calls if call.name == name]

    def inputs(self, call: ModuleCall) -> list[fx.Node]:
        """Return the results from elsewhere that a call takes, its own tensors left out."""
        outer = (a for node in call.nodes for a in node.all_input_nodes if a not in call.nodes)
        return [a for a in dict.fromkeys(outer) if a not in self.tensors]


def trace(
    body: nn.Module,
    x: Tensor,
    parts: Collection[str],
    channels: int = -1,
    *,
    any_width: bool = False,
) -> Graph:
    """Return the graph of `body(x)`, for `x` of any size but for its dimension of channels.

    With `any_width` it holds for all even numbers of channels, too.

    It holds for the present mode, gradient mode and autocast, and for the dtype and the number of
    dimensions of `x`. A call of a module named in `parts` stays whole, whatever its depth.

    Raises:
        MismatchError: the forward has no such graph, or changes attributes or buffers.

    Example:
        >>> graph = trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), torch.ones(3, 2), ("0",))
        >>> [(call.name, str(call.nodes[-1].target)) for call in graph.calls]
        [('0', 'aten.linear.default'), ('1', 'aten.relu.default')]
    """
    from torch.export import Dim, export  # heavy, and not needed to import the library

    snapshot = Snapshot(body, type(body).forward)
    before = {name: set(vars(module)) for name, module in body.named_modules()}
    channels %= x.ndim
    sizes: dict[int, Any] = {i: Dim.DYNAMIC for i in range(x.ndim) if i != channels}
    if any_width:
        sizes[channels] = 2 * Dim("half", min=2)
    try:
        with _quiet():
            program = export(_Call(body), (x,), dynamic_shapes=(sizes,), strict=False)
    except Exception as error:  # a foreign module may raise anything
        if "Constraints violated" in str(error):
            raise MismatchError("its forward depends on the size of its input") from error
        raise MismatchError(f"its forward has no fixed graph: {first_line(error)}") from error
    for name, module in body.named_modules():
        if new := vars(module).keys() - before.get(name, set()):
            raise MismatchError(f"its forward sets {f'{name}.{min(new)}'.lstrip('.')!r}")
    if change := snapshot.change(body):
        raise MismatchError(f"its forward changes its state: {change}")
    if any_width:
        _require_any_width(program)
    else:
        _require_any_size(program)
    graph = _graph(program, parts)
    for node in program.graph.nodes:
        place = _changed_in_place(node)
        if place is not None and place.op == "placeholder":
            name = graph.tensors.get(place, "the input")
            raise MismatchError(f"its forward changes {name!r} in place")
    return graph


def _changed_in_place(node: fx.Node) -> fx.Node | None:
    """Return the node whose memory a node changes, `None` if it makes a tensor of its own."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return None
    place = node.args[0]
    while isinstance(place, fx.Node) and place.op == "call_function":
        returns = getattr(getattr(place.target, "_schema", None), "returns", ())
        if not any(r.alias_info is not None for r in returns):
            break
        place = place.args[0]  # a view of it
    return place if isinstance(place, fx.Node) else None


class _Call(nn.Module):
    """Call of a module with one input, whatever else its forward takes."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(x)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what an export prints and logs; its errors are reasons, and say the same."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)


def _require_any_size(program: "ExportedProgram") -> None:
    """Raise a MismatchError if the graph holds for some sizes of the input only."""
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            continue
        guards = value.fake_mode.shape_env.guards  # type: ignore[attr-defined]
        if guards:
            raise MismatchError(f"its forward depends on the size of its input: {guards[0].expr}")
        return


def _require_any_width(program: "ExportedProgram") -> None:
    """Raise a MismatchError if the graph holds for some even widths only.

    A width that is a multiple of two makes guards of its own, so that its range tells.
    """
    ranges = [r for size, r in program.range_constraints.items() if size.is_symbol]
    if not all(r.lower <= 2 and r.upper > 2**62 for r in ranges):
        raise MismatchError("its forward depends on the size of its input")


def _graph(program: "ExportedProgram", parts: Collection[str]) -> Graph:
    signature = program.graph_signature
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    tensors: dict[fx.Node, str] = {}
    calls: dict[str, ModuleCall] = {}
    x = output = None
    for node in program.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise MismatchError(f"a part of its forward runs under {node.target}")
        if node.op == "placeholder":
            name = names.get(node.name)
            if name is None:
                x = node
            else:
                tensors[node] = name.removeprefix("body.")
        elif node.op == "output":
            (output,) = node.args
        elif (entry := _child(node, parts)) is not None:
            calls.setdefault(entry[0], ModuleCall(entry[1])).nodes.append(node)
    result = output[0] if isinstance(output, (tuple, list)) and len(output) == 1 else output
    if not isinstance(result, fx.Node) or x is None:
        raise MismatchError("its forward does not return one tensor made of its input")
    return Graph(x, result, list(calls.values()), tensors)


def _child(node: fx.Node, parts: Collection[str]) -> tuple[str, str] | None:
    """Return key and name of the child module's call that computes a node."""
    stack = [(key, path[0]) for key, path in (node.meta.get("nn_module_stack") or {}).items()]
    inner = [(key, path.removeprefix("body.")) for key, path in stack if path not in ("", "body")]
    return next((entry for entry in inner if entry[1] in parts), inner[0] if inner else None)
