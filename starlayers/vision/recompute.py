"""Gradient checkpointing that does not update BatchNorm statistics twice."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

__all__ = ["recompute"]


def recompute(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)` that stores only `x` and runs `module` again in the backward.

    Values, gradients and running statistics are those of a plain call: the second run leaves the
    statistics alone.

    Example:
        >>> import torch
        >>> recompute(nn.Linear(2, 3), torch.ones(1, 2, requires_grad=True)).shape
        torch.Size([1, 3])
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _frozen_statistics(module)

    y: Tensor = checkpoint(module, x, use_reentrant=False, context_fn=contexts)
    return y


@contextmanager
def _frozen_statistics(module: nn.Module) -> Iterator[None]:
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for m in norms:
        m.track_running_stats = False
    try:
        yield
    finally:
        for m in norms:
            m.track_running_stats = True
