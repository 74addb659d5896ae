"""Tracers of PyTorch: what they call with, and what they record."""

from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from starlayers.drop_path import DropPath

__all__ = ["add_residual", "is_optional", "is_traced", "record"]


def is_traced(x: object) -> bool:
    """Return True if `x` belongs to torch.fx or `torch.jit.trace`, which record no checks."""
    return hasattr(x, "tracer") or torch._C._get_tracing_state() is not None


def is_optional(residual: Tensor) -> bool:
    """Return True for torch.fx's stand-in of an argument that a caller may leave out."""
    node: Any = getattr(residual, "node", None)
    return node is not None and node.op == "placeholder" and node.args != ()


def add_residual(y: Tensor, residual: Tensor | None) -> Tensor:
    """Return `residual + y`, or `y` without a residual; torch.fx records it as one call."""
    if residual is None:
        return y
    if residual.shape != y.shape:
        raise ValueError("the residual must have the shape of the result")
    return residual + y


def record(module: nn.Module) -> nn.Module:
    """Return a module as torch.fx records it, which `torch.jit.script` compiles in its place.

    TorchScript cannot compile the choice of a path and the table of activations.

    Raises:
        ValueError: parts of the module are dropped at random in training mode, which would be
            recorded for good; or a part that is recorded has hooks.
    """
    for name, part in module.named_modules():
        recorded = not type(part).__module__.startswith("torch.nn")
        if recorded and (part._forward_hooks or part._forward_pre_hooks):
            raise ValueError(
                f"torch.jit.script: {name or type(part).__name__} has hooks, which a recording "
                "leaves out; remove them first"
            )
        if isinstance(part, DropPath) and part.training and part.p:
            raise ValueError(
                f"torch.jit.script: {name or 'DropPath'} drops at rate {part.p} in training mode; "
                "call eval() first"
            )
    traced = torch.fx.symbolic_trace(module)
    for node in traced.graph.nodes:
        if "dropout" in getattr(node.target, "__name__", "") and node.kwargs.get("training"):
            raise ValueError(
                f"torch.jit.script: {node.target.__name__} in {type(module).__name__} would be "
                "recorded in training mode; call eval() first, or use the module nn.Dropout"
            )
    # torch.jit.script remembers what it has replaced by id(), which a new object may have once the
    # old one is gone
    traced.meta["recorded"] = module
    return traced
