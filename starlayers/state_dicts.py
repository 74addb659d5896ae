"""State dicts and pickles of other layouts than the layer that loads them."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["pack_branches", "rearrange_ranks", "remove_old_options", "split_branches"]

#: options that became modules of `starlayers.coefficients.modules`, and their neutral values
OLD_OPTIONS = {"combine": "mul", "rank": 1, "coefficients": "fixed"}


def pack_branches(state_dict: Any, prefix: str, rows: int) -> None:
    """Join `f1` and `f2`, of `rows` rows each, into `f12`; others are left to a named error.

    Example:
        >>> state = {"f1.bias": torch.tensor([1.0]), "f2.bias": torch.tensor([2.0])}
        >>> pack_branches(state, "", rows=1)
        >>> state
        {'f12.bias': tensor([1., 2.])}
    """
    for kind in ("weight", "bias"):
        keys, packed = [f"{prefix}{f}.{kind}" for f in ("f1", "f2")], f"{prefix}f12.{kind}"
        branches = [state_dict.get(key) for key in keys]
        shapes = [t.shape if isinstance(t, Tensor) else () for t in branches]
        if shapes[0] == shapes[1] and shapes[0][:1] == (rows,) and packed not in state_dict:
            state_dict[packed] = torch.cat(branches)
            for key in keys:
                del state_dict[key]


def split_branches(state_dict: Any, prefix: str) -> None:
    """Split `f12` into `f1` and `f2`; an odd number of rows is left to a named error.

    Example:
        >>> state = {"f12.bias": torch.tensor([1.0, 2.0])}
        >>> split_branches(state, "")
        >>> state
        {'f1.bias': tensor([1.]), 'f2.bias': tensor([2.])}
    """
    for kind in ("weight", "bias"):
        packed = state_dict.get(f"{prefix}f12.{kind}")
        if isinstance(packed, Tensor) and packed.ndim and not len(packed) % 2:
            branches = state_dict.pop(f"{prefix}f12.{kind}").chunk(2)
            state_dict |= {f"{prefix}f{i}.{kind}": t for i, t in enumerate(branches, 1)}


def rearrange_ranks(state_dict: Any, prefix: str, rank: int) -> None:
    """Move branches of layout (rank, channels) into the child `star`, as (channels, rank).

    Example:
        >>> state = {"f1.bias": torch.tensor([1.0, 2.0, 3.0, 4.0])}
        >>> rearrange_ranks(state, "", rank=2)
        >>> state
        {'star.f1.bias': tensor([1., 3., 2., 4.])}
    """
    for name in ("f1.weight", "f1.bias", "f2.weight", "f2.bias"):
        rows = state_dict.get(prefix + name)
        if isinstance(rows, Tensor):
            if rows.ndim and len(rows) % rank == 0:  # the layer below names a wrong size
                rows = rows.unflatten(0, (rank, -1)).transpose(0, 1).flatten(0, 1)
            state_dict[f"{prefix}star.{name}"] = rows
            del state_dict[prefix + name]


def remove_old_options(layer: str, state: dict[str, Any]) -> None:
    """Remove options of older versions from a pickled layer's attributes.

    Raises:
        ValueError: one of them changed what the layer computes.
    """
    for option, neutral in OLD_OPTIONS.items():
        value = state.pop(option, neutral)
        if value != neutral:
            raise ValueError(
                f"{layer} was pickled with {option}={value!r}, which is a module of its own now: "
                "save the state dict with the older version and load it into SumMLP, RankStarMLP, "
                "ScaledStarMLP or DynamicStarMLP of starlayers.coefficients.modules"
            )
