"""Play Pong from pixels with PPO and a small StarNet.

"StarCnnPolicy" reads four screens of 84 x 84 through a small StarNet. The 30,000 steps of the
default are a demonstration of a few minutes on a CPU: the agent moves and loses about every point
(-21). Pong takes one to two million steps to win points and ten million for a full run, which is
for a GPU. The learning curve, a film and the model go to the folder of the run.

python examples/rl_pong.py                                # moves, and loses: see what it prints
python examples/rl_pong.py --steps 10000000               # a full run, for a night on a GPU
python examples/rl_pong.py --policy CnnPolicy             # SB3's own network, for comparison
"""

import time
from pathlib import Path
from typing import Annotated, Any

import _report
import ale_py
import gymnasium
import numpy as np
import typer
from _rl import CURVE_SEED, FINAL_SEED, learning_curve, record_gif
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecTransposeImage

import starlayers.rl  # noqa: F401  registers StarCnnPolicy

ENV, ENVS, FULL = "PongNoFrameskip-v4", 8, 10_000_000


def games(n: int, seed: int, *, raw: bool = False, **env_kwargs: Any) -> VecEnv:
    """Make games with SB3's Atari wrappers; `raw` keeps the score and episodes of the game."""
    wrapper = {"clip_reward": not raw, "terminal_on_life_loss": not raw}
    made = make_atari_env(ENV, n, seed, wrapper_kwargs=wrapper, env_kwargs=env_kwargs)
    return VecTransposeImage(VecFrameStack(made, n_stack=4))


def main(
    steps: int = 30_000,
    seed: int = 0,
    policy: Annotated[str, typer.Option(help="StarCnnPolicy or CnnPolicy")] = "StarCnnPolicy",
    out: Annotated[Path, typer.Option(help="folder of the run")] = Path("runs/rl_pong"),
    device: str = "auto",
) -> float:
    gymnasium.register_envs(ale_py)
    out.mkdir(parents=True, exist_ok=True)
    # the hyperparameters of rl-baselines3-zoo
    model = PPO(
        policy,
        games(ENVS, seed),
        n_steps=128,
        batch_size=256,
        n_epochs=4,
        ent_coef=0.01,
        learning_rate=LinearSchedule(2.5e-4, 0.0, 1.0),
        clip_range=LinearSchedule(0.1, 0.0, 1.0),
        seed=seed,
        device=device,
    )
    parameters = sum(p.numel() for p in model.policy.parameters())
    print(f"{policy}: {parameters:,} parameters on {model.device}; seed {seed}")
    if steps < FULL // 10:
        print(
            f"{steps:,} steps are a demonstration: the agent will lose about every point. "
            f"Pong takes 1 to 2 million steps to win points and {FULL:,} for a full run: --steps"
        )
    evaluation = EvalCallback(
        games(2, CURVE_SEED, raw=True),
        n_eval_episodes=2,
        eval_freq=max(1, steps // (3 * ENVS)),
        log_path=str(out),
        verbose=0,
    )
    began = time.perf_counter()
    model.learn(steps, callback=evaluation, progress_bar=True)
    seconds = time.perf_counter() - began
    mean, std = evaluate_policy(model, games(2, FINAL_SEED, raw=True), 2)

    model.save(out / "model.zip")
    curve = np.load(out / "evaluations.npz")
    learning_curve(out / "curve.png", {policy: (curve["timesteps"], curve["results"])})
    film = games(1, FINAL_SEED, raw=True, render_mode="rgb_array")
    record_gif(model, film, out / "agent.gif", steps=300)
    print(
        f"{model.num_timesteps:,} steps in {seconds:.0f} s, "
        f"{model.num_timesteps / seconds:.0f} a second\n"
        f"mean score of 2 games {mean:.1f} ± {std:.1f} (-21 is losing every point, 21 winning "
        f"them); curve.png, agent.gif and model.zip in {out}"
    )
    return float(mean)


if __name__ == "__main__":
    _report.run(main, __doc__)
