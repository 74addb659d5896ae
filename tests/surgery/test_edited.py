"""Edited MLPs: refused by a reason that names the obstacle, or exact, then and later."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from starlayers import starify, use_backend
from starlayers.surgery import GatedMLP, report, revert
from tests.surgery import edited
from tests.surgery.edited import ELSEWHERE, EXACT, REFUSED, SwiGLU

SHAPES = ((3, 16), (1, 16), (2, 5, 16), (1, 1, 16), (1, 600, 16), (2, 3, 4, 16))
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.06, torch.float64: 1e-9}


def values(mlp, x, **kwargs):
    """Return output and gradients of a call with seeded dropout."""
    torch.manual_seed(0)
    x = x.clone().requires_grad_()
    y = mlp(x, **kwargs)
    weight = torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype)
    inputs = [x, *mlp.parameters()]
    gradients = torch.autograd.grad((y * weight).sum(), inputs, allow_unused=True)
    return [y.detach(), *(torch.zeros(()) if g is None else g for g in gradients)]


def require_equal(own, star, x, tolerance=1e-4, **kwargs):
    for a, b in zip(values(own, x, **kwargs), values(star, x, **kwargs), strict=True):
        assert a.dtype == b.dtype
        assert float((a - b).abs().max()) <= tolerance * max(float(a.abs().max()), 1e-30)


def pair(make):
    """Return an MLP and a star of the same weights."""
    torch.manual_seed(1)
    own = make()
    star = starify(copy.deepcopy(own), mode="fuse")
    assert isinstance(star, GatedMLP)
    assert isinstance(star, type(own))
    return own, star


def backend_of(star, x):
    """Return a backend that forces the CPU's op where it can serve, else "auto"."""
    try:
        with use_backend("cpu"):
            return "cpu" if star.star_plan(x).weights is not None else "auto"
    except RuntimeError:
        return "auto"


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_more_than_a_star_is_refused_by_name(name):
    make, reason = REFUSED[name]
    torch.manual_seed(0)
    mlp = make()
    state, kinds = copy.deepcopy(mlp.state_dict()), [type(m) for m in mlp.modules()]
    with pytest.raises(ValueError, match=reason):
        starify(mlp, mode="fuse")
    assert [type(m) for m in mlp.modules()] == kinds
    assert all(torch.equal(state[k], v) for k, v in mlp.state_dict().items())
    rows = report(mlp).rows
    assert len(rows) == 1
    assert rows[0].detail


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_changes_elsewhere_is_left_as_it_was(name):
    mlp = ELSEWHERE[name][0]()
    if hasattr(mlp, "rng"):
        mlp.rng.seed(1), mlp.generator.random(3)
    states = edited.MONITOR.__dict__ | {"counts": dict(edited.COUNTS), "last": list(edited.LAST)}
    shape, calls = edited.LAST_SHAPE, vars(edited.Quantised).get("calls")
    drawn = getattr(mlp, "rng", None) and (mlp.rng.getstate(), mlp.generator.bit_generator.state)
    with pytest.raises(ValueError, match="no MLP"):
        starify(mlp, mode="fuse")
    now = edited.MONITOR.__dict__ | {"counts": dict(edited.COUNTS), "last": list(edited.LAST)}
    assert now == states
    assert (edited.LAST_SHAPE, vars(edited.Quantised).get("calls")) == (shape, calls)
    if drawn:
        assert (mlp.rng.getstate(), mlp.generator.bit_generator.state) == drawn
        assert next(mlp.steps) == 0


class Stored(nn.Linear):
    """Linear layer that stores a low dtype and computes in that of its input."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), self.bias)


class KeepsFloat32(SwiGLU):
    """MLP that converts its product to the dtype of its last layer, as T5 does."""

    def forward(self, x):
        h, weight = self.product(x), self.down_proj.weight
        return self.down_proj(h.to(weight.dtype) if weight.dtype != torch.int8 else h)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_a_last_layer_of_another_dtype(dtype):
    own = SwiGLU()
    own.down_proj.__class__ = Stored
    own.down_proj.weight = nn.Parameter(own.down_proj.weight.detach().to(dtype), False)
    x = torch.randn(5, 16)
    grown = starify(copy.deepcopy(own), grow=1)
    fused = starify(copy.deepcopy(own), mode="fuse").star_definition
    for star in (grown, fused):
        assert torch.equal(star(x), own(x))
        assert star(x).dtype == torch.float32
    own = KeepsFloat32()
    own.gate_proj.bfloat16(), own.up_proj.bfloat16()
    assert torch.equal(starify(copy.deepcopy(own), grow=1)(x.bfloat16()), own(x.bfloat16()))


def test_random_numbers_are_drawn_in_the_order_of_the_forward():
    own = EXACT["up first"]()
    grown = starify(copy.deepcopy(own), grow=1)
    for mlp in (own, grown):
        for layer in (mlp.gate_proj, mlp.up_proj):
            layer.register_forward_hook(lambda m, args, y: F.dropout(y, 0.5))
    x = torch.randn(5, 16)
    torch.manual_seed(2)
    expected = own(x)
    torch.manual_seed(2)
    assert torch.equal(grown(x), expected)


@pytest.mark.parametrize("name", ["own identity", "own dropout"])
def test_a_module_derived_from_the_identity_acts(name):
    own, star = pair(EXACT[name])
    x = torch.randn(50, 16)
    x[0, 0] = float("nan")
    with use_backend(backend_of(star.eval(), x)):
        assert torch.equal(star(x), own.eval()(x))
        assert star(x).isfinite().all()


def test_sparse_and_nested_input_runs_the_own_forward():
    own, star = pair(SwiGLU)
    x = torch.randn(50, 16).relu()
    nested = torch.nested.nested_tensor([x[:2], x[2:]])
    assert torch.equal(star(x.to_sparse()), own(x.to_sparse()))
    assert torch.equal(star(nested).to_padded_tensor(0.0), own(nested).to_padded_tensor(0.0))
    with use_backend("cpu"), pytest.raises(RuntimeError, match="other arguments than one input"):
        star(x.to_sparse())
    grown = starify(copy.deepcopy(own), grow=1)
    with pytest.raises(TypeError, match=r"a dense tensor .* got a nested Tensor"):
        grown(nested)


def test_grown_products_of_another_width_are_named():
    grown = starify(SwiGLU(), grow=1)
    grown.gate_proj, grown.up_proj = nn.Linear(16, 24), nn.Linear(16, 24)
    grown.down_proj = nn.Linear(24, 16)
    with pytest.raises(RuntimeError, match="16 to 40 channels, its layers now compute 16 to 24"):
        grown(torch.randn(5, 16))


@pytest.mark.parametrize("name", EXACT)
def test_what_is_a_star_is_exact(name):
    own, star = pair(EXACT[name])
    used = set()
    for dtype in TOLERANCES:
        own.to(dtype), star.to(dtype)
        for shape in SHAPES:
            for scale in (1.0, 1e-2, 1e3, 1e6):
                x = scale * torch.randn(shape, dtype=dtype)
                for train in (False, True):
                    own.train(train), star.train(train)
                    backend = backend_of(star, x)
                    used.add(backend)
                    with use_backend(backend):
                        require_equal(own, star, x, TOLERANCES[dtype])
                    with torch.no_grad(), use_backend("eager"):
                        torch.manual_seed(0)
                        expected = own(x)
                        torch.manual_seed(0)
                        assert torch.equal(star(x), expected)  # the model's own bits
    acts = name in ("norm before the last layer", "own identity", "own dropout")
    assert ("cpu" in used) != acts


@pytest.mark.parametrize("name", EXACT)
def test_a_star_stays_exact_after_a_checkpoint_and_under_autocast(name):
    own, star = pair(EXACT[name])
    torch.manual_seed(5)
    state = {k: 3 * torch.randn_like(v) for k, v in own.state_dict().items()}
    own.load_state_dict(state)
    star.load_state_dict(state)
    x = torch.randn(4, 3, 16)
    with use_backend(backend_of(star, x)):
        require_equal(own, star, x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(0)
        expected = own(x)
        torch.manual_seed(0)
        assert torch.equal(star(x), expected)
    assert type(revert(star)) is type(own)
    assert torch.equal(star.eval()(x), own.eval()(x))


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("how", ["deepcopy", "state of grown products"])
def test_copies_and_growth(name, how):
    own, star = pair(EXACT[name])
    x = torch.randn(4, 16)
    own.eval(), star.eval()
    if how == "deepcopy":
        again = copy.deepcopy(star)
        assert type(again) is type(star)
        with use_backend(backend_of(again, x)):
            require_equal(own, again, x)
        return
    grown = starify(copy.deepcopy(own), grow=2)
    assert torch.equal(grown(x), own(x))
    nn.init.normal_(grown.star_grown.f2.weight)
    assert not torch.allclose(grown(x), own(x))


def test_a_star_is_pickled_by_the_class_it_had():
    own, star = pair(SwiGLU)
    x = torch.randn(4, 16)
    again = pickle.loads(pickle.dumps(star))
    assert type(again) is type(star)
    assert torch.equal(again(x), star(x))
    file = io.BytesIO()
    torch.save(star, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), own(x))


# calls that were not verified run the model's own forward


def test_other_arguments_run_the_own_forward():
    own, star = pair(EXACT["scale with a default"])
    x = torch.randn(4, 16)
    with pytest.raises(RuntimeError):  # what the edit does with another scale: 16 channels, not 40
        star(x, scale=2.0)
    own, star = pair(EXACT["shift by keyword"])
    for backend in ("auto", "eager"):
        with use_backend(backend):
            require_equal(own, star, x, 0.0, shift=2.0)
    assert (
        star.star_plan(x, shift=2.0).reason
        == "the call has other arguments than one input of a kind that was verified"
    )
    with pytest.raises(TypeError, match="positional"):
        star(x, x)
    grown = starify(copy.deepcopy(own), grow=1)
    with pytest.raises(TypeError, match=r"takes its input alone, .* got 1 .* \['shift'\]; revert"):
        grown(x, shift=2.0)


@pytest.mark.parametrize("shape", [(16,), (1, 1, 1, 2, 16)])
def test_other_dimensions_run_the_own_forward(shape):
    own, star = pair(SwiGLU)
    x = torch.randn(shape)
    require_equal(own, star, x, 0.0)
    assert not star.star_plan(x).fused


# changed afterwards: the change acts, and the plan says so


def replaced_act(mlp):
    mlp.act_fn = nn.ReLU()


def hooked_act(mlp):
    mlp.act_fn.register_forward_hook(lambda m, args, y: 2 * y)


def prehooked_act(mlp):
    mlp.act_fn.register_forward_pre_hook(lambda m, args: (2 * args[0],))


def backward_hooked_act(mlp):
    mlp.act_fn.register_full_backward_hook(lambda m, g_in, g_out: (3 * g_in[0],))


def forward_of_act(mlp):
    mlp.act_fn.forward = F.relu


def class_of_act(mlp):
    mlp.act_fn.__class__ = nn.ReLU


def hooked_first_layer(mlp):
    mlp.gate_proj.register_forward_hook(lambda m, args, y: 2 * y)


def backward_hooked_first_layer(mlp):
    mlp.gate_proj.register_full_backward_hook(lambda m, g_in, g_out: (3 * g_in[0],))


def hooked_mlp(mlp):
    mlp.register_forward_hook(lambda m, args, y: 2 * y)


def replaced_last_layer(mlp):
    torch.manual_seed(7)
    mlp.down_proj = nn.Sequential(nn.Linear(40, 16), nn.LayerNorm(16))


def parametrised(mlp):
    torch.manual_seed(7)
    nn.utils.parametrizations.weight_norm(mlp.up_proj)
    mlp.up_proj.parametrizations.weight.original0.data.mul_(2)


def quantised(mlp):
    mlp.gate_proj.weight.data = mlp.gate_proj.weight.data.mul(8).round().div(8)


def own_forward(mlp):
    mlp.forward = lambda x: 2 * mlp.down_proj(mlp.product(x))


def other_product(mlp):
    mlp.product = lambda x: 2 * mlp.up_proj(x)


CHANGES = [
    replaced_act,
    hooked_act,
    prehooked_act,
    backward_hooked_act,
    forward_of_act,
    class_of_act,
    hooked_first_layer,
    backward_hooked_first_layer,
    hooked_mlp,
    replaced_last_layer,
    parametrised,
    quantised,
    own_forward,
    other_product,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("tokens", [8, 2000])
def test_a_change_afterwards_acts(change, tokens):
    own, star = pair(SwiGLU)
    x = torch.randn(tokens, 16)
    with use_backend("cpu"):
        assert star.star_plan(x).path == "cpu"
    change(own), change(star)
    with use_backend(backend_of(star, x)):
        require_equal(own, star, x)


@pytest.mark.parametrize(
    ("name", "attribute", "value"),
    [("functional dropout at 0", "rate", 0.5), ("no limit", "limit", 0.1)],
)
def test_an_attribute_set_afterwards_acts(name, attribute, value):
    own, star = pair(EXACT[name])
    for mlp in (own, star):
        setattr(mlp, attribute, value)
    x = torch.randn(50, 16)
    assert star.star_plan(x).reason.startswith(f"{attribute} is {value}, was ")
    require_equal(own, star, x, 0.0)
    grown = starify(copy.deepcopy(EXACT[name]()), grow=1)
    setattr(grown, attribute, value)
    with pytest.raises(RuntimeError, match=rf"{attribute} is {value}.*change it back, or revert"):
        grown(x)


def test_a_value_of_a_config_set_afterwards_acts():
    class Config:
        def __init__(self):
            self.scale, self.unrelated = 1.0, 1

    class Scaled(SwiGLU):
        def __init__(self):
            super().__init__()
            self.config = Config()

        def forward(self, x):
            y = super().forward(x)
            return y if self.config.scale == 1.0 else y * self.config.scale

    own, star = pair(Scaled)
    x = torch.randn(50, 16)
    with use_backend("cpu"):
        assert star.star_plan(x).path == "cpu"
    star.config.scale = own.config.scale = 3.0
    assert star.star_plan(x).reason == "config.scale is 3.0, was 1.0"
    require_equal(own, star, x, 0.0)


def test_a_forward_of_the_class_replaced_afterwards_acts(monkeypatch):
    class Mine(SwiGLU):
        def forward(self, x):
            return self.down_proj(self.product(x))

    own, star = pair(Mine)
    x = torch.randn(50, 16)
    monkeypatch.setattr(Mine, "forward", lambda self, x: 2 * self.down_proj(self.product(x)))
    assert star.star_plan(x).reason == "the forward of its class was replaced"
    require_equal(own, star, x, 0.0)


LIMIT = None


def test_a_global_a_closure_and_a_class_changed_afterwards_act(monkeypatch):
    doubled = False

    class Mine(SwiGLU):
        scale = 1.0

        def forward(self, x):
            h = self.product(x)
            h = h if LIMIT is None else h.clamp(max=LIMIT)
            h = 2 * h if doubled else h
            return self.down_proj(h if self.scale == 1.0 else h * self.scale)

        def other(self, x):
            return 3 * self.up_proj(x)

    own, star = pair(Mine)
    x = torch.randn(50, 16)
    with use_backend("cpu"):
        assert star.star_plan(x).path == "cpu"
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "LIMIT", 0.1)
        assert star.star_plan(x).reason == "the global LIMIT is 0.1, was None"
        assert copy.deepcopy(star).star_plan(x).reason == star.star_plan(x).reason
        require_equal(own, star, x, 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(Mine, "scale", 2.0)
        assert star.star_plan(x).reason == "Mine.scale is 2.0, was 1.0"
        require_equal(own, star, x, 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(SwiGLU, "product", Mine.other)
        words = f"SwiGLU.product is {Mine.other.__qualname__}, was SwiGLU.product"
        assert star.star_plan(x).reason == words
        require_equal(own, star, x, 0.0)
    with use_backend("cpu"):
        assert star.star_plan(x).path == "cpu"
    doubled = True
    assert star.star_plan(x).reason == "the variable doubled is True, was False"
    require_equal(own, star, x, 0.0)


def test_a_change_of_a_grown_activation_acts():
    torch.manual_seed(0)
    mlp = starify(SwiGLU(), grow=1)
    nn.init.normal_(mlp.star_grown.f2.weight)
    mlp.act_fn = nn.ReLU()
    x = torch.randn(5, 16)
    grown = F.relu(mlp.star_grown.f1(x)) * mlp.star_grown.f2(x)
    expected = mlp.down_proj(F.relu(mlp.gate_proj(x)) * mlp.up_proj(x) + grown)
    torch.testing.assert_close(mlp(x), expected)


# the interface of the class survives


def test_methods_attributes_and_signature_survive():
    import inspect

    class Mine(SwiGLU):
        kind = "mine"

        @property
        def width(self):
            return self.gate_proj.out_features

        def norms(self):
            return self.down_proj.weight.norm()

        def forward(self, hidden_states, scale=None):
            """Compute it."""
            return super().forward(hidden_states)

    own, star = pair(Mine)
    assert (star.kind, star.width, type(star).__name__) == ("mine", 40, "StarMine")
    assert torch.equal(star.norms(), own.norms())
    assert inspect.signature(star.forward) == inspect.signature(own.forward)
    x = torch.randn(9, 16)
    with use_backend("cpu"):
        assert star.star_plan(hidden_states=x).path == "cpu"
        torch.testing.assert_close(star(hidden_states=x), own(x))
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        star(x, nonsense=x)
    traced = torch.fx.symbolic_trace(star)
    torch.testing.assert_close(traced(x), own(x))


@pytest.mark.slow
@pytest.mark.parametrize("change", [replaced_act, hooked_first_layer, other_product])
def test_a_change_before_or_after_compiling_acts(change):
    own, star = pair(SwiGLU)
    x = torch.randn(50, 16)
    compiled = torch.compile(star, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), own(x))
    star.act_fn = own.act_fn = nn.ReLU()  # after compiling
    torch.testing.assert_close(compiled(x), own(x))
    own, star = pair(SwiGLU)
    change(own), change(star)
    torch.compiler.reset()  # PyTorch's compiled code does not see hooks that come later
    torch.testing.assert_close(torch.compile(star, backend="eager")(x), own(x))
