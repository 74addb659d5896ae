"""Options of the star policies: each changes something, defaults are pinned, errors name them."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.torch_layers import NatureCNN
from torch import nn

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
    [("PPO", {"pi": [], "vf": []}), ("DQN", []), ("SAC", {"pi": [180, 180], "qf": [180, 180]})],
)
def test_widths_behind_convolutions(name, widths):
    mlp = agent(name, "image", policy_kwargs={"net": "mlp", "activation_fn": "default"})
    base = {"pi": [256, 256], "qf": [256, 256]} if name == "SAC" else widths
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
