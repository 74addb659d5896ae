"""Every algorithm with every kind of observation and action it takes; options; errors."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import DQN, PPO, SAC, TD3
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize
from torch import nn

from starlayers.rl.spec import default_widths
from tests.rl.agents import ACTIONS, CONTINUOUS, OBSERVATIONS, SHORT, Sampled, agent, algorithm

STEPS = 64


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


def cases():
    for name in SHORT:
        first = "box" if name in CONTINUOUS else "discrete"
        for observation in OBSERVATIONS:
            for action in ACTIONS:
                if not takes(name, observation, action):
                    continue
                # TRPO differentiates the convolutions twice, which takes PyTorch many seconds
                slow = observation != "box" and action != first
                slow |= name == "TRPO" and observation in ("image", "dict")
                marks = [pytest.mark.slow] if slow else []
                yield pytest.param(name, observation, action, marks=marks)


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


@pytest.mark.parametrize("name", SHORT)
def test_a_seed_decides_everything(name):
    first, second, third = (agent(name, seed=seed).learn(STEPS) for seed in (3, 3, 4))
    for (key, a), b in zip(first.policy.named_parameters(), second.policy.parameters()):
        assert torch.equal(a, b), key
    pairs = zip(first.policy.parameters(), third.policy.parameters())
    assert not all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", [n for n in SHORT if n != "ARS"])
@pytest.mark.parametrize("net", ["mlp", "d2rl", "simba", "star", "star_residual"])
def test_every_net_learns(name, net):
    if name == "CrossQ" and net in ("simba", "star_residual"):
        pytest.skip("CrossQ brings its own norms and refuses these: test_crossq below")
    options = {"net": net, "width": 8, "depth": 2}
    model = agent(name, policy_kwargs=options)
    before = parameters(model)
    model.learn(STEPS)
    trained = [k for k, p in model.policy.named_parameters() if not torch.equal(p, before[k])]
    assert len(trained) >= len(before) / 2  # targets of some algorithms move later


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


@pytest.mark.parametrize("activation", ["gelu", "relu6", None, nn.SiLU, nn.Tanh])
@pytest.mark.parametrize("net", ["star", "mlp"])
@pytest.mark.parametrize("name", ["PPO", "SAC", "DQN"])
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
    assert default_widths("d2rl", [64, 64]) == [64, 64]
    assert default_widths("star", []) == []


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", ["PPO", "A2C", "SAC", "TD3", "TQC"])
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


def test_vec_normalize_and_subprocesses(tmp_path):
    # not SB3's default, the fork server: it is one per process, and other tests set up their own
    workers = {"vec_env_cls": SubprocVecEnv, "vec_env_kwargs": {"start_method": "spawn"}}
    env = VecNormalize(make_vec_env("CartPole-v1", 2, **workers))
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
        ("PPO", {"net": "product"}, "unknown net 'product' for 'pi'"),
        ("PPO", {"net": {"qf": "star"}}, "has the sides pi, vf; .* names 'qf'"),
        ("SAC", {"net": {"vf": "star"}}, "has the sides pi, qf; .* names 'vf'"),
        ("DQN", {"net": "product"}, "unknown net 'product' for 'q'"),
        ("PPO", {"norm": "batch"}, "unknown norm 'batch', choose one of layer, rms, 'none'"),
        ("PPO", {"width": 8}, "width=8 and depth=None must be given together"),
        ("PPO", {"width": 8, "depth": 1, "net_arch": [8]}, "say the same twice"),
        ("PPO", {"width": 0, "depth": 1}, "width must be at least 1, got 0"),
        ("PPO", {"net": "simba", "net_arch": [8, 4]}, r"net_arch=\[8, 4\] needs equal widths"),
        ("SAC", {"net": {"qf": "product"}, "net_arch": []}, "needs a layer for its product"),
        ("PPO", {"activation_fn": "swishy"}, "unknown activation 'swishy'"),
        ("PPO", {"activation_fn": nn.ELU}, "activation_fn=ELU: a star layer needs an activation of ACTIV"),
        ("CrossQ", {"net": "simba"}, "net='simba' brings norms beside CrossQ's own"),
        ("CrossQ", {"net": {"qf": "product"}}, "net='product' brings norms"),
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
