"""Starts of linear layers that are smaller than PyTorch's, at every reset."""

from functools import partial
from typing import Any

import torch
from torch import nn

__all__ = ["reset_inside", "shrink", "start_smaller"]


def reset_inside(module: nn.Module) -> None:
    """Reset the parameters of all layers inside of a module, each once."""
    for child in module.children():
        reset: Any = getattr(child, "reset_parameters", None)
        if reset is None:
            reset_inside(child)
        else:
            reset()


def start_smaller(layer: nn.Linear, first_row: int, gain: float) -> None:
    """Multiply rows of a linear layer from `first_row` on by `gain`, now and at every reset.

    The layer itself keeps its start, so that it and the modules around it reset in any order.
    """
    layer.reset_parameters = partial(reset_smaller, layer, first_row, gain)  # type: ignore[method-assign]
    shrink(layer, first_row, gain)


def reset_smaller(layer: nn.Linear, first_row: int, gain: float) -> None:
    """Initialise a linear layer as PyTorch does, its rows from `first_row` on times `gain`."""
    nn.Linear.reset_parameters(layer)
    shrink(layer, first_row, gain)


@torch.no_grad()
def shrink(layer: nn.Linear, first_row: int, gain: float) -> None:
    """Multiply the rows of a linear layer from `first_row` on by `gain`."""
    for name in ("weight", "bias"):  # what parametrises them was not initialised again
        parameter = layer._parameters.get(name)
        if parameter is not None:
            parameter[first_row:].mul_(gain)
