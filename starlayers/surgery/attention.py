"""Attention gates, `attended * sigmoid(gate)`: the same product, inside a model's own forward."""

import inspect
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from starlayers.backend import star_blocker
from starlayers.functional import star_product
from starlayers.surgery.recipes import projections

__all__ = ["GatedAttention", "fuse_gates", "gated_attentions", "release_gates"]

SIGMOIDS = (torch.sigmoid, Tensor.sigmoid, torch.special.expit, nn.functional.sigmoid)
PRODUCTS = (torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__)


class _SigmoidOf(Tensor):
    """Holds a gate and stands for its sigmoid, computed when anything but a product asks."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in PRODUCTS and len(args) == 2 and not kwargs:
                gate, other = args if isinstance(args[0], cls) else reversed(args)
                alike = type(other) is Tensor and other.shape == gate.shape
                gate = gate.as_subclass(Tensor)
                if alike and star_blocker(gate, other, "sigmoid") is None:
                    return star_product(gate, other, "sigmoid")
            return func(
                *map(_computed, args), **{k: _computed(v) for k, v in (kwargs or {}).items()}
            )


def _computed(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_computed, value))
    return torch.sigmoid(value.as_subclass(Tensor)) if isinstance(value, _SigmoidOf) else value


class _LazySigmoids(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in SIGMOIDS and len(args) == 1 and not kwargs and type(args[0]) is Tensor:
            return args[0].as_subclass(_SigmoidOf)
        return func(*args, **(kwargs or {}))


class GatedAttention(nn.Module):
    """An attention of a model's own class whose output gate goes through the star kernel.

    Not constructed: `starify(mode="fuse")` gives a module a class derived from this one and from
    its own. Its forward is the model's, in which the product with a sigmoid is taken as
    `star(gate, attended, "sigmoid")`; where no kernel serves, nothing differs.

    Example:
        >>> issubclass(GatedAttention, nn.Module)
        True
    """

    original: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        # a compiler sees both operations, and fuses them itself
        if x is None or torch.compiler.is_compiling() or star_blocker(x, x, "sigmoid"):
            return super().forward(*args, **kwargs)
        with _LazySigmoids():
            return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _remake, (self.original,), dict(vars(self))


@cache
def _gated_class(original: Any) -> type[nn.Module]:
    return type(f"Star{original.__name__}", (GatedAttention, original), {"original": original})


def _remake(original: Any) -> nn.Module:
    return object.__new__(_gated_class(original))


def gated_attentions(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The attention modules whose own forward takes a sigmoid, fused or not.

    Example:
        >>> list(gated_attentions(nn.MultiheadAttention(8, 2)))
        []
    """
    for path, module in model.named_modules():
        if isinstance(module, GatedAttention):
            yield path, module
            continue
        names = projections(module)
        if len(names) < 3 or not any(name.startswith(("q", "k")) for name in names):
            continue
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        if code is not None and "sigmoid" in code.co_names and "forward" not in vars(module):
            yield path, module


def fuse_gates(module: nn.Module) -> None:
    """Give an attention module the class whose gate goes through the star kernel."""
    if not isinstance(module, GatedAttention):
        kind: Any = type(module)
        module.__class__ = _gated_class(kind)


def release_gates(module: nn.Module) -> None:
    """Give an attention module its own class back."""
    if isinstance(module, GatedAttention):
        module.__class__ = module.original  # type: ignore[assignment]
