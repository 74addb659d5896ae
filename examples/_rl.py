"""Returns, learning curves and films, shared by the reinforcement-learning examples."""

import os
from pathlib import Path
from typing import Any

import _report
import imageio
import numpy as np
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv

# pygame draws the frames and needs no screen for it with this driver
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")

#: seeds of evaluation, different from those of training
CURVE_SEED, FINAL_SEED = 1_000_000, 2_000_000

#: PPO on CartPole-v1 in rl-baselines3-zoo, with eight environments
CARTPOLE: dict[str, Any] = {
    "n_steps": 32,
    "batch_size": 256,
    "gae_lambda": 0.8,
    "gamma": 0.98,
    "n_epochs": 20,
    "learning_rate": LinearSchedule(1e-3, 0.0, 1.0),
    "clip_range": LinearSchedule(0.2, 0.0, 1.0),
}


def learning_curve(path: Path, curves: dict[str, tuple[Any, Any]]) -> None:
    """Plot returns over steps.

    Each label has steps and returns; returns are (steps,) or (steps, episodes).
    """
    figure, ax = _report.axes(1, 6, 3.6)
    for label, (steps, returns) in curves.items():
        episodes = np.asarray(returns, dtype=float).reshape(len(steps), -1)
        (line,) = ax.plot(steps, episodes.mean(1), marker=".", label=label)
        band = {"color": line.get_color(), "alpha": 0.2, "lw": 0}
        ax.fill_between(steps, episodes.min(1), episodes.max(1), **band)
    ax.set_xlabel("steps")
    ax.set_ylabel("return: mean, lowest, highest")
    ax.grid(alpha=0.3)
    ax.legend()
    _report.save(figure, path)


def record_gif(model: Any, env_id: str | VecEnv, path: Path, steps: int) -> None:
    """Film the deterministic agent in an environment, by its name or with wrappers of its own."""
    env = env_id
    if isinstance(env, str):
        env = make_vec_env(env, 1, FINAL_SEED, env_kwargs={"render_mode": "rgb_array"})
    frames, states = [], env.reset()
    for _ in range(steps):
        frames.append(env.render())
        actions, _ = model.predict(states, deterministic=True)
        states, *_ = env.step(actions)
    env.close()
    imageio.mimsave(path, frames, duration=1000 / 30, loop=0)
    print(f"film: {path}")
