"""One training run of the reinforcement-learning study, and its measures."""

import time
from typing import Any

import numpy as np
import torch

from benchmarks.rl.tasks import algorithm, counts, matched_widths, policy_kwargs, spaces

EVALUATIONS, EVALUATED, FINAL = 20, 5, 20
#: apart enough that the environments of two seeds, and those evaluated on, share no seed
SEED_STEP, CURVE_SEED, FINAL_SEED = 1000, 1_000_000, 2_000_000
#: what a run is measured by, part of its definition
MEASURED = {
    "evaluations": EVALUATIONS,
    "episodes": EVALUATED,
    "final_episodes": FINAL,
    "seeds": [SEED_STEP, CURVE_SEED, FINAL_SEED],
}


def environments(spec: dict[str, Any], n_envs: int, seed: int, *, training: bool) -> Any:
    """Make the task's environments, normalised where the task says so."""
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    env = make_vec_env(spec["env"], n_envs, seed=seed)
    if spec.get("normalize"):
        gamma = spec["settings"].get("gamma", 0.99)
        return VecNormalize(env, training=training, norm_reward=training, gamma=gamma)
    return env


def build(
    spec: dict[str, Any], kwargs: dict[str, Any], seed: int, policy: str = "StarMlpPolicy"
) -> Any:
    """Make the task's algorithm with the policy that `kwargs` describe."""
    from stable_baselines3.common.noise import NormalActionNoise
    from stable_baselines3.common.utils import LinearSchedule

    settings = dict(spec["settings"])
    for name, value in settings.items():
        if isinstance(value, str):  # the zoo's notation: linearly from there to 0
            settings[name] = LinearSchedule(float(value.removeprefix("lin_")), 0.0, 1.0)
    if "noise" in spec:
        n = spaces(spec["env"])[1].shape
        settings["action_noise"] = NormalActionNoise(np.zeros(n), spec["noise"] * np.ones(n))
    env = environments(spec, spec.get("n_envs", 1), seed, training=True)
    return algorithm(spec)(policy, env, policy_kwargs=kwargs, seed=seed, device="cpu", **settings)


@torch.no_grad()
def initial_scale(model: Any) -> dict[str, float]:
    """Return the standard deviation of each side's outputs over random states before training."""
    draw = torch.Generator().manual_seed(0)  # of its own: training is as it would be without
    states = torch.randn(256, *model.observation_space.shape, generator=draw)
    policy = model.policy
    if hasattr(policy, "q_net"):
        outputs = {"q": policy.q_net(states)}
    elif hasattr(policy, "critic"):
        actions = 2 * torch.rand(256, *model.action_space.shape, generator=draw) - 1
        actor = policy.actor
        mean = actor(states) if not hasattr(actor, "log_std") else actor.mu(actor.latent_pi(states))
        outputs = {"pi": mean, "qf": policy.critic(states, actions)[0]}
    else:
        latent_pi, latent_vf = policy.mlp_extractor(states)
        outputs = {"pi": policy.action_net(latent_pi), "vf": policy.value_net(latent_vf)}
    return {side: float(output.std(0).mean()) for side, output in outputs.items()}


def evaluation(model: Any, spec: dict[str, Any], episodes: int, seed: int) -> list[float]:
    """Return the returns of the deterministic policy from the start states of the seed."""
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.vec_env import sync_envs_normalization

    env = environments(spec, episodes, seed, training=False)
    if spec.get("normalize"):
        sync_envs_normalization(model.get_env(), env)
    returns, _ = evaluate_policy(model, env, episodes, return_episode_rewards=True)
    env.close()
    return [float(r) for r in returns]


def learning_curve(model: Any, spec: dict[str, Any]) -> tuple[dict[str, list[float]], float]:
    """Train on the whole budget; return the evaluations, and the CPU seconds without them."""
    from stable_baselines3.common.callbacks import BaseCallback

    class Curve(BaseCallback):
        timesteps: list[int]
        returns: list[float]
        spent = 0.0

        def _on_training_start(self) -> None:
            self.timesteps, self.returns = [], []

        def _on_step(self) -> bool:
            done = len(self.returns)
            if self.num_timesteps >= (done + 1) * spec["steps"] / EVALUATIONS and (
                done < EVALUATIONS - 1  # the last is after the last update
            ):
                self.evaluate()
            return True

        def _on_training_end(self) -> None:
            self.evaluate()

        def evaluate(self) -> None:
            began = time.process_time()
            self.timesteps.append(self.num_timesteps)
            returns = evaluation(self.model, spec, EVALUATED, CURVE_SEED)
            self.returns.append(float(np.mean(returns)))
            self.spent += time.process_time() - began

    curve = Curve()
    began = time.process_time()
    model.learn(spec["steps"], callback=curve)
    cpu = time.process_time() - began - curve.spent
    return {"timesteps": curve.timesteps, "returns": curve.returns}, cpu


def normalised(spec: dict[str, Any], returns: Any) -> Any:
    """Scale returns so that a random policy has 0 and the zoo's agent 1."""
    return (np.asarray(returns) - spec["random"]) / (spec["anchor"] - spec["random"])


def train_one(job: dict[str, Any]) -> dict[str, Any]:
    """Train the job's arm from its seed; evaluate it on the way and on held-out seeds."""
    spec, began = job["spec"], time.perf_counter()
    widths = matched_widths(spec, job["arm"])
    widths = {side: max(1, round(job["scale"] * width)) for side, width in widths.items()}
    kwargs = policy_kwargs(spec, job["arm"], widths)
    model = build(spec, kwargs, SEED_STEP * job["seed"])
    scale = initial_scale(model)
    curve, cpu = learning_curve(model, spec)
    final = evaluation(model, spec, FINAL, FINAL_SEED)
    steps = model.num_timesteps
    model.get_env().close()
    return {
        "curve": curve,
        "final": float(np.mean(final)),
        "final_returns": final,
        "score": float(normalised(spec, np.mean(final))),
        # evaluations are evenly spaced: the area under the curve is its mean
        "auc": float(np.mean(normalised(spec, curve["returns"]))),
        "parameters": counts(spec, kwargs),
        "policy_kwargs": kwargs,
        "initial_scale": scale,
        "steps": steps,
        "steps_per_cpu_second": steps / cpu,
        "seconds": time.perf_counter() - began,
    }
