"""Deterministic policy as one module: the graph that `export_onnx` writes."""

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor, nn

#: the value that sb3-contrib gives to masked logits
MASKED = -1e8


class NormaliseObservation(nn.Module):
    """`VecNormalize` of one observation: `clip((x - mean) / sqrt(var + epsilon))`.

    It computes in single precision where the observation fits, as accelerators need it, and
    subtracts the mean in two parts: with a mean of 1e6 the digits of a spread of 1 are kept.
    Observations in float64 or integers of 4 bytes or more are kept in float64.
    """

    def __init__(self, rms: RunningMeanStd, stats: VecNormalize, dtype: np.dtype[Any]) -> None:
        super().__init__()
        single = dtype == np.float32 or dtype.itemsize < 4
        mean = torch.as_tensor(rms.mean, dtype=torch.float64)
        high = mean.float() if single else mean
        self.clip = float(stats.clip_obs)
        self.mean_high = nn.Buffer(high)
        self.mean_low = nn.Buffer((mean - high.double()).to(high.dtype))
        self.std = nn.Buffer(torch.as_tensor(rms.var + stats.epsilon).sqrt().to(high.dtype))

    def forward(self, x: Tensor) -> Tensor:
        x = (x.to(self.std.dtype) - self.mean_high - self.mean_low) / self.std
        return x.clamp(-self.clip, self.clip).float()


class DeterministicPolicy(nn.Module):
    """Module that computes `predict(deterministic=True)` from an observation.

    It makes no distributions: their checks depend on data, which an exporter cannot follow.
    """

    def __init__(self, policy: Any, stats: VecNormalize | None) -> None:
        super().__init__()
        self.policy = policy
        self.space = policy.action_space
        self.maskable = hasattr(getattr(policy, "action_dist", None), "apply_masking")
        self.recurrent = hasattr(policy, "lstm_actor")
        # the actors of TD3 and ARS end in a tanh, the others leave it to a distribution
        actor = getattr(policy, "actor", policy)
        stochastic = hasattr(policy, "mlp_extractor") or hasattr(actor, "get_action_dist_params")
        self.tanh = stochastic and policy.squash_output
        space = policy.observation_space
        self.is_dict = isinstance(space, spaces.Dict)
        self.inputs = dict(space.spaces) if self.is_dict else {"obs": space}
        lstm = ["hidden", "cell", "episode_start"] if self.recurrent else []
        #: names of all inputs
        self.names = [*self.inputs, *(["action_masks"] if self.maskable else []), *lstm]
        self.statistics = self._check_statistics(stats)
        self.normalise = nn.ModuleList(
            NormaliseObservation(rms, stats, self.inputs[key].dtype)  # type: ignore[arg-type]
            for key, rms in self.statistics.items()
        )
        #: number of values of each discrete action; a binary action has two
        self.choices: list[int] = []
        if isinstance(self.space, spaces.Discrete):
            self.choices = [int(self.space.n)]
        elif isinstance(self.space, spaces.MultiDiscrete):
            self.choices = [int(n) for n in self.space.nvec]
        elif isinstance(self.space, spaces.MultiBinary):
            self.choices = [2] * int(np.prod(self.space.shape))
        else:
            dtype = np.result_type(np.float32, self.space.dtype)
            self.low = nn.Buffer(torch.as_tensor(self.space.low.astype(dtype)))
            self.high = nn.Buffer(torch.as_tensor(self.space.high.astype(dtype)))
        self.to(policy.device)

    def _check_statistics(self, stats: VecNormalize | None) -> dict[str, Any]:
        """Return the running statistics by name of the input."""
        if stats is None or not stats.norm_obs:
            return {}
        obs_rms: Any = stats.obs_rms
        statistics = obs_rms if isinstance(obs_rms, dict) else {"obs": obs_rms}
        for key, rms in statistics.items():
            expected = self.inputs[key].shape if key in self.inputs else None
            if rms.mean.shape != expected:
                raise ValueError(
                    f"export_onnx: VecNormalize has statistics of shape {rms.mean.shape} for "
                    f"{key!r}, but the model observes {expected}; a wrapper that changes the shape "
                    "belongs inside VecNormalize"
                )
        return statistics

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        scores, state = self.scores(*args)
        shape = tuple(self.space.shape)
        if self.choices:
            action = torch.stack([s.argmax(1) for s in scores.split(self.choices, 1)], 1)
            if isinstance(self.space, spaces.MultiBinary) and not self.maskable:
                action = action.float()
            return (action.reshape(-1, *shape), *state)
        scores = scores.tanh() if self.tanh else scores
        action = scores.reshape(-1, *shape).to(self.low.dtype)
        if self.policy.squash_output:
            action = self.low + 0.5 * (action + 1.0) * (self.high - self.low)
        else:
            action = torch.minimum(torch.maximum(action, self.low), self.high)
        return (action, *state)

    def scores(self, *args: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Compute mean action before tanh, or score per choice, and next LSTM state."""
        named = dict(zip(self.names, args, strict=True))
        observations = {key: named[key] for key in self.inputs}
        for key, normalise in zip(self.statistics, self.normalise):
            observations[key] = normalise(observations[key])
        obs: Any = observations if self.is_dict else observations["obs"]
        policy = self.policy
        state: tuple[Tensor, ...] = ()
        if hasattr(policy, "mlp_extractor"):
            latent = BaseModel.extract_features(policy, obs, policy.pi_features_extractor)
            if self.recurrent:
                keep = 1.0 - named["episode_start"].reshape(1, -1, 1)  # 0 where an episode starts
                state = (keep * named["hidden"], keep * named["cell"])
                latent, state = policy.lstm_actor(latent.unsqueeze(0), state)
                latent = latent.squeeze(0)
            scores = policy.action_net(policy.mlp_extractor.forward_actor(latent))
        elif hasattr(policy, "actor"):
            params = getattr(policy.actor, "get_action_dist_params", None)
            scores = policy.actor(obs) if params is None else params(obs)[0]
        elif hasattr(policy, "q_net"):
            scores = policy.q_net(obs)
        elif hasattr(policy, "quantile_net"):
            scores = policy.quantile_net(obs).mean(1)
        elif hasattr(policy, "action_net"):
            features = BaseModel.extract_features(policy, obs, policy.features_extractor)
            scores = policy.action_net(features)
        else:
            raise ValueError(
                f"export_onnx: {type(policy).__name__} has none of the networks by which the "
                "policies of stable-baselines3 act (mlp_extractor, actor, q_net, quantile_net, "
                "action_net)"
            )
        if self.maskable:
            return torch.where(named["action_masks"], scores, MASKED), state
        if isinstance(self.space, spaces.MultiBinary):
            # the logit of a binary action is that of 1 against 0
            scores = torch.stack([torch.zeros_like(scores), scores], -1).flatten(1)
        return scores, state
