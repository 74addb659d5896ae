"""Modules of foreign classes that `starify` gives a class of its own, derived from theirs."""

import inspect
from collections.abc import Collection
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from starlayers.surgery.compiling import evaluated_when_traced
from starlayers.surgery.sandbox import unsharded


class Adopted(nn.Module):
    """Module of a foreign class `C` with the class `StarC`, of a mixin and of `C`.

    It has no constructor. The module keeps its identity, attributes, methods, children, parameter
    names, hooks and mode, `isinstance(module, C)` holds, and `release` gives the class back. Names
    that mixins add begin with "star", because the module may have layers of any other name.

    Its `star` has `original` (the class `C`), and for the methods of this class `input_name` and
    `snapshot` (its state when it was verified).
    """

    star: Any

    def _star_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Return the input, `None` if a call has other arguments or was not verified."""
        x = None
        if len(args) == 1 and not kwargs:
            (x,) = args
        elif not args and len(kwargs) == 1:
            x = kwargs.get(self.star.input_name)
        return x if isinstance(x, Tensor) and _verified_for(x) else None

    def _star_change(self, hooks_of: Collection[str] | None = None) -> str:
        """Return in words what has changed since the module was verified.

        Hooks of the parts in `hooks_of` are no change. A compiler is told what has changed when it
        traces the call.
        """
        change = change_of(self, None if hooks_of is None else tuple(hooks_of))
        if not change and torch.compiler.is_dynamo_compiling() and self.star.snapshot is not None:
            for name, value in self.star.snapshot.plain:  # a compiler guards what it compares
                if getattr(self, name) != value:
                    return f"{name} is another"
        return str(change)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # a class that registers its subclasses is not told of its star, which is made at run time
        pass

    def __reduce_ex__(self, protocol: Any) -> Any:
        # `StarC` is made at run time: name `C` instead, which can be imported
        original, mixin = self.star.original, _mixin(type(self))
        if type(self) is not star_class(original, mixin):
            return super().__reduce_ex__(protocol)
        get_state = getattr(self, "__getstate__", None)
        return _empty_star, (original, mixin), get_state() if get_state else vars(self)


@evaluated_when_traced
def change_of(module: Adopted, hooks_of: tuple[str, ...] | None) -> str:
    """Return what has changed of a module since it was verified."""
    snapshot, forward = module.star.snapshot, module.star.original.forward
    return "" if snapshot is None else snapshot.change(module, forward, hooks_of=hooks_of)


#: dtype and number of dimensions of inputs for which modules are verified, and the dtype of
#: autocast if it is on
COMBINATIONS: list[tuple[torch.dtype, int, torch.dtype | None]] = [
    (dtype, ndim, low)
    for dtype, low in (
        *((dtype, None) for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)),
        *((torch.float32, low) for low in (torch.bfloat16, torch.float16)),
    )
    for ndim in (2, 3, 4)
]


def _verified_for(x: Tensor) -> bool:
    """Return True for an input of a kind for which modules are verified."""
    if x.layout is not torch.strided or x.is_nested:
        return False
    # a forward may ask for them, and none is verified with them
    if not torch.compiler.is_compiling() and (isinstance(x, nn.Parameter) or _has_attributes(x)):
        return False
    kind = x.device.type
    autocast = kind != "meta" and torch.is_autocast_enabled(kind)
    low = torch.get_autocast_dtype(kind) if autocast else None
    dtype = torch.float32 if x.dtype == low else x.dtype  # as hidden states under autocast are
    return (dtype, x.ndim, low) in COMBINATIONS


def _has_attributes(x: Tensor) -> bool:
    return type(x) is Tensor and bool(vars(x))


#: names of the children that `starify` adds
ADDED = ("star_grown", "star_gate")

#: mixin and class -> the class of both
_star_classes: dict[tuple[type[Adopted], type[nn.Module]], type[Adopted]] = {}


def star_class(kind: type[nn.Module], mixin: type[Adopted]) -> type[Adopted]:
    """Return the class `StarC` of modules of a class `C`, with the forward of a mixin."""
    if (mixin, kind) in _star_classes:
        return _star_classes[mixin, kind]

    @wraps(kind.forward)  # the signature, for those who ask for it
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, mixin):
            return mixin.forward(self, *args, **kwargs)
        # accelerate and expert parallelism hold the forward that they found, past revert
        return kind.forward(self, *args, **kwargs)

    members = {"forward": forward, "__module__": kind.__module__, "__doc__": kind.__doc__}
    metaclass: Any = type(kind)
    star: type[Adopted] = metaclass(f"Star{kind.__name__}", (mixin, kind), members)
    return _star_classes.setdefault((mixin, kind), star)


def _mixin(kind: type[Adopted]) -> type[Adopted]:
    """Return the mixin of a class `StarC`, or of a class that another library derived from it."""
    return next(base for base in kind.__mro__ if Adopted in base.__bases__)


def _empty_star(kind: type[nn.Module], mixin: type[Adopted]) -> Adopted:
    """Return an uninitialised star of a class; what pickle and copy start from."""
    return object.__new__(star_class(kind, mixin))


def adopt(module: nn.Module, mixin: type[Adopted], star: Any) -> Any:
    """Change the class of a module to the star of its class, in place."""
    module.star = star
    module.__class__ = star_class(star.original, mixin)  # type: ignore[assignment]
    return module


def release(module: Adopted) -> nn.Module:
    """Give a module its original class back, and remove the children that `starify` added.

    Raises:
        ValueError: as `released_class` does.
    """
    original = released_class(module)
    for name in ADDED:
        module._modules.pop(name, None)
    del module.star
    module.__class__ = original  # type: ignore[assignment]
    return module


def released_class(module: Adopted) -> type[nn.Module]:
    """Return the class that `release` gives a module.

    Where FSDP2 derived a class from the star, it is what it would have derived from the original.

    Raises:
        ValueError: another library has changed the class since.
    """
    original: type[nn.Module] = module.star.original
    kind, star = type(module), star_class(original, _mixin(type(module)))
    if kind is star:
        return original
    if unsharded(kind) is not star:
        raise ValueError(
            f"revert: a {star.__name__} is a {kind.__name__} now, another library has changed its "
            "class after starify; undo that first (parametrisations)"
        )
    left_out = ("__dict__", "__weakref__")
    members = {key: value for key, value in vars(kind).items() if key not in left_out}
    metaclass: Any = type(kind)
    derived: type[nn.Module] = metaclass(
        f"FSDP{original.__name__}", (kind.__bases__[0], original), members
    )
    return derived


def arguments(module: nn.Module) -> list[inspect.Parameter]:
    """Return the named arguments of a module's forward, those with defaults among them."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return [p for p in parameters if p.kind not in variadic]


def input_name(module: nn.Module) -> str:
    """Return the name of the argument that a module's forward takes its input by."""
    return arguments(module)[0].name
