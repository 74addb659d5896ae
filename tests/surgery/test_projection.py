"""Gates, and the star projection."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

from starlayers import starify
from starlayers.surgery import Site, StarProjection
from starlayers.surgery.linear_layers import Projection
from starlayers.surgery.projection import LowRankGate, ScaleGate, make_gate, parse_gate, zero_
from tests.surgery.small import MLP

SITE = Site("chain", "plain", "fc1", "act", "fc2")


@pytest.mark.parametrize(
    ("spec", "parsed"),
    [
        ("full", ("full", 0)),
        ("scale", ("scale", 0)),
        ("low_rank=1", ("low_rank", 1)),
        ("low_rank=12", ("low_rank", 12)),
    ],
)
def test_parse_gate(spec, parsed):
    assert parse_gate(spec) == parsed


@pytest.mark.parametrize(
    "spec", ["half", "full=2", "scale=1", "low_rank", "low_rank=0", "low_rank=-1", "low_rank=a", ""]
)
def test_unknown_gates(spec):
    with pytest.raises(ValueError, match=f"^unknown gate '{spec}', choose 'full', 'scale' or"):
        parse_gate(spec)


def test_gates_are_strings():
    with pytest.raises(TypeError, match=r"^gate must be 'full', 'scale' or 'low_rank=r', got None"):
        parse_gate(None)


@pytest.mark.parametrize(
    "inp", [nn.Linear(4, 6), Conv1D(6, 4), nn.Linear(4, 6, dtype=torch.bfloat16)]
)
def test_gates_of_linear_layers(inp):
    dtype = inp.weight.dtype
    full, thin, scale = (make_gate(spec, inp) for spec in ("full", "low_rank=2", "scale"))
    assert {k: tuple(p.shape) for k, p in full.named_parameters()} == {
        "weight": (6, 4),
        "bias": (6,),
    }
    assert {k: tuple(p.shape) for k, p in thin.named_parameters()} == {
        "down.weight": (2, 4),
        "up.weight": (6, 2),
        "up.bias": (6,),
    }
    assert {k: tuple(p.shape) for k, p in scale.named_parameters()} == {"weight": (6,)}
    for gate in (full, thin, scale):
        assert all(p.dtype == dtype and p.requires_grad for p in gate.parameters())
        assert not gate(torch.randn(3, 4, dtype=dtype)).any()
    assert thin.down.weight.any()
    assert repr(scale) == "ScaleGate(6)"


def test_gates_of_maps():
    inp, x = nn.Conv2d(4, 6, 1), torch.randn(2, 4, 3, 3)
    for spec, shape in [("full", (2, 6, 3, 3)), ("low_rank=2", (2, 6, 3, 3)), ("scale", (6, 1, 1))]:
        gate = make_gate(spec, inp)
        assert gate(x).shape == shape
        assert not gate(x).any()
    assert make_gate("low_rank=2", inp).down.weight.shape == (2, 4, 1, 1)


def test_gates_on_meta():
    inp = nn.Linear(4, 6, device="meta")
    for spec in ("full", "low_rank=2", "scale"):
        assert all(p.is_meta for p in make_gate(spec, inp).parameters())


def test_zero_gates_draw_no_random_numbers():
    torch.manual_seed(0)
    inp, state = nn.Linear(4, 6), torch.get_rng_state()
    make_gate("full", inp)
    make_gate("scale", inp)
    assert torch.equal(torch.get_rng_state(), state)
    make_gate("low_rank=2", inp)  # its first layer is random
    assert not torch.equal(torch.get_rng_state(), state)


def test_only_linear_layers_have_gates():
    with pytest.raises(ValueError, match=r"^ReLU is no linear layer or 1x1 convolution"):
        make_gate("full", nn.ReLU())
    with pytest.raises(ValueError, match="unknown gate 'half'"):
        make_gate("half", nn.ReLU())


def test_zero_leaves_the_random_half():
    factory = {"dtype": torch.float32, "device": "cpu"}
    thin = LowRankGate(Projection(4, 6), 2, **factory)
    down = thin.down.weight.clone()
    nn.init.ones_(thin.up.weight)
    nn.init.ones_(thin.up.bias)
    zero_(thin)
    assert torch.equal(thin.down.weight, down)
    assert not thin.up.weight.any()
    assert not thin.up.bias.any()
    scale = ScaleGate(Projection(4, 6), **factory)
    nn.init.ones_(scale.weight)
    zero_(scale)
    assert not scale.weight.any()


def projection(spec="full", act=None, **options):
    torch.manual_seed(0)
    inp = nn.Linear(8, 6)
    star = StarProjection(
        inp, nn.SiLU() if act is None else act, make_gate(spec, inp), SITE, spec=spec, **options
    )
    for parameter in star.gate.parameters():
        nn.init.normal_(parameter)
    return star


def test_defaults():
    star = projection()
    assert (star.act_name, star.fused, star.recompute, star.undo) == (None, False, False, {})
    assert star.site is SITE


@pytest.mark.parametrize("spec", ["full", "low_rank=2", "scale"])
@pytest.mark.parametrize("fused", [False, True])
def test_the_product(x, spec, fused):
    star = projection(spec, act_name="silu", fused=fused)
    h = star.inp(x)
    expected = nn.functional.silu(h) * (1 + star.gate(x))
    torch.testing.assert_close(star(x), expected, rtol=1e-5, atol=1e-6)


def test_fused_takes_the_activation_by_name(x):
    star = projection(act=nn.Tanh(), act_name="silu", fused=True)
    expected = nn.functional.silu(star.inp(x)) * (1 + star.gate(x))
    torch.testing.assert_close(star(x), expected)
    star.fused = False
    torch.testing.assert_close(star(x), star.inp(x).tanh() * (1 + star.gate(x)))
    star.fused, star.act_name = True, None  # an activation without a name is called
    torch.testing.assert_close(star(x), star.inp(x).tanh() * (1 + star.gate(x)))


def test_the_gate_follows_the_dtype_of_the_product(x):
    star = projection("scale").to(torch.bfloat16)
    star.gate.float()
    assert star(x.to(torch.bfloat16)).dtype == torch.bfloat16
    star.fused, star.act_name = True, "silu"
    assert star(x.to(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("recompute", [False, True])
def test_recompute_runs_the_layer_again_in_the_backward(x, recompute):
    star, calls = projection(recompute=recompute), []
    star.inp.register_forward_hook(lambda *_: calls.append(1))
    star(x).sum().backward()
    assert len(calls) == 1 + recompute
    with torch.no_grad():
        star(x)
    assert len(calls) == 2 + recompute


def test_further_arguments_go_to_the_models_own_layer(x):
    class Scaled(nn.Linear):
        def forward(self, x, scale=1.0, *, shift=0.0):
            return scale * super().forward(x) + shift

    inp = Scaled(8, 6)
    star = StarProjection(inp, nn.ReLU(), make_gate("full", inp), SITE, spec="full")
    assert torch.equal(star(x, 2.0, shift=1.0), inp(x, 2.0, shift=1.0).relu())
    star.recompute = True
    assert torch.equal(star(x, 2.0, shift=1.0), inp(x, 2.0, shift=1.0).relu())


def test_it_shows_what_models_ask_of_a_linear_layer():
    star = projection()
    assert star.weight is star.inp.weight
    assert star.bias is star.inp.bias
    assert (star.in_features, star.out_features) == (8, 6)


def test_the_mode_is_that_of_the_layer():
    inp = nn.Linear(8, 6).eval()
    star = StarProjection(inp, nn.ReLU(), make_gate("full", inp), SITE, spec="full")
    assert not star.training
    assert not star.gate.training
    assert projection().training


def test_reset_gate():
    thin = projection("low_rank=2")
    down = thin.gate.down.weight.clone()
    thin.reset_gate()
    assert not torch.equal(thin.gate.down.weight, down)
    assert thin.gate.down.weight.abs().max() <= 8**-0.5
    assert not thin.gate.up.weight.any()
    full = projection()
    full.reset_gate()
    assert not full.gate.weight.any()
    assert not full.gate.bias.any()


def test_repr():
    assert repr(projection("scale")).startswith("StarProjection(\n  gate='scale'\n")
    full = projection(fused=True, recompute=True)
    assert "gate='full', fused, recompute" in repr(full)


def test_state_of_earlier_versions(x):
    star = projection(act_name="silu", fused=True)
    old = copy.copy(star)
    state = dict(vars(star))
    state["row"] = state.pop("act_name")
    old = StarProjection.__new__(StarProjection)
    old.__setstate__(state)
    assert (old.act_name, hasattr(old, "row"), "row" in state) == ("silu", False, True)
    assert torch.equal(old(x), star(x))


def test_weight_and_bias_are_set_on_the_own_layer():
    mlp = starify(MLP())
    weight = nn.Parameter(torch.ones(16, 8))
    mlp.fc1.weight, mlp.fc1.bias = weight, None
    assert mlp.fc1.inp.weight is weight
    assert mlp.fc1.bias is None
    with pytest.raises(RuntimeError, match="prune or parametrise its child `inp`"):
        prune.l1_unstructured(mlp.fc1, "weight", 0.5)
    prune.l1_unstructured(mlp.fc1.inp, "weight", 0.5)
    assert mlp(torch.ones(2, 8)).shape == (2, 8)


def test_a_low_rank_gate_that_overflows_in_float16_leaves_the_mlp_as_it_was():
    mlp = MLP().half()
    mlp.fc1.weight.data.mul_(0.01)
    x = (6e4 * torch.sign(torch.randn(30, 8))).half()
    expected = mlp(x)
    assert expected.isfinite().all()
    assert torch.equal(starify(mlp, gate="low_rank=4")(x), expected)
