"""Figures of the reinforcement-learning study."""

from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.harness.comparison import difference, mean_interval
from benchmarks.harness.report import conditions
from benchmarks.harness.runner import Records
from benchmarks.harness.study import Study
from benchmarks.rl import quality
from benchmarks.rl.quality import interval, values
from benchmarks.rl.scores import FEWEST
from benchmarks.rl.tasks import ARMS, TASKS
from benchmarks.rl.train import train_one

TEXT = """\
## Study: star policies and critics

**The question.** Do agents learn more, or sooner, with star layers than with the MLP of
stable-baselines3 or with published nets of equal size?

**What was done.** {tasks} tasks, {arms} nets, {seeds} seeds, {runs} runs. Hyperparameters are
rl-baselines3-zoo's, on shorter budgets ({budgets}) and with a small MLP ({net_arch}); every
other net has as many parameters. Scores are normalised: a random policy has 0, the zoo's
agent 1. Intervals are 95 %: of means (Student) in the first table, stratified bootstraps in the
second. `_ln` is a LayerNorm behind each layer; `mlp_tanh` and `star_relu` are there because
stars have tanh where SB3 has relu.

{returns}
IQM is the interquartile mean over the runs of all tasks. It cannot see a task that is lost in
less than a quarter of all runs, which the mean over tasks beside it does. An interval of no
width, such as a probability of 1.00 [1.00, 1.00], is what a bootstrap makes of few runs that all
agree; it is not certainty.

{scores}
![over the mlp, with intervals](../figures/rl-quality.png)

![learning curves](../figures/rl-quality-curves.png)

**The answer, in plain words.**

- *A critic that multiplies state and action learned faster.* On both Pendulums, the only tasks
  with such critics here, its area under the curve exceeds the MLP's by {product_auc}; without
  the norms by {raw_auc}. *But so did an MLP with tanh instead of relu*: its area on SAC is
  {tanh_sac:.2f} against {product_sac:.2f} for the product and {mlp_sac:.2f} for the MLP, on TD3
  {tanh_td3:.2f}, {product_td3:.2f} and {mlp_td3:.2f}. So the product is not needed for the gain.
  All nets end at nearly the same return: these tasks saturate and say nothing about hard ones.
- *Stars everywhere*: final score {star_iqm} by IQM, {star_mean} by the mean over tasks;
  undecided where the interval holds 0. Their speed is {star_speed:.2f} of the MLP's.
- *A plain star as the value of PPO is a risk.* On Acrobot {star_lost} of {acrobot} seeds never
  left the worst return ({critic_lost} with a star value behind an MLP actor), where {mlp_lost}
  of the MLP's did. `star_critic` is {critic_iqm} by IQM but {critic_mean} by the mean over its
  tasks. The actor is not the cause: with star actors {actor_lost} seeds were lost. With a
  LayerNorm (`norm="layer"`) {ln_lost} were, and the final score differs from the MLP's by
  {ln_iqm}; it is what we would take, at {ln_speed:.2f} of the MLP's speed.
- *Whether the first branch has to be bounded rests on one task.* With relu, as SB3 has it for
  DQN, stars ended at {relu_low:.0f} to {relu_high:.0f} on CartPole; with tanh at
  {dqn_star_low:.0f} to {dqn_star_high:.0f}, the MLP at {dqn_mlp_low:.0f} to {dqn_mlp_high:.0f}.
  Against the MLP the relu star has p = {p_mlp_paired:.3f} paired by seed and {p_mlp_welch:.3f}
  without pairing, against the tanh star {p_paired:.3f} and {p_welch:.3f}: two of very many
  comparisons, and uncorrected. tanh is the default of stars.
- *SimBa did not help at this size and budget* (area {simba_auc}). It has one narrow block, which
  is what so small a net has parameters for; it is undecided over all tasks. It is published for
  nets a hundred times as large and for hundreds of thousands of steps, which were not tried.
- D2RL and an MLP with LayerNorm are undecided against the MLP.

What to keep in mind: {tasks} small tasks, some of them saturated; DQN on CartPole scatters over
the whole range for every net. The default activation of stars and the size of their second
branches at the start were settled after first runs on Acrobot and DQN CartPole, with other seeds
than those above but on these tasks; neither is held out. Runs shared machines with other work,
so speeds in the last column are rough; Speed has them measured in turn. SAC on
MuJoCo (`--tier b`) and the time-matched form (`--match time`) are written and were not run.

**Conditions**

{conditions}
"""


def plot_curves(records: Records, file: Path) -> None:
    """Draw a panel a task: mean returns over the budget, with 95 % intervals as bands."""
    from matplotlib.figure import Figure

    tasks = [t for t in TASKS if any((r.definition or {})["task"] == t for r in records.values())]
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
    """Draw what each arm gains over the MLP, on the tasks that it has."""
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


def text(records: Records) -> str:
    """Make the page of the reinforcement-learning study."""
    summary = quality.summarise(records)
    acrobot = {arm: values(records, arm, "final").get("ppo-acrobot", []) for arm in ARMS}
    worst = min(score for scores in acrobot.values() for score in scores)
    lost = {arm: sum(s == worst for s in scores) for arm, scores in acrobot.items()}
    dqn = {arm: values(records, arm, "final")["dqn-cartpole"] for arm in ("mlp", "star_relu")}
    dqn["star"] = values(records, "star", "final")["dqn-cartpole"]
    by_seed = {arm: dict(enumerate(scores)) for arm, scores in dqn.items()}
    bounded = difference(by_seed["star"], by_seed["star_relu"])
    plain = difference(by_seed["mlp"], by_seed["star_relu"])
    assert bounded is not None
    assert plain is not None
    auc = {
        (arm, task.split("-")[0]): fmean(runs)
        for arm in ("mlp", "mlp_tanh", "product")
        for task, runs in values(records, arm, "auc").items()
    }
    specs = {r.definition["task"]: r.definition["spec"] for r in records.values() if r.definition}

    def over(arm: str, measure: str = "over mlp", what: str = "score") -> str:
        return interval(summary[arm][what][measure], "+")

    return TEXT.format(
        tasks=len(specs),
        arms=len(summary),
        seeds=len({r.seed for r in records.values()}),
        runs=len(records),
        budgets=", ".join(f"{task}: {spec['steps']:,} steps" for task, spec in specs.items()),
        net_arch=" or ".join(dict.fromkeys(f"`{spec['net_arch']}`" for spec in specs.values())),
        returns=quality.returns_table(summary),
        scores=quality.scores_table(summary),
        product_auc=over("product", what="auc"),
        raw_auc=over("product_raw", what="auc"),
        tanh_sac=auc["mlp_tanh", "sac"],
        product_sac=auc["product", "sac"],
        mlp_sac=auc["mlp", "sac"],
        tanh_td3=auc["mlp_tanh", "td3"],
        product_td3=auc["product", "td3"],
        mlp_td3=auc["mlp", "td3"],
        star_iqm=over("star"),
        star_mean=over("star", "mean over mlp"),
        star_speed=summary["star"]["speed over tasks"],
        star_lost=lost["star"],
        acrobot=len(acrobot["star"]),
        critic_lost=lost["star_critic"],
        mlp_lost=lost["mlp"] or "none",
        critic_iqm=over("star_critic"),
        critic_mean=over("star_critic", "mean over mlp"),
        actor_lost=lost["star_actor"] or "no",
        ln_lost=lost["star_ln"] or "none",
        ln_iqm=over("star_ln"),
        ln_speed=summary["star_ln"]["speed over tasks"],
        relu_low=min(dqn["star_relu"]),
        relu_high=max(dqn["star_relu"]),
        dqn_star_low=min(dqn["star"]),
        dqn_star_high=max(dqn["star"]),
        dqn_mlp_low=min(dqn["mlp"]),
        dqn_mlp_high=max(dqn["mlp"]),
        p_mlp_paired=plain.paired,
        p_mlp_welch=plain.welch,
        p_paired=bounded.paired,
        p_welch=bounded.welch,
        simba_auc=over("simba", what="auc"),
        conditions=conditions(records.values()),
    )


STUDY = Study(
    quality.STUDY,
    "python -m benchmarks.rl quality",
    quality.jobs,
    train_one,
    quality.tables,
    text,
    lambda records: {
        "rl-quality-curves.png": lambda file: plot_curves(records, file),
        "rl-quality.png": lambda file: plot_intervals(quality.summarise(records), file),
    },
)
