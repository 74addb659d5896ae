"""MLPs of a model that no recipe claims, and why they cannot be replaced."""

import re
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from starlayers.surgery.adopted import Adopted
from starlayers.surgery.contexts import fake_maker
from starlayers.surgery.entries import names_in_code
from starlayers.surgery.formula import function_name, read_chain
from starlayers.surgery.graph import SIZES, Graph, trace
from starlayers.surgery.linear_layers import Projection, dtype_and_device, projection
from starlayers.surgery.projection import StarProjection
from starlayers.surgery.recipes import FUNCTIONS, SPLITS, half, is_sequence, runs
from starlayers.surgery.sandbox import sandbox_copy
from starlayers.surgery.site import attribute, join
from starlayers.surgery.snapshot import signature
from starlayers.surgery.trial_run import MismatchError
from starlayers.surgery.verify import verify

#: classes whose linear layers are no MLP, though their sizes may be those of one
OTHERS = re.compile(r"attention|attn|mamba|mixer$|recurrent|deltanet|lstm|gru\b|router", re.I)

#: functions that mix positions or heads: what passes through them is no hidden layer
MIXING = re.compile(r"scaled_dot_product|bmm|matmul|einsum|cumsum|fft|scan|attention")

#: most names of parts in one reason
MOST_PARTS = 4


class Pair(NamedTuple):
    """Two linear layers with the sizes of an MLP: names in their owner, and branches in `first`."""

    first: str
    last: str
    branches: int


def overlooked(model: nn.Module, listed: Collection[str]) -> dict[str, tuple[str, str]]:
    """Return the MLPs that are not `listed`: form and reason by name of the first layer.

    The form is "packed" where that layer makes two branches.

    An MLP is a linear layer that widens, and a later one in the same module, or in one that this
    module calls, that leads from the hidden size back to the first one's input.

    Example:
        >>> class Inline(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)
        ...     def forward(self, x):
        ...         return self.fc2(self.fc1(x).relu().square())
        >>> overlooked(Inline(), ())
        {'fc1': ('plain', 'its activation square(relu(x)) is written into the forward of Inline')}
    """
    found: dict[str, tuple[str, str]] = {}
    known: dict[Any, tuple[str, Any]] = {}
    seen = set(listed)
    for path, owner in reversed(list(model.named_modules())):  # the innermost owner first
        if not runs(owner) or isinstance(owner, (Adopted, StarProjection)):
            continue
        if OTHERS.search(type(owner).__name__):
            continue
        for pair in _pairs(owner):
            name = join(path, pair.first)
            if name in seen:
                continue
            own, kept = signature(owner)
            key = own, pair
            if key not in known:
                known[key] = _reason(owner, pair), kept
            if reason := known[key][0]:
                seen.add(name)
                found[name] = "packed" if pair.branches == 2 else "plain", reason
    return found


def _pairs(owner: nn.Module) -> Iterator[Pair]:
    layers = dict(_layers(owner, deep=True))
    names = list(layers)
    for i, last in enumerate(names):
        out = layers[last]
        for first in names[:i]:
            n, f, _ = layers[first]
            branches = 2 if f == 2 * out.in_features else 1
            if (
                0 < n < out.in_features
                and out.out_features == n
                and f == branches * out.in_features
            ):
                yield Pair(first, last, branches)
                break  # the other ones are branches of the same MLP


def _layers(owner: nn.Module, *, deep: bool) -> Iterator[tuple[str, Projection]]:
    """Yield the linear layers of a module, in lists of it, and alone in a child of it."""
    for name, child in owner._modules.items():
        if child is None or isinstance(child, (Adopted, StarProjection)):
            continue
        if (sizes := _sizes(child)) is not None:
            yield name, sizes
        elif isinstance(child, nn.ModuleList) or is_sequence(child):
            yield from ((f"{name}.{inner}", s) for inner, s in _layers(child, deep=deep))
        elif deep and runs(child) and not OTHERS.search(type(child).__name__):
            inside = list(_layers(child, deep=False))
            if len(inside) == 1:
                yield f"{name}.{inside[0][0]}", inside[0][1]


def _sizes(module: nn.Module) -> Projection | None:
    """Return `projection(module)`, and that of 1x1 convolutions of other dimensions."""
    if isinstance(module, (nn.Conv1d, nn.Conv3d)):
        pointwise = {*module.kernel_size, *module.stride, module.groups} == {1}
        return Projection(module.in_channels, module.out_channels, True) if pointwise else None
    return projection(module)


def _reason(owner: nn.Module, pair: Pair) -> str:
    """Return why the MLP of two layers is left, empty if it turns out to be none."""
    parent = owner.get_submodule(pair.first.rpartition(".")[0])
    for site in half(parent) if pair.branches == 2 else ():
        if (reason := verify(parent, site).reason) is not None:
            return reason
    kind, names = type(owner).__name__, names_in_code(type(owner))
    first = _sizes(attribute(owner, pair.first))
    if pair.branches == 2 and first is not None and first.channels_first and SPLITS & names:
        return f"{pair.first!r} is a convolution, and stars of two branches take linear layers"
    problem: MismatchError | None = None
    for shape in _shapes(owner, pair):
        try:
            graph = _traced(owner, pair, shape)
            return _between(owner, graph, pair)
        except MismatchError as error:
            problem = problem or error
    calls = sorted(FUNCTIONS & names)
    if pair.branches == 2 or not calls:
        return ""  # what its layers are for is not known
    return f"the forward of {kind} calls {' and '.join(calls)} itself; {problem}"


def _shapes(owner: nn.Module, pair: Pair) -> list[tuple[int, ...]]:
    n = (_sizes(attribute(owner, pair.first)) or Projection(1, 1)).in_features
    a, b, c = SIZES
    return [(a, b, n), (a, n), (a, n, b, c)]


def _traced(owner: nn.Module, pair: Pair, shape: tuple[int, ...]) -> Graph:
    dtype, device = dtype_and_device(attribute(owner, pair.first))
    device = torch.device("cpu") if device.type == "meta" else device
    dtype = dtype if dtype.is_floating_point else torch.get_default_dtype()
    from torch._subclasses.fake_tensor import FakeTensorMode  # heavy, as `torch.export` is

    with FakeTensorMode(allow_non_fake_inputs=True):
        body = sandbox_copy(owner, make=fake_maker(dtype, device)).eval()
        x = torch.empty(shape, dtype=dtype, device=device)
    with torch.no_grad():
        parts = [name for name, m in owner.named_modules() if not m._modules]
        return trace(body, x, [*parts, pair.first, pair.last], 1 if x.ndim == 4 else -1)


def _between(owner: nn.Module, graph: Graph, pair: Pair) -> str:
    """Return what is between two layers in words, empty if the second does not follow the first."""

    first, last = (graph.calls_to(name) for name in (pair.first, pair.last))
    if not first or not last:
        return ""
    if len(first) != 1 or len(last) != 1:
        return f"one run calls {pair.first!r} {len(first)} times and {pair.last!r} {len(last)}"
    hidden = [n for n in first[0].nodes if set(n.users) - set(first[0].nodes)]
    inputs = graph.inputs(last[0])
    if len(hidden) != 1 or len(inputs) != 1:
        return ""
    after: set[fx.Node] = set(hidden)
    for node in hidden[0].graph.nodes:  # in the order they run
        if after & set(node.all_input_nodes):
            after.add(node)
    before: dict[fx.Node, None] = {}
    todo = [inputs[0]]
    while todo:
        node = todo.pop()
        if node in after and node not in before and node is not hidden[0]:
            before[node] = None
            todo += node.all_input_nodes
    if inputs[0] not in after or any(MIXING.search(str(n.target)) for n in before):
        return ""
    try:
        text = read_chain(graph, inputs[0], hidden).text
    except MismatchError:
        parts = _parts(owner, graph, before)
        more = ", and more" if len(parts) > MOST_PARTS else ""
        names = ", ".join(parts[:MOST_PARTS]) + more
        return f"its hidden layer is more than one activation: {names} after {pair.first!r}"
    if text == "x":
        return f"no activation is between {pair.first!r} and {pair.last!r}"
    return f"its activation {text} is written into the forward of {type(owner).__name__}"


def _parts(owner: nn.Module, graph: Graph, nodes: Collection[fx.Node]) -> list[str]:
    """Return the names of what computes nodes, in the order they run."""
    names: dict[str, None] = {}
    for node in graph.x.graph.nodes:
        if node in nodes:
            call = graph.call_of(node)
            if call is None:
                names[function_name(node)] = None
            else:
                names[f"{type(owner.get_submodule(call.name)).__name__} {call.name!r}"] = None
    return list(names)
