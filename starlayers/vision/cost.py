"""Multiply-adds of a network, counted as the StarNet paper counts them."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from starlayers.backend import use_backend


def multiply_adds(model: nn.Module, shape: tuple[int, ...] = (3, 224, 224)) -> int:
    """Count the multiply-adds of one forward pass in eval mode.

    Those of convolutions and linear layers, and two per output element of a BatchNorm: fvcore's
    rule, by which the published StarNet figures were counted.

    `shape` is (C, H, W) of the one image; the mode of `model` is restored.
    """
    norm_macs = 0

    def count_norm(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        nonlocal norm_macs
        norm_macs += 2 * output.numel()

    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    hooks = [m.register_forward_hook(count_norm) for m in norms]
    training = model.training
    device = next(model.parameters()).device
    # eager backend: the counter does not know the fused ops
    with torch.no_grad(), use_backend("eager"), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, *shape, device=device))
    model.train(training)
    for hook in hooks:
        hook.remove()
    return int(counter.get_total_flops()) // 2 + norm_macs
