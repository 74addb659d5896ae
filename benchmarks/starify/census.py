"""Count of the MLPs of a model by its structure alone, to hold `surgery.report` against.

It shares no code with `starlayers.surgery` and knows no activation and no forward: two linear
layers of which the second leads from a hidden width back to the first one's input are an MLP, and
so are two stacks of matrices, one for each expert. That finds too much: `EXPLAINED` says what is
left out.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

#: pattern of the owner's class name -> why its pairs of linear layers are no MLP
EXPLAINED = {
    r"Attention|Attn|MLA$|Indexer": "attention: projections of heads",
    r"MambaMixer|DeltaNet|RecurrentBlock|ShortConv|LSTM|GRU": "recurrence between the two",
}


class Row(Protocol):
    """Row of `surgery.report`."""

    name: str
    state: str
    detail: str


@dataclass(frozen=True)
class Candidate:
    """Module that looks like an MLP.

    Args:
        owner: name of the module in the model, "" for the model itself.
        kind: class of the module.
        form: "pair" (linear layers of one module), "split" (of two that it calls) or "experts"
            (parameters with one matrix for each expert).
        first: names of the layers or parameters that widen.
        explained: why it is no MLP; empty where it is one.
    """

    owner: str
    kind: str
    form: str
    first: tuple[str, ...]
    explained: str = ""


def census(model: nn.Module) -> list[Candidate]:
    """Return what looks like an MLP in a model, explained or not, in the order of its modules."""
    found: dict[tuple[str, ...], Candidate] = {}
    for path, module in model.named_modules():
        if not _runs(module):
            continue
        for form, first, narrows in (*_pairs(module), *_splits(module), *_experts(module)):
            names = tuple(f"{path}.{name}".lstrip(".") for name in first)
            kind = type(module).__name__
            explained = next((why for p, why in EXPLAINED.items() if re.search(p, kind)), "")
            if narrows and not explained:
                explained = "bottleneck: narrows first"
            # of modules that share the layers, the innermost owns them
            found[names] = Candidate(path, kind, form, names, explained)
    return list(found.values())


def unlisted(candidates: Iterable[Candidate], rows: Iterable[Row]) -> list[Candidate]:
    """Return the candidates that are no row of a report, or one skipped without a reason."""
    listed = {row.name for row in rows if row.state != "skipped" or row.detail.strip()}

    def is_listed(c: Candidate) -> bool:
        return any(
            name in c.first or name == c.owner or (c.form == "experts" and _inside(name, c.owner))
            for name in listed
        )

    return [c for c in candidates if not c.explained and not is_listed(c)]


def _inside(name: str, owner: str) -> bool:
    return name.startswith(f"{owner}.")


def _runs(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """Return the inputs and outputs of a linear layer or 1x1 convolution."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D":  # GPT-2's linear layer
        weight: Any = module.weight
        return weight.shape[0], weight.shape[1]
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        pointwise = {*module.kernel_size, *module.stride, module.groups} == {1}
        return (module.in_channels, module.out_channels) if pointwise else None
    return None


def _linears(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the linear layers that a module calls itself: children, also in lists of it."""
    found = {}
    for name, child in module.named_children():
        if sizes := _sizes(child):
            found[name] = sizes
        elif isinstance(child, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            found |= {f"{name}.{inner}": sizes for inner, sizes in _linears(child).items()}
    return found


def _fits(first: tuple[int, int], last: tuple[int, int]) -> bool:
    """Return True if `last` leads from `first`'s outputs, or half of them, to its inputs."""
    hidden = last[0]
    return first[0] == last[1] and first[1] in (hidden, 2 * hidden) and hidden != last[1]


Found = tuple[str, tuple[str, ...], bool]


def _pairs(module: nn.Module) -> Iterator[Found]:
    linears = _linears(module)
    names = list(linears)
    for i, last in enumerate(names):
        # two layers fit both ways round: the one that is defined first comes first
        first = tuple(n for n in names[:i] if _fits(linears[n], linears[last]))
        if first:
            yield "pair", first, linears[last][0] < linears[last][1]


def _splits(module: nn.Module) -> Iterator[Found]:
    """Yield a child with one linear layer that widens, and a sibling that narrows."""
    children = {
        n: {k: v for k, v in _linears(c).items() if isinstance(c.get_submodule(k), nn.Linear)}
        for n, c in module.named_children()
        if _runs(c)
    }
    for name, linears in children.items():
        if len(linears) != 1:
            continue
        ((inner, first),) = linears.items()
        for sibling, others in children.items():
            if sibling == name:
                continue
            for sizes in others.values():
                if _fits(first, sizes) and first[1] > first[0]:
                    yield "split", (f"{name}.{inner}",), False


def _leads_back(first: Any, last: tuple[int, int]) -> bool:
    """Return True if `last` undoes `first`, both (out, in) or both (in, out)."""
    (c, d), (a, b) = first, last
    return (d == a and c in (b, 2 * b)) or (c == b and d in (a, 2 * a))


def _experts(module: nn.Module) -> Iterator[Found]:
    stacks = {n: p.shape for n, p in module.named_parameters(recurse=False) if p.ndim == 3}
    matrices = {n: p.shape for n, p in module.named_parameters(recurse=False) if p.ndim == 2}
    for shapes in (stacks, matrices):
        for last, shape in shapes.items():
            a, b = shape[-2:]
            others = {n: s for n, s in shapes.items() if n != last and s[:-2] == shape[:-2]}
            first = tuple(n for n, s in others.items() if _leads_back(s[-2:], (a, b)))
            if a == b or min(a, b) == 1:
                continue
            if not first and list(others.values()).count(shape) >= 2:  # all in one layout
                first = tuple(n for n, s in others.items() if s == shape)
            if first:
                yield "experts", (*first, last), False
                break
