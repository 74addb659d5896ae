"""Explanation of what the star layers of a model run, and why not a fused kernel."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer

from starlayers.backend import backend_name, use_backend
from starlayers.dispatch import Plan

__all__ = ["Explanation", "explain"]


class Row(NamedTuple):
    """Star layer of a model and the plan for the call it gets."""

    name: str
    layer: str
    plan: Plan


class Explanation(tuple[Row, ...]):
    """Rows of `explain`, one for each star layer; printed, they are a table.

    Example:
        >>> from starlayers import StarMLP
        >>> rows = explain(nn.Sequential(StarMLP(4)), torch.ones(1, 4))
        >>> rows[0].name, rows[0].plan.fused
        ('0', False)
    """

    def __str__(self) -> str:
        if len(self) == 1 and not self[0].name:
            return str(self[0].plan)
        cells = [(row.name, row.layer, str(row.plan)) for row in self]
        widths = [max(map(len, column)) for column in zip(*cells)]
        rows = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)
        return "\n".join(rows) or "no star layers"


def explain(model: nn.Module, *args: Any, **kwargs: Any) -> Explanation:
    """Tell for each star layer of a model what computes it, or why it is the definition.

    The model is called once with `args` and `kwargs` to see what its layers get; PyTorch's random
    numbers and the buffers are then as before. The answer is for the backend, gradient mode and
    autocast that are in effect at each layer's call. A layer that is called several times with
    different plans has a row for each. Parts of a layer that runs fused as a whole have none.

    Args:
        model: a star layer, or a model that has some: layers with a method `plan`.
        args, kwargs: its inputs.

    Returns:
        Rows of name, class and `Plan`, in the order of `named_modules`.

    Raises:
        TypeError: `model` is not a module.

    Example:
        >>> from starlayers import StarMLP, use_backend
        >>> print(explain(StarMLP(64), torch.ones(8, 64)))
        runs eager: hidden activation of 8192 bytes is small enough for eager
        >>> with use_backend("cpu"):
        ...     print(explain(StarMLP(64), torch.ones(8, 64)))
        runs fused: cpu
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain needs a model or a layer, got a {type(model).__name__}")
    layers = {n: m for n, m in model.named_modules() if _plan_method(m) is not None}
    found: dict[nn.Module, list[Plan]] = {layer: [] for layer in layers.values()}
    # a backend that was asked for may raise in the call: the call runs by its definitions then
    asked = backend_name()
    forced = asked in ("triton", "cpu")
    hooks: list[Any] = []
    nothing: set[nn.Module] = set()

    def attach() -> None:
        for layer in found.keys() - {model}:
            hooks.append(layer.register_forward_pre_hook(note, with_kwargs=True))

    def detach() -> None:
        while hooks:
            hooks.pop().remove()

    def note(layer: nn.Module, args: Any, kwargs: Any) -> None:
        detach()  # a layer with hooks has another plan
        try:
            with use_backend(asked) if forced else nullcontext():
                plan = _plan_method(layer)(*args, **kwargs)
        except RuntimeError as error:  # the backend asked for cannot serve
            plan = Plan("raises", str(error))
        except TypeError as error:
            plan = Plan("unknown", f"its forward takes other arguments than its plan: {error}")
        finally:
            attach()
        if plan is None:  # of a network that plans nothing as a whole
            nothing.add(layer)
        elif str(plan) not in map(str, found[layer]):
            found[layer].append(plan)

    try:
        if model in found:
            note(model, args, kwargs)  # with its own buffers, which its CUDA graphs ask about
        else:
            attach()
        with _unchanged(model), use_backend("eager") if forced else nullcontext():
            model(*args, **kwargs)
    finally:
        detach()
    rows: list[Row] = []
    for name, layer in layers.items():
        if any(row.plan.fused and name.startswith(f"{row.name}.".lstrip(".")) for row in rows):
            continue
        if layer in nothing:
            continue
        plans = found[layer] or [Plan("eager", "not called as a module with these inputs")]
        rows += [Row(name, type(layer).__name__, plan) for plan in plans]
    return Explanation(rows)


def _plan_method(layer: nn.Module) -> Any:
    for name in ("plan", "star_plan"):
        method = getattr(type(layer), name, None)
        if getattr(method, "__annotations__", {}).get("return") in (Plan, Plan | None):
            return getattr(layer, name)
    return None


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Restore PyTorch's random numbers and the buffers; copies of these serve meanwhile."""
    places = [(m, name, b) for m in model.modules() for name, b in m._buffers.items()]
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices):
        try:
            for module, name, buffer in places:
                if buffer is not None and not isinstance(buffer, UninitializedBuffer):
                    module._buffers[name] = buffer.clone()
            yield
        finally:
            for module, name, buffer in places:
                module._buffers[name] = buffer
