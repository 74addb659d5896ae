"""Swing a pendulum up with SAC and a critic that multiplies state and action.

The actor is an ordinary MLP; only the critics differ: net={"pi": "mlp", "qf": "product"}. After
about 3,000 of the 10,000 steps the pendulum stands up, a return near -150; an agent that acts at
random has about -1,200. Two minutes on a CPU. The learning curve, a film of the agent and the model
go to the folder of the run.

python examples/rl_pendulum_sac.py
python examples/rl_pendulum_sac.py --critic mlp      # SB3's own critic, for comparison
python examples/rl_pendulum_sac.py --steps 20000 --seed 3
"""

import time
from pathlib import Path
from typing import Annotated

import _report
import numpy as np
import typer
from _rl import CURVE_SEED, FINAL_SEED, learning_curve, record_gif
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

import starlayers.rl

ENV = "Pendulum-v1"
#: the width at which a critic has the parameters of the MLP's [64, 64]
WIDTHS = {"product": 43, "star": 45}


def main(
    steps: int = 10_000,
    seed: int = 0,
    critic: Annotated[
        str, typer.Option(help=f"product, or one of {', '.join(starlayers.rl.NETS)}")
    ] = "product",
    out: Annotated[Path, typer.Option(help="folder of the run")] = Path("runs/rl_pendulum_sac"),
) -> float:
    out.mkdir(parents=True, exist_ok=True)
    width = WIDTHS.get(critic, 64)
    model = SAC(
        "StarMlpPolicy",
        make_vec_env(ENV, 1, seed),
        learning_rate=1e-3,  # of rl-baselines3-zoo
        policy_kwargs={
            "net": {"pi": "mlp", "qf": critic},
            "net_arch": {"pi": [64, 64], "qf": [width, width]},
        },
        seed=seed,
        device="cpu",
    )
    evaluation = EvalCallback(
        make_vec_env(ENV, 10, CURVE_SEED),
        n_eval_episodes=10,
        eval_freq=max(1, steps // 10),
        log_path=str(out),
        verbose=0,
    )
    began = time.perf_counter()
    model.learn(steps, callback=evaluation, progress_bar=True)
    seconds = time.perf_counter() - began
    returns, _ = evaluate_policy(
        model, make_vec_env(ENV, 20, FINAL_SEED), 20, return_episode_rewards=True
    )
    mean = float(np.mean(returns))

    model.save(out / "model.zip")
    curve = np.load(out / "evaluations.npz")
    label = f"{critic} critic"
    learning_curve(out / "curve.png", {label: (curve["timesteps"], curve["results"])})
    record_gif(model, ENV, out / "agent.gif", steps=200)
    parameters = sum(p.numel() for p in model.critic.parameters())
    print(
        f"{label}: {parameters:,} parameters, {steps:,} steps in {seconds:.0f} s; seed {seed}\n"
        f"mean return of 20 new episodes {mean:.1f} (about -1,200 at random, -150 when it stands "
        f"up); curve.png, agent.gif and model.zip in {out}"
    )
    return mean


if __name__ == "__main__":
    _report.run(main, __doc__)
