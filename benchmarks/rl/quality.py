"""Star policies and critics against MLPs and published nets, at matched parameters or time."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import interleave, markdown_table, mean_interval, run_study, write_json
from benchmarks.comparison import shown
from benchmarks.rl_scores import FEWEST, compare
from benchmarks.rl_tasks import ARMS, TASKS, has, matched_widths, policy_kwargs
from benchmarks.rl_train import build, train_one

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

Records = dict[str, dict[str, Any]]


def specification(task: str, smoke: bool) -> dict[str, Any]:
    spec = TASKS[task]
    if not smoke:
        return spec
    return {**spec, "steps": SMOKE_STEPS, "settings": spec["settings"] | SMOKE[spec["algo"]]}


def jobs(
    tasks: list[str], arms: list[str], seeds: int, match: str, smoke: bool, out: Path
) -> dict[str, dict[str, Any]]:
    """All runs by name, seeds outermost: a study stopped early has whole seeds."""
    return {
        f"{task}-{arm}-seed{seed}": {
            "task": task,
            "arm": arm,
            "seed": seed,
            "spec": specification(task, smoke),
            "match": match,
            "scale": 1.0 if match == "parameters" else time_share(task, arm, smoke, out),
        }
        for seed in range(seeds)
        for task in tasks
        for arm in arms
        if has(task, arm)
    }


def time_share(task: str, arm: str, smoke: bool, out: Path) -> float:
    """The share of the matched width whose training takes as long as the MLP's, kept on disk."""
    file = out / ("rl-time-smoke" if smoke else "rl-time") / "calibration" / f"{task}-{arm}.json"
    if not file.is_file():
        spec = specification(task, smoke)
        slice_ = spec.get("n_envs", 1) * spec["settings"].get("n_steps", 0) or SLICE
        if smoke:
            slice_ = SMOKE_STEPS // 2
        widths = matched_widths(spec, arm)
        mlp = dict.fromkeys(widths, spec["net_arch"][0])
        kwargs = {"mlp": policy_kwargs(spec, "mlp", mlp)}
        for share in SHARES[-1:] if smoke else SHARES:
            narrow = {side: max(1, round(share * width)) for side, width in widths.items()}
            kwargs[str(share)] = policy_kwargs(spec, arm, narrow)
        runs = {}
        for name, kw in kwargs.items():
            # no random actions first: every slice has its updates
            settings = {k: v for k, v in spec["settings"].items() if k != "learning_starts"}
            model = build({**spec, "settings": settings}, kw, 0)
            runs[name] = lambda m=model: m.learn(slice_, reset_num_timesteps=False)
        times = interleave(runs, baselines=["mlp"], repeats=1 if smoke else 5)
        ratios = {name: t["ratio"] for name, t in times.items() if name != "mlp"}
        write_json(file, ratios)
    ratios = json.loads(file.read_text())
    return float(min(ratios, key=lambda share: abs(np.log(ratios[share]))))


def values(records: Records, arm: str, what: str) -> dict[str, list[float]]:
    """A value of an arm's runs by task."""
    found: dict[str, list[float]] = {}
    for record in records.values():
        if record["job"]["arm"] == arm:
            found.setdefault(record["job"]["task"], []).append(record[what])
    return found


def summarise(records: Records) -> dict[str, dict[str, Any]]:
    """Of each arm: its final returns and sizes by task, and its standing over all of its tasks."""
    rows = {}
    speed = {t: np.mean(v) for t, v in values(records, "mlp", "steps_per_cpu_second").items()}
    baseline = {what: values(records, "mlp", what) for what in ("score", "auc")}
    for arm in ARMS:
        returns = values(records, arm, "final")
        if not returns or not returns.keys() <= speed.keys():
            continue  # nothing to compare with yet
        speeds = values(records, arm, "steps_per_cpu_second")
        ratios = {task: float(np.mean(speeds[task]) / speed[task]) for task in speeds}
        sizes = values(records, arm, "parameters")
        rows[arm] = {
            "returns": {task: mean_interval(found) for task, found in returns.items()},
            "seeds": {task: len(found) for task, found in returns.items()},
            "parameters": {task: sum(found[0].values()) for task, found in sizes.items()},
            "speed": ratios,
            "speed over tasks": float(np.exp(np.mean(np.log(list(ratios.values()))))),
            **{what: compare(values(records, arm, what), baseline[what]) for what in baseline},
        }
    return rows


def interval(numbers: list[float], sign: str = "") -> str:
    value, low, high = numbers
    if np.isnan(low):
        return f"{value:{sign}.2f}"
    return f"{value:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"


def tables(rows: dict[str, dict[str, Any]]) -> str:
    """Final returns by task, and the standing over tasks, as Markdown with 95 % intervals."""
    tasks = [task for task in TASKS if any(task in row["returns"] for row in rows.values())]
    by_task = [
        [arm, *(shown(row["returns"][t], 1) if t in row["returns"] else "-" for t in tasks)]
        for arm, row in rows.items()
    ]
    most = max(len(row["returns"]) for row in rows.values())
    over = []
    for arm, row in rows.items():
        name = arm if len(row["returns"]) == most else f"{arm} ({len(row['returns'])} tasks)"
        cells = [interval(row["score"]["iqm"])]
        for what in ("score", "auc"):
            cells.append("-" if arm == "mlp" else interval(row[what]["over mlp"], "+"))
        for what in ("score", "auc"):
            cells.append("-" if arm == "mlp" else interval(row[what]["P(improvement)"]))
        over.append([name, *cells, f"{row['speed over tasks']:.2f}"])
    header = ["arm", "IQM of final score", "final, over mlp", "area under curve, over mlp"]
    header += ["P(final better)", "P(area better)", "steps per CPU-second, x mlp"]
    return f"{markdown_table(['arm', *tasks], by_task)}\n{markdown_table(header, over)}"


def plot_curves(records: Records, file: Path) -> None:
    """A panel a task: mean returns over the budget, with 95 % intervals as bands."""
    from matplotlib.figure import Figure

    tasks = [t for t in TASKS if any(r["job"]["task"] == t for r in records.values())]
    columns = min(3, len(tasks))
    lines = -(-len(tasks) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for ax in axes[len(tasks) :]:
        ax.axis("off")
    for ax, task in zip(axes, tasks):
        for i, arm in enumerate(ARMS):
            curves = values(records, arm, "curve").get(task, [])
            if not curves:
                continue
            points = [mean_interval(p) for p in zip(*(c["returns"] for c in curves))]
            mean, half = np.array(points).T
            steps = np.mean([c["timesteps"] for c in curves], 0) / 1000
            style = "-" if i < 10 else "--"  # there are ten colours
            ax.plot(steps, mean, style, color=f"C{i % 10}", label=arm, lw=1.2)
            if len(curves) >= FEWEST:
                ax.fill_between(
                    steps, mean - half, mean + half, color=f"C{i % 10}", alpha=0.08, lw=0
                )
        # the bands of few runs are wide: the axis is that of their means
        ends = [end for line in ax.lines for end in (min(line.get_ydata()), max(line.get_ydata()))]
        margin = 0.05 * (max(ends) - min(ends)) or 1
        ax.set_ylim(min(ends) - margin, max(ends) + margin)
        ax.set_title(task, fontsize=10)
        ax.set_xlabel("thousand steps", fontsize=8)
        ax.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    for ax in axes[1 : len(tasks)]:
        for handle, label in zip(*ax.get_legend_handles_labels()):
            if label not in labels:
                handles, labels = [*handles, handle], [*labels, label]
    spare = axes[len(tasks)] if len(tasks) < len(axes) else figure
    place = "center" if spare is not figure else "outside right center"
    spare.legend(handles, labels, loc=place, fontsize=8)
    figure.savefig(file, dpi=120)


def plot_intervals(rows: dict[str, dict[str, Any]], file: Path) -> None:
    """What each arm gains over the MLP, on the tasks that it has."""
    from matplotlib.figure import Figure

    panels = {
        "final score, IQM over mlp's": ("score", "over mlp", 0.0),
        "area under curve, IQM over mlp's": ("auc", "over mlp", 0.0),
        "P(final score above mlp's)": ("score", "P(improvement)", 0.5),
    }
    arms = [arm for arm in rows if arm != "mlp"][::-1]
    figure = Figure(figsize=(10, 1.2 + 0.3 * len(arms)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True)
    for ax, (title, (what, measure, even)) in zip(axes, panels.items()):
        for y, arm in enumerate(arms):
            value, low, high = rows[arm][what][measure]
            colour = "C2" if low > even else "C3" if high < even else "C7"
            ax.errorbar(value, y, xerr=[[value - low], [high - value]], fmt="o", color=colour)
        ax.axvline(even, color="k", lw=0.8)
        ax.set_title(title, fontsize=9)
        ax.grid(axis="x", alpha=0.3)
    names = [f"{arm} ({len(rows[arm]['returns'])} tasks)" for arm in arms]
    axes[0].set_yticks(range(len(arms)), names, fontsize=8)
    figure.savefig(file, dpi=120)


def run(jobs_: dict[str, dict[str, Any]], folder: Path, report: Path, processes: int) -> None:
    """Run what is missing, and write table, figures and summary beside each other."""
    records = run_study(folder, jobs_, train_one, processes=processes)
    rows = summarise(records)
    text = tables(rows)
    print(text)
    first = next(iter(records.values()))
    write_json(
        report.with_suffix(".json"),
        {
            "arms": rows,
            "tasks": {r["job"]["task"]: r["job"]["spec"] for r in records.values()},
            "match": first["job"]["match"],
            "versions": first["versions"],
            "environment": first["environment"],
        },
    )
    report.with_suffix(".md").write_text(text)
    plot_curves(records, report.with_name(f"{report.name}-curves.png"))
    plot_intervals(rows, report.with_suffix(".png"))
