"""Plain PyTorch layers of `portable_starformer` against those of the core."""

import inspect

import pytest
import torch

from starlayers import ACTIVATIONS, StarBlock, StarMLP, get_activation
from starlayers.functional import star_product
from starlayers.nlp import portable_starformer as portable

BUILT_IN = sorted({activation.name for activation in ACTIVATIONS.values()})


@pytest.mark.parametrize("act", [*BUILT_IN, None, "swiglu"])
@pytest.mark.parametrize("options", [{}, {"rank": 2, "offset": 1.0}, {"combine": "sum"}], ids=str)
def test_portable_layers_are_the_cores(act, options):
    torch.manual_seed(0)
    ours = StarBlock(8, expansion=3, act=act, pre=torch.nn.LayerNorm(8), **options)
    theirs = portable.StarBlock(8, expansion=3, act=act, pre=torch.nn.LayerNorm(8), **options)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 8)
    assert torch.equal(ours(x), theirs(x))


def test_portable_activations_refuse_what_they_do_not_know():
    with pytest.raises(ValueError, match="'cube' is not known without starlayers"):
        portable.get_activation("cube")


def test_activations_are_the_cores():
    x, y = torch.randn(50) * 4, torch.randn(50)
    assert set(portable._FUNCTIONS) | set(portable._ALIASES) == {None, *ACTIVATIONS}
    for name in (None, *ACTIVATIONS):
        ours, theirs = get_activation(name), portable.get_activation(name)
        assert theirs.name == (None if ours.name == "identity" else ours.name)
        torch.testing.assert_close(theirs.fn(x), ours.fn(x))
        torch.testing.assert_close(portable.star_product(x, y, name), star_product(x, y, name))


@pytest.mark.parametrize(
    ("ours", "theirs"), [(StarMLP, portable.StarMLP), (StarBlock, portable.StarBlock)]
)
def test_defaults_are_the_cores(ours, theirs):
    core = {n: p.default for n, p in inspect.signature(ours).parameters.items()}
    for name, parameter in inspect.signature(theirs).parameters.items():
        if name != "hidden":  # optional in the core
            assert parameter.default == core[name], name


@pytest.mark.parametrize("post", [None, torch.nn.Tanh()])
@pytest.mark.parametrize("bias", [True, False])
def test_portable_block_with_and_without_parts(post, bias):
    torch.manual_seed(0)
    options = {"expansion": 2.5, "act": "gelu", "bias": bias, "post": post}
    ours, theirs = StarBlock(8, **options), portable.StarBlock(8, **options)
    theirs.load_state_dict(ours.state_dict())
    assert theirs.mlp.recompute is False
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(theirs(x), ours(x))
