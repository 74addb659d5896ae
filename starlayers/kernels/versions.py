"""Versions of weights, by which what was computed from them is found to be out of date."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

__all__ = ["versions"]

#: steps of all optimizers of this process: fused ones change weights without a new version
_steps = 0


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


def versions(tensors: Iterable[Tensor | None]) -> tuple[Any, ...] | None:
    """Return what differs as soon as one of the tensors was replaced or changed in place.

    Optimizers, `load_state_dict`, `.to()` and in-place functions are all seen. A change through
    `tensor.data` is not, since PyTorch does not count it. Returns `None` for inference tensors,
    which have no versions.

    Example:
        >>> import torch
        >>> w = torch.ones(2)
        >>> before = versions([w])
        >>> _ = w.mul_(2)
        >>> versions([w]) == before
        False
    """
    seen: list[Any] = [_steps]
    for t in tensors:
        if t is None:
            seen.append(None)
        elif t.is_inference():
            return None
        else:
            # the layout too: `w.data = w.data.t()` changes neither version nor address
            seen += (id(t), t._version, t.data_ptr(), t.stride())
    return tuple(seen)
