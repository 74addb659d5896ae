"""Speed of star policies beside SB3's own at matched parameters: calls, training, updates."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness.report import conditions, markdown_table
from benchmarks.harness.runner import Job, Records
from benchmarks.harness.study import Study
from benchmarks.harness.timing import cpu_clock, interleave
from benchmarks.rl.tasks import TASKS, counts, matched_widths, policy_kwargs
from benchmarks.rl.train import build

BASELINE = "SB3's MlpPolicy"
#: steps between two updates of PPO on CartPole are 256: slices are whole rollouts
SLICE = 8 * 256
TEXT = """\
## Speed: star policies

**What was done.** CPU time as a fraction of SB3's own policy at the same parameters (lower is
better), variants in turn on one thread, medians over rounds; other work ran on the second core.

{ratios}
**What this shows.** PPO's policy and value are one pass, with half the tensors to optimise. The
rest is paid for elsewhere: predictions of the value alone ({value:.2f}), and every critic of
SAC, run layer by layer with twice the element-wise work of an MLP ({sac_low:.2f} to
{sac_high:.2f}). Training of PPO on CartPole takes {ppo:.2f} of SB3's time by this measure.

All times, in milliseconds of CPU:

{table}
**Conditions**

{conditions}
"""


def models(spec: dict[str, Any], arms: list[str]) -> dict[str, tuple[Any, int]]:
    """Make SB3's own policy and the arms, each with its number of parameters."""
    wide = {arm: policy_kwargs(spec, arm, matched_widths(spec, arm)) for arm in ("mlp", *arms)}
    stock = {"net_arch": wide["mlp"]["net_arch"]}
    made = {BASELINE: (build(spec, stock, 0, "MlpPolicy"), sum(counts(spec, wide["mlp"]).values()))}
    for arm in arms:
        made[arm] = build(spec, wide[arm], 0), sum(counts(spec, wide[arm]).values())
    return made


def calls(policy: Any, generator: torch.Generator) -> dict[str, Callable[[], object]]:
    """Return the calls that a rollout and an update make of an actor-critic policy."""
    one, eight, batch = (torch.randn(n, 4, generator=generator) for n in (1, 8, 64))
    actions = torch.randint(2, (64,), generator=generator)
    state = one[0].numpy()

    def update() -> None:
        values, log_prob, entropy = policy.evaluate_actions(batch, actions)
        (values.mean() + log_prob.mean() + entropy.mean()).backward()
        policy.optimizer.zero_grad()

    def without_gradient(call: Callable[..., object], *inputs: Any) -> Callable[[], object]:
        return torch.no_grad()(lambda: call(*inputs))

    return {
        "forward, batch 1": without_gradient(policy, one),
        "forward, batch 8": without_gradient(policy, eight),
        "predict_values, batch 8": without_gradient(policy.predict_values, eight),
        "evaluate_actions and backward, batch 64": update,
        "predict, one NumPy state": lambda: policy.predict(state),
    }


def repeated(call: Callable[[], object], times: int) -> Callable[[], None]:
    """Return a function that makes the call several times."""

    def run() -> None:
        for _ in range(times):
            call()

    return run


def check(policy: Any) -> None:
    """Raise where the policy's fast path computes something else than its parts."""
    states = torch.randn(16, 4)
    with torch.no_grad():
        _, values, _ = policy(states)
        latent, _ = policy.mlp_extractor(states)
        torch.testing.assert_close(values, policy.predict_values(states), rtol=1e-5, atol=1e-6)
        want = policy.mlp_extractor.forward_actor(states)
        torch.testing.assert_close(latent, want, rtol=1e-5, atol=1e-6)


def ppo(smoke: bool) -> dict[str, dict[str, Any]]:
    """Time single calls and training of PPO on CartPole."""
    spec = TASKS["ppo-cartpole"]
    policies = models(spec, ["mlp", "star"])
    for model, _ in policies.values():
        check(model.policy)
    by_policy = {
        name: calls(model.policy, torch.Generator().manual_seed(0))
        for name, (model, _) in policies.items()
    }
    rows: dict[str, dict[str, Any]] = {}
    repeats, many = (2, 3) if smoke else (41, 100)
    for call in by_policy[BASELINE]:
        runs = {name: repeated(each[call], many) for name, each in by_policy.items()}
        rows[call] = interleave(runs, baselines=[BASELINE], repeats=repeats, clock=cpu_clock)
        for each in rows[call].values():
            for kind in ("median_ms", "min_ms", "max_ms"):
                each[kind] /= many
    steps = 256 if smoke else SLICE
    runs = {
        name: (lambda m=model: m.learn(steps, reset_num_timesteps=False))
        for name, (model, _) in policies.items()
    }
    training = f"PPO on CartPole-v1, {steps} steps of training"
    times = interleave(runs, baselines=[BASELINE], repeats=2 if smoke else 21, clock=cpu_clock)
    rows[training] = times
    return {name: with_sizes(times, policies) for name, times in rows.items()}


def sac(width: int, smoke: bool) -> dict[str, dict[str, Any]]:
    """Time updates of SAC on batches of 256."""
    spec = {**TASKS["sac-hopper"], "net_arch": [width, width], "settings": {"learning_starts": 600}}
    policies = models(spec, ["mlp", "star", "star_critic", "product"])
    for model, _ in policies.values():
        model.learn(500)  # random actions, and no update yet
    updates = 1 if smoke else 10
    runs = {
        name: (lambda m=model: m.train(gradient_steps=updates, batch_size=256))
        for name, (model, _) in policies.items()
    }
    times = interleave(runs, baselines=[BASELINE], repeats=1 if smoke else 21, clock=cpu_clock)
    for each in times.values():
        for kind in ("median_ms", "min_ms", "max_ms"):
            each[kind] /= updates
    return {f"update of SAC on Hopper-v5, [{width}, {width}]": with_sizes(times, policies)}


def with_sizes(times: dict[str, Any], policies: dict[str, tuple[Any, int]]) -> dict[str, Any]:
    """Add the number of parameters to the times of each policy."""
    return {name: {**t, "parameters": policies[name][1]} for name, t in times.items()}


def job(smoke: bool = False) -> Job:
    """Make the job: policies, calls and widths that are timed."""
    return {
        "arm": None,
        "seed": None,
        "clock": "CPU",
        "tasks": ["ppo-cartpole", "sac-hopper"],
        "sac_widths": [64, 256],
        "smoke": smoke,
    }


def work(job: Job) -> dict[str, Any]:
    """Time calls and training of PPO, and updates of SAC at each width, on one thread."""
    torch.set_num_threads(1)
    rows = ppo(job["smoke"])
    for width in job["sac_widths"]:
        rows |= sac(width, job["smoke"])
    return rows


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return times and ratios to SB3's policy."""
    header = ["call", "policy", "parameters", "CPU, ms", f"time, x {BASELINE}", "speed, x"]
    body = []
    for call, row in rows.items():
        for name, t in row.items():
            ratios = [f"{t['ratio']:.2f}", f"{1 / t['ratio']:.2f}"]
            body.append([call, name, f"{t['parameters']:,}", f"{t['median_ms']:.3f}", *ratios])
    return markdown_table(header, body)


def ratio_table(rows: dict[str, dict[str, Any]]) -> str:
    """Return the ratios of the arms to SB3's policy."""
    arms = list(dict.fromkeys(a for row in rows.values() for a in row if a != BASELINE))
    lines = [
        [call, *(f"{row[arm]['ratio']:.2f}" if arm in row else "" for arm in arms)]
        for call, row in rows.items()
    ]
    return markdown_table(["call", *arms], lines)


def text(records: Records) -> str:
    """Make the page of the speed of policies."""
    (record,) = records.values()
    rows = record.metrics
    training = next(row for call, row in rows.items() if call.startswith("PPO"))
    sac = [
        row[arm]["ratio"]
        for call, row in rows.items()
        if "SAC" in call
        for arm in row
        if arm not in ("mlp", BASELINE)
    ]
    return TEXT.format(
        ratios=ratio_table(rows),
        value=rows["predict_values, batch 8"]["star"]["ratio"],
        sac_low=min(sac),
        sac_high=max(sac),
        ppo=training["star"]["ratio"],
        table=table(rows),
        conditions=conditions([record]),
    )


STUDY = Study(
    "rl-speed",
    "python -m benchmarks.rl speed",
    lambda: {"speed": job()},
    work,
    lambda records: table(next(iter(records.values())).metrics),
    text,
)
