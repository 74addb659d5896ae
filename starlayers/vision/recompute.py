"""Gradient checkpointing that updates BatchNorm statistics once."""

from contextlib import nullcontext

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from starlayers.recompute import recomputed


def recompute(module: nn.Module, x: Tensor) -> Tensor:
    """Call `module(x)`, save only `x`, and run `module` again in the backward.

    Values, gradients and running statistics are those of a plain call: the second run leaves the
    statistics alone.
    """
    contexts = nullcontext(), _FrozenStatistics(module)
    y: Tensor = recomputed(module, x, context_fn=lambda: contexts)
    return y


class _FrozenStatistics:
    """Context that keeps the running statistics of BatchNorms from changing.

    Inside it the norms update copies. It can be entered again, as checkpoint needs.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        norms = [m for m in self.module.modules() if isinstance(m, _BatchNorm)]
        self.buffers = [(m, name, b) for m in norms for name, b in m.named_buffers(recurse=False)]
        for m, name, buffer in self.buffers:
            setattr(m, name, buffer.clone())

    def __exit__(self, *_: object) -> None:
        for m, name, buffer in self.buffers:
            setattr(m, name, buffer)
