"""Pages of the reinforcement-learning studies: every number comes from the records."""

from statistics import fmean
from typing import Any

from benchmarks.harness.comparison import difference
from benchmarks.harness.report import conditions, markdown_table, template
from benchmarks.harness.runner import Records
from benchmarks.harness.study import Study
from benchmarks.rl import figures, quality, speed
from benchmarks.rl.quality import interval, values
from benchmarks.rl.tasks import ARMS
from benchmarks.rl.train import train_one


def quality_text(records: Records) -> str:
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

    return template(__file__, "quality").format(
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


QUALITY = Study(
    quality.STUDY,
    "python -m benchmarks.rl quality",
    quality.jobs,
    train_one,
    quality.tables,
    quality_text,
    lambda records: {
        "rl-quality-curves.png": lambda file: figures.plot_curves(records, file),
        "rl-quality.png": lambda file: figures.plot_intervals(quality.summarise(records), file),
    },
)


def ratio_table(rows: dict[str, dict[str, Any]]) -> str:
    """Return the ratios of the arms to SB3's policy."""
    arms = list(dict.fromkeys(a for row in rows.values() for a in row if a != speed.BASELINE))
    lines = [
        [call, *(f"{row[arm]['ratio']:.2f}" if arm in row else "" for arm in arms)]
        for call, row in rows.items()
    ]
    return markdown_table(["call", *arms], lines)


def speed_text(records: Records) -> str:
    """Make the page of the speed of policies."""
    (record,) = records.values()
    rows = record.metrics
    training = next(row for call, row in rows.items() if call.startswith("PPO"))
    sac = [
        row[arm]["ratio"]
        for call, row in rows.items()
        if "SAC" in call
        for arm in row
        if arm not in ("mlp", speed.BASELINE)
    ]
    return template(__file__, "speed").format(
        ratios=ratio_table(rows),
        value=rows["predict_values, batch 8"]["star"]["ratio"],
        sac_low=min(sac),
        sac_high=max(sac),
        ppo=training["star"]["ratio"],
        table=speed.table(rows),
        conditions=conditions([record]),
    )


SPEED = Study(
    "rl-speed",
    "python -m benchmarks.rl speed",
    lambda: {"rl-speed": speed.job()},
    speed.work,
    lambda records: speed.table(next(iter(records.values())).metrics),
    speed_text,
)
STUDIES = (QUALITY, SPEED)
