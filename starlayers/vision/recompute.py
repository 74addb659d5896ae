"""Gradient checkpointing that does not update BatchNorm statistics twice."""

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from starlayers.backend import recomputed

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
        return nullcontext(), _KeptStatistics(module)

    y: Tensor = recomputed(module, x, context_fn=contexts)
    return y


class _KeptStatistics:
    """Puts copies in the place of the running statistics; re-enterable, as checkpoint needs."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        norms = [m for m in self.module.modules() if isinstance(m, _BatchNorm)]
        self.kept = [(m, k, b) for m in norms for k, b in m.named_buffers(recurse=False)]
        for m, name, buffer in self.kept:
            setattr(m, name, buffer.clone())

    def __exit__(self, *_: object) -> None:
        for m, name, buffer in self.kept:
            setattr(m, name, buffer)
