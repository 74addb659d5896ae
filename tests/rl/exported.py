"""Models of every algorithm and space that look trained, and their deterministic actions."""

import copy
from typing import Any

import numpy as np
import sb3_contrib as contrib
import stable_baselines3 as sb3
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

import starlayers.rl  # noqa: F401  registers the star policies
from tests.rl.agents import BUFFERED, Env

BOX = spaces.Box(-2, 3, (3,), np.float32)
WIDE = spaces.Box(-np.inf, np.inf, (2, 3), np.float32)
DOUBLE = spaces.Box(-1, 2, (2, 2), np.float64)
BYTES = spaces.Box(0, 255, (3,), np.uint8)
CHOICE, CHOICES, SWITCHES = spaces.Discrete(4), spaces.MultiDiscrete([3, 4]), spaces.MultiBinary(3)
IMAGE = spaces.Box(0, 255, (36, 40, 3), np.uint8)
DICT = spaces.Dict(vector=BOX, image=IMAGE, choice=CHOICE, speed=DOUBLE)
SMALL = {"net_arch": [8]}


def build(algorithm, observation, action, policy="MlpPolicy", norm=False, **kwargs):
    """A small model that looks trained: no weight and no statistic is at its start."""
    torch.manual_seed(0)
    env = DummyVecEnv([lambda: Env(copy.deepcopy(observation), action)])
    if norm:
        keys = ["vector", "speed"] if isinstance(observation, spaces.Dict) else None
        env = VecNormalize(env, norm_obs_keys=keys, clip_obs=2.5)
        rng = np.random.default_rng(0)
        for rms in env.obs_rms.values() if keys else [env.obs_rms]:
            rms.mean = rng.normal(size=rms.mean.shape) * 100
            rms.var = rng.uniform(0.1, 9, size=rms.var.shape)
    if algorithm in BUFFERED:
        kwargs["buffer_size"] = 10
    kwargs["policy_kwargs"] = {**SMALL, **kwargs.pop("policy_kwargs", {})}
    if policy == "LinearPolicy":
        kwargs["policy_kwargs"] = {}
    model = algorithm(policy, env, device="cpu", **kwargs)
    with torch.no_grad():
        for p in model.policy.parameters():
            fan_in = p[0].numel() if p.ndim > 1 else 4
            p.add_(torch.randn_like(p) * 0.5 / fan_in**0.5)
        for name, buffer in model.policy.named_buffers():
            if "ra_" in name:
                buffer.add_(torch.rand_like(buffer))
    return model


def observe(model, n=5):
    """Observations of our own, and the actions of `predict` on them."""
    stats, space = model.get_vec_normalize_env(), copy.deepcopy(model.observation_space)
    space.seed(1)
    samples = [space.sample() for _ in range(n)]
    stack = {k: np.stack([s[k] for s in samples]) for k in space} if space.shape is None else None
    obs = stack or np.stack([np.asarray(s) for s in samples])
    if stats is not None:  # samples of the space alone are all beyond the clip
        for rms, x in _normalised(stats, obs):
            x[1:] = rms.mean + np.sqrt(rms.var) * np.random.default_rng(2).normal(size=x[1:].shape)
    normalised = obs if stats is None else stats.normalize_obs(obs)
    actions, _ = model.predict(normalised, deterministic=True)
    return obs if isinstance(obs, dict) else {"obs": obs}, actions


def _normalised(stats, obs):
    if not isinstance(obs, dict):
        return [(stats.obs_rms, obs)]
    return [(stats.obs_rms[key], obs[key]) for key in stats.norm_obs_keys]


def case(name, norm=False):
    """The model of a case."""
    algorithm, observation, action, *rest = CASES[name]
    policy, policy_kwargs, kwargs = [*rest, *("MlpPolicy", {}, {})[len(rest) :]]
    return build(
        algorithm, observation, action, policy, norm, policy_kwargs=policy_kwargs, **kwargs
    )


SDE = {"use_sde": True}
CASES: dict[str, Any] = {
    "ppo": (sb3.PPO, BOX, CHOICE),
    "ppo-wide-box": (sb3.PPO, WIDE, BOX),
    "ppo-double": (sb3.PPO, DOUBLE, DOUBLE),
    "ppo-bytes": (sb3.PPO, BYTES, BOX),
    "ppo-discrete-multidiscrete": (sb3.PPO, CHOICE, CHOICES),
    "ppo-multidiscrete-multibinary": (sb3.PPO, CHOICES, SWITCHES),
    "ppo-multibinary": (sb3.PPO, SWITCHES, CHOICE),
    "ppo-image": (sb3.PPO, IMAGE, CHOICE, "CnnPolicy"),
    "ppo-dict": (sb3.PPO, DICT, BOX, "MultiInputPolicy"),
    "ppo-unshared": (sb3.PPO, BOX, BOX, "MlpPolicy", {"share_features_extractor": False}),
    "a2c-sde": (sb3.A2C, BOX, BOX, "MlpPolicy", {}, SDE),
    "ppo-squashed": (sb3.PPO, BOX, BOX, "MlpPolicy", {"squash_output": True}, SDE),
    "trpo": (contrib.TRPO, BOX, BOX),
    "ars": (contrib.ARS, BOX, BOX),
    "ars-discrete": (contrib.ARS, BOX, CHOICE),
    "ars-linear": (contrib.ARS, BOX, BOX, "LinearPolicy"),
    "sac": (sb3.SAC, BOX, BOX),
    "sac-dict": (sb3.SAC, DICT, DOUBLE, "MultiInputPolicy"),
    "sac-sde": (sb3.SAC, BOX, BOX, "MlpPolicy", {}, SDE),
    "td3": (sb3.TD3, BOX, BOX),
    "ddpg": (sb3.DDPG, WIDE, BOX),
    "tqc": (contrib.TQC, BOX, BOX),
    "crossq": (contrib.CrossQ, BOX, BOX),
    "dqn": (sb3.DQN, BOX, CHOICE),
    "qrdqn": (contrib.QRDQN, BOX, CHOICE),
    "star-ppo": (sb3.PPO, BOX, CHOICE, "StarMlpPolicy", {"net_arch": [8, 8]}),
    "star-ppo-image": (sb3.PPO, IMAGE, CHOICE, "StarCnnPolicy"),
    "star-a2c-dict": (sb3.A2C, DICT, BOX, "StarMultiInputPolicy"),
    "star-trpo": (contrib.TRPO, BOX, BOX, "StarMlpPolicy", {"net": "star_residual"}),
    "star-sac": (sb3.SAC, BOX, BOX, "StarMlpPolicy", {"net": {"pi": "star", "qf": "product"}}),
    "star-td3": (sb3.TD3, BOX, BOX, "StarMlpPolicy", {"norm": "layer"}),
    "star-tqc": (contrib.TQC, BOX, BOX, "StarMlpPolicy"),
    "star-crossq": (contrib.CrossQ, BOX, BOX, "StarMlpPolicy"),
    "star-dqn": (sb3.DQN, BOX, CHOICE, "StarMlpPolicy", {"net": "simba"}),
    "star-qrdqn": (contrib.QRDQN, BOX, CHOICE, "StarMlpPolicy"),
    "star-ars": (contrib.ARS, BOX, BOX, "StarMlpPolicy"),
}
#: cases that are also tried behind `VecNormalize`
NORMED = (
    "ppo-wide-box",
    "ppo-double",
    "ppo-dict",
    "sac",
    "sac-dict",
    "td3",
    "dqn",
    "star-a2c-dict",
)
