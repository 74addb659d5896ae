"""Star formula of a gated MLP, read from the graph of its forward."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from starlayers.activations import ACTIVATIONS
from starlayers.surgery.graph import Graph
from starlayers.surgery.site import Site
from starlayers.surgery.trial_run import MismatchError

#: element-wise functions that activations are made of; all of them smooth but for known kinks
ELEMENTWISE = frozenset([
    "abs", "add", "celu", "clamp", "clamp_max", "clamp_min", "div", "elu", "erf", "exp",
    "expm1", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "log1p",
    "log_sigmoid", "mish", "mul", "neg", "pow", "reciprocal", "relu", "relu6", "rsub", "selu",
    "sigmoid", "silu", "softplus", "softsign", "sqrt", "square", "sub", "tanh", "threshold",
])  # fmt: skip
CASTS = ("to", "_to_copy", "type_as")
#: functions that return the values of their input
IDENTITIES = ("alias", "clone", "contiguous")


@dataclass(frozen=True)
class Chain:
    """Element-wise function of one node, as the nodes that compute it.

    `text` is the function in words, `silu(clamp(x, max=9.0))`; `x` alone is the identity.
    """

    base: fx.Node
    end: fx.Node
    nodes: tuple[fx.Node, ...]
    text: str

    @property
    def trivial(self) -> bool:
        """True if it computes nothing: the identity, or conversions of the dtype."""
        return self.text == "x"

    def __call__(self, x: Tensor) -> Tensor:
        """Compute the function in the dtype of `x`, without conversions in between."""
        values: dict[fx.Node, Any] = {self.base: x}
        for node in self.nodes:
            args = fx.map_arg(node.args, values.__getitem__)
            kwargs = fx.map_arg(node.kwargs, values.__getitem__)
            cast = function_name(node) in CASTS
            values[node] = args[0] if cast else node.target(*args, **kwargs)  # type: ignore[operator, index]
        return values[self.end]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Formula:
    """Formula of a gated MLP as its graph computes it: `out(act(inp(x)) * up(x))`.

    Args:
        site: names of the parts, the branches in the right order. Its `act` is the child that
            computes the activation, `None` if the forward itself does.
        between: names of the modules between the product and the last layer.
        after: names of the modules after the last layer.
        act: the activation in words.
        up_first: the second branch is computed first, which decides about random numbers.
    """

    site: Site
    between: tuple[str, ...]
    after: tuple[str, ...]
    act: str
    up_first: bool = False

    def difference(self, other: "Formula") -> tuple[str, str]:
        """Return in words what this formula has and what another one has instead."""
        if self.act != other.act:
            return self.act, other.act
        for place, key in (("before", "between"), ("after", "after")):
            mine, others = getattr(self, key), getattr(other, key)
            if mine != others:
                words = (" and ".join(map(repr, names)) or "no module" for names in (mine, others))
                return tuple(f"{w} {place} its last layer" for w in words)  # type: ignore[return-value]
        if self.up_first != other.up_first:
            return "its layers in another order", "them as they come"
        return f"{self.site}", f"{other.site}"


def read_formula(graph: Graph, site: Site) -> tuple[Formula, Chain]:
    """Read the star formula from a graph, and the function that is its activation.

    A packed site whose `inp` is "" has no first layer: the input itself holds both branches.

    Raises:
        MismatchError: the graph computes anything else; the message names the first such part.
    """
    return _Reader(graph, site).read()


class _Reader:
    """Walk from the output of a graph back to its input."""

    def __init__(self, graph: Graph, site: Site) -> None:
        self.graph, self.site = graph, site
        self.parts = site.layers
        #: results of the first layers: the layer, and the half for a packed one
        self.branches: dict[fx.Node, tuple[str, int | None]] = {}
        self.outputs = {name: self._only_output(name) for name in self.parts}
        firsts = {name: node for name, node in self.outputs.items() if name != site.out}
        if not site.inp:
            firsts[""] = graph.x
            _require_no_overwriting(graph)
        self.firsts = firsts
        for name, node in firsts.items():
            self._add_branch(name, node)

    def read(self) -> tuple[Formula, Chain]:
        product, between, after = self._before_out()
        a, b = (read_chain(self.graph, node, self.branches) for node in self._factors(product))
        if a.trivial and not (b.trivial and self._is_first(a)):
            a, b = b, a
        if not b.trivial:
            raise MismatchError(
                f"both branches pass through functions, {a.text} and {b.text}, where a star has one"
            )
        name, half = self.branches[a.base]
        other, other_half = self.branches[b.base]
        if (name, half) == (other, other_half):
            what = repr(name) if name else "one half of its input"
            raise MismatchError(f"its product has {what} for both factors")
        act = self._act_module(a)
        if self.site.act is not None and act != self.site.act:
            raise MismatchError(f"{self.site.act!r} is not applied to the output of {name!r}")
        site = replace(self.site, inp=name, act=act)
        order: dict[str, Any] = {"up": other} if half is None else {"gate_last": half == 1}
        site = replace(site, **order)
        names = [call.name for call in self.graph.calls]
        up_first = half is None and names.index(other) < names.index(name)
        return Formula(site, between, after, a.text, up_first), a

    def _only_output(self, name: str) -> fx.Node:
        """Return the node with the result of a part that is called once."""
        calls = self.graph.calls_to(name)
        if len(calls) != 1:
            raise MismatchError(f"one run calls {name!r} {len(calls)} times, not once")
        nodes = calls[0].nodes
        outputs = [n for n in nodes if set(n.users) - set(nodes)]
        if len(outputs) != 1:
            raise MismatchError(f"the result of {name!r} is not used")
        inputs = self.graph.inputs(calls[0])
        if name != self.site.out and [_original(n) for n in inputs] != [self.graph.x]:
            what = "input" if not inputs else _where(self.graph, inputs[0])
            raise MismatchError(f"{name!r} takes {what}, not the input itself")
        return outputs[0]

    def _add_branch(self, name: str, output: fx.Node) -> None:
        if self.site.form != "packed":
            self.branches[output] = name, None
            return
        users = _users(output)
        for node in users:
            for half_node, half in _halves(node, output):
                self.branches[half_node] = name, half
        if {half for _, half in self.branches.values()} != {0, 1}:
            what = repr(name) if name else "its input"
            words = ", ".join(map(_call_text, users)) or "nothing"
            raise MismatchError(f"{words} does not split {what} into its first and second half")

    def _before_out(self) -> tuple[fx.Node, tuple[str, ...], tuple[str, ...]]:
        """Return the product, and the names of the modules that lead to `out` and follow it."""
        graph, out = self.graph, self.site.out
        node, names = self._passed(graph.output)
        if out is not None:
            if node is not self.outputs[out]:
                raise MismatchError(f"its output is {_where(graph, node)}, not that of {out!r}")
            inputs = graph.inputs(graph.calls_to(out)[0])
            if len(inputs) != 1:
                raise MismatchError(f"{out!r} takes {len(inputs)} tensors")
            node, between = self._passed(inputs[0])
            return node, between, names
        return node, names, ()

    def _passed(self, node: fx.Node) -> tuple[fx.Node, tuple[str, ...]]:
        """Return the node before the modules that lead to one, and their names in order."""
        graph, names = self.graph, []
        while True:
            node = _without_casts(graph, node)
            call = graph.call_of(node)
            if call is None or call.name in self.parts:
                break
            inputs = graph.inputs(call)
            if len(inputs) != 1 or inputs[0] in self.branches or inputs[0] in self.firsts.values():
                break  # it computes the product, or a part of it
            if len(graph.calls_to(call.name)) != 1:
                raise MismatchError(f"one run calls {call.name!r} more than once")
            names.append(call.name)
            node = inputs[0]
        return node, tuple(reversed(names))

    def _factors(self, node: fx.Node) -> tuple[fx.Node, fx.Node]:
        if function_name(node) == "mul" and len(node.args) == 2:
            a, b = node.args
            if isinstance(a, fx.Node) and isinstance(b, fx.Node):
                for factor in (a, b):
                    if factor in self.graph.tensors:
                        name = self.graph.tensors[factor]
                        raise MismatchError(f"its product is multiplied by {name!r}")
                return a, b
        before = repr(self.site.out) if self.site.out else "its output"
        raise MismatchError(
            f"{before} takes {_where(self.graph, node)}, not the product of two branches"
        )

    def _is_first(self, chain: Chain) -> bool:
        """Return True if a branch is the one that the site names first."""
        name, half = self.branches[chain.base]
        return half == int(self.site.gate_last) if half is not None else name == self.site.inp

    def _act_module(self, chain: Chain) -> str | None:
        """Return the name of the child that computes a whole function, if one does."""
        computed = [n for n in chain.nodes if function_name(n) not in CASTS]
        calls = {self.graph.call_of(n) for n in computed}
        call = calls.pop() if len(calls) == 1 else None
        if call is None or any(n in call.nodes for n in (chain.base,)):
            return None
        # a child that computes the product too is no activation
        inside = all(n in chain.nodes or not n.users for n in call.nodes)
        return call.name if inside and len(self.graph.calls_to(call.name)) == 1 else None


def read_chain(graph: Graph, end: fx.Node, bases: Collection[fx.Node]) -> Chain:
    """Return the element-wise function that makes `end` of one of the nodes `bases`.

    Raises:
        MismatchError: it is made of several of them, or by anything else.
    """
    texts: dict[fx.Node, str] = dict.fromkeys(bases, "x")
    used: dict[fx.Node, None] = {}
    nodes: list[fx.Node] = []

    def visit(node: fx.Node) -> str:
        if node in bases:
            used[node] = None
        if node in texts:
            return texts[node]
        name = function_name(node)
        if name in IDENTITIES or (name in CASTS and _widens(node)):
            text = visit(node.args[0])  # type: ignore[arg-type]
        elif node.op == "call_function" and name in ELEMENTWISE and not _overwrites(node):
            text = _text(name, node, visit)
        else:
            raise MismatchError(f"a factor of its product depends on {_where(graph, node)}")
        nodes.append(node)
        texts[node] = text
        return text

    text = visit(end)
    if len(used) != 1:
        raise MismatchError(f"a factor of its product is made of {len(used)} branches")
    return Chain(next(iter(used)), end, tuple(nodes), text)


def _require_no_overwriting(graph: Graph) -> None:
    """Raise a MismatchError if anything works in place: it may overwrite the input."""
    for node in graph.x.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            raise MismatchError(f"its forward works in place, by {node.target._opname}")


def _users(node: fx.Node) -> list[fx.Node]:
    """Return what uses a tensor, its copies, or slices that are all of it, `h[:]`."""
    users: list[fx.Node] = []
    for user in node.users:
        sliced = function_name(user) == "slice" and user.args[2:3] in ((), (0,), (None,))
        whole = sliced and len(user.args) < 5
        whole = whole and user.meta["val"].shape == node.meta["val"].shape
        users += _users(user) if whole or function_name(user) in IDENTITIES else [user]
    return users


def _halves(node: fx.Node, output: fx.Node) -> list[tuple[fx.Node, int]]:
    """Return the halves of a packed result that `node` makes of it, with their numbers."""
    name, n = function_name(node), output.meta["val"].shape[-1]
    last = (-1, output.meta["val"].ndim - 1)
    args: list[Any] = list(node.args[1:])
    if name == "slice":
        defaults: list[Any] = [0, None, None, 1]
        dim, start, end, step = [*args, *defaults[len(args) :]]
        start, end = start or 0, n if end is None else min(end, n)
        start, end = start + n * (start < 0), end + n * (end < 0)
        first, second = (start, end) == (0, n // 2), (start, end) == (n // 2, n)
        if dim in last and step == 1 and (first or second):
            return [(node, int(second))]
        return []
    dim = node.kwargs.get("dim", args[1] if len(args) > 1 else 0)
    whole = node.meta["val"] if isinstance(node.meta.get("val"), (tuple, list)) else ()
    even = [part.shape[-1] for part in whole] == [n // 2, n // 2]
    if name not in ("chunk", "split", "split_with_sizes", "tensor_split") or dim not in last:
        return []
    users: list[Any] = [user for user in node.users if even and function_name(user) == "getitem"]
    return [(user, int(user.args[1])) for user in users]


def _text(name: str, node: fx.Node, visit: Any) -> str:
    """Return an element-wise call in words, `clamp(x, None, 9)`."""
    args = [visit(a) if isinstance(a, fx.Node) else a for a in node.args]
    kwargs = {k: visit(v) if isinstance(v, fx.Node) else v for k, v in node.kwargs.items()}
    if name in ("mul", "div") and len(args) == 2 and args[1] == 1 and not kwargs:
        return str(args[0])
    words = [str(a) for a in args] + [f"{k}={v}" for k, v in kwargs.items()]
    return f"{name}({', '.join(words)})"


def _call_text(node: fx.Node) -> str:
    """Return a call with its constants in words, `slice(1, 0, 48, 2)`."""
    constants = ["None" if a == 2**63 - 1 else str(a) for a in node.args[1:]]
    return f"{function_name(node)}({', '.join(constants)})"


def function_name(node: fx.Node) -> str:
    """Return the name of a node's function, `mul` for `aten.mul_.Tensor`."""
    target: Any = node.target
    packet = str(getattr(target, "_opname", None) or getattr(target, "__name__", target))
    return packet if packet.startswith("_") else packet.rstrip("_")


def _overwrites(node: fx.Node) -> bool:
    """Return True if a function works in place on a tensor that has another use."""
    first = node.args[0] if node.args else None
    in_place = str(getattr(node.target, "_opname", "")).endswith("_")
    return in_place and isinstance(first, fx.Node) and len(first.users) > 1


def _widens(node: fx.Node) -> bool:
    """Return True if a conversion of the dtype loses nothing: to float32, or back."""
    before, after = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    x_dtype = torch.promote_types(before.dtype, after.dtype)
    return after.dtype in (x_dtype, torch.float32) or before.dtype == torch.float32


def _drops_nothing(node: fx.Node) -> bool:
    drop = function_name(node) == "dropout"
    return drop and (node.args[1] == 0 or not node.args[2])  # type: ignore[return-value]


def _original(node: fx.Node) -> fx.Node:
    """Return the node of which a node is a copy."""
    while function_name(node) in IDENTITIES or _drops_nothing(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _without_casts(graph: Graph, node: fx.Node) -> fx.Node:
    """Return the node before what changes no value: conversions, products with one, no dropout."""
    while True:
        one = function_name(node) in ("mul", "div") and len(node.args) == 2 and node.args[1] == 1
        cast = function_name(node) in CASTS and _widens(node)
        same = _drops_nothing(node) or function_name(node) in IDENTITIES
        same = same and graph.call_of(node) is None  # no module's
        first = node.args[0] if one or cast or same else None
        if not isinstance(first, fx.Node):
            return node
        node = first


def _where(graph: Graph, node: fx.Node) -> str:
    """Return in words what computes a node: an input, a parameter, or a function."""
    if node is graph.x:
        return "the input"
    if node in graph.tensors:
        return repr(graph.tensors[node])
    call = graph.call_of(node)
    place = f" of {call.name!r}" if call is not None else ""
    named = [graph.tensors[a] for a in node.all_input_nodes if a in graph.tensors]
    if call is not None and function_name(node) in ("linear", "addmm"):
        return f"the result{place}"
    constants = [a for a in node.args if isinstance(a, (int, float)) and not isinstance(a, bool)]
    details = ", ".join([*map(repr, named), *map(str, constants)])
    return f"{function_name(node)}{place}" + (f" with {details}" if details else "")


def activation_name(function: Any) -> str | None:
    """Return the name of the row of `ACTIVATIONS` that equals an element-wise function.

    Values and gradients are compared in float64, at points all over the range of float32.
    """
    x = _points()
    try:
        y, gradient = _with_gradient(function, x)
    except Exception:  # a foreign function may raise anything
        return None
    for row in dict.fromkeys(ACTIVATIONS.values()):
        z, slope = _with_gradient(row.fn, x)
        if _close(y, z) and _close(gradient, slope):
            return row.name
    return None


def _points() -> Tensor:
    """Return points that are densest around zero, up to the limits of float32."""
    near = torch.linspace(-30.0, 30.0, 4093, dtype=torch.float64, device="cpu")
    far = torch.logspace(-30, 38, 2049, dtype=torch.float64, device="cpu")
    return torch.cat([near, far, -far])


def _with_gradient(function: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        y = function(x.clone())
        if not y.requires_grad:  # of a constant
            return y, torch.zeros_like(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), gradient


def _close(a: Tensor, b: Tensor) -> bool:
    """Return True if all values agree to 1e-9, where the first is finite."""
    if a.shape != b.shape:
        return False
    error = (a - b).abs()
    return bool(((error <= 1e-9 * (1 + b.abs())) | ~a.isfinite()).all())
