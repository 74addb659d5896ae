"""Where an MLP lies inside a model: dotted names, and what stands behind them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

__all__ = ["Projection", "Site", "attribute", "gate_blocker", "parent_of", "projection"]


@dataclass(frozen=True)
class Site:
    """One MLP of an owner module, by the names of its parts relative to the owner.

    Args:
        recipe: the recipe that found it.
        form: "plain" `out(act(inp(x)))`, "gated" `out(act(inp(x)) * up(x))`, or "packed", where
            `inp` makes both branches at once.
        inp: the projection whose output the activation takes.
        act: the activation, a module or a function attribute.
        out: the projection after the product, `None` where it lies outside of the owner.
        up: the second branch of a gated MLP.
        gate_last: whether a packed projection holds the activated half last.

    Example:
        >>> Site("chain", "plain", inp="fc1", act="act", out="fc2").inp
        'fc1'
    """

    recipe: str
    form: str
    inp: str
    act: str
    out: str | None
    up: str | None = None
    gate_last: bool = False

    def variants(self) -> Iterator["Site"]:
        """This site, then the other order of its branches: only a run can tell them apart."""
        yield self
        if self.form == "gated" and self.up is not None:
            yield replace(self, inp=self.up, up=self.inp)
        if self.form == "packed":
            yield replace(self, gate_last=not self.gate_last)


class Projection(NamedTuple):
    """The sizes of a linear map over channels, and whether they lie last or at dimension 1."""

    in_features: int
    out_features: int
    channels_first: bool = False


def projection(module: nn.Module | None) -> Projection | None:
    """What `module` maps, if it is a linear layer, a `Conv1D` of transformers or a 1x1 convolution.

    A layer that PEFT has wrapped counts as the layer inside it.

    Example:
        >>> projection(nn.Linear(2, 3))
        Projection(in_features=2, out_features=3, channels_first=False)
        >>> projection(nn.Conv2d(2, 3, 3)) is None
        True
    """
    base = base_layer(module)
    if isinstance(base, nn.Conv2d):
        simple = base.kernel_size == (1, 1) == base.stride and base.groups == 1
        unpadded = simple and base.padding in (0, (0, 0), "valid", "same")
        return Projection(base.in_channels, base.out_channels, True) if unpadded else None
    conv1d = type(base).__name__ == "Conv1D"
    names = ("nx", "nf") if conv1d else ("in_features", "out_features")
    n, f = (getattr(base, name, None) for name in names)
    linear = conv1d or any("Linear" in kind.__name__ for kind in type(base).__mro__)
    return Projection(n, f) if linear and isinstance(n, int) and isinstance(f, int) else None


def base_layer(module: nn.Module | None) -> nn.Module | None:
    """The layer inside of PEFT's wrappers, or the module itself."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def weight_of(module: nn.Module) -> Any:
    """The weight of a projection; of a parametrised one what it is made of, and nothing is run."""
    base: Any = base_layer(module)
    if is_parametrized(base, "weight"):
        made_of = base.parametrizations.weight
        return made_of.original if hasattr(made_of, "original") else made_of.original1
    return getattr(base, "weight", None)


def dtype_and_device(module: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Where and in what type the weight of a projection lies."""
    weight = weight_of(module)
    return weight.dtype, weight.device


def gate_blocker(module: nn.Module) -> str | None:
    """Why no gate can stand beside this projection: its weight is quantised, or no tensor.

    Example:
        >>> gate_blocker(nn.Linear(2, 2)) is None
        True
    """
    weight, kind = weight_of(module), type(base_layer(module)).__name__
    if not isinstance(weight, Tensor):
        return f"{kind} has no weight tensor: quantised? starify before quantising"
    if type(weight) not in (Tensor, nn.Parameter):
        what = type(weight).__name__
        return f"{kind} has a {what} for a weight: starify before quantising, after initialising"
    if not weight.is_floating_point() or weight.element_size() < 2:
        return f"{kind} holds {weight.dtype} weights: starify before quantising"
    return None


def parent_of(owner: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the dotted `name`, and the last part of the name.

    Example:
        >>> parent, leaf = parent_of(nn.Sequential(nn.Sequential(nn.ReLU())), "0.0")
        >>> parent, leaf
        (Sequential(
          (0): ReLU()
        ), '0')
    """
    path, _, leaf = name.rpartition(".")
    return owner.get_submodule(path), leaf


def attribute(owner: nn.Module, name: str) -> Any:
    """The module or function under a dotted name.

    Example:
        >>> attribute(nn.Sequential(nn.ReLU()), "0")
        ReLU()
    """
    parent, leaf = parent_of(owner, name)
    return getattr(parent, leaf)


def join(path: str, name: str) -> str:
    """A dotted name below a module, which is "" for the model itself."""
    return f"{path}.{name}" if path else name


def put(owner: nn.Module, name: str, value: nn.Module | Callable[..., Tensor]) -> None:
    """Set a module or function attribute where it is found, at its place among the children."""
    parent, leaf = parent_of(owner, name)
    # a function can hide a module of its name: torch's decoder layer has both after a deepcopy
    if leaf in parent._modules and leaf not in vars(parent):
        parent._modules[leaf] = value  # type: ignore[assignment]
    else:
        vars(parent)[leaf] = value


def halves(h: Tensor, site: Site) -> tuple[Tensor, Tensor]:
    """The two branches in the output of a packed projection, the activated one first."""
    first, second = h.chunk(2, -1)
    return (second, first) if site.gate_last else (first, second)
