"""Trunks: layouts, initialisation that survives SB3's, and the row of an activation class."""

from functools import partial

import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.policies import BasePolicy
from torch import nn

from starlayers import StarBlock
from starlayers.coefficients import branch_vectors, spectrum
from starlayers.rl import StarExtractor
from starlayers.rl.stack import GATE_GAIN, PackedStar, StarStack
from starlayers.rl.trunks import (
    NETS,
    ActivationLayer,
    D2RLTrunk,
    Dense,
    SimBaBlock,
    Trunk,
    activation_factory,
    activation_module,
    activation_name,
    build_trunk,
    parse_activation,
)

ORTHO = partial(BasePolicy.init_weights, gain=2**0.5)


@pytest.mark.parametrize("norm", [None, "layer", "rms"])
@pytest.mark.parametrize("net", NETS)
def test_a_trunk_has_a_layer_for_each_width(net, norm):
    trunk = build_trunk(net, 5, [8, 8], act="gelu", norm=norm)
    x = torch.randn(3, 5)
    assert trunk(x).shape == (3, 8)
    kind = {"star": PackedStar, "simba": SimBaBlock, "star_residual": StarBlock}.get(net, nn.Linear)
    assert sum(isinstance(m, kind) for m in trunk.modules()) == 2
    trunk(x).sum().backward()
    # a residual star begins as the identity: only its last layer learns from the first step
    still = [n for n, p in trunk.named_parameters() if p.grad is None or not p.grad.abs().max()]
    assert bool(still) is (net == "star_residual")
    assert all(".mlp.f" in n or ".pre." in n for n in still)


def test_an_empty_trunk_is_the_identity():
    x = torch.randn(3, 5)
    assert torch.equal(build_trunk("star", 5, [])(x), x)


def test_d2rl_sees_its_input_in_every_layer():
    trunk = build_trunk("d2rl", 5, [8, 8, 8], act="relu")
    x = torch.randn(3, 5)
    y = torch.relu(trunk[0][0](x))
    for layer in list(trunk)[1:]:
        y = torch.relu(layer[0](torch.cat([y, x], -1)))
    assert torch.equal(trunk(x), y)


def test_simba_is_an_embedding_blocks_and_a_norm():
    trunk = build_trunk("simba", 5, [8], act="relu")
    x = torch.randn(3, 5)
    embed, block, last = trunk
    h = embed(x)
    expected = last(h + block.out(torch.relu(block.inp(block.norm(h)))))
    assert torch.equal(trunk(x), expected)
    assert block.inp.out_features == 32


@pytest.mark.parametrize("ortho", [True, False])
def test_the_start_of_a_residual_star_survives_ppo(ortho):
    options = {"net": "star_residual", "net_arch": [8, 8], "ortho_init": ortho}
    policy = PPO("StarMlpPolicy", "CartPole-v1", policy_kwargs=options, device="cpu").policy
    blocks = [m for m in policy.modules() if isinstance(m, StarBlock)]
    assert len(blocks) == 4
    x = torch.randn(3, 8)
    for block in blocks:
        assert torch.equal(block(x), x)
        assert block.mlp.f2.weight.abs().max() > 0


def test_the_stacked_trunks_of_ppo_begin_as_stars():
    policy = PPO("StarMlpPolicy", "CartPole-v1", device="cpu").policy
    for weight, bias in policy.mlp_extractor.stack.layers():
        assert bias.abs().max() == 0
        for net in weight.detach():
            for branch, gain in zip(net.chunk(2, -1), (2**0.5, GATE_GAIN)):
                small = branch if branch.shape[0] <= branch.shape[1] else branch.t()
                eye = torch.eye(len(small)) * gain**2
                torch.testing.assert_close(small @ small.t(), eye, atol=1e-4, rtol=0)


def test_the_start_of_simba_survives_ppo():
    options = {"net": "simba", "net_arch": [64]}
    policy = PPO("StarMlpPolicy", "CartPole-v1", policy_kwargs=options, device="cpu").policy
    blocks = [m for m in policy.modules() if isinstance(m, SimBaBlock)]
    assert len(blocks) == 2  # policy and value
    for block in blocks:
        assert block.inp.bias.eq(0).all()
        assert block.out.bias.eq(0).all()
        assert block.act.act == "relu"
        # He's deviation; orthogonal columns would have half of it
        assert block.inp.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.05)


def test_the_start_of_an_extractor_survives_a_stock_policy():
    options = {"features_extractor_class": StarExtractor, "net_arch": []}
    policy = PPO("MlpPolicy", "CartPole-v1", policy_kwargs=options, device="cpu").policy
    for layer in policy.features_extractor.trunk:
        first, second = layer.f12.weight.detach().chunk(2)
        for branch, gain in ((first, 2**0.5), (second, GATE_GAIN)):
            small = branch if branch.shape[0] <= branch.shape[1] else branch.t()
            eye = torch.eye(len(small)) * gain**2
            torch.testing.assert_close(small @ small.t(), eye, atol=1e-4, rtol=0)


def test_one_matrix_for_both_branches_is_not_initialised_as_one():
    # orthogonal rows shared by two branches would have half of each branch's weight
    trunk = build_trunk("star", 64, [64], act="identity").apply(ORTHO)
    stack = StarStack(2, 64, [64], act="identity")
    stack.reset_branches(2**0.5)
    x = torch.randn(4096, 64)
    for y in (trunk(x), *stack(x)):
        # E[(h1 (1 + h2))^2] for unit inputs
        assert y.pow(2).mean().item() == pytest.approx(2 * (1 + GATE_GAIN**2), rel=0.1)


def test_a_users_own_initialisation_is_left_alone():
    trunk = build_trunk("star_residual", 4, [8])
    trunk.apply(lambda m: nn.init.ones_(m.weight) if isinstance(m, nn.Linear) else None)
    assert trunk[1].mlp.g.weight.eq(1).all()


def test_activation_names():
    rows = {nn.Tanh: "tanh", nn.ReLU: "relu", nn.SiLU: "silu", nn.GELU: "gelu", nn.ReLU6: "relu6"}
    for kind, row in rows.items():
        assert activation_name(kind) == row
    assert activation_name("swiglu") == "silu"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("kan", 4, [8]), "unknown net 'kan', choose one of star, star_residual, mlp"),
        (("star", 4, [0]), r"star: net_arch\[0\] must be at least 1, got 0"),
        (("simba", 4, [8, 4]), r"net='simba' has residual blocks: net_arch=\[8, 4\]"),
    ],
)
def test_bad_trunks_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        build_trunk(*arguments)
    with pytest.raises(ValueError, match="unknown norm 'batch'"):
        build_trunk("star", 4, [8], norm="batch")
    with pytest.raises(TypeError, match=r"net_arch\[0\] must be an integer, got 8.5"):
        build_trunk("star", 4, [8.5])


def test_the_coefficients_of_packed_and_stacked_stars_are_seen():
    stack = StarStack(2, 5, [8, 4], act="identity")
    packed = PackedStar(5, 8, act="identity")
    for star in (packed, stack):
        for p in star.parameters():
            nn.init.normal_(p)
    w1, w2 = branch_vectors(packed)
    x = torch.randn(3, 5)
    rows = torch.cat([x, torch.ones(3, 1)], 1)
    torch.testing.assert_close((rows @ w1[:, 0].T) * (rows @ w2[:, 0].T), packed(x))
    assert [tuple(w.shape) for w, _ in stack.star_vectors()] == [(16, 1, 6), (8, 1, 9)]
    found = spectrum(nn.ModuleDict({"packed": packed, "stack": stack}))
    assert list(found) == ["packed", "stack.0", "stack.1"]
    assert all(bool((s.norm > 0).all()) for s in found.values())


@pytest.mark.parametrize(
    ("net", "layers"),
    [
        ("star", "B P N B P N"),
        ("mlp", "B L N A B L N A"),
        ("d2rl", "[B L N A] [B L N A]"),
        ("star_residual", "B L S S N"),
        ("simba", "B L M M N"),
    ],
)
def test_norms_stand_where_they_are_documented(net, layers):
    class Before(nn.Identity):
        def __init__(self, dim):
            super().__init__()
            widths.append(dim)

    def letters(modules):
        return " ".join(
            f"[{letters(m)}]" if isinstance(m, Dense) else kinds[type(m)] for m in modules
        )

    kinds = {Before: "B", PackedStar: "P", nn.RMSNorm: "N", nn.Linear: "L", ActivationLayer: "A"}
    kinds |= {StarBlock: "S", SimBaBlock: "M"}
    widths = []
    trunk = build_trunk(net, 5, [8, 8], act="relu", norm="rms", norm_before=Before)
    assert letters(trunk) == layers
    assert widths == {"star": [5, 8], "mlp": [5, 8], "d2rl": [5, 13]}.get(net, [5])
    for block in trunk:
        if isinstance(block, StarBlock):
            assert isinstance(block.pre, nn.RMSNorm)
            assert (block.mlp.f1.out_features, block.mlp.offset, block.mlp.act) == (16, 1.0, "relu")
        if isinstance(block, SimBaBlock):
            assert isinstance(block.norm, nn.RMSNorm)


@pytest.mark.parametrize("norm", [None, "none"])
def test_no_norm_unless_it_is_asked_for(norm):
    for net in ("star", "mlp", "d2rl"):
        trunk = build_trunk(net, 5, [8], norm=norm)
        assert not any("Norm" in type(m).__name__ for m in trunk.modules())
    for net in ("star_residual", "simba"):  # a residual block always has one
        norms = [
            m for m in build_trunk(net, 5, [8], norm=norm).modules() if "Norm" in repr(type(m))
        ]
        assert [type(m) for m in norms] == [nn.LayerNorm] * 2


@pytest.mark.parametrize("net", NETS)
def test_relu_is_the_default_activation_of_a_trunk(net):
    acts = {getattr(m, "act", None) for m in build_trunk(net, 5, [8]).modules()}
    assert {act for act in acts if isinstance(act, str)} == {"relu"}
    classes = [m for m in build_trunk(net, 5, [8], act=nn.Tanh).modules() if type(m) is nn.Tanh]
    assert bool(classes) is ("star" not in net)  # a star knows it by its name


def test_widths_of_a_trunk():
    trunk = build_trunk("mlp", 5, [8, 4])
    assert (trunk.in_features, trunk.out_features) == (5, 4)
    empty = build_trunk("d2rl", 5, [])
    assert (empty.in_features, empty.out_features, len(empty)) == (5, 5, 0)
    assert type(build_trunk("d2rl", 5, [8])) is D2RLTrunk
    assert type(trunk) is Trunk


@pytest.mark.parametrize(
    ("fn", "resets"),
    [
        (ORTHO, True),
        (partial(BasePolicy.init_weights), True),
        (BasePolicy.init_weights, False),
        (partial(lambda m, gain: None, gain=2.0), False),
    ],
    ids=["gain", "default", "plain", "other"],
)
def test_only_the_initialisation_of_sb3_is_followed_by_the_own(fn, resets):
    trunk = build_trunk("star", 4, [4])
    nn.init.constant_(trunk[0].f12.bias, 3.0)
    trunk.apply(fn)
    gram = trunk[0].f12.weight.detach().chunk(2)
    own = torch.allclose(gram[1] @ gram[1].T, GATE_GAIN**2 * torch.eye(4), atol=1e-5)
    assert own is resets
    if resets:
        gain = fn.keywords.get("gain", 1.0)
        torch.testing.assert_close(gram[0] @ gram[0].T, gain**2 * torch.eye(4), atol=1e-4, rtol=0)


def test_the_branches_of_a_residual_star_after_the_initialisation_of_sb3():
    block = build_trunk("star_residual", 4, [4]).apply(ORTHO)[1]
    gram = block.mlp.f2.weight.T @ block.mlp.f2.weight
    torch.testing.assert_close(gram, GATE_GAIN**2 * torch.eye(4), atol=1e-5, rtol=0)
    assert not block.mlp.g.weight.any()
    assert not block.mlp.g.bias.any()


def test_activations_as_modules():
    x = torch.linspace(-9, 9, 5)
    assert torch.equal(activation_module("relu6")(x), x.clamp(0, 6))
    assert type(activation_factory(nn.ELU)()) is nn.ELU
    assert activation_factory("gelu")().act == "gelu"
    assert activation_factory("gelu")() is not activation_factory("gelu")()
    assert repr(ActivationLayer("silu")) == "ActivationLayer('silu')"


@pytest.mark.parametrize("given", [3, nn.Tanh(), int, torch.tanh])
def test_activations_of_the_wrong_type(given):
    with pytest.raises(TypeError, match=r"must be a name from ACTIVATIONS or a class such as nn.T"):
        parse_activation(given)


def test_activations_that_no_star_has():
    assert parse_activation(nn.ELU) is nn.ELU
    words = r"activation_fn=ELU: a star layer needs an activation of ACTIVATIONS, and none computes"
    with pytest.raises(ValueError, match=words):
        activation_name(nn.ELU)
    with pytest.raises(ValueError, match="unknown activation 'swishy'"):
        parse_activation("swishy")
    with pytest.raises(ValueError, match="activation_fn=ELU"):
        build_trunk("star_residual", 4, [8], act=nn.ELU)
