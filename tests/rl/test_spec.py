"""Options of policies: which net, activation, norm and widths each side gets."""

from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from starlayers.rl.critics import ProductTrunk
from starlayers.rl.spec import (
    DEFAULT_ACTS,
    PRODUCT,
    NetSpec,
    default_widths,
    resolve_specs,
    uniform_widths,
)
from starlayers.rl.stack import PackedStar
from starlayers.rl.trunks import NETS, NORMS, RESIDUAL, Trunk
from tests.helpers import properties

ACTOR_CRITIC, OFF_POLICY, Q_NETWORK = ("pi", "vf"), ("pi", "qf"), ("q",)


def resolved(sides, net="star", norm=None, activation_fn="default", sb3_activation=nn.Tanh):
    specs = resolve_specs("P", sides, net, norm, activation_fn, sb3_activation=sb3_activation)
    return {side: (spec.net, spec.act, spec.norm) for side, spec in specs.items()}


def test_names_are_pinned():
    assert list(NETS) == ["star", "star_residual", "mlp", "d2rl", "simba"]
    assert {"layer": nn.LayerNorm, "rms": nn.RMSNorm} == NORMS
    assert (PRODUCT, RESIDUAL) == ("product", ("star_residual", "simba"))
    assert DEFAULT_ACTS == {"star": "tanh", "star_residual": "tanh", "simba": "relu"}


@pytest.mark.parametrize(
    ("net", "act"),
    [
        ("star", "tanh"),
        ("star_residual", "tanh"),
        ("simba", "relu"),
        ("mlp", nn.ELU),
        ("d2rl", nn.ELU),
    ],
)
def test_the_default_activation_of_each_net(net, act):
    assert resolved(Q_NETWORK, net, sb3_activation=nn.ELU) == {"q": (net, act, None)}
    # one that is asked for wins, for every net, and `None` is the identity
    assert resolved(Q_NETWORK, net, activation_fn="gelu")["q"][1] == "gelu"
    assert resolved(Q_NETWORK, net, activation_fn=nn.ReLU)["q"][1] is nn.ReLU
    assert resolved(Q_NETWORK, net, activation_fn=None)["q"][1] == "identity"


def test_the_product_critic_has_the_default_activation_of_sb3():
    specs = resolved(OFF_POLICY, {"pi": "mlp", "qf": "product"}, sb3_activation=nn.ReLU)
    assert specs == {"pi": ("mlp", nn.ReLU, None), "qf": ("product", nn.ReLU, None)}


@pytest.mark.parametrize(
    ("sides", "net", "expected"),
    [
        (ACTOR_CRITIC, "mlp", ["mlp", "mlp"]),
        (ACTOR_CRITIC, {}, ["star", "star"]),
        (ACTOR_CRITIC, {"vf": "mlp"}, ["star", "mlp"]),
        (ACTOR_CRITIC, {"pi": "mlp"}, ["mlp", "star"]),
        (OFF_POLICY, "product", ["star", "product"]),  # only the critic takes actions
        (OFF_POLICY, {"qf": "product"}, ["star", "product"]),
        (OFF_POLICY, {"pi": "simba", "qf": "d2rl"}, ["simba", "d2rl"]),
        (Q_NETWORK, {"q": "simba"}, ["simba"]),
    ],
)
def test_nets_by_side(sides, net, expected):
    assert [name for name, _, _ in resolved(sides, net).values()] == expected
    assert list(resolved(sides, net)) == list(sides)


@pytest.mark.parametrize("norm", [None, "none", "layer", "rms"])
def test_the_norm_is_that_of_all_sides(norm):
    assert {spec[2] for spec in resolved(OFF_POLICY, norm=norm).values()} == {norm}


@pytest.mark.parametrize(
    ("sides", "net", "norm", "words"),
    [
        (ACTOR_CRITIC, "kan", None, "P: unknown net 'kan' for 'pi', choose one of star, star_res"),
        (ACTOR_CRITIC, "product", None, "unknown net 'product' for 'pi', .* d2rl, simba$"),
        (Q_NETWORK, "product", None, "unknown net 'product' for 'q'"),
        (OFF_POLICY, {"pi": "product"}, None, "unknown net 'product' for 'pi'"),
        (OFF_POLICY, {"qf": "kan"}, None, "unknown net 'kan' for 'qf', .* simba, product$"),
        (OFF_POLICY, {"vf": "star", "zf": "star"}, None, "has the sides pi, qf; .* names 'vf'"),
        (
            ACTOR_CRITIC,
            "star",
            "batch",
            "unknown norm 'batch', choose one of layer, rms, 'none' or",
        ),
    ],
)
def test_unknown_names(sides, net, norm, words):
    with pytest.raises(ValueError, match=words):
        resolved(sides, net, norm)


@pytest.mark.parametrize("net", [None, 3, ["star"]])
def test_nets_of_the_wrong_type(net):
    with pytest.raises(TypeError, match="P: net must be a name or one per side, got"):
        resolved(ACTOR_CRITIC, net)


@pytest.mark.parametrize(
    ("net", "norm", "stock", "plain_star"),
    [
        ("mlp", None, True, False),
        ("mlp", "none", True, False),
        ("mlp", "layer", False, False),
        ("star", None, False, True),
        ("star", "none", False, True),
        ("star", "rms", False, False),
        ("star_residual", None, False, False),
        ("d2rl", None, False, False),
        ("product", "none", False, False),
    ],
)
def test_stock_networks_and_plain_stars(net, norm, stock, plain_star):
    spec = NetSpec(net, "relu", norm)
    assert (spec.is_stock, spec.is_plain_star) == (stock, plain_star)


def test_a_spec_builds_its_trunks():
    spec = NetSpec("star", nn.ReLU, "layer")
    assert spec.act_name == "relu"
    trunk = spec.trunk(3, [8, 4], nn.RMSNorm)
    assert [type(m) for m in trunk] == [nn.RMSNorm, PackedStar, nn.LayerNorm] * 2
    assert (trunk.in_features, trunk.out_features, trunk[1].act) == (3, 4, "relu")
    critic = spec.critic_trunk(3, 2, [8])
    assert (type(critic), critic.in_features) == (Trunk, 5)
    with pytest.raises(FrozenInstanceError):
        spec.net = "mlp"


@pytest.mark.parametrize(
    ("norm", "kind"),
    [(None, nn.LayerNorm), ("rms", nn.RMSNorm), ("none", nn.Identity)],
)
def test_a_spec_builds_a_product(norm, kind):
    critic = NetSpec("product", nn.GELU, norm).critic_trunk(3, 2, [8])
    assert isinstance(critic, ProductTrunk)
    assert (critic.sizes, critic.act, type(critic.state_norm)) == ([3, 2], "gelu", kind)


@pytest.mark.parametrize(
    ("net", "base", "widths"),
    [
        ("star", [64, 64], [44, 44]),
        ("star", [256, 256], [180, 180]),
        ("star", [400, 300], [284, 212]),
        ("product", [256, 256], [180, 180]),
        ("star", [1], [4]),  # the smallest there is
        ("star", [], []),
        ("simba", [], []),
        ("mlp", [64, 32], [64, 32]),
        ("d2rl", [64, 64], [64, 64]),
        ("simba", [256, 256], [92]),  # 8 w^2 of 256^2
        ("simba", [64], [24]),  # 8 w^2 of 64^2
        ("star_residual", [256, 256], [104]),  # 6 w^2 of 256^2
        ("star_residual", [400, 300], [140]),
        ("star_residual", [16, 32, 64], [20]),  # 6 w^2 of 16 * 32 + 32 * 64
    ],
)
def test_default_widths(net, base, widths):
    assert default_widths(net, base) == widths


@properties
@given(st.sampled_from(["star", "simba", "star_residual"]), st.integers(24, 400))
def test_default_widths_keep_the_number_of_weights(net, width):
    (first, *_) = widths = default_widths(net, [width, width])
    assert all(w % 4 == 0 for w in widths)
    trunk = NetSpec(net, "relu").trunk(first, [first])
    inner = list(trunk)[0 if net == "star" else 1].parameters()
    weights = sum(p.numel() for p in inner if p.ndim == 2)
    # a width that is off by two of four changes the square by twice as many percent
    assert weights == pytest.approx(width**2, rel=2.1 * 2 / first)


def test_widths_of_width_and_depth():
    assert uniform_widths("P", None, None, None) is None
    assert uniform_widths("P", None, None, [8]) is None
    assert uniform_widths("P", 8, 3, None) == [8, 8, 8]
    assert uniform_widths("P", 1, 1, None) == [1]


@pytest.mark.parametrize(
    ("width", "depth", "net_arch", "words"),
    [
        (8, None, None, "P: width=8 and depth=None must be given together"),
        (None, 2, None, "P: width=None and depth=2 must be given together"),
        (8, 2, [4], r"P: width=8, depth=2 and net_arch=\[4\] say the same twice; pass width and"),
        (8, None, [], r"net_arch=\[\] say the same twice"),
        (0, 1, None, "P: width must be at least 1, got 0"),
        (1, 0, None, "P: depth must be at least 1, got 0"),
    ],
)
def test_contradictory_widths(width, depth, net_arch, words):
    with pytest.raises(ValueError, match=words):
        uniform_widths("P", width, depth, net_arch)


def test_widths_of_the_wrong_type():
    with pytest.raises(TypeError, match=r"P: width must be an integer, got 8\.5"):
        uniform_widths("P", 8.5, 1, None)
