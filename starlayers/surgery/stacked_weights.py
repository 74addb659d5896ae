"""Find experts with stacked weights outside of the experts interface, by their structure."""

import re
from collections.abc import Iterable
from itertools import permutations

from torch import nn

#: words in the name of a class or module that say that it holds experts
WORDS = re.compile(r"expert|moe|mixture", re.IGNORECASE)
#: words in the name of a class that holds no MLP
OTHERS = re.compile(r"attention|attn|router|moa", re.IGNORECASE)
#: names of the weights of MLPs
WEIGHTS = re.compile(r"^(gate|up|down|gate_up|w_?[123]|v_?1|wi|wo|fc_?[12])(_|\d|$)")


def stacked_experts(path: str, module: nn.Module) -> str:
    """Return why stacked experts are not served, "" for a module that holds none.

    Stacked experts are the weights of several MLPs in one parameter: three dimensions, of which
    the last two fit together as those of an MLP with one or two branches; or two dimensions, the
    rows of all experts below one another. A name has to say that they are experts or an MLP:
    projections of attention heads have the same shapes.
    """
    kind = type(module)
    if kind.__module__.startswith("torch.nn.") or OTHERS.search(kind.__name__):
        return ""
    named = bool(WORDS.search(kind.__name__) or WORDS.search(path.rpartition(".")[2]))
    own = {name: p for name, p in module._parameters.items() if p is not None}
    stacks = {
        name: tuple(p.shape)
        for name, p in own.items()
        if p.ndim == 3 and (p.shape[0] > 1 or WEIGHTS.match(name))  # one expert is a stack too
    }
    if _chained(stacks.values()) and (named or all(map(WEIGHTS.match, stacks))):
        return f"{kind.__name__} holds stacked weights and computes its experts itself: {_WHY}"
    flat = [tuple(p.shape) for p in own.values() if p.ndim == 2]
    if named and len(flat) > 1 and _rows_of_experts(module, flat):
        return f"{kind.__name__} holds the rows of all experts in one matrix: {_WHY}"
    children = [c for c in module.children() if len(c._parameters) and not len(c._modules)]
    single = [
        tuple(p.shape)
        for child in children
        for p in child.parameters(recurse=False)
        if p.ndim == 3 and p.shape[0] > 1 and WORDS.search(type(child).__name__)
    ]
    if (
        not stacks
        and not flat
        and _chained(single)
        and any("act" in name for name in module._modules)
    ):
        return f"{kind.__name__} holds stacked linear layers: {_WHY}"
    return ""


_WHY = "starify serves experts of transformers' experts interface (use_experts_implementation)"


def _chained(shapes: Iterable[tuple[int, ...]]) -> bool:
    """Return True if two of the stacked matrices are first and last layer of an MLP."""
    for (_, *first), (_, *last) in permutations(shapes, 2):
        for width, hidden in permutations(first):
            for last_width, last_hidden in permutations(last):
                fits = width == last_width and hidden in (last_hidden, 2 * last_hidden)
                if fits and min(width, last_hidden) > 1:
                    return True
    return False


def _rows_of_experts(module: nn.Module, shapes: list[tuple[int, ...]]) -> bool:
    """Return True if matrices of one shape hold the rows of as many experts as an attribute says.

    A router has one row an expert, and one matrix.
    """
    counts = [v for k, v in vars(module).items() if "expert" in k and type(v) is int and v > 1]
    repeated = [s for s in shapes if shapes.count(s) > 1]
    return any(rows % n == 0 and rows > n for rows, _ in repeated for n in counts)
