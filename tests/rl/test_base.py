"""Options of the star policies: each changes something, defaults are pinned, errors name them."""

from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3.common.torch_layers import NatureCNN
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
from tests.rl.agents import (
    CONTINUOUS,
    STEPS,
    Sampled,
    action_of,
    agent,
    parameters,
)

ACTIVATIONS_OF_ONES_OWN = [
    *(("PPO", activation) for activation in ("gelu", "relu6", None, nn.SiLU, nn.Tanh)),
    ("SAC", "gelu"),
    ("SAC", nn.SiLU),
    ("DQN", None),
    ("DQN", nn.Tanh),
]


@pytest.mark.parametrize("norm", [None, "layer", "rms"])
@pytest.mark.parametrize("name", ["PPO", "SAC", "DQN"])
def test_norms_stand_behind_each_layer(name, norm):
    model = agent(name, policy_kwargs={"norm": norm, "net_arch": [8, 8]})
    kind = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}.get(norm)
    count = sum(isinstance(m, (nn.LayerNorm, nn.RMSNorm)) for m in model.policy.modules())
    trunks = {"PPO": 2, "SAC": 1 + 2 + 2, "DQN": 2}[name]
    assert count == (2 * trunks if norm else 0)
    if kind:
        assert any(type(m) is kind for m in model.policy.modules())
    model.learn(STEPS)


@pytest.mark.parametrize("name", ["PPO", "A2C", "SAC", "TD3", "DQN", "TQC", "QRDQN", "CrossQ"])
def test_mlp_is_the_network_of_sb3(name):
    kwargs = {"net_arch": [8, 8]}
    results = []
    for policy, net in (("MlpPolicy", {}), ("StarMlpPolicy", {"net": "mlp"})):
        model = agent(name, policy=policy, policy_kwargs={**kwargs, **net})
        before = list(parameters(model).values())
        results.append(before + list(parameters(model.learn(STEPS)).values()))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "net", "activation"),
    [(n, net, act) for net in ("star", "mlp") for n, act in ACTIVATIONS_OF_ONES_OWN],
)
def test_activations_by_name_or_class(name, net, activation):
    model = agent(name, policy_kwargs={"activation_fn": activation, "net": net, "net_arch": [8]})
    found = {getattr(m, "act", type(m).__name__) for m in model.policy.modules()}
    row = {None: "identity", nn.SiLU: "silu", nn.Tanh: "tanh"}.get(activation, activation)
    # a net without stars keeps the class it was given
    own = net == "mlp" and isinstance(activation, type)
    expected = activation.__name__ if own else row
    assert expected in found
    others = {"tanh", "relu", "gelu", "relu6", "silu", "Tanh", "ReLU", "SiLU"} - {expected}
    assert not found & others
    model.learn(STEPS)


@pytest.mark.parametrize("name", ["PPO", "SAC", "DQN", "ARS"])
def test_the_first_branch_of_a_star_is_bounded_unless_asked_otherwise(name):
    rows = {m.act for m in agent(name).policy.modules() if hasattr(m, "act")}
    assert rows == {"tanh"}
    asked = agent(name, policy_kwargs={"activation_fn": nn.ReLU})
    assert {m.act for m in asked.policy.modules() if hasattr(m, "act")} == {"relu"}


def test_default_widths_match_the_parameters_of_sb3():
    for name, slack in (("PPO", 0.05), ("SAC", 0.02), ("TD3", 0.02), ("DQN", 0.06)):
        env = "Pendulum-v1" if name in CONTINUOUS else "CartPole-v1"
        theirs, ours = (
            sum(p.numel() for p in agent(name, env=env, policy=policy).policy.parameters())
            for policy in ("MlpPolicy", "StarMlpPolicy")
        )
        assert abs(ours / theirs - 1) < slack, name


def test_a_users_dictionary_is_not_written_to():
    # SB3 writes `normalized_image` into the one that it is given, for extractors of its own
    given = {"cnn_output_dim": 8}
    kwargs = {"features_extractor_kwargs": given, "normalize_images": False}
    agent("PPO", "dict", policy_kwargs=kwargs)
    assert given == {"cnn_output_dim": 8}


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("PPO", {"net": "kan"}, r"StarPPOPolicy: unknown net 'kan' for 'pi', choose one of star"),
        ("PPO", {"net": {"qf": "star"}}, "StarPPOPolicy has the sides pi, vf; .* names 'qf'"),
        ("DQN", {"net": "product"}, "StarDQNPolicy: unknown net 'product' for 'q'"),
        ("PPO", {"norm": "batch"}, "unknown norm 'batch', choose one of layer, rms, 'none'"),
        ("PPO", {"width": 8}, "width=8 and depth=None must be given together"),
        ("PPO", {"width": 8, "depth": 1, "net_arch": [8]}, "say the same twice"),
        ("PPO", {"width": 0, "depth": 1}, "width must be at least 1, got 0"),
        ("PPO", {"net": "simba", "net_arch": [8, 4]}, r"net_arch=\[8, 4\] needs equal widths"),
        ("SAC", {"net": {"qf": "product"}, "net_arch": []}, "needs a layer for its product"),
        ("PPO", {"activation_fn": "swishy"}, "unknown activation 'swishy'"),
        ("PPO", {"activation_fn": nn.ELU}, "activation_fn=ELU: a star layer needs an activation"),
        (
            "CrossQ",
            {"net": "simba"},
            "net='simba' has norms, and so has CrossQ; take net='star', 'mlp' or 'd2rl'",
        ),
        ("CrossQ", {"net": {"qf": "product"}}, "net='product' has norms"),
        ("CrossQ", {"net": {"pi": "star_residual"}}, "StarCrossQPolicy: net='star_residual' has"),
        ("ARS", {"net": "product"}, "StarARSPolicy: unknown net 'product' for 'pi'"),
        ("ARS", {"width": 8}, "StarARSPolicy: width=8 and depth=None must be given together"),
    ],
)
def test_bad_options_are_named(name, options, words):
    with pytest.raises(ValueError, match=words):
        agent(name, policy_kwargs=options)


@pytest.mark.parametrize("name", ["PPO", "A2C", "DQN"])
@pytest.mark.parametrize(
    "options", [{"net": "simba"}, {"norm": "layer"}, {"activation_fn": "gelu"}]
)
def test_options_without_a_layer_to_shape_are_named(name, options):
    words = "behind a convolutional extractor there is no layer by default, and "
    with pytest.raises(ValueError, match=words + next(iter(options))):
        agent(name, "image", policy_kwargs=options)
    agent(name, "image", policy_kwargs={**options, "net_arch": [8]})


@pytest.mark.parametrize("name", ["PPO", "SAC", "DQN", "ARS"])
@pytest.mark.parametrize("net", ["mlp", "d2rl", "simba"])
def test_nets_without_stars_take_any_activation(name, net):
    options = {"net": net, "activation_fn": nn.ELU, "width": 8, "depth": 2}
    model = agent(name, policy_kwargs=options).learn(STEPS)
    assert any(type(m) is nn.ELU for m in model.policy.modules())


def test_activation_of_the_wrong_type():
    with pytest.raises(TypeError, match=r"activation_fn must be a name .* got 3"):
        agent("PPO", policy_kwargs={"activation_fn": 3})
    with pytest.raises(TypeError, match="net must be a name or one per side, got None"):
        agent("PPO", policy_kwargs={"net": None})


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("PPO", {"pi": [44, 44], "vf": [44, 44]}),
        ("SAC", {"pi": [180, 180], "qf": [180, 180]}),
        ("TD3", {"pi": [284, 212], "qf": [284, 212]}),
        ("CrossQ", {"pi": [180, 180], "qf": [724, 724]}),
        ("DQN", [44, 44]),
        ("QRDQN", [44, 44]),
        ("ARS", [44, 44]),
    ],
)
def test_default_widths_are_pinned(name, widths):
    assert agent(name).policy.net_arch == widths
    mlp = agent(name, policy_kwargs={"net": "mlp"}).policy.net_arch
    sizes = {"SAC": [256, 256], "TD3": [400, 300], "CrossQ": [256, 256]}.get(name, [64, 64])
    assert (mlp["pi"] if isinstance(mlp, dict) else mlp) == sizes


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("PPO", {"pi": [], "vf": []}),
        ("DQN", []),
        ("SAC", {"pi": [180, 180], "qf": [180, 180]}),
        ("TD3", {"pi": [180, 180], "qf": [180, 180]}),  # without images 400 and 300 over sqrt(2)
    ],
)
def test_widths_behind_convolutions(name, widths):
    mlp = agent(name, "image", policy_kwargs={"net": "mlp", "activation_fn": "default"})
    base = {"pi": [256, 256], "qf": [256, 256]} if name in ("SAC", "TD3") else widths
    assert mlp.policy.net_arch == base
    assert agent(name, "image").policy.net_arch == widths
    stock = {"policy": "StarMlpPolicy", "policy_kwargs": {"features_extractor_class": NatureCNN}}
    big = Sampled("image", action_of(name))
    big.observation_space = spaces.Box(0, 255, (1, 36, 36), dtype=np.uint8)
    assert agent(name, env=big, **stock).policy.net_arch == widths


@pytest.mark.parametrize("name", ["PPO", "SAC", "DQN", "ARS"])
@pytest.mark.parametrize(
    "options",
    [
        {"net": "mlp"},
        {"net": "d2rl"},
        {"net": "simba"},
        {"net": "star_residual"},
        {"norm": "layer"},
        {"norm": "rms"},
        {"activation_fn": "gelu"},
        {"activation_fn": nn.ReLU},
        {"activation_fn": None},
        {"width": 44, "depth": 1},
        {"width": 8, "depth": 2},
        {"net_arch": [44]},
    ],
    ids=str,
)
def test_every_option_changes_what_is_computed(name, options):
    x = np.linspace(-1, 1, 3, dtype=np.float32)

    def scores(**kwargs):
        policy = agent(name, policy_kwargs=kwargs).policy
        policy.set_training_mode(False)
        tensor, _ = policy.obs_to_tensor(x)
        if name == "PPO":
            return policy.get_distribution(tensor).distribution.logits
        if name == "SAC":
            return policy.actor(tensor, deterministic=True)
        return policy.q_net(tensor) if name == "DQN" else policy.action_net(tensor)

    assert not torch.allclose(scores(), scores(**options), atol=1e-6)


def test_none_is_no_norm_and_default_is_no_choice():
    first = agent("PPO").policy.state_dict()
    for options in ({"norm": "none"}, {"activation_fn": "default"}, {"net": {"pi": "star"}}):
        second = agent("PPO", policy_kwargs=options).policy.state_dict()
        assert list(first) == list(second)
        assert all(torch.equal(first[key], second[key]) for key in first)


# --- options of policies: which net, activation, norm and widths each side gets


ACTOR_CRITIC, OFF_POLICY, Q_NETWORK = ("pi", "vf"), ("pi", "qf"), ("q",)


def resolved(sides, net="star", norm=None, activation_fn="default", sb3_activation=nn.Tanh):
    specs = resolve_specs(
        "P", sides, sb3_activation, net=net, norm=norm, activation_fn=activation_fn
    )
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
