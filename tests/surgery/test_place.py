"""Places of activations: only the result of the star projection goes through."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from starlayers import starify
from starlayers.surgery import revert
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
    y = place.mark(torch.ones(2))
    assert place.placeholder(y) is y
    with pytest.raises(RuntimeError, match="'act' of a MLP takes another tensor"):
        place.placeholder(y.clone())
    assert place.placeholder("not a tensor") == "not a tensor"  # a tracer's stand-in
