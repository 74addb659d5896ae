"""Place that an activation had in its MLP, where a placeholder stands after `starify`."""

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from starlayers.surgery.compiling import evaluated_when_traced

_numbers = itertools.count(1)


class Place:
    """Place of an activation that moved into a star projection.

    The placeholder there returns what the projection computed, as it is. Anything else is an error:
    a layer, hook or operation between the two would have acted before the activation in the model,
    and acts on the product now.

    It is an object of its own, so that the modules that it refers to are no children. In the place
    of a function it is the placeholder itself, in that of a module a `Placeholder` is.

    Args:
        parent: the module that holds the activation, and its name there.
        inp: name of the layer that is a star projection now, for messages.
        is_module: True if the activation is a module.
    """

    def __init__(self, parent: tuple[nn.Module, str], inp: str, *, is_module: bool) -> None:
        (self.parent, self.name), self.inp = parent, inp
        self.number = next(_numbers)
        self.placeholder: Any = Placeholder(self) if is_module else self

    def mark(self, y: Tensor) -> Tensor:
        """Mark a result of the star projection, which the placeholder lets through."""
        y.star_place = self.number  # type: ignore[attr-defined]
        if not torch.compiler.is_compiling() and isinstance(y, Tensor):
            _note(y, self.number)
        return y

    def __call__(self, x: Tensor) -> Tensor:
        """Return `x` if it is the result of the star projection.

        Raises:
            RuntimeError: it is anything else.
        """
        if isinstance(x, Tensor) and not self._is_result(x):
            owner = type(self.parent).__name__
            raise RuntimeError(
                f"the activation {self.name!r} of a {owner} takes another tensor than the result "
                f"of {self.inp!r}: a layer, a hook or an operation came between them after "
                "starify, or the layer was replaced. It would act on a product; undo that, or "
                "revert first and starify again"
            )
        return x

    def _is_result(self, x: Tensor) -> bool:
        marked: bool = getattr(x, "star_place", 0) == self.number
        if torch.compiler.is_compiling():
            return marked
        note = _read_note(x)
        return marked if note is None else note == (self.number, *_layout(x))

    def require_free(self) -> None:
        """Raise a RuntimeError if another activation was put into the place."""
        if kind := other_in(self):
            raise RuntimeError(
                f"the activation {self.name!r} of a {type(self.parent).__name__} was set to {kind} "
                "after starify, and would be applied to a product; set it as `act` of the "
                "StarProjection, or revert first"
            )


@evaluated_when_traced
def other_in(place: Place) -> str:
    """Return what was put into a place instead of the placeholder, "" if nothing was."""
    now = vars(place.parent).get(place.name, place.parent._modules.get(place.name))
    if now is place.placeholder:
        return ""
    return type(now).__name__ if isinstance(now, nn.Module) else repr(now)


class Placeholder(nn.Identity):
    """Module in the place of an activation that moved into a star projection.

    Shapes: those of its input, which it returns.
    """

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        return self.place(x)


# A storage keeps its Python object, so a note on it holds for tensors that libraries derive from a
# result without changing it: hooks of backward passes wrap it, DeepSpeed detaches it.


def _note(y: Tensor, number: int) -> None:
    try:
        y.untyped_storage().star_place = (number, *_layout(y))  # type: ignore[attr-defined]
    except (NotImplementedError, RuntimeError):
        return  # `torch.func` and some subclasses have no storage: the mark on the tensor tells


def _read_note(x: Tensor) -> Any:
    try:
        return getattr(x.untyped_storage(), "star_place", None)
    except (NotImplementedError, RuntimeError):
        return None


def _layout(x: Tensor) -> tuple[Any, ...]:
    """Return the shape and the strides of a tensor, and how often it was changed in place."""
    return x.shape, x.stride(), None if x.is_inference() else x._version
