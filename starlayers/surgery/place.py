"""Place that an activation had in its MLP, where a placeholder stands after `starify`."""

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx, nn

if TYPE_CHECKING:
    from starlayers.surgery.projection import StarProjection

from starlayers.surgery.compiling import evaluated_when_traced

_numbers = itertools.count(1)


class Result(NamedTuple):
    """Input of the first layer, which the activation needs beside its result.

    `x` is the layer's input, `None` if the result is the product already. `again` computes the
    result of the layer once more, for a backward that saved the input alone.
    """

    x: Any
    again: Any = None


class Place:
    """Place of an activation in its MLP, where a gate multiplies what it computes.

    The first layer of the MLP, a star projection now, returns what it did in the model, marked with
    its input. The placeholder in this place computes activation, gate and product of it. So other
    calls of the layer compute what the model does. Another tensor than the layer's result is an
    error: a layer, hook or operation between the two acts before the activation, which was not
    verified.

    It is an object of its own, so that the modules that it refers to are no children. In the place
    of a function it is the placeholder itself, in that of a module a `Placeholder` is.

    Args:
        parent: the module that holds the activation, and its name there.
        inp: name of the layer that is a star projection now, for messages.
        is_module: True if the activation is a module.
        star: the star projection.
    """

    def __init__(
        self,
        parent: tuple[nn.Module, str],
        inp: str,
        *,
        is_module: bool,
        star: "StarProjection | None" = None,
    ) -> None:
        (self.parent, self.name), self.inp, self.star = parent, inp, star
        self.number = next(_numbers)
        self.placeholder: Any = Placeholder(self) if is_module else self

    def mark(self, h: Tensor, x: Any, again: Any = None) -> Tensor:
        """Mark a result of the first layer, which the placeholder takes."""
        result = Result(x, again)
        h.star_place, h.star_input = self.number, x  # type: ignore[attr-defined]
        if not torch.compiler.is_compiling() and isinstance(h, Tensor):
            _note(h, self.number, result)
        return h

    def __call__(self, h: Any) -> Any:
        """Return activation times gate of `h`, the result of the first layer.

        Raises:
            RuntimeError: it is anything else.
        """
        if not isinstance(h, (Tensor, fx.Proxy)):
            return h
        result = self._result(h)
        if result is None:
            owner = type(self.parent).__name__
            raise RuntimeError(
                f"the activation {self.name!r} of a {owner} takes another tensor than the result "
                f"of {self.inp!r}: a layer, a hook or an operation is between them that was not "
                "there in the runs that verified it (it came after starify, or works on other "
                "inputs), or the layer was replaced. The gate was not verified for that; undo it, "
                "or revert first and starify again"
            )
        if result.x is None or self.star is None:
            return h
        return self.star.activated(h, *result)  # type: ignore[arg-type]

    def _result(self, h: Any) -> Result | None:
        """Return what belongs to a tensor, `None` if it is no result of the first layer."""
        marked = Result(getattr(h, "star_input", None))
        right: Any = vars(h).get("star_place") if isinstance(h, fx.Proxy) else None
        if isinstance(h, fx.Proxy):
            return marked if right == self.number else None
        marked_here = getattr(h, "star_place", 0) == self.number
        if torch.compiler.is_compiling():
            return marked if marked_here else None
        note = _read_note(h)
        if note is None:
            return marked if marked_here else None
        number, layout, result = note
        return result if number == self.number and layout == _layout(h) else None

    def require_free(self) -> None:
        """Raise a RuntimeError if another activation was put into the place."""
        if kind := other_in(self):
            raise RuntimeError(
                f"the activation {self.name!r} of a {type(self.parent).__name__} was set to {kind} "
                "after starify, and the gate would have no effect; set it as `act` of the "
                "StarProjection, or revert first"
            )


@evaluated_when_traced
def other_in(place: Place) -> str:
    """Return what was put into a place instead of the placeholder, "" if nothing was."""
    now = vars(place.parent).get(place.name, place.parent._modules.get(place.name))
    if now is place.placeholder:
        return ""
    return type(now).__name__ if isinstance(now, nn.Module) else repr(now)


#: names that every module has, which belong to the placeholder itself
OWN = frozenset(["place", *dir(nn.Module), *vars(nn.Module())])


class Placeholder(nn.Identity):
    """Module in the place of an activation that a star projection multiplies by a gate.

    Its attributes are those of the activation, so that `mlp.act.negative_slope = 0.5` sets the
    activation's.

    Shapes: those of its input.
    """

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place

    def __getattr__(self, name: str) -> Any:
        act = self._act()
        if act is None or not _is_of_activation(name):
            return super().__getattr__(name)
        return getattr(act, name)

    def __setattr__(self, name: str, value: Any) -> None:
        act = self._act()
        if act is None or not _is_of_activation(name):
            super().__setattr__(name, value)
        else:
            setattr(act, name, value)

    def _act(self) -> Any:
        star = getattr(vars(self).get("place"), "star", None)
        return None if star is None else star.act

    def forward(self, x: Tensor) -> Tensor:
        return self.place(x)  # type: ignore[no-any-return]


def _is_of_activation(name: str) -> bool:
    """Return True for names that no module has of its own, and no library marks modules with."""
    return not name.startswith("_") and name not in OWN


# A storage keeps its Python object, so a note on it holds for tensors that libraries derive from a
# result without changing it: hooks of backward passes wrap it, DeepSpeed detaches it.


def _note(h: Tensor, number: int, result: Result) -> None:
    try:
        h.untyped_storage().star_place = number, _layout(h), result  # type: ignore[attr-defined]
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
