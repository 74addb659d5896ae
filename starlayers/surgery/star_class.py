"""Classes of star modules: `StarC` for modules of a class `C`, made at run time."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn


class StarModule(nn.Module):
    """Base of what modules become in place; `star.original` is the class that they had.

    Copies and pickles name that class, because `StarC` is made at run time and has no address.
    """

    star: Any

    def __reduce_ex__(self, protocol: Any) -> Any:
        original, kind = self.star.original, base_of(self)
        if type(self) is not star_class(kind, original):
            return super().__reduce_ex__(protocol)
        get_state = getattr(self, "__getstate__", None)
        return _empty_star, (kind, original), get_state() if get_state else vars(self)


#: (base, class) -> `StarC`
_star_classes: dict[tuple[type[StarModule], type[nn.Module]], Any] = {}


def star_class(base: type[StarModule], kind: type[nn.Module]) -> Any:
    """Return the class `StarC` of a class `C`: a subclass of `base` and of `C`.

    Example:
        >>> kind = star_class(StarModule, nn.ReLU)
        >>> kind.__name__, issubclass(kind, nn.ReLU), star_class(StarModule, nn.ReLU) is kind
        ('StarReLU', True, True)
    """
    if (base, kind) in _star_classes:
        return _star_classes[base, kind]
    own: Callable[..., Any] = base.forward

    @wraps(kind.forward)  # the signature, for those who ask for it
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, base):
            return own(self, *args, **kwargs)
        # accelerate and expert parallelism hold the forward that they found, past revert
        return kind.forward(self, *args, **kwargs)

    members = {"forward": forward, "__module__": kind.__module__, "__doc__": kind.__doc__}
    metaclass: Any = type(kind)
    star = metaclass(f"Star{kind.__name__}", (base, kind), members)
    return _star_classes.setdefault((base, kind), star)


def base_of(module: StarModule) -> type[StarModule]:
    """Return the subclass of `StarModule` that a star has of this library."""
    return next(kind for kind in type(module).__mro__ if StarModule in kind.__bases__)


def _empty_star(base: type[StarModule], kind: type[nn.Module]) -> Any:
    """Return an uninitialised star of a class; what pickle and copy start from."""
    return object.__new__(star_class(base, kind))
