"""What is found, by the recipes there are and by one's own."""

import copy

import pytest
import torch
from torch import nn

from starlayers import starify
from starlayers.surgery import RECIPES, Site, find_mlps, register_recipe, report, revert
from tests.surgery.small import MLP, train_gates


def test_a_recipe_of_ones_own(x):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleDict({"squeeze": nn.Linear(8, 4), "expand": nn.Linear(4, 8)})
            self.inner["bend"] = nn.Softplus()

        def forward(self, x):
            return self.inner["expand"](self.inner["bend"](self.inner["squeeze"](x)))

    with pytest.raises(ValueError, match="no module has the structure"):
        starify(Odd())

    @register_recipe
    def odd(owner):
        if isinstance(owner, Odd):
            names = {part: f"inner.{name}" for part, name in (("inp", "squeeze"), ("act", "bend"))}
            yield Site("odd", "plain", **names, out="inner.expand")

    try:
        model = Odd()
        y = model(x)
        assert torch.equal(starify(model)(x), y)
        assert report(model).rows[0].recipe == "odd"
        train_gates(model)
        assert not torch.equal(model(x), y)
    finally:
        RECIPES.remove(odd)


def test_functions_serve_as_activations(x):
    mlp = MLP(act=nn.functional.silu)
    y = mlp(x)
    starify(mlp)
    assert torch.equal(mlp(x), y)
    assert torch.equal(copy.deepcopy(mlp)(x), y)
    revert(mlp)
    assert mlp.act is nn.functional.silu


def test_squeeze_and_excitation_adapters_and_heads_are_no_mlps():
    import timm

    model = timm.create_model("mobilenetv3_small_050", num_classes=10)
    assert find_mlps(model) == []
    poolers = nn.Sequential(nn.Linear(8, 2), nn.ReLU(), nn.Linear(2, 8))
    assert find_mlps(poolers) == []
