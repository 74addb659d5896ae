"""Names of an MLP's parts in a module, and access to them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

__all__ = ["Site"]


@dataclass(frozen=True)
class Site:
    """Names of the parts of one MLP, relative to its owner.

    The owner is the module that contains the parts, at any depth.

    Args:
        recipe: name of the recipe that claims the MLP.
        form: "plain" for `out(act(inp(x)))`, "gated" for `out(act(inp(x)) * up(x))`, or "packed"
            if `inp` computes both branches of a gated MLP at once.
        inp: linear layer whose output goes into the activation.
        act: activation, a module or a function attribute; `None` for gated MLPs whose forward
            computes it, or to let the verification find it.
        out: linear layer after the product, `None` if it lies outside of the owner.
        up: linear layer of the second branch, for "gated" only.
        gate_last: for "packed", True if the second half of the output is the activated one.

    The order of `inp` and `up`, and `gate_last`, may be left to the verification too: it finds
    which of two branches is the activated one.

    Example:
        >>> swiglu = Site("mine", "gated", inp="w1", act=None, out="w2", up="w3")
        >>> swiglu.form, swiglu.act
        ('gated', None)
    """

    recipe: str
    form: str
    inp: str
    act: str | None
    out: str | None
    up: str | None = None
    gate_last: bool = False

    @property
    def layers(self) -> list[str]:
        """Names of its linear layers: `inp`, `up` and `out`, without those that it has not."""
        return [name for name in (self.inp, self.up, self.out) if name]


def parent_of(owner: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds the dotted `name`, and the last part of the name."""
    path, _, leaf = name.rpartition(".")
    return owner.get_submodule(path), leaf


def attribute(owner: nn.Module, name: str) -> Any:
    """Return the module or function with a dotted name."""
    if "." not in name:  # the usual case, at every call of a fused MLP
        return getattr(owner, name)
    parent, leaf = parent_of(owner, name)
    return getattr(parent, leaf)


def join(path: str, name: str) -> str:
    """Return the dotted name of a part in the module `path`, "" for the model."""
    return f"{path}.{name}" if path else name


def put(owner: nn.Module, name: str, value: nn.Module | Callable[..., Tensor]) -> None:
    """Replace the module or function with a dotted name, in the same place."""
    parent, leaf = parent_of(owner, name)
    # A function in `__dict__` hides a child module of the same name, so it is the one to replace:
    # deepcopies of nn.TransformerDecoderLayer have both.
    if leaf in parent._modules and leaf not in vars(parent):
        parent._modules[leaf] = value  # type: ignore[assignment]
    else:
        vars(parent)[leaf] = value


def with_new_names(state: dict[str, Any]) -> dict[str, Any]:
    """Return a pickled state in which `act_name` no longer has the name of earlier versions."""
    return {"act_name" if name == "row" else name: value for name, value in state.items()}
