"""Sums, several products and learned factors: values, folding, fused paths, old files."""

import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from starlayers import StarBlock, StarMLP, StarOp, param_groups, use_backend
from starlayers.coefficients.modules import (
    DynamicStarMLP,
    DynamicStarOp,
    RankStarMLP,
    RankStarOp,
    ScaledStarMLP,
    ScaledStarOp,
    SumMLP,
    SumOp,
)
from tests.coefficients.layers import filled, hidden_formula, layer_formula
from tests.helpers import (
    FORMULAS,
    RecordOps,
    assert_close_in_scale,
    gradients,
    properties,
    randn,
    star_mlp_formula,
    star_op_formula,
)

DOUBLE = torch.float64
OPS = {"sum": SumOp, "rank": RankStarOp, "scale": ScaledStarOp, "dynamic": DynamicStarOp}
MLPS = {"sum": SumMLP, "rank": RankStarMLP, "scale": ScaledStarMLP, "dynamic": DynamicStarMLP}
LEARNED = ("scale", "dynamic")
FORMS = ("op", "mlp", "block")
OPTIONS = st.fixed_dictionaries(
    {
        "act": st.sampled_from(list(FORMULAS)),
        "bias": st.booleans(),
        "offset": st.sampled_from([0.0, 1.0, -0.5]),
    }
)
SHAPES = st.sampled_from([(3,), (1, 3), (4, 3), (2, 5, 3), (2, 3, 4, 3), (0, 3), (2, 0, 3)])
RANKS = st.integers(1, 3)
variants = pytest.mark.parametrize("variant", OPS)
learned = pytest.mark.parametrize("variant", LEARNED)
forms = pytest.mark.parametrize("form", FORMS)


def build(form, variant, **options):
    """A layer of 4 channels and 6 products for each of its own (with several, of 12)."""
    if form == "op":
        return filled(OPS[variant](4, 6, **options))
    mlp = MLPS[variant](4, 6, **options)
    return filled(mlp if form == "mlp" else StarBlock(4, mlp))


def options_of(variant, options, rank):
    """The options that a variant has."""
    if variant == "sum":
        return {name: value for name, value in options.items() if name != "offset"}
    return options | {"rank": rank} if variant == "rank" else options


# --- values


@properties
@given(
    options=OPTIONS, shape=SHAPES, rank=RANKS, packed=st.booleans(), variant=st.sampled_from([*OPS])
)
def test_op_is_its_formula(options, shape, rank, packed, variant):
    options = options_of(variant, options, rank)
    op = filled(OPS[variant](3, 2, **options, packed=packed, dtype=DOUBLE))
    x = randn(*shape, dtype=DOUBLE)
    assert op(x).shape == (*shape[:-1], 2)
    torch.testing.assert_close(op(x), hidden_formula(op, x))
    assert torch.equal(op.products(x), op(x))


@properties
@given(
    options=OPTIONS,
    shape=SHAPES,
    rank=RANKS,
    out=st.none() | st.integers(1, 4),
    recompute=st.booleans(),
    variant=st.sampled_from([*MLPS]),
)
def test_mlp_is_its_formula(options, shape, rank, out, recompute, variant):
    options = options_of(variant, options, rank) | {"recompute": recompute, "dtype": DOUBLE}
    mlp = filled(MLPS[variant](3, 5, out_features=out, **options))
    x = randn(*shape, dtype=DOUBLE)
    assert mlp.products(x).shape == (*shape[:-1], 5)
    assert mlp(x).shape == (*shape[:-1], out or 3)
    torch.testing.assert_close(mlp(x), layer_formula(mlp, x))
    torch.testing.assert_close(mlp.products(x), hidden_formula(mlp, x))


@variants
def test_blocks_take_them(variant):
    block, x = build("block", variant, dtype=DOUBLE), randn(2, 5, 4, dtype=DOUBLE)
    torch.testing.assert_close(block(x), x + layer_formula(block.mlp, x))


@pytest.mark.parametrize("variant", ["sum", "scale", "dynamic"])
def test_a_residual_is_added(variant):
    mlp = build("mlp", variant, dtype=DOUBLE)
    x, residual = randn(2, 5, 4, dtype=DOUBLE), randn(2, 5, 4, seed=1, dtype=DOUBLE)
    torch.testing.assert_close(mlp(x, residual), residual + layer_formula(mlp, x))


@pytest.mark.parametrize("layer", [StarOp(4, 6, act="gelu"), RankStarOp(4, 6, rank=1, act="gelu")])
def test_one_product_is_a_star(layer):
    twin, x = StarOp(4, 6, act="gelu"), randn(3, 4)
    twin.load_state_dict({k.removeprefix("star."): v for k, v in layer.state_dict().items()})
    torch.testing.assert_close(layer(x), star_op_formula(twin, x))


@learned
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_learned_factors_start_as_the_plain_layer(form, variant, offset):
    def made(op, mlp):
        if form == "op":
            return op(4, 6, offset=offset)
        return mlp(4, 6, offset=offset) if form == "mlp" else StarBlock(4, mlp(4, 6, offset=offset))

    twin, module = made(StarOp, StarMLP), made(OPS[variant], MLPS[variant])
    x = randn(3, 5, 4)
    missing, unexpected = module.load_state_dict(twin.state_dict(), strict=False)
    assert unexpected == []
    own = {name.removeprefix("mlp.").split(".")[0] for name in missing}
    assert own == {"scale", "shift"} | ({"gate"} if variant == "dynamic" else set())
    torch.testing.assert_close(module(x), twin(x))
    # from the first step on everything learns, except the first layer of the gate
    grads = dict(zip(dict(module.named_parameters()), gradients(module, x)[2:]))
    still = {name for name, g in grads.items() if not g.any()}
    assert all("gate.0" in name for name in still)


@pytest.mark.parametrize(("kind", "plain"), [(SumOp, StarOp), (SumMLP, StarMLP)])
def test_sums_have_the_parameters_of_stars(kind, plain):
    layers = []
    for k in (plain, kind):
        torch.manual_seed(0)
        layers.append(k(4, 6))
    states = [layer.state_dict() for layer in layers]
    names = [f"{f}.{p}" for f in ("f1", "f2", "g") for p in ("weight", "bias")]
    assert [*states[0]] == [*states[1]] == names[: 6 if plain is StarMLP else 4]
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states)))


def test_sizes_and_names_of_a_rank():
    mlp = RankStarMLP(4, 6, rank=3, out_features=5, bias=False)
    shapes = {name: tuple(p.shape) for name, p in mlp.named_parameters()}
    assert shapes == {"star.f1.weight": (18, 4), "star.f2.weight": (18, 4), "g.weight": (5, 6)}
    assert type(mlp.star) is StarOp
    assert (mlp.in_features, mlp.hidden_features, mlp.out_features) == (4, 6, 5)
    mlp = RankStarMLP(4)
    assert (mlp.rank, mlp.hidden_features, mlp.out_features, mlp.recompute) == (2, 16, 4, False)
    op = RankStarOp(4, 6, act="gelu", offset=0.5)
    assert (op.rank, op.act, op.offset, op.in_features, op.out_features) == (2, "gelu", 0.5, 4, 6)
    assert {p.dtype for p in RankStarMLP(4, 6, dtype=DOUBLE).parameters()} == {DOUBLE}
    assert all(p.is_meta for p in RankStarMLP(4, 6, device="meta").parameters())


def test_the_gate_is_small_and_has_biases():
    op = DynamicStarOp(256, 6, bias=False)
    shapes = {name: tuple(p.shape) for name, p in op.gate.named_parameters()}
    assert shapes == {
        "0.weight": (16, 256), "0.bias": (16,), "2.weight": (6, 16), "2.bias": (6,),
    }  # fmt: skip
    assert DynamicStarOp(16, 6).gate[0].out_features == 8  # at least
    assert type(op.gate[1]) is nn.ReLU


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (SumOp(4, 6, act=None), "4, 6, act='identity'"),
        (SumMLP(4, 6), "4, 6, act='relu6'"),
        (ScaledStarOp(4, 6, offset=1), "4, 6, act='relu6', offset=1.0"),
        (DynamicStarMLP(4, 6, recompute=True), "4, 6, act='relu6', recompute=True"),
        (RankStarOp(4, 6, rank=3), "4, 6, rank=3"),
        (RankStarMLP(4, 6, out_features=5), "4, 6, 5, rank=2"),
    ],
)
def test_repr_shows_sizes_and_what_differs(module, text):
    assert module.extra_repr() == text
    assert repr(module).startswith(f"{type(module).__name__}(")


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: SumOp(4, 3, offset=1), ValueError, r"SumOp: offset=1.0 needs a product"),
        (lambda: SumMLP(4, 3, offset=-0.5), ValueError, r"SumMLP: offset=-0.5 needs a product"),
        (lambda: RankStarOp(4, 3, rank=0), ValueError, "RankStarOp: rank must be at least 1, .* 0"),
        (lambda: RankStarMLP(4, 3, rank=0), ValueError, "RankStarMLP: rank must be at least 1"),
        (lambda: RankStarOp(4, 3, rank=1.5), TypeError, "rank must be an integer, got 1.5"),
        (lambda: RankStarMLP(4, 3, rank=1.5), TypeError, "rank must be an integer, got 1.5"),
        (lambda: RankStarMLP(4, 3, recompute=1), TypeError, "recompute must be True or False"),
        (lambda: RankStarMLP(0, 3), ValueError, "RankStarMLP: dim must be at least 1, got 0"),
        (lambda: RankStarMLP(4, 0), ValueError, "RankStarMLP: hidden must be at least 1, got 0"),
        (lambda: RankStarMLP(4, out_features=0), ValueError, "out_features must be at least 1"),
        (lambda: RankStarOp(4, 3, act="no"), ValueError, "unknown activation 'no'"),
        (lambda: ScaledStarOp(4, 3, combine="sum"), TypeError, "combine"),
        (lambda: RankStarOp(4, 3)(randn(2, 5)), ValueError, "expects 4 input features, got 5"),
        (lambda: ScaledStarMLP(4, 3)(randn(2, 5)), ValueError, "expects 4 input features, got 5"),
        (lambda: SumOp(4, 3)(torch.ones(2, 4).int()), TypeError, "SumOp expects a floating tensor"),
    ],
)
def test_wrong_use_names_the_numbers(call, error, words):
    with pytest.raises(error, match=words):
        call()


# --- folding


@properties
@given(options=OPTIONS, packed=st.booleans())
def test_folding_keeps_the_function(options, packed):
    op = filled(ScaledStarOp(3, 2, **options, packed=packed, dtype=DOUBLE))
    x = randn(50, 3, dtype=DOUBLE)
    before, state = op(x), copy.deepcopy(op.state_dict())
    plain = op.fold()
    assert type(plain) is StarOp
    torch.testing.assert_close(plain(x), before, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(plain(x), star_op_formula(plain, x))
    assert (plain.offset, plain.act, plain.packed) == (options["offset"], op.act, packed)
    assert {n.split(".")[0] for n in plain.state_dict()} == ({"f12"} if packed else {"f1", "f2"})
    assert [*plain._modules.values()][-1].bias is not None
    if not packed:
        assert (plain.f1.bias is None) is not options["bias"]
    # the layer itself is as it was
    assert torch.equal(op(x), before)
    assert all(torch.equal(a, state[name]) for name, a in op.state_dict().items())


def test_a_folded_layer_shares_all_but_the_second_branch():
    mlp = build("mlp", "scale", offset=1.0, recompute=True, out_features=5, act="gelu").eval()
    plain = mlp.fold()
    assert type(plain) is StarMLP
    assert plain.f1 is mlp.f1
    assert plain.g is mlp.g
    assert plain.f2 is not mlp.f2
    assert not plain.training
    assert (plain.recompute, plain.hidden_features, plain.out_features) == (True, 6, 5)
    assert not any(p.is_meta for p in plain.parameters())
    before, x = mlp(randn(3, 4)), randn(3, 4)
    with torch.no_grad():
        plain.f2.weight.zero_()
    assert torch.equal(mlp(x), before)


def test_folding_makes_no_bias_that_is_not_needed():
    op = ScaledStarOp(3, 2, bias=False)
    nn.init.normal_(op.scale)
    x = randn(5, 3)
    plain = op.fold()
    torch.testing.assert_close(plain(x), op(x))
    assert plain.f2.bias is None
    op = ScaledStarOp(3, 2, bias=False, packed=True)
    assert op.fold().f12.bias is None
    nn.init.normal_(op.shift)
    plain = op.fold()
    torch.testing.assert_close(plain(x), op(x))
    assert plain.f12.bias[:2].tolist() == [0, 0]
    assert op.f12.bias is None


def test_a_folded_layer_is_the_layer_one_can_build():
    mlp, x = build("mlp", "scale", offset=1.0), randn(3, 4)
    twin, plain = StarMLP(4, 6, offset=1.0), mlp.fold()
    twin.load_state_dict(plain.state_dict())
    assert torch.equal(twin(x), plain(x))
    assert repr(plain) == repr(twin)
    torch.testing.assert_close(twin(x), mlp(x), rtol=1e-4, atol=1e-4)


def test_folding_keeps_small_gates_in_half_precision():
    # a bias of 1 + 1e-3 would be 1 in bfloat16
    op = ScaledStarOp(4, 3, act=None, offset=1.0, dtype=torch.bfloat16)
    nn.init.constant_(op.f2.bias, 1e-3)
    nn.init.zeros_(op.f2.weight)
    folded = op.fold().f2.bias
    assert folded.dtype == torch.bfloat16
    torch.testing.assert_close(folded.float(), torch.full((3,), 1e-3), rtol=1e-2, atol=0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("packed", [False, True])
def test_frozen_layers_stay_frozen_and_others_learn(bias, packed):
    op = filled(ScaledStarOp(4, 3, bias=bias, packed=packed))
    plain = op.fold()
    assert all(p.requires_grad and p.is_leaf for p in plain.parameters())
    plain(randn(2, 4)).sum().backward()
    assert all(p.grad.any() for p in plain.parameters())
    frozen = op.requires_grad_(False).fold()
    assert [*frozen.state_dict()][-1].endswith("bias")
    assert not any(p.requires_grad for p in frozen.parameters())


def test_a_folded_layer_resets_as_it_began():
    op = ScaledStarOp(4, 3, offset=1.0, init="near_linear")
    plain = filled(op.fold())
    second = op.f2.weight.clone()
    plain.reset_parameters()
    assert plain.init == "near_linear"
    assert 0 < plain.f2.weight.abs().max() <= 0.1 / 2  # a tenth of 1 / sqrt(4)
    assert plain.f1.weight.abs().max() > 0.1 / 2
    assert torch.equal(op.f2.weight, second)


def parametrised():
    op = ScaledStarOp(4, 3)
    parametrizations.weight_norm(op.f2)
    return op


def replaced():
    op = ScaledStarMLP(4, 3)
    op.f2 = nn.Sequential(op.f2)
    return op


def packed_and_replaced():
    op = ScaledStarOp(4, 3, packed=True)
    op.f12 = nn.Sequential(op.f12)
    return op


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DynamicStarOp(4, 3), "DynamicStarOp: factors that depend on the input"),
        (lambda: DynamicStarMLP(4, 3), "DynamicStarMLP: factors that depend on the input"),
        (parametrised, "ScaledStarOp: f2 is a wrapped or parametrised ParametrizedLinear"),
        (replaced, "ScaledStarMLP: f2 is a wrapped or parametrised Sequential"),
        (packed_and_replaced, "ScaledStarOp: f12 is a wrapped or parametrised Sequential"),
    ],
)
def test_what_cannot_be_folded(make, words):
    op = make()
    with pytest.raises(ValueError, match=words):
        op.fold()
    assert "scale" in dict(op.named_parameters())


# --- factors of a sample


@forms
@pytest.mark.parametrize("shape", [(4,), (3, 4), (3, 2, 4), (3, 2, 2, 4)])
def test_dynamic_factors_are_of_one_sample_alone(form, shape):
    module, x = build(form, "dynamic", dtype=DOUBLE), randn(*shape, dtype=DOUBLE)
    y = module(x)
    if x.ndim > 1:
        alone = torch.cat([module(sample[None]) for sample in x])
        torch.testing.assert_close(y, alone)
        other = x.clone()
        other[1:] += 1
        torch.testing.assert_close(module(other)[0], y[0])
    if x.ndim > 2:  # the factors depend on the whole sample
        other = x.clone()
        other[:, -1] += 1
        assert not torch.allclose(module(other)[:, 0], y[:, 0])


@forms
@pytest.mark.parametrize("variant", ["sum", "rank", "scale"])
def test_all_others_compute_each_row_alone(form, variant):
    module, x = build(form, variant, dtype=DOUBLE), randn(3, 2, 4, dtype=DOUBLE)
    torch.testing.assert_close(module(x), torch.stack([module(row) for row in x.unbind(1)], 1))


# --- precision, compilers, copies


@forms
@variants
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(form, variant, dtype):
    exact, x = build(form, variant), randn(3, 5, 4)
    with torch.no_grad():
        for p in exact.parameters():
            p.mul_(0.3)
    half, y = copy.deepcopy(exact).to(dtype), exact(x)
    cast = half(x.to(dtype))
    assert cast.dtype == dtype
    assert_close_in_scale([cast], [y], 0.02)
    with torch.autocast("cpu", dtype=dtype):
        cast = exact(x)
        assert cast.dtype == (dtype if form != "block" else torch.float32)
    assert_close_in_scale([cast], [y], 0.02)
    assert all(g.isfinite().all() for g in gradients(half, x.to(dtype)))


#: the quick tier compiles one layer, the slow one all
COMPILED = [
    pytest.param(
        form, variant, marks=() if (form, variant) == ("op", "scale") else pytest.mark.slow
    )
    for form in FORMS
    for variant in OPS
]


@pytest.mark.parametrize(("form", "variant"), COMPILED)
def test_compiled_is_eager(form, variant, fresh_compiler):
    module, x = build(form, variant, act="gelu"), randn(3, 5, 4)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(compiled, x), gradients(module, x)):
        torch.testing.assert_close(a, b)
    if variant == "scale" and form != "block":
        folded = torch.compile(module.fold(), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(folded(x), module(x), rtol=1e-4, atol=1e-4)


@forms
@variants
def test_copies_and_transforms(form, variant):
    module, x = build(form, variant, act="tanh"), randn(3, 5, 4)
    y = module(x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), y)
        for p in twin.parameters():
            nn.init.zeros_(p)
        assert torch.equal(module(x), y)
    torch.testing.assert_close(torch.func.vmap(lambda v: module(v[None])[0])(x), y)


@forms
@variants
def test_state_dict_round_trip(form, variant):
    module, x = build(form, variant, act="tanh"), randn(3, 5, 4)
    twin = filled(build(form, variant, act="tanh"), seed=1)
    assert not torch.allclose(twin(x), module(x))
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin(x), module(x))


@pytest.mark.export
@forms
@variants
def test_exported_is_eager(form, variant):
    module, x = build(form, variant, act="tanh"), randn(3, 5, 4)
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), module(x))


@forms
@pytest.mark.parametrize("variant", ["sum", "rank", "scale"])
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_recorded_and_scripted_is_eager(form, variant):
    module, x = build(form, variant, act="tanh"), randn(3, 5, 4)
    torch.testing.assert_close(torch.fx.symbolic_trace(module)(x), module(x))
    torch.testing.assert_close(torch.jit.script(nn.Sequential(module))(x), module(x))


@variants
@pytest.mark.parametrize("form", ["op", "mlp"])
@pytest.mark.parametrize("act", [None, "gelu"])
def test_gradients_of_any_order(form, variant, act):
    kind = (OPS if form == "op" else MLPS)[variant]
    layer = filled(kind(3, 2, act=act, dtype=DOUBLE))
    x = randn(2, 2, 3, dtype=DOUBLE, grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(layer, (x,))


@variants
def test_recompute_gives_the_same_gradients(variant):
    stored = build("mlp", variant, act="gelu", dtype=DOUBLE)
    again = build("mlp", variant, act="gelu", dtype=DOUBLE, recompute=True)
    again.load_state_dict(stored.state_dict())
    x = randn(3, 5, 4, dtype=DOUBLE)
    for a, b in zip(gradients(again, x), gradients(stored, x), strict=True):
        torch.testing.assert_close(a, b)


def saved_numbers(layer, x):
    """Numbers that a forward keeps for the backward, parameters aside."""
    own, kept = {p.data_ptr() for p in layer.parameters()}, {}

    def pack(t):
        if t.data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    return sum(kept.values())


@variants
def test_recompute_keeps_the_input_alone(variant):
    x = randn(50, 4, grad=True)
    kept = [
        saved_numbers(build("mlp", variant, act="gelu", recompute=recompute), x)
        for recompute in (False, True)
    ]
    assert kept[0] >= x.numel() + 2 * 50 * 6
    assert kept[1] <= x.numel()


# --- start values


def resets(module):
    return [m for m in module.modules() if hasattr(m, "reset_parameters")]


ORDERS = {
    "itself": lambda layer: layer.reset_parameters(),
    "parents first": lambda layer: [m.reset_parameters() for m in resets(layer)],
    "children first": lambda layer: [m.reset_parameters() for m in reversed(resets(layer))],
}
orders = pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)


def copied(layer):
    return pickle.loads(pickle.dumps(copy.deepcopy(layer)))


def emptied(layer):
    """The layer on the meta device and back, full of what is no number."""
    layer = layer.to("meta").to_empty(device="cpu")
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(torch.nan)
    return layer


@orders
@pytest.mark.parametrize("form", ["op", "mlp"])
@pytest.mark.parametrize("init", ["linear", "near_linear"])
@pytest.mark.parametrize("change", [lambda layer: layer, copied, emptied])
@pytest.mark.parametrize("variant", ["rank", "scale", "dynamic"])
def test_start_values_can_be_set_again_in_any_order(variant, change, init, form, order):
    layer = change(build(form, variant, offset=0.5, init=init))
    order(layer)
    inner = layer.star if variant == "rank" else layer
    bound = 1 / 4**0.5  # of nn.Linear
    (w1, b1), (w2, b2) = inner.branch_layers()
    for p, most in zip((w1, b1, w2, b2), [bound] * 2 + [bound * (0.1, 1)[init == "linear"]] * 2):
        assert 0 < p.abs().max() <= most
    assert w1.abs().max() > 0.1 * bound
    if form == "mlp":
        assert 0 < layer.g.weight.abs().max() <= 6**-0.5
    if variant != "rank":
        assert layer.scale.tolist() == [1.0] * 6
        assert layer.shift.tolist() == [0.5] * 6
    if variant == "dynamic":
        assert not layer.gate[2].weight.any()
        assert not layer.gate[2].bias.any()
        assert 0 < layer.gate[0].weight.abs().max() <= bound


@orders
def test_sums_are_drawn_anew(order):
    for op in (build("op", "sum"), emptied(build("mlp", "sum"))):
        order(op)
        for weight, bias in op.branch_layers():
            assert 0 < weight.abs().max() <= 0.5
            assert 0 < bias.abs().max() <= 0.5


@learned
def test_resetting_a_copy_leaves_the_layer_alone(variant):
    layer = build("op", variant, offset=1.0, init="near_linear")
    state = copy.deepcopy(layer.state_dict())
    copied(layer).reset_parameters()
    copy.deepcopy(layer).reset_parameters()
    assert all(torch.equal(p, state[name]) for name, p in layer.state_dict().items())


@learned
def test_device_and_dtype_reach_every_parameter(variant):
    for kind in (OPS[variant], MLPS[variant]):
        assert all(p.is_meta for p in kind(4, 6, device="meta").parameters())
        assert {p.dtype for p in kind(4, 6, dtype=DOUBLE).parameters()} == {DOUBLE}


def test_factors_are_not_decayed():
    mlp = ScaledStarMLP(4, 6)
    groups = param_groups(mlp, 0.1)
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    assert id(mlp.f1.weight) in decayed
    assert not {id(mlp.scale), id(mlp.shift)} & decayed


# --- fused paths


REASONS = {
    "scale": "ScaledStarMLP has factors of its own; fold() makes it a StarMLP",
    "dynamic": "DynamicStarMLP computes its products by a method of its own",
    "sum": "SumMLP computes its products by a method of its own",
}


@pytest.mark.usefixtures("eligible")
@pytest.mark.parametrize("variant", REASONS)
@pytest.mark.parametrize("recompute", [False, True])
def test_fused_paths_say_why_they_stand_back(variant, recompute):
    mlp, x = build("mlp", variant, recompute=recompute), randn(70, 4)
    assert mlp.plan(x).reason == REASONS[variant]
    assert mlp.plan(x, x).reason == REASONS[variant]
    expected = layer_formula(mlp, x)
    with RecordOps() as ops:
        y = mlp(x)
    assert "starlayers::star_mlp" not in ops.counts
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    y.sum().backward()
    assert all(p.grad.any() for p in mlp.parameters())
    with use_backend("triton"):
        for call in (mlp, mlp.plan):
            with pytest.raises(RuntimeError, match="triton") as caught:
                call(x)
            assert REASONS[variant] in str(caught.value)


@pytest.mark.usefixtures("eligible")
def test_folded_layers_run_fused():
    mlp, x = build("mlp", "scale").fold(), randn(70, 4)
    with RecordOps() as ops:
        y = mlp(x)
    assert ops.counts["starlayers::star_mlp"] == 1
    torch.testing.assert_close(y, star_mlp_formula(mlp, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["rank", "scale", "dynamic"])
def test_products_are_stars_that_a_kernel_may_compute(variant):
    """Where Triton was asked for and cannot serve, they do not run eager in silence."""
    op, x = build("op", variant), randn(3, 4)
    words = "cannot serve this star: no Triton kernel for device 'cpu'"
    with use_backend("triton"), pytest.raises(RuntimeError, match=words):
        op(x)
    star = op.star if variant == "rank" else op
    assert star.plan(x).reason == "no Triton kernel for device 'cpu'"


def test_sums_have_no_kernel():
    op, x = SumOp(4, 6), randn(3, 4)
    assert op.plan(x).reason == "SumOp has no product to fuse"
    for backend, call in itertools.product(("triton", "cpu"), (op, op.plan)):
        words = f"the {backend} backend cannot serve this SumOp: SumOp has no product"
        with use_backend(backend), pytest.raises(RuntimeError, match=words):
            call(x)
    with use_backend("eager"):
        assert op.plan(x).reason == "the eager backend was asked for"
    with pytest.raises(ValueError, match="SumOp expects 4 input features, got 5"):
        op.plan(randn(3, 5))


# --- files of the time when these were options of StarOp


def old_state(rank, channels, bias=True, g=False, prefix=""):
    """A state dict of `StarOp(4, channels, rank=rank)`: rows are laid out (rank, channels)."""
    shapes = {f"{f}.weight": (rank * channels, 4) for f in ("f1", "f2")}
    shapes |= {"g.weight": (4, channels)} if g else {}
    if bias:
        shapes |= {name.replace("weight", "bias"): shape[:1] for name, shape in shapes.items()}
    return {prefix + name: randn(*s, seed=i) for i, (name, s) in enumerate(shapes.items())}


def old_formula(state, x, rank, act, offset, prefix=""):
    """What that layer computed, one product after the other."""

    def row(f, i):
        bias = state.get(f"{prefix}{f}.bias")
        return x @ state[f"{prefix}{f}.weight"][i] + (0 if bias is None else bias[i])

    channels = len(state[f"{prefix}f1.weight"]) // rank
    sums = [
        sum(
            FORMULAS[act](row("f1", r * channels + c)) * (offset + row("f2", r * channels + c))
            for r in range(rank)
        )
        for c in range(channels)
    ]
    y = torch.stack(sums, -1)
    if f"{prefix}g.weight" not in state:
        return y
    return y @ state[f"{prefix}g.weight"].T + state.get(f"{prefix}g.bias", 0)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("packed", [False, True])
def test_old_state_dicts_of_a_rank_load(rank, bias, packed):
    x, options = randn(5, 4), {"rank": rank, "bias": bias, "act": "gelu", "offset": 0.5}
    state = old_state(rank, 3, bias)
    kept = copy.deepcopy(state)
    op = RankStarOp(4, 3, packed=packed, **options)
    missing, unexpected = op.load_state_dict(state)
    assert (missing, unexpected) == ([], [])
    expected = old_formula(state, x, rank, "gelu", 0.5)
    torch.testing.assert_close(op(x), expected, rtol=1e-4, atol=1e-4)
    # what was loaded is left alone, and what is saved is of the new layout
    assert all(torch.equal(state[name], kept[name]) for name in kept | state)
    twin = RankStarOp(4, 3, packed=packed, **options)
    twin.load_state_dict(op.state_dict())
    assert all(name.startswith("star.") for name in op.state_dict())
    assert torch.equal(twin(x), op(x))


@pytest.mark.parametrize("bias", [True, False])
def test_old_state_dicts_of_mlps_load_inside_of_models(bias):
    x, options = randn(2, 5, 4), {"rank": 2, "bias": bias, "act": "silu"}
    alone = RankStarMLP(4, 3, **options)
    state = old_state(2, 3, bias, g=True)
    alone.load_state_dict(state)
    expected = old_formula(state, x, 2, "silu", 0.0)
    torch.testing.assert_close(alone(x), expected, rtol=1e-4, atol=1e-4)
    model = nn.Sequential(nn.Identity(), StarBlock(4, RankStarMLP(4, 3, **options)))
    model.load_state_dict(old_state(2, 3, bias, g=True, prefix="1.mlp."))
    torch.testing.assert_close(model(x), x + expected, rtol=1e-4, atol=1e-4)


def test_state_dicts_of_another_size_are_named():
    op = RankStarOp(4, 3, rank=2)
    for rank, channels in ((3, 3), (1, 5)):
        with pytest.raises(RuntimeError, match=r"size mismatch for star.f1.weight"):
            op.load_state_dict(old_state(rank, channels))
    with pytest.raises(RuntimeError, match=r"Missing key.*star.f2.weight"):
        op.load_state_dict({"f1.weight": randn(6, 4), "f1.bias": randn(6)})


PICKLED = [StarOp(4, 3), StarMLP(4, 3), StarBlock(4), ScaledStarOp(4, 3), SumMLP(4, 3)]


def star_of(module):
    return module.mlp if isinstance(module, StarBlock) else module


@pytest.mark.parametrize("module", PICKLED, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize(
    ("option", "value"), [("rank", 2), ("combine", "sum"), ("coefficients", "scale")]
)
def test_old_pickles_with_an_option_that_is_a_class_now_name_it(module, option, value):
    module = copy.deepcopy(module)
    star = star_of(module)
    star.__dict__[option] = value
    saved = pickle.dumps(module)
    words = f"{type(star).__name__} was pickled with {option}={value!r}, .* save the state dict"
    with pytest.raises(ValueError, match=words):
        pickle.loads(saved)


@pytest.mark.parametrize("module", PICKLED, ids=lambda m: type(m).__name__)
def test_old_pickles_of_plain_layers_load(module):
    module, x = copy.deepcopy(module), randn(2, 4)
    neutral = {"rank": 1, "combine": "mul", "coefficients": "fixed"}
    star_of(module).__dict__.update(neutral)
    for name in ("packed", "init"):  # which there were not
        star_of(module).__dict__.pop(name)
    twin = pickle.loads(pickle.dumps(module))
    assert not neutral.keys() & star_of(twin).__dict__.keys()
    assert not hasattr(star_of(twin), "rank")
    assert torch.equal(twin(x), module(x))
    assert repr(twin) == repr(module)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("shape", [(3, 4), (3, 5, 4), (2, 3, 5, 4)])
def test_dynamic_factors_are_recorded_for_inputs_of_any_rank(shape):
    op = build("op", "dynamic")
    nn.init.normal_(op.gate[-1].bias)
    x = randn(*shape)
    torch.testing.assert_close(torch.fx.symbolic_trace(op)(x), op(x))
    torch.testing.assert_close(torch.jit.script(op)(x), op(x))
