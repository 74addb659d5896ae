"""Places of activations: only the result of the first layer is taken, and other uses are right."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from starlayers import starify
from starlayers.surgery import StarProjection, revert
from starlayers.surgery.place import Place, Placeholder
from tests.surgery.small import MLP

ANOTHER = "takes another tensor than the result of 'fc1'"


class Between(nn.Module):
    """MLP with a layer between its first layer and its activation, which does nothing at first."""

    def __init__(self, act=None):
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(8, 16), nn.Identity(), nn.Linear(16, 8)
        self.act = act or nn.GELU()

    def forward(self, x):
        return self.fc2(self.act(self.norm(self.fc1(x))))


def star(act=None, **options):
    torch.manual_seed(0)
    return starify(Between(act), **options)


@pytest.fixture
def x():
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def set_norm(mlp):
    mlp.norm = nn.LayerNorm(16)


def set_dropout(mlp):
    mlp.norm = nn.Dropout(0.5)


def set_first_layer(mlp):
    mlp.fc1 = nn.Linear(8, 16)


def hook_that_scales(mlp):
    mlp.fc1.register_forward_hook(lambda module, args, y: 3 * y)


def hook_that_scales_in_place(mlp):
    mlp.fc1.register_forward_hook(lambda module, args, y: y.mul_(3))


def hook_on_the_layer_between(mlp):
    mlp.norm.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def hook_on_the_placeholder(mlp):
    mlp.act.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def forward_of_the_first_layer(mlp):
    own = mlp.fc1.forward
    mlp.fc1.forward = lambda x: own(x).roll(1, -1)


def narrow(mlp):
    mlp.fc1.register_forward_hook(lambda module, args, y: y[..., :8])
    mlp.fc2 = nn.Linear(8, 8)


EDITS = [
    set_norm,
    set_dropout,
    set_first_layer,
    hook_that_scales,
    hook_that_scales_in_place,
    hook_on_the_layer_between,
    hook_on_the_placeholder,
    forward_of_the_first_layer,
    narrow,
]


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("options", [{}, {"mode": "star", "recompute": True}])
def test_what_comes_between_afterwards_is_an_error(edit, options, x):
    mlp = star(**options)
    mlp(x)
    edit(mlp)
    with pytest.raises(RuntimeError, match=ANOTHER) as error:
        mlp(x)
    assert "revert first" in str(error.value)
    with torch.no_grad(), pytest.raises(RuntimeError, match=ANOTHER):
        mlp(x)


@pytest.mark.parametrize("edit", [set_norm, hook_that_scales])
def test_a_function_has_a_place_too(edit, x):
    mlp = star(nn.functional.silu)
    assert type(mlp.act) is Place
    mlp(x)
    edit(mlp)
    with pytest.raises(RuntimeError, match=ANOTHER):
        mlp(x)


@pytest.mark.slow
@pytest.mark.parametrize("edit", [set_norm, set_first_layer, hook_that_scales])
def test_compiled(edit, x):
    torch._dynamo.reset()
    mlp = star()
    expected = mlp(x)
    torch.testing.assert_close(torch.compile(mlp, fullgraph=True, backend="eager")(x), expected)
    part = copy.deepcopy(mlp)
    part.fc1.compile(backend="eager")
    torch.testing.assert_close(part(x), expected)
    edit(mlp)
    torch._dynamo.reset()  # a compiled graph does not see new hooks at all
    with pytest.raises(Exception, match="another tensor"):
        torch.compile(mlp, backend="eager")(x)


def test_revert_takes_the_place_away(x):
    mlp = star()
    expected = mlp(x)
    set_norm(mlp)
    revert(mlp)
    assert type(mlp.act) is nn.GELU
    mlp.norm = nn.Identity()
    assert torch.equal(mlp(x), expected)


class Detached(torch.autograd.Function):
    """As DeepSpeed's stage 3 wraps the outputs of all modules."""

    @staticmethod
    def forward(ctx, y):
        return y.detach()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def test_hooks_that_keep_the_result_are_welcome(x):
    mlp, seen = star(), []
    expected = mlp(x)
    mlp.fc1.register_forward_hook(lambda module, args, y: seen.append(y))
    mlp.fc1.register_full_backward_hook(lambda module, *gradients: seen.append(gradients))
    mlp.fc1.register_forward_hook(lambda module, args, y: Detached.apply(y))
    y = mlp(x.requires_grad_())
    y.sum().backward()
    assert torch.equal(y, expected)
    assert len(seen) == 2


def test_results_are_saved_without_the_place(x):
    mlp, seen = star(), []
    mlp.fc1.register_forward_hook(lambda module, args, y: seen.append(y.detach()))
    mlp(x)
    file = io.BytesIO()
    torch.save(seen[0], file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), seen[0])


def test_the_results_of_other_mlps_do_not_pass(x):
    first, second = star(), star()
    with pytest.raises(RuntimeError, match=ANOTHER):
        second.act(first.fc1(x))


@pytest.mark.parametrize("act", [None, nn.functional.silu])
def test_copies_and_pickles(act, x):
    mlp = star(act)
    for again in (copy.deepcopy(mlp), pickle.loads(pickle.dumps(mlp))):
        assert torch.equal(again(x), mlp(x))
        set_norm(again)
        with pytest.raises(RuntimeError, match=ANOTHER):
            again(x)


def test_transforms_and_modes(x):
    mlp = star()
    expected = mlp(x)
    # `vmap` multiplies matrices in another order
    torch.testing.assert_close(torch.func.vmap(mlp)(x), expected)
    state = dict(mlp.named_parameters())
    assert torch.equal(torch.func.functional_call(mlp, state, (x,)), expected)
    with torch.inference_mode():
        assert torch.equal(mlp(x), expected)
    assert torch.equal(torch.jit.trace(mlp, (x,))(x), expected)
    assert mlp.to("meta")(x.to("meta")).shape == expected.shape


def test_the_placeholder():
    mlp = MLP()
    place = Place((mlp, "act"), "fc1", is_module=True)
    assert type(place.placeholder) is Placeholder
    assert isinstance(place.placeholder, nn.Identity)
    y = place.mark(torch.ones(2), None)
    assert place.placeholder(y) is y
    with pytest.raises(RuntimeError, match="'act' of a MLP takes another tensor"):
        place.placeholder(y.clone())
    assert place.placeholder("not a tensor") == "not a tensor"  # a tracer's stand-in


class Paths(MLP):
    """MLP whose first layer is used in other ways than by its forward on usual input."""

    fast, hidden = False, None

    def forward(self, x):
        if self.fast or x.ndim in (1, 5) or x.shape[0] > 64 or x.shape[-2] > 1024:
            return self.fc2(F.gelu(self.fc1(x)))
        h = self.fc1(x)
        return self.drop(self.fc2(self.act(h) if self.hidden is None else F.relu(h)))

    def by_getattr(self, x):
        return getattr(self, "fc1")(x)  # noqa: B009

    def by_name(self, x):
        layer = self.fc1
        return layer(x)

    def by_path(self, x):
        return self.get_submodule("fc1")(x)

    def by_forward(self, x):
        return self.fc1.forward(x)

    def passed(self, x):
        return self.run(self.fc1, x)

    def run(self, layer, x):
        return layer(x)

    def in_a_loop(self, x):
        for layer in [self.fc1]:
            x = layer(x)
        return x


class Loops(nn.Module):
    """Net whose forward uses the layers of its MLPs."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([MLP(), MLP()])

    def forward(self, batch):
        x = batch["x"]
        for layer in self.layers:
            x = x + layer.fc2(F.relu(layer.fc1(x)))
        return x

    def hidden(self, x, i=1):
        return self.layers[i].fc1(x)


def random_gate(star):
    for layer in star.modules():
        if isinstance(layer, StarProjection):
            nn.init.normal_(layer.gate.weight)
    return star


@pytest.mark.parametrize("options", [{}, {"recompute": True}])
@pytest.mark.parametrize(
    "name", ["by_getattr", "by_name", "by_path", "by_forward", "passed", "in_a_loop"]
)
def test_any_other_call_of_the_first_layer_computes_what_it_did(name, options, x):
    own = Paths()
    star = random_gate(starify(copy.deepcopy(own), **options))
    assert not torch.equal(star(x), own(x))
    assert torch.equal(getattr(star, name)(x), getattr(own, name)(x))


@pytest.mark.parametrize("shape", [(8,), (1, 1, 1, 2, 8), (1, 1100, 8), (70, 2, 8)])
def test_paths_past_the_activation_on_other_input(shape):
    own = Paths()
    star = random_gate(starify(copy.deepcopy(own)))
    x = torch.randn(shape)
    assert torch.equal(star(x), own(x))
    exported = torch.export.export(star, (x,)).module()
    assert torch.equal(exported(x), own(x))


@pytest.mark.parametrize(("flag", "value"), [("fast", True), ("hidden", 1)])
def test_paths_past_the_activation_by_a_flag(flag, value, x):
    own = Paths()
    star = random_gate(starify(copy.deepcopy(own)))
    setattr(own, flag, value), setattr(star, flag, value)
    assert torch.equal(star(x), own(x))


def test_a_parent_that_uses_the_layers_of_its_mlps(x):
    own = Loops()
    star = random_gate(starify(copy.deepcopy(own)))
    assert torch.equal(star({"x": x}), own({"x": x}))
    assert torch.equal(star.hidden(x), own.hidden(x))


@pytest.mark.parametrize("edit", ["forward", "class"])
def test_a_placeholder_that_is_made_an_activation_acts_on_the_hidden_layer(edit, x):
    own = MLP()
    star = random_gate(starify(copy.deepcopy(own)))
    for mlp in (own, star):
        if edit == "forward":
            mlp.act.forward = torch.tanh
        else:
            mlp.act.__class__ = nn.Tanh
    assert torch.equal(star(x), own(x))


def test_another_activation_is_an_error_under_export_too(x):
    mlp = star()
    mlp.act = nn.ReLU()
    with pytest.raises(RuntimeError, match="was set to ReLU"):
        torch.export.export(mlp, (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_torch_fx_sees_the_same_network(dtype, x):
    mlp = random_gate(starify(MLP().to(dtype)))
    traced = torch.fx.symbolic_trace(mlp)
    assert torch.equal(traced(x.to(dtype)), mlp(x.to(dtype)))
    infinite = torch.full((2, 8), 6e4, dtype=dtype)
    assert torch.equal(traced(infinite).isnan(), mlp(infinite).isnan())
    changed = star()
    set_norm(changed)
    with pytest.raises(RuntimeError, match=ANOTHER):
        torch.fx.symbolic_trace(changed)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors(layout, x):
    own = MLP()
    plain = starify(copy.deepcopy(own))
    nested = torch.nested.nested_tensor([x[:2], x[2:]], layout=layout)
    a, b = (mlp(nested).to_padded_tensor(0.0) for mlp in (own, plain))
    assert torch.equal(a, b)


@pytest.mark.parametrize("act", [nn.GELU(), nn.ReLU(inplace=True), nn.Tanh()])
def test_recomputation_repeats_the_random_numbers_of_the_first_layer(act):
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5))
    results = []
    for recompute in (False, True):
        mlp = MLP()
        mlp.act = act
        torch.manual_seed(3)
        mlp = starify(mlp, recompute=recompute)
        mlp.load_state_dict({k: torch.linspace(-1, 1, v.numel()).view_as(v)
                             for k, v in mlp.state_dict().items()})  # fmt: skip
        mlp.fc1.inp.register_forward_hook(lambda m, args, y: first[1](y))
        x = torch.linspace(-2, 2, 40).view(5, 8).requires_grad_()
        torch.manual_seed(4)
        y = mlp(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *mlp.parameters()])])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("act", "name", "value"),
    [(nn.LeakyReLU(), "negative_slope", 0.5), (nn.GELU(), "approximate", "tanh")],
)
def test_options_of_the_activation_are_set_through_the_placeholder(act, name, value, x):
    own = MLP()
    own.act = act
    star = starify(copy.deepcopy(own))
    assert getattr(star.act, name) == getattr(act, name)
    setattr(own.act, name, value), setattr(star.act, name, value)
    assert getattr(star.fc1.act, name) == value
    assert torch.equal(star(x), own(x))
    star.act.eval()
    assert (star.act.training, star.fc1.act.training) == (False, True)  # modules have a mode each
    with pytest.raises(AttributeError, match="slope"):
        star.act.slope  # noqa: B018
