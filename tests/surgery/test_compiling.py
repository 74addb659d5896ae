"""Changes after `starify` are told to compilers when they trace, as eager calls are told."""

import pytest
import torch
from torch import nn

from starlayers import starify
from tests.surgery.small import MLP, Gated


class Limited(Gated):
    limit = None

    def forward(self, x):
        y = super().forward(x)
        return y if self.limit is None else y.clamp(max=self.limit)


class LimitedHere(Limited):
    def __init__(self):
        super().__init__()
        self.limit = None


def compiled(mlp):
    torch.compiler.reset()
    return torch.compile(mlp, backend="eager", fullgraph=True)


def exported(mlp):
    return lambda x: torch.export.export(mlp, (x,)).module()(x)


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(5, 8)


@pytest.mark.parametrize("how", [compiled, exported])
@pytest.mark.parametrize("where", ["module", "class"])
def test_a_grown_star_that_was_changed_raises(how, where, x):
    kind = type("Limited", (Limited,), {})
    mlp = kind()
    expected = mlp(x)
    grown = starify(mlp, grow=1)
    torch.testing.assert_close(how(grown)(x), expected)
    (kind if where == "class" else grown).limit = 0.01
    with pytest.raises(RuntimeError, match=r"limit (is 0\.01|is new|was set)"):
        grown(x)
    with pytest.raises(RuntimeError, match=r"limit (is 0\.01|is new|was set)"):
        how(grown)(x)


def test_an_attribute_that_is_set_after_compiling_is_seen(x):
    grown = starify(LimitedHere(), grow=1)
    call = compiled(grown)
    torch.testing.assert_close(call(x), grown(x))
    grown.limit = 0.01
    with pytest.raises(RuntimeError, match=r"limit is 0\.01, was None"):
        call(x)


@pytest.mark.parametrize("how", [compiled, exported])
def test_a_plain_mlp_whose_activation_was_replaced_raises(how, x):
    star = starify(MLP())
    torch.testing.assert_close(how(star)(x), star(x))
    star.act = nn.ReLU()
    with pytest.raises(RuntimeError, match=r"set to ReLU|Observed exception"):
        how(star)(x)


def test_a_compiled_product_uses_the_activation_that_is_there(x):
    star = starify(MLP(), mode="star")
    starify(star, mode="fuse")
    star.fc1.act = nn.ReLU()
    torch.testing.assert_close(compiled(star)(x), star(x))
