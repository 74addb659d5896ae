"""Recipes: what counts as an activation, and which structures are claimed."""

import copy

import pytest
import torch
from torch import nn

from starlayers import starify
from starlayers.surgery import RECIPES, Site, find_mlps, register_recipe, report, revert
from starlayers.surgery import recipes as module
from starlayers.surgery.recipes import is_activation, is_sequence, runs
from tests.surgery.small import MLP, Gated, Packed, train_gates


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
        assert RECIPES[0] is odd
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


class WithChild(nn.ReLU):
    def __init__(self):
        super().__init__()
        self.child = nn.Identity()


class TwoParameters(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))

    def forward(self, x):
        return (self.a * x).relu() + self.b


class ManyNumbers(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return (self.a[0] * x).relu()


def fails(x):
    raise RuntimeError


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (nn.GELU(), True),
        (nn.ReLU(inplace=True), True),
        (nn.PReLU(), True),
        (nn.Tanh().to(torch.float64), True),
        (torch.relu, True),
        (nn.functional.hardswish, True),
        (torch.square, True),
        (nn.Dropout(), False),
        (nn.Identity(), False),
        (nn.LayerNorm(4), False),
        (nn.Softmax(-1), False),
        (nn.AvgPool1d(2), False),
        (nn.Linear(4, 4), False),
        (nn.GELU, False),
        (WithChild(), False),
        (TwoParameters(), True),
        (ManyNumbers(), False),
        (lambda x: 2 * x + 1, False),
        (lambda x: x.sum(), False),
        (lambda x: x > 0, False),
        (lambda x: x.relu().long(), False),
        (lambda x: x - x.mean(-1, keepdim=True).relu(), False),
        (fails, False),
        ("relu", False),
    ],
)
def test_is_activation(f, expected):
    assert is_activation(f) is expected


def test_scripted_activations_are_left_alone():
    assert is_activation(torch.jit.script(nn.GELU())) is False


def test_activations_are_looked_at_in_eval_mode():
    act = nn.RReLU(0.1, 0.1)  # random slopes in train mode
    assert act.training
    assert is_activation(act)
    assert act.training


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("act", True),
        ("act_fn", True),
        ("mlp_act", True),
        ("activation", True),
        ("activation1", True),
        ("act2", True),
        ("nonlinearity", True),
        ("intermediate_act_fn", True),
        ("nonlin", True),
        ("factor", False),
        ("active", False),
        ("fact", False),
        ("relu", False),
    ],
)
def test_names_of_activation_functions(name, expected):
    owner = nn.Module()
    setattr(owner, name, torch.relu)
    assert module.activations(owner) == ([name] if expected else [])


def test_activations_are_children_of_any_name_and_named_functions():
    owner = nn.Module()
    owner.bend, owner.fc, owner.act_fn, owner.act_scale = nn.GELU(), nn.Linear(2, 2), torch.relu, 2
    assert module.activations(owner) == ["bend", "act_fn"]


class OwnForward(nn.Sequential):
    def forward(self, x):
        return super().forward(x)


def test_is_sequence_and_runs():
    assert is_sequence(nn.Sequential())
    assert not is_sequence(OwnForward())
    assert not is_sequence(nn.ModuleList())
    assert runs(nn.Sequential())
    assert runs(OwnForward())
    assert not runs(nn.ModuleList())
    assert not runs(nn.ModuleDict())
    assert not runs(nn.Module())
    assert not runs(torch.jit.script(nn.ReLU()))


def owner(**children):
    made = nn.Module()
    for name, child in children.items():
        made.add_module(name, child)
    return made


def claims(recipe, made):
    return [
        (s.recipe, s.form, s.inp, s.act, s.out, s.up, s.gate_last)
        for s in getattr(module, recipe)(made)
    ]


def linear(n, f):
    return nn.Linear(n, f)


GELU = nn.GELU()


@pytest.mark.parametrize(
    ("children", "claimed"),
    [
        ({"a": linear(2, 6), "act": GELU, "b": linear(6, 2)}, [("a", "act", "b")]),
        ({"b": linear(6, 2), "a": linear(2, 6), "act": GELU}, []),  # narrow, as defined
        ({"a": linear(4, 4), "act": GELU, "b": linear(4, 4)}, [("a", "act", "b")]),
        (
            {"a": linear(2, 6), "act": GELU, "relu": nn.ReLU(), "b": linear(6, 2)},
            [("a", "act", "b"), ("a", "relu", "b")],
        ),
        ({"a": nn.Conv2d(2, 6, 1), "act": GELU, "b": nn.Conv2d(6, 2, 1)}, [("a", "act", "b")]),
        ({"a": linear(2, 6), "b": linear(6, 2)}, []),  # no activation
        ({"a": linear(2, 6), "act": GELU, "b": linear(6, 3)}, []),  # another width
        ({"a": linear(2, 6), "act": GELU, "b": linear(5, 2)}, []),
        ({"a": linear(2, 6), "act": GELU, "b": nn.Conv2d(6, 2, 1)}, []),
        ({"a": linear(2, 6), "up": linear(2, 6), "act": GELU, "b": linear(6, 2)}, []),  # gated
    ],
)
def test_chain(children, claimed):
    expected = [("chain", "plain", inp, act, out, None, False) for inp, act, out in claimed]
    assert claims("chain", owner(**children)) == expected


def test_a_sequence_is_for_its_own_recipe():
    layers = nn.Sequential(linear(2, 6), GELU, linear(6, 2))
    for recipe in ("chain", "split", "gated", "packed"):
        assert claims(recipe, layers) == []
    assert claims("sequential", owner(a=linear(2, 6), act=GELU, b=linear(6, 2))) == []


def half(n, f, **more):
    return owner(dense=linear(n, f), **more)


@pytest.mark.parametrize(
    ("children", "claimed"),
    [
        ({"wide": half(2, 6, act=GELU), "out": half(6, 2)}, True),
        ({"out": half(6, 2), "wide": half(2, 6, act=GELU)}, True),
        ({"wide": half(2, 6, act=GELU), "none": None, "out": half(6, 2, act=GELU)}, True),
        ({"wide": half(4, 4, act=GELU), "out": half(4, 4)}, False),  # a pooler widens nothing
        ({"wide": half(2, 6), "out": half(6, 2)}, False),
        ({"wide": half(2, 6, act=GELU, relu=nn.ReLU()), "out": half(6, 2)}, False),
        ({"wide": half(2, 6, act=GELU), "out": half(6, 3)}, False),
        ({"wide": half(2, 6, act=GELU), "out": half(6, 2), "out2": half(6, 2)}, False),
        ({"wide": half(2, 6, act=GELU, more=linear(2, 6)), "out": half(6, 2)}, False),
        ({"wide": half(2, 6, act=GELU)}, False),
    ],
)
def test_split(children, claimed):
    site = ("split", "plain", "wide.dense", "wide.act", "out.dense", None, False)
    assert claims("split", owner(**children)) == ([site] if claimed else [])


def test_split_ignores_the_linear_layers_of_the_same_child():
    inside = owner(dense=linear(2, 6), act=GELU)
    both = owner(wide=inside, out=owner(dense=linear(6, 2), other=linear(3, 3)))
    assert len(claims("split", both)) == 1


@pytest.mark.parametrize(
    ("layers", "claimed"),
    [
        ([linear(2, 6), GELU, linear(6, 2)], [("sequential", "0", "1", "2")]),
        ([linear(2, 6), GELU, nn.Dropout(), linear(6, 3)], [("sequential", "0", "1", "3")]),
        ([linear(6, 3), GELU, linear(3, 2)], [("sequential", "0", "1", "2")]),
        ([linear(3, 3), GELU, linear(3, 3)], [("sequential", "0", "1", "2")]),
        ([linear(8, 2), GELU, linear(2, 8)], []),  # narrower than both
        ([linear(2, 6), GELU, linear(5, 2)], []),
        ([linear(2, 6), nn.Dropout(), GELU, linear(6, 2)], []),
        ([nn.LayerNorm(6), GELU, linear(6, 2)], []),
        ([linear(2, 6), GELU], []),  # one pair is no stack
        (
            [linear(2, 6), nn.GELU(), linear(6, 6), nn.GELU()],
            [("sequential", "0", "1", "2"), ("stack", "2", "3", None)],
        ),
        (
            [linear(2, 6), nn.GELU(), linear(6, 3), nn.GELU()],  # half as wide is the least
            [("sequential", "0", "1", "2"), ("stack", "2", "3", None)],
        ),
        ([linear(2, 6), nn.GELU(), linear(6, 2), nn.GELU()], [("sequential", "0", "1", "2")]),
        ([linear(2, 6), nn.GELU(), linear(6, 6), nn.Tanh()], [("sequential", "0", "1", "2")]),
        (
            [linear(2, 6), nn.GELU(), linear(6, 6), nn.GELU(), nn.Dropout()],
            [("sequential", "0", "1", "2")],
        ),
        (
            [nn.LayerNorm(2), linear(2, 6), nn.GELU(), linear(6, 6), nn.GELU()],
            [("sequential", "1", "2", "3")],
        ),
    ],
)
def test_sequential(layers, claimed):
    expected = [(recipe, "plain", inp, act, out, None, False) for recipe, inp, act, out in claimed]
    assert claims("sequential", nn.Sequential(*layers)) == expected


@pytest.mark.parametrize(
    ("recipe", "children", "claimed"),
    [
        ("gated", {"u": (2, 6), "v": (2, 6), "act": GELU, "w": (6, 2)}, ("u", None, "w", "v")),
        ("gated", {"w": (6, 2), "v": (2, 6), "act": GELU, "u": (2, 6)}, ("v", None, "w", "u")),
        ("gated", {"u": (2, 6), "act": GELU, "w": (6, 2)}, None),
        ("gated", {"u": (2, 6), "v": (2, 6), "t": (2, 6), "act": GELU, "w": (6, 2)}, None),
        ("gated", {"u": (2, 6), "v": (2, 6), "w": (6, 2)}, None),
        ("bilinear", {"u": (2, 6), "v": (2, 6), "w": (6, 2)}, ("u", None, "w", "v")),
        ("bilinear", {"u": (2, 2), "v": (2, 2), "w": (2, 2)}, None),  # an attention, usually
        ("bilinear", {"u": (2, 6), "v": (2, 6), "act": GELU, "w": (6, 2)}, None),
        ("packed", {"uv": (2, 12), "act": GELU, "w": (6, 2)}, ("uv", None, "w", None)),
        ("packed", {"uv": (2, 6), "act": GELU, "w": (6, 2)}, None),
        ("packed", {"uv": (2, 12), "w": (6, 2)}, None),
        ("packed", {"uv": (2, 12), "st": (2, 12), "act": GELU, "w": (6, 2)}, None),
    ],
)
@pytest.mark.parametrize("maps", [False, True])
def test_gated_and_packed(recipe, children, claimed, maps):
    layer = (lambda n, f: nn.Conv2d(n, f, 1)) if maps else linear
    made = owner(**{k: layer(*v) if isinstance(v, tuple) else v for k, v in children.items()})
    if claimed is None or maps:  # of maps there are plain MLPs only
        assert claims(recipe, made) == []
        return
    inp, act, out, up = claimed
    form = "gated" if up else "packed"
    assert claims(recipe, made) == [(recipe, form, inp, act, out, up, False)]


@pytest.mark.parametrize(("make", "recipe"), [(MLP, "chain"), (Gated, "gated"), (Packed, "packed")])
def test_one_recipe_claims_a_module(make, recipe):
    assert [f.site.recipe for f in find_mlps(make())] == [recipe]
    assert [r.__name__ for r in RECIPES] == [
        "packed",
        "gated",
        "sequential",
        "split",
        "chain",
        "inline",
        "bilinear",
        "half",
    ]
