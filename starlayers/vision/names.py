"""Names of StarNet's parameters in timm, in the authors' code and here."""

import re
from collections.abc import Mapping, MutableMapping
from typing import Any

from torch import Tensor

__all__ = ["POINTWISE", "adopt_names", "has_timm_names", "our_name", "timm_name"]

#: our name of a part (of a block: without the block's name) -> timm's and the authors' name
TIMM_NAMES = {
    "stem.conv": "stem.0.conv",
    "stem.bn": "stem.0.bn",
    "pre.conv": "dwconv.conv",
    "pre.bn": "dwconv.bn",
    "mlp.f1": "f1.conv",
    "mlp.f2": "f2.conv",
    "mlp.g": "g.conv",
    "post.bn": "g.bn",
    "post.conv": "dwconv2.conv",
}
OUR_NAMES = {timm: ours for ours, timm in TIMM_NAMES.items()}
BLOCK = re.compile(r"stages\.\d+\.\d+\.")
#: weights of our linear layers, which are 1x1 convolutions elsewhere
POINTWISE = re.compile(r"\.(mlp\.(f1|f2|g)|(f1|f2|g)\.conv)\.weight$")


def our_name(key: str) -> str:
    """Return our name of a parameter of timm's or the authors' StarNet.

    Example:
        >>> our_name("stages.0.1.f1.conv.weight")
        'stages.0.1.mlp.f1.weight'
    """
    return _rename(key, OUR_NAMES)


def timm_name(key: str) -> str:
    """Return timm's name of a parameter of ours.

    Example:
        >>> timm_name("stages.0.1.post.conv.bias")
        'stages.0.1.dwconv2.conv.bias'
    """
    return _rename(key, TIMM_NAMES)


def has_timm_names(state: Mapping[str, Any], prefix: str = "") -> bool:
    """Return True if a state dict is of timm's or the authors' StarNet, by its stem."""
    return any(key.startswith(f"{prefix}stem.0.") for key in state)


def adopt_names(state: MutableMapping[str, Any], prefix: str = "") -> None:
    """Give the parameters of a StarNet our names and shapes, in place.

    Those of timm's and the authors' are renamed; weights of 1x1 convolutions become those of linear
    layers. Other modules, whose names do not begin with `prefix`, are left alone.

    Example:
        >>> import torch
        >>> g = torch.ones(2, 8, 1, 1)
        >>> state = {"stem.0.bn.bias": torch.ones(1), "stages.0.1.g.conv.weight": g}
        >>> adopt_names(state)
        >>> {name: tuple(t.shape) for name, t in state.items()}
        {'stem.bn.bias': (1,), 'stages.0.1.mlp.g.weight': (2, 8)}
    """
    timms = has_timm_names(state, prefix)
    for key in [key for key in state if key.startswith(prefix)]:
        value, name = state.pop(key), key[len(prefix) :]
        name = our_name(name) if timms else name
        if POINTWISE.search(name) and isinstance(value, Tensor) and value.ndim == 4:
            value = value.flatten(1)  # of a 1x1 convolution; another kernel has too many columns
        state[prefix + name] = value


def _rename(key: str, names: Mapping[str, str]) -> str:
    block = BLOCK.match(key)
    start = block.end() if block else 0
    for old, new in names.items():
        if key.startswith(f"{old}.", start):
            return key[:start] + new + key[start + len(old) :]
    return key
