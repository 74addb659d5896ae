"""Recipes: functions that claim MLPs of a known structure in a module."""

import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from starlayers.surgery.entries import names_in_code
from starlayers.surgery.linear_layers import Projection, projection
from starlayers.surgery.sandbox import sandbox_copy
from starlayers.surgery.site import Site

__all__ = ["RECIPES", "register_recipe"]

#: function from a module to the MLPs in it; it may claim too much, because every claim is verified
Recipe = Callable[[nn.Module], Iterator[Site]]

#: names of attributes that hold an activation function rather than a module
ACTIVATION_NAME = re.compile(r"(^|_)(act|activation|nonlin|nonlinearity)(_|\d|$)")

#: functions of activations, as a forward calls them
FUNCTIONS = frozenset(
    [
        "elu",
        "gelu",
        "hardswish",
        "hardtanh",
        "leaky_relu",
        "mish",
        "relu",
        "relu6",
        "selu",
        "sigmoid",
        "silu",
        "softplus",
        "tanh",
    ]
)
#: functions that split a tensor; a forward without any of them has no packed branches
SPLITS = frozenset(("chunk", "split", "tensor_split"))

#: recipes whose claims count when they are verified: most of what they see is no MLP
TENTATIVE = frozenset(("half", "bilinear"))

RECIPES: list[Recipe] = []
"""Recipes in the order they are called; the first whose claim is verified gets the MLP.

A recipe is a function from a module to the `Site`s of the MLPs in it.

Example:
    >>> from starlayers.surgery import RECIPES
    >>> all(callable(recipe) for recipe in RECIPES)
    True
"""


def register_recipe(recipe: Recipe) -> Recipe:
    """Add a recipe before the existing ones; usable as a decorator.

    A recipe is called with every module of a model and yields a `Site` for each MLP in it.
    `starify` runs each claimed MLP on random input and skips those that do not compute the formula
    of their site.

    Returns:
        `recipe` itself; `RECIPES.remove(recipe)` takes it out again.

    Example:
        >>> from starlayers.surgery import report
        >>> class Mine(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layers = nn.ModuleList([nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)])
        ...     def forward(self, x):
        ...         return self.layers[2](self.layers[1](self.layers[0](x)))
        >>> @register_recipe
        ... def mine(owner):
        ...     if isinstance(owner, Mine):
        ...         yield Site("mine", "plain", inp="layers.0", act="layers.1", out="layers.2")
        >>> [(row.name, row.recipe, row.state) for row in report(Mine()).rows]
        [('layers.0', 'mine', 'ready')]
        >>> RECIPES.remove(mine)
    """
    RECIPES.insert(0, recipe)
    return recipe


# activations


def is_activation(f: Any) -> bool:
    """Return True if `f` maps tensors element by element and is not linear.

    Dropout, identity, norms, softmax and pooling are no activations. `f` is called on a few
    numbers to tell.
    """
    if not callable(f) or isinstance(f, (type, nn.Dropout, nn.Identity, torch.jit.ScriptModule)):
        return False
    if isinstance(f, nn.Module) and len(f._modules):
        return False
    x = torch.tensor([[-1.0, 0.0, 1.0, 2.0], [-3.0, 0.5, 5.0, 7.0]], device="cpu")
    y, y_of_column = _applied(f, x), _applied(f, x[:, 1:2])
    if y is None or y_of_column is None or not torch.equal(y_of_column, y[:, 1:2]):
        return False  # other elements have an influence
    return bool((y[0].diff(n=2) != 0).any())  # the first row has equal steps: second differences


def _applied(f: Any, x: Tensor) -> Tensor | None:
    """Return `f(x)`, or `None` if `f` fails or returns other than one float each."""
    like = x
    try:
        if isinstance(f, nn.Module):
            if any(p.numel() > 1 for p in f.parameters()):
                return None
            f = sandbox_copy(f).eval()
            like = next(f.parameters(), x)  # nn.PReLU has a parameter
        with torch.no_grad(), torch.autocast(like.device.type, enabled=False):
            y = f(x.to(like.device, like.dtype, copy=True))
    except Exception:  # a foreign callable may raise anything
        return None
    fits = isinstance(y, Tensor) and y.shape == x.shape and y.is_floating_point()
    return y.to(x.device, x.dtype) if fits else None


def activations(owner: nn.Module) -> list[str]:
    """Return the names of a module's activations: children and functions."""
    functions = [name for name in vars(owner) if ACTIVATION_NAME.search(name)]
    names = dict.fromkeys([*owner._modules, *functions])
    return [name for name in names if is_activation(getattr(owner, name))]


# structure


def is_sequence(owner: nn.Module) -> bool:
    """Return True if a module runs its children one after the other, and nothing else."""
    return isinstance(owner, nn.Sequential) and type(owner).forward is nn.Sequential.forward


def runs(owner: nn.Module) -> bool:
    """Return True if a module has a Python forward: no list, none scripted."""
    scripted = isinstance(owner, torch.jit.ScriptModule)
    return not scripted and type(owner).forward is not nn.Module.forward


def projections(owner: nn.Module) -> dict[str, Projection]:
    """Return the linear layers among a module's children, by name."""
    children = {name: projection(child) for name, child in owner._modules.items()}
    return {name: sizes for name, sizes in children.items() if sizes is not None}


def _own_projections(owner: nn.Module) -> dict[str, Projection]:
    """Return `projections(owner)`, none for a sequence, which has recipes of its own."""
    return {} if is_sequence(owner) else projections(owner)


def _widens(first: Projection, last: Projection) -> bool:
    """Return False if the hidden layer is narrower than input and output."""
    return first.out_features >= min(first.in_features, last.out_features)


def _returns(first: Projection, last: Projection, branches: int = 1) -> bool:
    """Return True if `last` maps the output of `first` back to its input's size."""
    return (
        last.in_features * branches == first.out_features
        and last.out_features == first.in_features
        and last.channels_first == first.channels_first
    )


def _first_layers(linears: dict[str, Projection], last: str, branches: int = 1) -> list[str]:
    """Return the names of the linear layers that `last` can be the end of."""
    end = linears[last]
    return [n for n, sizes in linears.items() if n != last and _returns(sizes, end, branches)]


@register_recipe
def half(owner: nn.Module) -> Iterator[Site]:
    """Claim one linear layer whose output is split into two branches: diffusers' GEGLU."""
    linears = _own_projections(owner)
    if len(linears) != 1 or not SPLITS & names_in_code(type(owner)):
        return
    ((name, sizes),) = linears.items()
    if sizes.out_features % 2 == 0 and not sizes.channels_first:
        yield Site("half", "packed", name, None, None)


@register_recipe
def bilinear(owner: nn.Module) -> Iterator[Site]:
    """Claim two linear layers that widen and one that narrows, without an activation."""
    for (inp, up), last in _gated_parts(owner, first_layers=2, branches=1):
        sizes = projections(owner)[inp]
        if sizes.out_features > sizes.in_features and not _activates(owner, inp):
            yield Site("bilinear", "gated", inp, None, last, up=up)


@register_recipe
def inline(owner: nn.Module) -> Iterator[Site]:
    """Claim a child whose forward widens and activates, and a sibling that narrows.

    diffusers' `FeedForward` has them in a list, ESM's layers as `intermediate` and `output`.
    """
    children = dict(_children(owner))
    for first, child in children.items():
        linears = _own_projections(child)
        if len(linears) != 1 or not runs(child):
            continue
        ((inp, sizes),) = linears.items()
        if sizes.out_features <= sizes.in_features or not _activates(child, inp):
            continue
        lasts = [
            f"{name}.{leaf}".rstrip(".")
            for name, sibling in children.items()
            for leaf, other in {"": projection(sibling), **projections(sibling)}.items()
            if name != first and other is not None and _returns(sizes, other)
        ]
        if lasts:
            yield Site("inline", "plain", f"{first}.{inp}", None, lasts[0])


def _children(owner: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the children of a module by name, those in lists too."""
    for name, child in owner._modules.items():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{inner}", module) for inner, module in _children(child))
        elif child is not None:
            yield name, child


@register_recipe
def chain(owner: nn.Module) -> Iterator[Site]:
    """Claim two linear layers and an activation: fc1/fc2, c_fc/c_proj, wi/wo."""
    linears = _own_projections(owner)
    names = list(linears)
    for i, last in enumerate(names):
        # of two square layers, the one that was defined first comes first
        firsts = [name for name in _first_layers(linears, last) if name in names[:i]]
        if len(firsts) == 1 and _widens(linears[firsts[0]], linears[last]):
            for act in activations(owner):
                yield Site("chain", "plain", firsts[0], act, last)


@register_recipe
def split(owner: nn.Module) -> Iterator[Site]:
    """Claim a child that widens and activates, and a sibling that narrows.

    BERT and its relatives have them as `intermediate` and `output`.
    """
    if is_sequence(owner):
        return
    children = {n: projections(child) for n, child in owner._modules.items() if child is not None}
    for first, linears in children.items():
        if len(linears) != 1:
            continue
        ((inp, sizes),) = linears.items()
        if sizes.out_features <= sizes.in_features:  # a pooler, for example
            continue
        acts = activations(owner.get_submodule(first))
        lasts = [
            f"{sibling}.{name}"
            for sibling, others in children.items()
            for name, other in others.items()
            if sibling != first and _returns(sizes, other)
        ]
        if len(acts) == 1 and len(lasts) == 1:
            yield Site("split", "plain", f"{first}.{inp}", f"{first}.{acts[0]}", lasts[0])


@register_recipe
def sequential(owner: nn.Module) -> Iterator[Site]:
    """Claim linear layer, activation and a later linear layer in an `nn.Sequential`."""
    if not is_sequence(owner):
        return
    names = list(owner._modules)
    linears = projections(owner)
    for inp, act in _pairs(owner):
        first = projection(owner.get_submodule(inp))
        if first is None or not is_activation(owner.get_submodule(act)):
            continue
        later = [n for n in names[names.index(act.partition(".")[0]) + 1 :] if n in linears]
        if not later:
            if inp in names and _is_stack(owner):
                yield Site("stack", "plain", inp, act, None)
            continue
        last = linears[later[0]]
        if first.out_features == last.in_features and _widens(first, last):
            yield Site("sequential", "plain", inp, act, later[0])


def _pairs(owner: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the names of neighbours in a sequence, and of the last two in a sequence within it."""
    yield from pairwise(owner._modules)
    for name, child in owner._modules.items():
        if child is not None and is_sequence(child) and len(child._modules) > 1:
            inp, act = list(child._modules)[-2:]
            yield f"{name}.{inp}", f"{name}.{act}"


def _is_stack(owner: nn.Module) -> bool:
    """Return True for pairs of linear layer and activation, as SB3's trunks.

    There must be two pairs or more, all with the same activation. A last layer narrower than half
    of its input is an output, such as a squashed action, and no hidden layer.
    """
    children = list(owner.children())
    linears = [sizes for child in children[::2] if (sizes := projection(child)) is not None]
    return (
        len(linears) > 1
        and len(children) == 2 * len(linears)
        and all(is_activation(child) for child in children[1::2])
        and len({type(child) for child in children[1::2]}) == 1
        and 2 * linears[-1].out_features >= linears[-1].in_features
    )


@register_recipe
def gated(owner: nn.Module) -> Iterator[Site]:
    """Claim two linear layers that widen and one that narrows: gate/up/down."""
    for (inp, up), last in _gated_parts(owner, first_layers=2, branches=1):
        if _activates(owner, inp):
            yield Site("gated", "gated", inp, None, last, up=up)


@register_recipe
def packed(owner: nn.Module) -> Iterator[Site]:
    """Claim one linear layer for both branches: Wi/Wo, gate_up_proj/down_proj."""
    for (inp,), last in _gated_parts(owner, first_layers=1, branches=2):
        if _activates(owner, inp):
            yield Site("packed", "packed", inp, None, last)


def _activates(owner: nn.Module, first: str) -> bool:
    """Return True if a module has an activation, or a forward that widens and calls one.

    What is named as an activation counts, even if it is more than one: the reason then says so.
    """
    sizes = projections(owner)[first]
    widens = sizes.out_features > sizes.in_features
    named = any(ACTIVATION_NAME.search(name) for name in (*owner._modules, *vars(owner)))
    calls = bool(FUNCTIONS & names_in_code(type(owner)))
    return bool(activations(owner)) or (widens and (named or calls))


def _gated_parts(
    owner: nn.Module, first_layers: int, branches: int
) -> Iterator[tuple[list[str], str]]:
    """Yield the first layers and the last layer of a gated MLP, by name."""
    linears = _own_projections(owner)
    for last in linears:
        firsts = _first_layers(linears, last, branches)
        if len(firsts) == first_layers and not linears[last].channels_first:
            yield firsts, last
