"""Every algorithm with every kind of observation and action it takes; options; errors."""

import itertools

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import DQN, PPO, SAC, TD3
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import NatureCNN
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize
from torch import nn

from tests.rl.agents import (
    ACTIONS,
    CONTINUOUS,
    OBSERVATIONS,
    SHORT,
    Sampled,
    action_of,
    agent,
    algorithm,
)

STEPS = 64


def but_for(names, quick):
    """Parameters, of which all but some are slow."""
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]


def takes(name: str, observation: str, action: str) -> bool:
    policies = algorithm(name).policy_aliases
    if observation == "dict" and "StarMultiInputPolicy" not in policies:
        return False
    if observation == "image" and "StarCnnPolicy" not in policies:
        return False
    if name in CONTINUOUS:
        return action == "box"
    if name in ("DQN", "QRDQN"):
        return action == "discrete"
    if name == "ARS":
        return action in ("box", "discrete")
    # the recurrent buffer and LSTM of sb3-contrib 2.9 fail on these, whatever the policy
    if name == "RecurrentPPO" and (action == "multi_binary" or observation == "multi_discrete"):
        return False
    return not (name == "MaskablePPO" and action == "box")


ACTIVATIONS_OF_ONES_OWN = [
    *(("PPO", activation) for activation in ("gelu", "relu6", None, nn.SiLU, nn.Tanh)),
    ("SAC", "gelu"),
    ("SAC", nn.SiLU),
    ("DQN", None),
    ("DQN", nn.Tanh),
]

#: one algorithm for each kind of observation and action; every algorithm also with its first ones
QUICK = (
    ("DQN", "discrete", "discrete"),
    ("A2C", "multi_discrete", "multi_discrete"),
    ("MaskablePPO", "multi_binary", "multi_binary"),
    ("PPO", "image", "discrete"),
    ("SAC", "dict", "box"),
)


def cases():
    """Each algorithm with each observation and each action, and each pair of those once."""
    rotation = itertools.cycle(("PPO", "A2C", "MaskablePPO", "TRPO", "RecurrentPPO"))
    chosen = {(name, "box", action_of(name)): None for name in SHORT} | dict.fromkeys(QUICK)
    for name in SHORT:
        chosen |= dict.fromkeys(
            (name, observation, action_of(name)) for observation in OBSERVATIONS
        )
        chosen |= dict.fromkeys((name, "box", action) for action in ACTIONS)
    for observation, action in itertools.product(OBSERVATIONS, ACTIONS):
        # TRPO differentiates the convolutions twice, which takes PyTorch many seconds
        names = (n for n in rotation if n != "TRPO" or observation not in ("image", "dict"))
        name = next(n for n in names if takes(n, observation, action))
        chosen[name, observation, action] = None
    for name, observation, action in chosen:
        if takes(name, observation, action):
            quick = (name, observation, action) in QUICK
            quick |= (observation, action) == ("box", action_of(name))
            marks = [] if quick else [pytest.mark.slow]
            yield pytest.param(name, observation, action, marks=marks)


def test_the_cases_cover_every_pair():
    found = {case.values for case in cases()}
    assert {name for name, _, _ in found} == set(SHORT)
    assert {pair[1:] for pair in found} == set(itertools.product(OBSERVATIONS, ACTIONS))
    quick = {case.values for case in cases() if not case.marks}
    assert {observation for _, observation, _ in quick} == set(OBSERVATIONS)
    assert {action for _, _, action in quick} == set(ACTIONS)


def parameters(model):
    return {name: p.detach().clone() for name, p in model.policy.named_parameters()}


@pytest.mark.parametrize(("name", "observation", "action"), list(cases()))
def test_learns_saves_loads_and_predicts_the_same(name, observation, action, tmp_path):
    model = agent(name, observation, action)
    before = parameters(model)
    model.learn(STEPS)
    moved = [key for key, p in model.policy.named_parameters() if not torch.equal(p, before[key])]
    own = [key for key in before if any(part in key for part in ("proj", "weight0", "mlp.f1"))]
    assert own
    assert set(own) & set(moved)
    model.policy.set_training_mode(False)
    observations = Sampled(observation, action).observation_space
    observations.seed(0)
    model.save(tmp_path / "model")
    loaded = algorithm(name).load(tmp_path / "model", device="cpu")
    model.policy.save(tmp_path / "policy.pt")
    policy = type(model.policy).load(tmp_path / "policy.pt", device="cpu")
    for _ in range(5):
        sample = observations.sample()
        expected = model.predict(sample, deterministic=True)[0]
        np.testing.assert_array_equal(loaded.predict(sample, deterministic=True)[0], expected)
        np.testing.assert_array_equal(policy.predict(sample, deterministic=True)[0], expected)


@pytest.mark.parametrize("name", but_for(SHORT, ("PPO", "SAC", "ARS")))
def test_a_seed_decides_everything(name):
    first, second, third = (agent(name, seed=seed).learn(STEPS) for seed in (3, 3, 4))
    for (key, a), b in zip(first.policy.named_parameters(), second.policy.parameters()):
        assert torch.equal(a, b), key
    pairs = zip(first.policy.parameters(), third.policy.parameters())
    assert not all(torch.equal(a, b) for a, b in pairs)


def nets():
    """Every net with PPO, SAC and CrossQ, and two of them with each other algorithm."""
    rotation = itertools.cycle(("mlp", "d2rl", "simba", "star", "star_residual"))
    for name in SHORT:
        own_norms = ("mlp", "d2rl", "star")  # CrossQ refuses the residual nets: test_contrib
        some = own_norms if name == "CrossQ" else itertools.islice(rotation, 2)
        for net in itertools.islice(rotation, 5) if name in ("PPO", "SAC") else some:
            marks = [] if name in ("PPO", "SAC") else [pytest.mark.slow]
            yield pytest.param(name, net, marks=marks)


@pytest.mark.parametrize(("name", "net"), list(nets()))
def test_every_net_learns(name, net):
    options = {"net": net, "width": 8, "depth": 2}
    model = agent(name, policy_kwargs=options)
    before = parameters(model)
    model.learn(STEPS)
    trained = [k for k, p in model.policy.named_parameters() if not torch.equal(p, before[k])]
    assert len(trained) >= len(before) / 2 or name == "ARS"  # targets may move later
    assert trained


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


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", but_for(["PPO", "A2C", "SAC", "TD3", "TQC"], ("PPO", "SAC")))
def test_features_extractors_shared_or_not(name, share, tmp_path):
    kwargs = {"share_features_extractor": share, "net_arch": [8]}
    model = agent(name, "image", policy_kwargs=kwargs).learn(STEPS)
    model.policy.save(tmp_path / "policy.pt")
    loaded = type(model.policy).load(tmp_path / "policy.pt", device="cpu")
    assert loaded.share_features_extractor is share
    image = OBSERVATIONS["image"].sample()
    np.testing.assert_array_equal(
        loaded.predict(image, deterministic=True)[0], model.predict(image, deterministic=True)[0]
    )
    if name == "PPO":
        (tensor, _), policies = model.policy.obs_to_tensor(image), (model.policy, loaded)
        model.policy.set_training_mode(False)
        loaded.set_training_mode(False)
        values = [p.predict_values(tensor) for p in policies]
        logits = [p.get_distribution(tensor).distribution.logits for p in policies]
        assert torch.equal(*values)
        assert torch.equal(*logits)  # SB3's own policy comes back shared, with other logits


def test_one_trunk_for_both_sides(tmp_path):
    model = agent("PPO", policy_kwargs={"share_trunk": True, "net_arch": [8]}).learn(STEPS)
    assert sum("mlp_extractor" in name for name, _ in model.policy.named_parameters()) == 2
    model.policy.save(tmp_path / "p.pt")
    assert type(model.policy).load(tmp_path / "p.pt").share_trunk
    with pytest.raises(ValueError, match=r"share_trunk=True needs equal sides.*\[8\].*\[4\]"):
        agent("PPO", policy_kwargs={"share_trunk": True, "net_arch": {"pi": [8], "vf": [4]}})


@pytest.mark.parametrize("name", ["PPO", "A2C", "SAC", "TQC", "RecurrentPPO"])
def test_gsde(name):
    model = agent(name, action="box", use_sde=True, policy_kwargs={"net_arch": [8]})
    model.learn(STEPS)
    assert np.isfinite(model.predict(np.zeros(3, np.float32))[0]).all()


@pytest.mark.parametrize("processes", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_vec_normalize_and_subprocesses(processes, tmp_path):
    # not SB3's default, the fork server: it is one per process, and other tests set up their own
    workers = {"vec_env_cls": SubprocVecEnv, "vec_env_kwargs": {"start_method": "spawn"}}
    env = VecNormalize(make_vec_env("CartPole-v1", 2, **(workers if processes else {})))
    model = agent("PPO", env=env, policy_kwargs={"net_arch": [8]}).learn(STEPS)
    model.save(tmp_path / "model")
    env.save(str(tmp_path / "stats"))
    again = VecNormalize.load(str(tmp_path / "stats"), make_vec_env("CartPole-v1", 2))
    observation = env.normalize_obs(np.ones((2, 4)))
    np.testing.assert_array_equal(observation, again.normalize_obs(np.ones((2, 4))))
    loaded = PPO.load(tmp_path / "model", again, device="cpu")
    np.testing.assert_array_equal(
        loaded.predict(observation, deterministic=True)[0],
        model.predict(observation, deterministic=True)[0],
    )
    env.close()


@pytest.mark.parametrize("name", ["SAC", "DQN"])
def test_hindsight_replay(name):
    from stable_baselines3 import HerReplayBuffer
    from stable_baselines3.common.envs import BitFlippingEnv

    env = BitFlippingEnv(n_bits=3, continuous=name == "SAC", max_steps=3)
    options = {
        "replay_buffer_class": HerReplayBuffer,
        "replay_buffer_kwargs": {"n_sampled_goal": 2},
    }
    model = agent(name, policy="StarMultiInputPolicy", env=env, **options)
    model.learn(STEPS)
    assert model.num_timesteps >= STEPS


@pytest.mark.parametrize("net_arch", [[], [8], [8, 4], {"pi": [8], "vf": [4, 4]}])
def test_architectures_of_ones_own(net_arch):
    model = agent("PPO", policy_kwargs={"net_arch": net_arch}).learn(STEPS)
    arch = net_arch if isinstance(net_arch, dict) else {"pi": net_arch, "vf": net_arch}
    assert model.policy.mlp_extractor.latent_dim_pi == [3, *arch["pi"]][-1]
    assert model.policy.mlp_extractor.latent_dim_vf == [3, *arch["vf"]][-1]


def test_optimizers_of_ones_own():
    options = {"optimizer_class": torch.optim.AdamW, "optimizer_kwargs": {"weight_decay": 0.1}}
    model = agent("SAC", policy_kwargs=options).learn(STEPS)
    assert type(model.actor.optimizer) is torch.optim.AdamW
    assert model.critic.optimizer.param_groups[0]["weight_decay"] == 0.1


def test_the_product_critic_takes_part_in_each_algorithm_that_has_one():
    for name in ("SAC", "TD3", "DDPG", "TQC"):
        model = agent(name, policy_kwargs={"net": {"pi": "mlp", "qf": "product"}, "net_arch": [8]})
        assert type(model.critic.qf0[0]).__name__ == "ProductTrunk"
        before = model.critic.qf0[0].action.weight.clone()
        model.learn(STEPS)
        assert not torch.equal(model.critic.qf0[0].action.weight, before)
    both = agent("SAC", policy_kwargs={"net": "product"})  # the actor sees no action: a star
    assert type(both.actor.latent_pi[0]).__name__ == "PackedStar"


def test_vectors_in_a_dictionary_are_the_flat_observation():
    class Wrapped(gym.ObservationWrapper):
        def __init__(self, env):
            super().__init__(env)
            self.observation_space = spaces.Dict({"vector": env.observation_space})

        def observation(self, observation):
            return {"vector": observation}

    flat = agent("PPO", env=gym.make("CartPole-v1")).learn(STEPS)
    wrapped = agent("PPO", env=Wrapped(gym.make("CartPole-v1")), policy="StarMultiInputPolicy")
    wrapped.learn(STEPS)
    for a, b in zip(flat.policy.parameters(), wrapped.policy.parameters()):
        assert torch.equal(a, b)


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


def test_lstms_of_ones_own_size_come_back(tmp_path):
    model = agent("RecurrentPPO", policy_kwargs={"lstm_hidden_size": 7, "net_arch": [8]})
    model.policy.save(tmp_path / "p.pt")
    loaded = type(model.policy).load(tmp_path / "p.pt", device="cpu")
    assert loaded.lstm_actor.hidden_size == 7


@pytest.mark.parametrize("options", [{}, {"net": "mlp"}, {"norm": "layer"}, {"share_trunk": True}])
def test_acting_and_judging_use_the_same_trunks_together_and_apart(options):
    policy = agent("PPO", policy_kwargs={**options, "net_arch": [8, 4]}).policy
    x = torch.randn(5, 3)
    pi, vf = policy.mlp_extractor(x)
    torch.testing.assert_close(policy.mlp_extractor.forward_actor(x), pi)
    torch.testing.assert_close(policy.mlp_extractor.forward_critic(x), vf)
    assert torch.equal(pi, vf) is ("share_trunk" in options)
    torch.testing.assert_close(policy(x)[1], policy.predict_values(x))


def test_activation_of_the_wrong_type():
    with pytest.raises(TypeError, match=r"activation_fn must be a name .* got 3"):
        agent("PPO", policy_kwargs={"activation_fn": 3})
    with pytest.raises(TypeError, match="net must be a name or one per side, got None"):
        agent("PPO", policy_kwargs={"net": None})


def test_names_are_each_algorithms_own():
    assert TD3.policy_aliases is not algorithm("DDPG").policy_aliases
    assert {"MlpPolicy", "StarMlpPolicy"} <= set(DQN.policy_aliases) & set(SAC.policy_aliases)
    assert "StarCnnPolicy" not in algorithm("CrossQ").policy_aliases
    assert isinstance(
        agent("PPO", env=DummyVecEnv([Sampled])).policy, PPO.policy_aliases["MlpPolicy"]
    )


def test_trpo_trains_actor_and_critic():
    model = agent("TRPO", policy_kwargs={"net_arch": [8, 8]})
    before = parameters(model)
    model.learn(STEPS)
    for name, p in model.policy.named_parameters():
        assert not torch.equal(p, before[name]), name


def test_crossq_norms_are_those_it_knows():
    from sb3_contrib.common.torch_layers import BatchRenorm1d

    model = agent("CrossQ", policy_kwargs={"net_arch": [8, 8]})
    norms = [m for m in model.policy.modules() if "Norm" in type(m).__name__]
    norms += [m for m in model.policy.modules() if isinstance(m, BatchRenorm1d)]
    assert {type(m) for m in norms} == {BatchRenorm1d}
    # before each layer and behind the last, in the actor and in both critics
    assert len(set(norms)) == 3 * 3
    before = [m.ra_mean.clone() for m in norms]
    model.learn(STEPS)
    assert all(not torch.equal(m.ra_mean, b) for m, b in zip(norms, before))
    # between updates the critics use their running statistics
    assert not any(m.training for m in model.critic.modules() if isinstance(m, BatchRenorm1d))
    bare = agent("CrossQ", policy_kwargs={"net_arch": [8], "batch_norm": False})
    assert not any(isinstance(m, BatchRenorm1d) for m in bare.policy.modules())
    bare.learn(STEPS)


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


@pytest.mark.parametrize(
    ("options", "stacked"),
    [
        ({}, True),
        ({"norm": "none"}, True),
        ({"activation_fn": "relu"}, True),
        ({"norm": "layer"}, False),
        ({"net": {"vf": "mlp"}}, False),
        ({"net": "mlp"}, False),
        ({"net_arch": {"pi": [8], "vf": [4]}}, False),
        ({"net_arch": []}, False),
        ({"share_trunk": True}, False),
        ({"share_features_extractor": False}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["PPO", "MaskablePPO", "TRPO"])
def test_policy_and_value_are_one_stack_where_they_can_be(name, options, stacked):
    stack = agent(name, policy_kwargs=options).policy.mlp_extractor.stack
    assert (stack is not None) is (stacked and name != "TRPO")
    if stack is not None:
        assert stack.act == options.get("activation_fn", "tanh")


def test_lstm_options_are_all_saved(tmp_path):
    options = {
        "lstm_hidden_size": 7,
        "n_lstm_layers": 2,
        "shared_lstm": True,
        "enable_critic_lstm": False,
        "lstm_kwargs": {"dropout": 0.1},
        "net_arch": [8],
    }
    policy = agent("RecurrentPPO", policy_kwargs=options).policy
    policy.save(tmp_path / "p.pt")
    loaded = type(policy).load(tmp_path / "p.pt", device="cpu")
    assert (loaded.lstm_actor.num_layers, loaded.lstm_actor.dropout) == (2, 0.1)
    assert loaded.lstm_critic is None
    saved = loaded._get_constructor_parameters()
    assert {key: saved[key] for key in options} == {**options, "net_arch": [8]}


@pytest.mark.parametrize("squash", [True, False])
def test_actions_of_ars_end_in_a_tanh_or_not(squash, tmp_path):
    options = {"squash_output": squash, "net_arch": [8]}
    policy = agent("ARS", action="box", policy_kwargs=options).policy
    assert isinstance(policy.action_net[-1], nn.Tanh) is squash
    policy.save(tmp_path / "p.pt")
    assert type(policy).load(tmp_path / "p.pt", device="cpu").squash_output is squash
    discrete = agent("ARS", policy_kwargs=options).policy
    assert not discrete.squash_output
    assert not any(isinstance(m, nn.Tanh) for m in discrete.action_net)


def test_crossq_options_reach_its_norms():
    from sb3_contrib.common.torch_layers import BatchRenorm1d

    options = {"batch_norm_momentum": 0.2, "batch_norm_eps": 0.1, "renorm_warmup_steps": 9}
    for kwargs, expected in (({}, (0.01, 0.001, 100_000)), (options, (0.2, 0.1, 9))):
        policy = agent("CrossQ", policy_kwargs={**kwargs, "net_arch": [8]}).policy
        norms = [m for m in policy.modules() if isinstance(m, BatchRenorm1d)]
        assert {(m.momentum, m.eps, int(m.warmup_steps)) for m in norms} == {expected}
        widths = [m.num_features for m in policy.critic.qf0 if isinstance(m, BatchRenorm1d)]
        assert widths == [8]
    empty = agent("CrossQ", policy_kwargs={"net_arch": {"pi": [], "qf": [8]}}).policy
    assert len(empty.actor.latent_pi) == 1


def test_heads_have_an_output_for_each_choice():
    assert agent("DQN", policy_kwargs={"net_arch": [8]}).q_net.q_net[1].out_features == 3
    options = {"net_arch": [8], "n_quantiles": 5}
    network = agent("QRDQN", policy_kwargs=options).policy.quantile_net
    assert network.quantile_net[1].out_features == 3 * 5
    critic = agent("TQC", policy_kwargs={**options, "n_critics": 3}).critic
    assert [q[1].out_features for q in critic.q_networks] == [5, 5, 5]
    assert [name for name, _ in critic.named_children() if "qf" in name] == ["qf0", "qf1", "qf2"]
    td3 = agent("TD3", policy_kwargs={"net_arch": [8]}).actor.mu
    assert (td3[1].out_features, type(td3[2])) == (2, nn.Tanh)
