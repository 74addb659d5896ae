"""Modules of foreign classes that became stars."""

import copy
import inspect
import io
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from starlayers import starify
from starlayers.surgery import GatedMLP, StarExperts, revert
from starlayers.surgery.adopted import Adopted, star_class
from tests.surgery.small import Gated


class Doubled(Adopted):
    def forward(self, *args, **kwargs):
        return 2 * super().forward(*args, **kwargs)


class Named(type):
    pass


class Layer(nn.Module, metaclass=Named):
    """Documented."""

    def forward(self, x, *, shift=0.0):
        return x + shift


def doubled():
    layer = Layer()
    layer.star = SimpleNamespace(original=Layer)
    layer.__class__ = star_class(Layer, Doubled)
    return layer


def test_the_class():
    kind = star_class(Layer, Doubled)
    assert kind is star_class(Layer, Doubled)
    assert kind is not star_class(Layer, GatedMLP)
    assert (kind.__name__, kind.__module__, kind.__doc__) == ("StarLayer", __name__, "Documented.")
    assert type(kind) is Named
    assert kind.__mro__[:4] == (kind, Doubled, Adopted, Layer)
    assert inspect.signature(kind.forward) == inspect.signature(Layer.forward)
    x = torch.ones(2)
    assert doubled()(x, shift=3.0).tolist() == [8.0, 8.0]


def test_copies_and_pickles_have_the_class():
    layer = doubled()
    layer.option = 3
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(again) is star_class(Layer, Doubled)
        assert again.star is not layer.star
        assert (again.option, again.star.original) == (3, Layer)


def test_a_class_on_top_is_pickled_by_itself():
    layer = doubled()
    layer.__class__ = type("Wrapped", (type(layer),), {})
    with pytest.raises(pickle.PicklingError, match="Wrapped"):
        pickle.dumps(layer)


def test_a_forward_that_somebody_holds_past_revert():
    """accelerate calls the forward that it found on the instance."""
    mlp, x = starify(Gated(), mode="fuse"), torch.randn(3, 8)
    held = mlp.forward
    expected = mlp(x)
    revert(mlp)
    assert type(mlp) is Gated
    torch.testing.assert_close(held(x), expected)


def test_both_mlps_and_experts_are_star_modules():
    assert issubclass(GatedMLP, Adopted)
    assert issubclass(StarExperts, Adopted)
    file = io.BytesIO()
    mlp, x = starify(Gated(), mode="fuse"), torch.randn(3, 8)
    torch.save(mlp, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert type(again) is star_class(Gated, GatedMLP)
    assert torch.equal(again(x), mlp(x))


@pytest.mark.parametrize(
    "make",
    [lambda x: nn.Parameter(x), lambda x: x.requires_grad_(), lambda x: marked(x)],
    ids=["parameter", "leaf", "attribute"],
)
def test_inputs_that_carry_more_than_values_run_the_own_forward(make):
    class Asks(Gated):
        def forward(self, x):
            y = super().forward(x)
            return 2 * y if isinstance(x, nn.Parameter) or hasattr(x, "scale") else y

    own = Asks()
    star, grown = starify(copy.deepcopy(own), mode="fuse"), starify(copy.deepcopy(own), grow=1)
    x = make(torch.randn(4, 8))
    torch.testing.assert_close(star(x), own(x))
    if star.star_plan(x).reason.startswith("the call has other arguments"):
        with pytest.raises(TypeError, match="no parameter and without attributes"):
            grown(x)
    else:
        torch.testing.assert_close(grown(x), own(x))


def marked(x):
    x.scale = 1
    return x


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_grown_products_of_maps_under_autocast(dtype):
    own = Gated()
    grown = starify(copy.deepcopy(own), grow=1)
    x = torch.randn(2, 3, 3, 8)
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(grown(x), own(x))
    torch.testing.assert_close(grown.half()(x.half()), own.half()(x.half()))
