"""Versions of weights, by which what was computed from them is found to be out of date."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

__all__ = ["folded_weights_stay", "versions", "weights_stay"]

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


_thread = threading.local()


@contextmanager
def folded_weights_stay() -> Iterator[None]:
    """Let a CUDA graph be captured with weights that were folded before, in this thread.

    The caller drops the graph when a weight changes, and keeps the folded weights until then.
    """
    _thread.weights_stay = True
    try:
        yield
    finally:
        _thread.weights_stay = False


def weights_stay() -> bool:
    """Return True inside of `folded_weights_stay`."""
    return getattr(_thread, "weights_stay", False)
