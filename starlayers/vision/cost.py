"""What a network costs: multiply-adds as papers count them."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from starlayers.backend import use_backend

__all__ = ["multiply_adds"]


def multiply_adds(model: nn.Module, shape: tuple[int, ...] = (3, 224, 224)) -> int:
    """Multiply-adds of one forward pass in eval mode on one image of `shape` (C, H, W).

    Those of convolutions and linear layers, and two per output element of a BatchNorm, which is
    how the published StarNet figures were counted (fvcore's rule).

    Example:
        >>> multiply_adds(nn.Conv2d(3, 8, 1), (3, 10, 10))
        2400
    """
    of_norms = 0

    def count(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        nonlocal of_norms
        of_norms += 2 * output.numel()

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, _BatchNorm)]
    training = model.training
    device = next(model.parameters()).device
    # eager, because the counter does not know the fused op
    with torch.no_grad(), use_backend("eager"), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, *shape, device=device))
    model.train(training)
    for hook in hooks:
        hook.remove()
    return int(counter.get_total_flops()) // 2 + of_norms
