"""Algorithms with settings for a few hundred steps, and an environment of any spaces."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import sb3_contrib
import sb3_contrib as contrib
import stable_baselines3
import stable_baselines3 as sb3
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm

import starlayers.rl  # noqa: F401  the names of policies

ON_POLICY = {"n_steps": 32, "batch_size": 16, "n_epochs": 2}
OFF_POLICY = {"learning_starts": 30, "batch_size": 8, "buffer_size": 300}
TRPO = {"n_steps": 32, "batch_size": 16}

STEPS = 64  # of training, where something has to move

#: algorithm -> settings
SHORT: dict[str, dict[str, Any]] = {
    "PPO": ON_POLICY,
    "A2C": {"n_steps": 16},
    "TRPO": TRPO,
    "MaskablePPO": ON_POLICY,
    "RecurrentPPO": ON_POLICY,
    "SAC": OFF_POLICY,
    "TD3": OFF_POLICY,
    "DDPG": OFF_POLICY,
    "TQC": OFF_POLICY,
    "CrossQ": OFF_POLICY,
    "DQN": OFF_POLICY,
    "QRDQN": OFF_POLICY,
    "ARS": {"n_delta": 1, "zero_policy": False},
}
CONTINUOUS = ("SAC", "TD3", "DDPG", "TQC", "CrossQ")

OBSERVATIONS: dict[str, spaces.Space[Any]] = {
    "box": spaces.Box(-1, 1, (3,)),
    "discrete": spaces.Discrete(4),
    "multi_discrete": spaces.MultiDiscrete([2, 3]),
    "multi_binary": spaces.MultiBinary(4),
    "image": spaces.Box(0, 255, (1, 20, 20), dtype=np.uint8),
    "dict": spaces.Dict(
        {
            "vector": spaces.Box(-1, 1, (3,)),
            "image": spaces.Box(0, 255, (1, 20, 20), dtype=np.uint8),
            "kind": spaces.Discrete(3),
        }
    ),
}
ACTIONS: dict[str, spaces.Space[Any]] = {
    "box": spaces.Box(-2, 1, (2,)),
    "discrete": spaces.Discrete(3),
    "multi_discrete": spaces.MultiDiscrete([2, 3]),
    "multi_binary": spaces.MultiBinary(2),
}
POLICY = {"image": "StarCnnPolicy", "dict": "StarMultiInputPolicy"}


#: algorithms that learn from a replay buffer
BUFFERED = tuple(
    getattr(stable_baselines3, name, None) or getattr(sb3_contrib, name)
    for name, settings in SHORT.items()
    if settings is OFF_POLICY
)


class Env(gym.Env[Any, Any]):
    """Any observations and actions, and nothing to earn."""

    def __init__(self, observation_space: Any, action_space: Any) -> None:
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        return self.observation_space.sample(), 0.0, False, False, {}


class Sampled(gym.Env[Any, Any]):
    """Observations drawn from a space, rewards from the action, episodes of ten steps."""

    def __init__(self, observation: str = "box", action: str = "discrete") -> None:
        import copy

        # spaces carry a generator, and environments of one test must not share it
        self.observation_space = copy.deepcopy(OBSERVATIONS[observation])
        self.action_space = copy.deepcopy(ACTIONS[action])

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        reward = float(np.sum(np.asarray(action, float)))
        return self.observation_space.sample(), reward, False, self.steps >= 10, {}

    def action_masks(self) -> np.ndarray:
        space = self.action_space
        if isinstance(space, spaces.MultiDiscrete):
            return np.ones(int(space.nvec.sum()), bool)
        return np.ones(2 * space.n if isinstance(space, spaces.MultiBinary) else space.n, bool)


def action_of(name: str) -> str:
    """The kind of action an algorithm is tried with first."""
    return "box" if name in CONTINUOUS else "discrete"


def algorithm(name: str) -> type[BaseAlgorithm]:
    """The class of an algorithm of either package."""
    return getattr(stable_baselines3, name, None) or getattr(sb3_contrib, name)


def agent(
    name: str,
    observation: str = "box",
    action: str | None = None,
    *,
    policy: str | type[Any] | None = None,
    env: Any = None,
    seed: int = 1,
    **kwargs: Any,
) -> Any:
    """A small agent that has not learned yet."""
    env = env if env is not None else Sampled(observation, action or action_of(name))
    policy = policy or POLICY.get(observation, "StarMlpPolicy")
    settings = {**SHORT[name], **kwargs}
    return algorithm(name)(policy, env, seed=seed, device="cpu", **settings)


BOX = spaces.Box(-1, 1, (3,), np.float32)
PLANE = spaces.Box(-1, 1, (2,), np.float32)
CHOICE = spaces.Discrete(4)
IMAGE = spaces.Box(0, 255, (3, 36, 36), np.uint8)


def stock(algorithm, observation=BOX, action=PLANE, policy="MlpPolicy", **policy_kwargs):
    """A small agent of an algorithm's class, with the stock policy by default."""
    if algorithm in (sb3.DQN, contrib.QRDQN):
        action = CHOICE
    if algorithm is contrib.MaskablePPO:
        action = CHOICE
    if algorithm is contrib.RecurrentPPO and policy == "MlpPolicy":
        policy = "MlpLstmPolicy"
    kwargs = {"buffer_size": 10} if algorithm in BUFFERED else {}
    kwargs["policy_kwargs"] = {"net_arch": [8], **policy_kwargs}
    return algorithm(policy, Env(observation, action), device="cpu", **kwargs)


ON_POLICY_CLASSES = [sb3.PPO, sb3.A2C, contrib.TRPO, contrib.MaskablePPO, contrib.RecurrentPPO]
ALGORITHMS = [*ON_POLICY_CLASSES, *BUFFERED, contrib.ARS]


def but_for(names, quick):
    """Parameters, of which all but some are slow."""
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]


def parameters(model):
    """Copies of all parameters of a model by name."""
    return {name: p.detach().clone() for name, p in model.policy.named_parameters()}
