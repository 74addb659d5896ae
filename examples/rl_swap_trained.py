"""Put star gates into a PPO agent in the middle of its training, and train on.

`starify` adds gates of zero to every MLP of the agent. Just after the swap logits, values and
returns are the same to the bit and Adam keeps its moments; then the gates learn with the rest. It
ends near the return of 500 that it would have without gates: the example shows that a swap is safe,
not that it gains. A minute on a CPU. The curve, a film and the model go to the folder of the run.

python examples/rl_swap_trained.py
python examples/rl_swap_trained.py --gate low_rank=8 --swap-at 20000
python examples/rl_swap_trained.py --model agent.zip        # an MlpPolicy of yours on CartPole-v1
"""

from pathlib import Path
from typing import Annotated

import _report
import numpy as np
import torch
import typer
from _rl import CARTPOLE, CURVE_SEED, FINAL_SEED, learning_curve, record_gif
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import CallbackList, ConvertCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from torch import Tensor

from starlayers.rl import starify
from starlayers.surgery import gate_sizes, report

START = typer.Option(help="a zip of PPO to start from", show_default="none")
ENV, ENVS, EPISODES = "CartPole-v1", 8, 20


@torch.no_grad()
def logits_and_values(model: PPO, observations: Tensor) -> tuple[Tensor, Tensor]:
    logits = model.policy.get_distribution(observations).distribution.logits
    return logits, model.policy.predict_values(observations)


def returns(model: PPO, seed: int) -> list[float]:
    envs = make_vec_env(ENV, EPISODES, seed)
    return evaluate_policy(model, envs, EPISODES, return_episode_rewards=True)[0]


def main(
    steps: int = 50_000,
    swap_at: Annotated[int, typer.Option(help="steps of the plain agent")] = 10_000,
    gate: Annotated[str, typer.Option(help="full, low_rank=r or scale")] = "full",
    model: Annotated[Path | None, START] = None,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="folder of the run")] = Path("runs/rl_swap_trained"),
) -> dict[str, float]:
    if not 0 < swap_at < steps:
        raise typer.BadParameter(f"0 < swap_at < steps, got swap_at={swap_at}, steps={steps}")
    out.mkdir(parents=True, exist_ok=True)
    agent = PPO("MlpPolicy", make_vec_env(ENV, ENVS, seed), **CARTPOLE, seed=seed, device="cpu")
    if model is not None:
        agent = PPO.load(model, env=agent.env, device="cpu")
        agent.num_timesteps = 0
    curve = EvalCallback(
        make_vec_env(ENV, 10, CURVE_SEED),
        n_eval_episodes=10,
        eval_freq=max(1, steps // 25 // ENVS),
        log_path=str(out),
        verbose=0,
    )
    # one learning-rate schedule over both parts: the first is stopped, not finished
    stop = ConvertCallback(lambda *_: agent.num_timesteps < swap_at)
    agent.learn(steps, callback=CallbackList([curve, stop]), progress_bar=True)

    observations = torch.as_tensor(agent.rollout_buffer.observations.reshape(-1, 4))
    logits, values = logits_and_values(agent, observations)
    moments = [s["exp_avg"].clone() for s in agent.policy.optimizer.state.values()]
    before, swapped = returns(agent, FINAL_SEED), agent.num_timesteps

    starify(agent, gate=gate)

    after = returns(agent, FINAL_SEED)
    pairs = zip(logits_and_values(agent, observations), (logits, values), strict=True)
    differences = [float((new - old).abs().max()) for new, old in pairs]
    kept = [s["exp_avg"] for s in agent.policy.optimizer.state.values()]
    print(
        f"\n{report(agent.policy)}\n\nswapped after {swapped:,} steps, seed {seed}; largest "
        f"difference on {len(observations)} states: logits {differences[0]}, "
        f"values {differences[1]}\n"
        f"moments of Adam kept: {all(map(torch.equal, moments, kept))}\n"
        f"mean return of {EPISODES} episodes just before {np.mean(before):.2f}, just after "
        f"{np.mean(after):.2f}, the same one by one: {before == after}\n"
    )

    agent.learn(steps - swapped, callback=curve, reset_num_timesteps=False, progress_bar=True)
    final = returns(agent, FINAL_SEED)
    agent.save(out / "model.zip")
    again = returns(PPO.load(out / "model.zip", device="cpu"), FINAL_SEED)

    log = np.load(out / "evaluations.npz")
    at, scores = log["timesteps"], log["results"]
    plain = at <= swapped
    star = at >= at[plain].max()  # begins where the MLP's curve ends: it is the same agent
    curves = {"MLP": (at[plain], scores[plain])}
    curves[f"starified at {swapped:,}"] = (at[star], scores[star])
    learning_curve(out / "curve.png", curves)
    record_gif(agent, ENV, out / "agent.gif", steps=200)
    sizes = ", ".join(f"{name} {size:.3f}" for name, size in gate_sizes(agent.policy).items())
    print(
        f"\nmean |gate| by now: {sizes}\nmean return at {agent.num_timesteps:,} steps "
        f"{np.mean(final):.1f} (lowest {min(final):.0f}, the most is 500), after saving and "
        f"loading {np.mean(again):.1f}; curve.png, agent.gif and model.zip in {out}"
    )
    means = {"before": before, "after": after, "final": final}
    figures = {name: float(np.mean(returns)) for name, returns in means.items()}
    return figures | dict(zip(("logits", "values"), differences, strict=True))


if __name__ == "__main__":
    _report.run(main, __doc__)
