"""Every algorithm with every kind of observation and action it takes."""

import itertools

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize

from tests.rl.agents import (
    ACTIONS,
    CONTINUOUS,
    OBSERVATIONS,
    SHORT,
    STEPS,
    Sampled,
    action_of,
    agent,
    algorithm,
    but_for,
    parameters,
)


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


@pytest.mark.parametrize(("name", "observation", "action"), list(cases()))
def test_learns_saves_loads_and_predicts_the_same(name, observation, action, tmp_path):
    model = agent(name, observation, action)
    before = parameters(model)
    model.learn(STEPS)
    moved = [key for key, p in model.policy.named_parameters() if not torch.equal(p, before[key])]
    own = [key for key in before if any(part in key for part in ("f12", "weight0", "mlp.f1"))]
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


def test_optimizers_of_ones_own():
    options = {"optimizer_class": torch.optim.AdamW, "optimizer_kwargs": {"weight_decay": 0.1}}
    model = agent("SAC", policy_kwargs=options).learn(STEPS)
    assert type(model.actor.optimizer) is torch.optim.AdamW
    assert model.critic.optimizer.param_groups[0]["weight_decay"] == 0.1


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
