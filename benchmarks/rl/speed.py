"""What star policies cost beside SB3's own, at matched parameters: calls, training, updates."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, environment, interleave, markdown_table, write_json
from benchmarks.rl_tasks import TASKS, counts, matched_widths, policy_kwargs
from benchmarks.rl_train import build

BASELINE = "SB3's MlpPolicy"
#: steps between two updates of PPO on CartPole are 256: slices are whole rollouts
SLICE = 8 * 256


def cpu_clock(run: Callable[[], object]) -> float:
    """Seconds of CPU: on a shared machine those of the wall are other people's too."""
    began = time.process_time()
    run()
    return time.process_time() - began


def models(spec: dict[str, Any], arms: list[str]) -> dict[str, tuple[Any, int]]:
    """SB3's own policy and the arms, each with its parameters."""
    wide = {arm: policy_kwargs(spec, arm, matched_widths(spec, arm)) for arm in ("mlp", *arms)}
    stock = {"net_arch": wide["mlp"]["net_arch"]}
    found = {
        BASELINE: (build(spec, stock, 0, "MlpPolicy"), sum(counts(spec, wide["mlp"]).values()))
    }
    for arm in arms:
        found[arm] = build(spec, wide[arm], 0), sum(counts(spec, wide[arm]).values())
    return found


def calls(policy: Any, generator: torch.Generator) -> dict[str, Callable[[], object]]:
    """What a rollout and an update ask of an actor-critic policy."""
    one, eight, batch = (torch.randn(n, 4, generator=generator) for n in (1, 8, 64))
    actions = torch.randint(2, (64,), generator=generator)
    state = one[0].numpy()

    def update() -> None:
        values, log_prob, entropy = policy.evaluate_actions(batch, actions)
        (values.mean() + log_prob.mean() + entropy.mean()).backward()
        policy.optimizer.zero_grad()

    def quietly(call: Callable[..., object], *inputs: Any) -> Callable[[], object]:
        return torch.no_grad()(lambda: call(*inputs))

    return {
        "forward, batch 1": quietly(policy, one),
        "forward, batch 8": quietly(policy, eight),
        "predict_values, batch 8": quietly(policy.predict_values, eight),
        "evaluate_actions and backward, batch 64": update,
        "predict, one NumPy state": lambda: policy.predict(state),
    }


def repeated(call: Callable[[], object], times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            call()

    return run


def check(policy: Any) -> None:
    """No time of a policy whose fast path computes something else than its parts."""
    states = torch.randn(16, 4)
    with torch.no_grad():
        _, values, _ = policy(states)
        latent, _ = policy.mlp_extractor(states)
        torch.testing.assert_close(values, policy.predict_values(states), rtol=1e-5, atol=1e-6)
        want = policy.mlp_extractor.forward_actor(states)
        torch.testing.assert_close(latent, want, rtol=1e-5, atol=1e-6)


def ppo(smoke: bool) -> dict[str, dict[str, Any]]:
    """PPO on CartPole: single calls, and training in turns."""
    spec = TASKS["ppo-cartpole"]
    found = models(spec, ["mlp", "star"])
    for model, _ in found.values():
        check(model.policy)
    asked = {n: calls(m.policy, torch.Generator().manual_seed(0)) for n, (m, _) in found.items()}
    rows: dict[str, dict[str, Any]] = {}
    repeats, many = (2, 3) if smoke else (41, 100)
    for what in asked[BASELINE]:
        runs = {name: repeated(each[what], many) for name, each in asked.items()}
        rows[what] = interleave(runs, baselines=[BASELINE], repeats=repeats, clock=cpu_clock)
        for times in rows[what].values():
            for kind in ("median_ms", "min_ms", "max_ms"):
                times[kind] /= many
    steps = 256 if smoke else SLICE
    runs = {
        name: (lambda m=model: m.learn(steps, reset_num_timesteps=False))
        for name, (model, _) in found.items()
    }
    what = f"PPO on CartPole-v1, {steps} steps of training"
    rows[what] = interleave(runs, baselines=[BASELINE], repeats=2 if smoke else 21, clock=cpu_clock)
    return {what: annotated(times, found) for what, times in rows.items()}


def sac(width: int, smoke: bool) -> dict[str, dict[str, Any]]:
    """Updates of SAC on batches of 256."""
    spec = {**TASKS["sac-hopper"], "net_arch": [width, width], "settings": {"learning_starts": 600}}
    found = models(spec, ["mlp", "star", "star_critic", "product"])
    for model, _ in found.values():
        model.learn(500)  # random actions, and no update yet
    updates = 1 if smoke else 10
    runs = {
        name: (lambda m=model: m.train(gradient_steps=updates, batch_size=256))
        for name, (model, _) in found.items()
    }
    times = interleave(runs, baselines=[BASELINE], repeats=1 if smoke else 21, clock=cpu_clock)
    for each in times.values():
        for kind in ("median_ms", "min_ms", "max_ms"):
            each[kind] /= updates
    return {f"update of SAC on Hopper-v5, [{width}, {width}]": annotated(times, found)}


def annotated(times: dict[str, Any], found: dict[str, tuple[Any, int]]) -> dict[str, Any]:
    return {name: {**t, "parameters": found[name][1]} for name, t in times.items()}


def run(smoke: bool, out: Path = RESULTS) -> None:
    torch.set_num_threads(1)
    rows = ppo(smoke)
    for width in (64, 256):
        rows |= sac(width, smoke)
    print(table(rows))
    name = "rl-speed-smoke.json" if smoke else "rl-speed.json"
    write_json(out / name, {"rows": rows, "clock": "CPU", "environment": environment()})


def table(rows: dict[str, dict[str, Any]]) -> str:
    header = ["what", "policy", "parameters", "CPU, ms", f"time, x {BASELINE}", "speed, x"]
    body = []
    for what, row in rows.items():
        for name, t in row.items():
            ratios = [f"{t['ratio']:.2f}", f"{1 / t['ratio']:.2f}"]
            body.append([what, name, f"{t['parameters']:,}", f"{t['median_ms']:.3f}", *ratios])
    return markdown_table(header, body)
