"""What `predict` decides, as one module without distributions: the graph that is exported."""

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor, nn

__all__ = ["Decision"]

#: what sb3-contrib puts in the place of a masked logit
MASKED = -1e8


class Normalise(nn.Module):
    """`VecNormalize` of one observation: `clip((x - mean) / sqrt(var + epsilon))`.

    It works in single precision where the observation fits, as accelerators want it, and takes
    the mean off in two parts: a mean of 1e6 with a spread of 1 keeps its digits.
    """

    first: Tensor
    rest: Tensor
    std: Tensor

    def __init__(self, rms: RunningMeanStd, stats: VecNormalize, dtype: np.dtype[Any]) -> None:
        super().__init__()
        fits = dtype == np.float32 or dtype.itemsize < 4
        mean = torch.as_tensor(rms.mean, dtype=torch.float64)
        first = mean.float() if fits else mean
        self.clip = float(stats.clip_obs)
        self.register_buffer("first", first)
        self.register_buffer("rest", (mean - first.double()).to(first.dtype))
        self.register_buffer("std", torch.as_tensor(rms.var + stats.epsilon).sqrt().to(first.dtype))

    def forward(self, x: Tensor) -> Tensor:
        x = (x.to(self.std.dtype) - self.first - self.rest) / self.std
        return x.clamp(-self.clip, self.clip).float()


class Decision(nn.Module):
    """What `predict(deterministic=True)` computes, from the observation to the action."""

    low: Tensor
    high: Tensor

    def __init__(self, policy: Any, stats: VecNormalize | None) -> None:
        super().__init__()
        self.policy = policy
        self.space = policy.action_space
        self.maskable = hasattr(getattr(policy, "action_dist", None), "apply_masking")
        self.recurrent = hasattr(policy, "lstm_actor")
        # the actors of TD3 and ARS end in a tanh, the others leave it to a distribution
        actor = getattr(policy, "actor", policy)
        drawn = hasattr(policy, "mlp_extractor") or hasattr(actor, "get_action_dist_params")
        self.tanh = drawn and policy.squash_output
        self.inputs = dict(policy.observation_space.spaces) if self.is_dict else {}
        self.inputs = self.inputs or {"obs": policy.observation_space}
        self.normalised = self._normalised(stats)
        self.normalise = nn.ModuleList(
            Normalise(rms, stats, self.inputs[key].dtype)  # type: ignore[arg-type]
            for key, rms in self.normalised.items()
        )
        #: sizes of the choices; a binary action is one of two
        self.heads: list[int] = []
        if isinstance(self.space, spaces.Discrete):
            self.heads = [int(self.space.n)]
        elif isinstance(self.space, spaces.MultiDiscrete):
            self.heads = [int(n) for n in self.space.nvec]
        elif isinstance(self.space, spaces.MultiBinary):
            self.heads = [2] * int(np.prod(self.space.shape))
        else:
            dtype = np.result_type(np.float32, self.space.dtype)
            self.register_buffer("low", torch.as_tensor(self.space.low.astype(dtype)))
            self.register_buffer("high", torch.as_tensor(self.space.high.astype(dtype)))
        self.to(policy.device)

    @property
    def is_dict(self) -> bool:
        return isinstance(self.policy.observation_space, spaces.Dict)

    def _normalised(self, stats: VecNormalize | None) -> dict[str, Any]:
        """The running statistics by the name of the input."""
        if stats is None or not stats.norm_obs:
            return {}
        rms: Any = stats.obs_rms
        found = rms if isinstance(rms, dict) else {"obs": rms}
        for key, rms in found.items():
            want = self.inputs[key].shape if key in self.inputs else None
            if rms.mean.shape != want:
                raise ValueError(
                    f"export_onnx: VecNormalize has statistics of shape {rms.mean.shape} for "
                    f"{key!r}, but the model observes {want}; a wrapper that changes the shape "
                    "belongs inside VecNormalize"
                )
        return found

    def extras(self) -> list[str]:
        return ["action_masks"] * self.maskable + ["hidden", "cell", "episode_start"] * (
            self.recurrent
        )

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        scores, state = self.scores(*args)
        shape = tuple(self.space.shape)
        if self.heads:
            action = torch.stack([s.argmax(1) for s in scores.split(self.heads, 1)], 1)
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
        """The mean action before tanh, or scores of all choices; and the next LSTM state."""
        named = dict(zip([*self.inputs, *self.extras()], args, strict=True))
        seen = {k: named[k] for k in self.inputs}
        for key, normalise in zip(self.normalised, self.normalise):
            seen[key] = normalise(seen[key])
        obs: Any = seen if self.is_dict else seen["obs"]
        policy = self.policy
        state: tuple[Tensor, ...] = ()
        if hasattr(policy, "mlp_extractor"):
            latent = BaseModel.extract_features(policy, obs, policy.pi_features_extractor)
            if self.recurrent:
                keep = 1.0 - named["episode_start"].reshape(1, -1, 1)
                state = (keep * named["hidden"], keep * named["cell"])
                latent, state = policy.lstm_actor(latent.unsqueeze(0), state)
                latent = latent.squeeze(0)
            # no distribution is made: its checks depend on data, which an exporter cannot follow
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
                f"export_onnx: {type(policy).__name__} has none of the networks that the policies "
                "of stable-baselines3 decide by (mlp_extractor, actor, q_net, quantile_net, "
                "action_net)"
            )
        if self.maskable:
            return torch.where(named["action_masks"], scores, MASKED), state
        if isinstance(self.space, spaces.MultiBinary):
            scores = torch.stack([torch.zeros_like(scores), scores], -1).flatten(1)
        return scores, state
