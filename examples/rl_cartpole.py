"""Balance a pole with PPO and a star policy.

One word, "StarMlpPolicy", puts star layers into PPO of stable-baselines3. Training stops when every
one of 20 episodes has the most it can, a return of 500; with LayerNorm that took all five seeds
tried less than 20,000 steps. Half a minute on a CPU. The learning curve, a film of the agent and
the model go to the folder of the run.

python examples/rl_cartpole.py
python examples/rl_cartpole.py --net mlp            # SB3's own network, for comparison
python examples/rl_cartpole.py --steps 20000 --seed 3
"""

import time
from pathlib import Path
from typing import Annotated

import _report
import numpy as np
import torch
import typer
from _rl import CARTPOLE, CURVE_SEED, FINAL_SEED, learning_curve, record_gif
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import EvalCallback, StopTrainingOnRewardThreshold
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

import starlayers.rl

ENV, ENVS = "CartPole-v1", 8


def main(
    steps: int = 50_000,
    seed: int = 0,
    net: Annotated[str, typer.Option(help=f"one of {', '.join(starlayers.rl.NETS)}")] = "star",
    norm: Annotated[str, typer.Option(help="layer, rms or none")] = "layer",
    out: Annotated[Path, typer.Option(help="folder of the run")] = Path("runs/rl_cartpole"),
) -> float:
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # for nets this small a second thread only costs
    model = PPO(
        "StarMlpPolicy",
        make_vec_env(ENV, ENVS, seed),
        **CARTPOLE,
        policy_kwargs={"net": net, "norm": norm},
        seed=seed,
        device="cpu",
    )
    # 500 is the most an episode can have; where that is not reached the best agent is kept
    evaluation = EvalCallback(
        make_vec_env(ENV, 20, CURVE_SEED),
        callback_on_new_best=StopTrainingOnRewardThreshold(500, verbose=0),
        n_eval_episodes=20,
        eval_freq=max(1, min(1250, steps // 5) // ENVS),
        best_model_save_path=str(out),
        log_path=str(out),
        verbose=0,
    )
    began = time.perf_counter()
    model.learn(steps, callback=evaluation, progress_bar=True)
    seconds = time.perf_counter() - began
    steps = model.num_timesteps
    model = PPO.load(out / "best_model.zip", device="cpu")
    returns, _ = evaluate_policy(
        model, make_vec_env(ENV, 20, FINAL_SEED), 20, return_episode_rewards=True
    )
    mean = float(np.mean(returns))

    (out / "best_model.zip").replace(out / "model.zip")
    curve = np.load(out / "evaluations.npz")
    learning_curve(out / "curve.png", {net: (curve["timesteps"], curve["results"])})
    record_gif(model, ENV, out / "agent.gif", steps=200)
    parameters = sum(p.numel() for p in model.policy.parameters())
    print(
        f"{net}: {parameters:,} parameters, {steps:,} steps in {seconds:.0f} s; "
        f"seed {seed}\nmean return of 20 new episodes {mean:.1f} (lowest {min(returns):.0f}, the "
        f"most is 500); curve.png, agent.gif and model.zip in {out}"
    )
    return mean


if __name__ == "__main__":
    _report.run(main, __doc__)
