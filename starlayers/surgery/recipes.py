"""How MLPs look: one function per structure, from a module to the sites inside it."""

import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from starlayers.activations import ACTIVATIONS
from starlayers.surgery.sandbox import shadow
from starlayers.surgery.site import Projection, Site, projection

__all__ = ["RECIPES", "Recipe", "is_activation", "recognise", "register_recipe"]

#: from a module to the MLPs it is made of; it may claim too much, because every claim is tried
Recipe = Callable[[nn.Module], Iterator[Site]]

#: what functions that are activations are called
NAMED = re.compile(r"(^|_)(act|activation|nonlin|nonlinearity)(_|\d|$)")

#: the recipes in the order they are asked; the first whose claim holds gets the site
RECIPES: list[Recipe] = []


def register_recipe(recipe: Recipe) -> Recipe:
    """Add a recipe, before those there are; usable as a decorator.

    A recipe is called with every module of a model and yields a `Site` for each MLP that it sees.
    `starify` runs every one on random input and skips what does not compute the site's formula.

    Example:
        >>> @register_recipe
        ... def my_mlp(owner):
        ...     if hasattr(owner, "expand") and hasattr(owner, "shrink"):
        ...         yield Site("mine", "plain", inp="expand", act="nonlinearity", out="shrink")
        >>> RECIPES.remove(my_mlp)
    """
    RECIPES.insert(0, recipe)
    return recipe


def is_activation(f: Any) -> bool:
    """Whether `f` maps tensors element by element, and not in a straight line.

    Dropout and identity, norms, softmax and pooling are no activations.

    Example:
        >>> is_activation(nn.GELU()), is_activation(torch.relu), is_activation(nn.LayerNorm(4))
        (True, True, False)
    """
    if not callable(f) or isinstance(f, (type, nn.Dropout, nn.Identity, torch.jit.ScriptModule)):
        return False
    if isinstance(f, nn.Module) and (len(f._modules) or len(f._parameters) > 1):
        return False
    x = torch.tensor([[-1.0, 0.0, 1.0, 2.0], [-3.0, 0.5, 5.0, 7.0]], device="cpu")
    y, part = _applied(f, x), _applied(f, x[:, 1:2])
    if y is None or part is None or not torch.equal(part, y[:, 1:2]):
        return False
    return bool((y[0].diff(n=2) != 0).any())  # at equal steps, a straight line has no bends


def recognise(act: Any) -> str | None:
    """The row of `ACTIVATIONS` that an activation is, by its values to 1e-6; `None` for no row.

    Example:
        >>> recognise(nn.SiLU()), recognise(torch.sin) is None
        ('silu', True)
    """
    x = torch.linspace(-8, 8, 257, device="cpu")
    y = _applied(act, x)
    if y is None:
        return None
    for name, row in ACTIVATIONS.items():
        if name == row.name and torch.allclose(row.fn(x), y, rtol=1e-6, atol=1e-6):
            return row.name
    return None


def _applied(f: Any, x: Tensor) -> Tensor | None:
    """What a foreign callable makes of some numbers, if that is as many numbers of their type."""
    own = x
    try:
        if isinstance(f, nn.Module):
            if any(p.numel() > 1 for p in f.parameters()):
                return None
            f = shadow(f).eval()
            own = next(f.parameters(), x)  # PReLU has one
        with torch.no_grad(), torch.autocast(own.device.type, enabled=False):
            y = f(x.to(own.device, own.dtype, copy=True))
    except Exception:  # it may raise anything
        return None
    fits = isinstance(y, Tensor) and y.shape == x.shape and y.is_floating_point()
    return y.to(x.device, x.dtype) if fits else None


def activations(owner: nn.Module) -> list[str]:
    """The names of the activations an owner holds itself, as modules or as functions."""
    functions = [name for name in vars(owner) if NAMED.search(name)]
    held = {name: getattr(owner, name) for name in dict.fromkeys([*owner._modules, *functions])}
    return [name for name, f in held.items() if is_activation(f)]


def projections(owner: nn.Module) -> dict[str, Projection]:
    """The projections an owner holds itself."""
    found = {name: projection(child) for name, child in owner._modules.items()}
    return {name: sizes for name, sizes in found.items() if sizes is not None}


def _wide(first: Projection, last: Projection) -> bool:
    """An MLP widens; what narrows is squeeze-and-excitation, an adapter or a bottleneck."""
    return first.out_features >= min(first.in_features, last.out_features)


def _returns(first: Projection, last: Projection, branches: int = 1) -> bool:
    """Whether `last` takes the channels of `first` back to where they came from."""
    return (
        last.in_features * branches == first.out_features
        and last.out_features == first.in_features
        and last.channels_first == first.channels_first
    )


def _feeds(first: Projection, last: Projection) -> bool:
    return first.out_features == last.in_features and _wide(first, last)


def is_sequence(owner: nn.Module) -> bool:
    """Whether an owner runs its children one after the other, and nothing else."""
    return isinstance(owner, nn.Sequential) and type(owner).forward is nn.Sequential.forward


def runs(owner: nn.Module) -> bool:
    """Lists and dicts of modules do not run, and what is scripted runs what was compiled."""
    scripted = isinstance(owner, torch.jit.ScriptModule)
    return not scripted and type(owner).forward is not nn.Module.forward


def _feeding(found: dict[str, Projection], last: str, branches: int = 1) -> list[str]:
    """The projections that make what `last` takes back to where it came from, in their order."""
    return [name for name in found if name != last and _returns(found[name], found[last], branches)]


@register_recipe
def chain(owner: nn.Module) -> Iterator[Site]:
    """Two projections and an activation in one module: fc1/fc2, c_fc/c_proj, wi/wo, inline ones."""
    found = {} if is_sequence(owner) else projections(owner)
    order = list(found)
    for last in found:
        # of two square ones, the one that was made first
        firsts = [name for name in _feeding(found, last) if order.index(name) < order.index(last)]
        if len(firsts) == 1 and _wide(found[firsts[0]], found[last]):
            for act in activations(owner):
                yield Site("chain", "plain", firsts[0], act, last)


@register_recipe
def split(owner: nn.Module) -> Iterator[Site]:
    """A module that widens and activates, and a sibling that narrows: Intermediate and Output."""
    if is_sequence(owner):
        return
    held = {name: projections(child) for name, child in owner._modules.items() if child is not None}
    for first, inside in held.items():
        if len(inside) != 1:
            continue
        ((inp, sizes),) = inside.items()
        if sizes.out_features <= sizes.in_features:  # a pooler beside a projection
            continue
        acts = activations(owner.get_submodule(first))
        backs = [
            f"{name}.{out}"
            for name, others in held.items()
            for out, back in others.items()
            if name != first and _returns(sizes, back)
        ]
        if len(acts) == 1 and len(backs) == 1:
            yield Site("split", "plain", f"{first}.{inp}", f"{first}.{acts[0]}", backs[0])


@register_recipe
def sequential(owner: nn.Module) -> Iterator[Site]:
    """Projection, activation, and later another projection, in a row of layers."""
    if not is_sequence(owner):
        return
    names = list(owner._modules)
    found = projections(owner)
    for inp, act in pairwise(names):
        if inp not in found or not is_activation(owner._modules[act]):
            continue
        later = [name for name in names[names.index(act) + 1 :] if name in found]
        if not later and _is_stack(owner):
            yield Site("stack", "plain", inp, act, None)
        elif later and _feeds(found[inp], found[later[0]]):
            yield Site("sequential", "plain", inp, act, later[0])


def _is_stack(owner: nn.Module) -> bool:
    """Pairs of one width or more and nothing else: the trunks of SB3, without squashed actions."""
    children = list(owner.children())
    maps = [sizes for child in children[::2] if (sizes := projection(child)) is not None]
    return (
        len(maps) > 1
        and len(children) == 2 * len(maps)
        and all(is_activation(child) for child in children[1::2])
        and len({type(child) for child in children[1::2]}) == 1
        and 2 * maps[-1].out_features >= maps[-1].in_features
    )


@register_recipe
def gated(owner: nn.Module) -> Iterator[Site]:
    """Two projections that widen and one that narrows: gate/up/down, wi_0/wi_1/wo, w1/w2/w3."""
    found = {} if is_sequence(owner) else projections(owner)
    for last in found:
        firsts = _feeding(found, last)
        if len(firsts) == 2 and not found[last].channels_first:
            for act in activations(owner):
                yield Site("gated", "gated", firsts[0], act, last, up=firsts[1])


@register_recipe
def packed(owner: nn.Module) -> Iterator[Site]:
    """One projection that makes both branches: Wi/Wo, gate_up_proj/down_proj, w12/w3."""
    found = {} if is_sequence(owner) else projections(owner)
    for last in found:
        firsts = _feeding(found, last, branches=2)
        if len(firsts) == 1 and not found[last].channels_first:
            for act in activations(owner):
                yield Site("packed", "packed", firsts[0], act, last)
