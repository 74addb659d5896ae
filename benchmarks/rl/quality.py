"""Star policies and critics against MLPs and published nets, at matched parameters or time."""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.comparison import mean_interval, with_half
from benchmarks.harness.records import RESULTS
from benchmarks.harness.report import markdown_table
from benchmarks.harness.runner import Job, Records, current, measure_once
from benchmarks.harness.timing import interleave
from benchmarks.rl.scores import compare
from benchmarks.rl.tasks import (
    ARMS,
    DEFAULT_ACTS,
    DEPTHS,
    TASKS,
    has,
    matched_widths,
    policy_kwargs,
)
from benchmarks.rl.train import MEASURED, build

STUDY = "rl-quality"
CALIBRATION = "rl-time-calibration"
SMOKE: dict[str, dict[str, Any]] = {
    "PPO": {"n_steps": 16, "n_epochs": 1, "batch_size": 64},
    "SAC": {"learning_starts": 100},
    "TD3": {"learning_starts": 100},
    "DQN": {"learning_starts": 100, "train_freq": 16, "gradient_steps": 1},
}
SMOKE_STEPS = 320
#: shares of the parameter-matched width among which time matching chooses
SHARES = (1.0, 0.85, 0.7, 0.55, 0.4, 0.25)
SLICE = 1024


def specification(task: str, smoke: bool) -> dict[str, Any]:
    """Return a task's algorithm, environment and settings; few steps of them in a smoke run."""
    spec = TASKS[task]
    if not smoke:
        return spec
    return {**spec, "steps": SMOKE_STEPS, "settings": spec["settings"] | SMOKE[spec["algo"]]}


def jobs(
    tasks: list[str] | None = None,
    arms: list[str] | None = None,
    seeds: int = 5,
    match: str = "parameters",
    smoke: bool = False,
    out: Path = RESULTS,
) -> dict[str, Job]:
    """Make all jobs by name, seeds outermost: a study stopped early has whole seeds.

    Without `tasks` and `arms`: all arms on the tasks of tier a.
    """
    tasks = tasks or [task for task, spec in TASKS.items() if spec["tier"] == "a"]
    return {
        f"{task}-{arm}{'-time' if match == 'time' else ''}-seed{seed}": {
            "arm": arm,
            "seed": seed,
            "task": task,
            "spec": specification(task, smoke),
            **_net(arm),
            "measured": MEASURED,
            "match": match,
            "scale": 1.0 if match == "parameters" else time_share(task, arm, smoke, out),
        }
        for seed in range(seeds)
        for task in tasks
        for arm in arms or ARMS
        if has(task, arm)
    }


def _net(arm: str) -> dict[str, Any]:
    """Return what an arm is: the nets of both sides, and the other options."""
    actor, critic, options = ARMS[arm]
    nets = {actor, critic}
    return {
        "nets": [actor, critic],
        "options": options,
        "depths": {net: DEPTHS[net] for net in nets if net in DEPTHS},
        "default_acts": {net: DEFAULT_ACTS[net] for net in nets if net in DEFAULT_ACTS},
    }


def time_share(task: str, arm: str, smoke: bool, out: Path = RESULTS) -> float:
    """Return the share of the matched width whose training takes as long as the MLP's.

    It is measured once and recorded.
    """
    study = f"{CALIBRATION}-smoke" if smoke else CALIBRATION
    job = {"arm": arm, "seed": None, "task": task, "spec": specification(task, smoke), **_net(arm)}
    run = f"{task}-{arm}"
    if not (records := current(study, {run: job}, out)):
        measure_once(study, job, {"ratios": _time_ratios(task, arm, smoke)}, run=run, folder=out)
        records = current(study, {run: job}, out)
    ratios = records[run].metrics["ratios"]
    return float(min(ratios, key=lambda share: abs(np.log(ratios[share]))))


def _time_ratios(task: str, arm: str, smoke: bool) -> dict[str, float]:
    """Train each share of the width in turn with the MLP, and return the ratios of their times."""
    spec = specification(task, smoke)
    steps = spec.get("n_envs", 1) * spec["settings"].get("n_steps", 0) or SLICE
    if smoke:
        steps = SMOKE_STEPS // 2
    widths = matched_widths(spec, arm)
    mlp = dict.fromkeys(widths, spec["net_arch"][0])
    kwargs = {"mlp": policy_kwargs(spec, "mlp", mlp)}
    for share in SHARES[-1:] if smoke else SHARES:
        narrow = {side: max(1, round(share * width)) for side, width in widths.items()}
        kwargs[str(share)] = policy_kwargs(spec, arm, narrow)
    runs = {}
    # no random actions first: every slice has its updates
    settings = {k: v for k, v in spec["settings"].items() if k != "learning_starts"}
    for name, kw in kwargs.items():
        model = build({**spec, "settings": settings}, kw, 0)
        runs[name] = lambda m=model: m.learn(steps, reset_num_timesteps=False)
    times = interleave(runs, baselines=["mlp"], repeats=1 if smoke else 5)
    return {name: t["ratio"] for name, t in times.items() if name != "mlp"}


def values(records: Records, arm: str, metric: str) -> dict[str, list[Any]]:
    """Return a metric of an arm's runs by task."""
    by_task: dict[str, list[Any]] = {}
    for record in records.values():
        if record.arm == arm:
            assert record.definition is not None
            by_task.setdefault(record.definition["task"], []).append(record.metrics[metric])
    return by_task


def summarise(records: Records) -> dict[str, dict[str, Any]]:
    """Return for each arm its returns and sizes by task, and its scores over all of its tasks."""
    summary = {}
    speed = {t: np.mean(v) for t, v in values(records, "mlp", "steps_per_cpu_second").items()}
    baseline = {metric: values(records, "mlp", metric) for metric in ("score", "auc")}
    for arm in ARMS:
        returns = values(records, arm, "final")
        if not returns or not returns.keys() <= speed.keys():
            continue  # nothing to compare with yet
        speeds = values(records, arm, "steps_per_cpu_second")
        ratios = {task: float(np.mean(speeds[task]) / speed[task]) for task in speeds}
        sizes = values(records, arm, "parameters")
        summary[arm] = {
            "returns": {task: mean_interval(runs) for task, runs in returns.items()},
            "seeds": {task: len(runs) for task, runs in returns.items()},
            "parameters": {task: sum(runs[0].values()) for task, runs in sizes.items()},
            "speed": ratios,
            "speed over tasks": float(np.exp(np.mean(np.log(list(ratios.values()))))),
            **{
                metric: compare(values(records, arm, metric), baseline[metric])
                for metric in baseline
            },
        }
    return summary


def interval(numbers: list[float], sign: str = "") -> str:
    """Return a value and its interval as text."""
    value, low, high = numbers
    if np.isnan(low):
        return f"{value:{sign}.2f}"
    return f"{value:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"


def returns_table(summary: dict[str, dict[str, Any]]) -> str:
    """Return final returns by task, with 95 % intervals."""
    tasks = [task for task in TASKS if any(task in row["returns"] for row in summary.values())]
    lines = [
        [arm, *(with_half(row["returns"][t], 1) if t in row["returns"] else "-" for t in tasks)]
        for arm, row in summary.items()
    ]
    return markdown_table(["arm", *tasks], lines)


def scores_table(summary: dict[str, dict[str, Any]]) -> str:
    """Return scores over tasks and their distances to the MLP's, with 95 % intervals."""
    most = max(len(row["returns"]) for row in summary.values())
    lines = []
    for arm, row in summary.items():
        number = len(row["returns"])
        name = arm if number == most else f"{arm} ({number} task{'s' * (number > 1)})"
        cells = [interval(row["score"]["iqm"])]
        if arm == "mlp":
            cells += ["-"] * 5
        else:
            cells += [interval(row["score"][m], "+") for m in ("over mlp", "mean over mlp")]
            cells.append(interval(row["auc"]["over mlp"], "+"))
            cells += [interval(row[what]["P(improvement)"]) for what in ("score", "auc")]
        lines.append([name, *cells, f"{row['speed over tasks']:.2f}"])
    header = ["arm", "IQM of final score", "final, IQM over mlp", "final, mean over mlp"]
    header += ["area under curve, IQM over mlp", "P(final better)", "P(area better)"]
    return markdown_table([*header, "steps per CPU-second, x mlp"], lines)


def tables(records: Records) -> str:
    """Return both tables."""
    summary = summarise(records)
    return f"{returns_table(summary)}\n{scores_table(summary)}"
