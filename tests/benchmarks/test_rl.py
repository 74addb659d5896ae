"""The reinforcement-learning study: matched nets, honest scores, runs that repeat."""

import json

import numpy as np
import pytest
import torch
from scipy.stats import trim_mean

from benchmarks.harness.records import Record, append
from benchmarks.harness.runner import definition
from benchmarks.rl import quality, report, speed
from benchmarks.rl.scores import compare, interquartile_mean
from benchmarks.rl.tasks import (
    ARMS,
    DEFAULT_ACTS,
    TASKS,
    counts,
    has,
    matched_widths,
    policy_kwargs,
)
from benchmarks.rl.train import EVALUATIONS, FINAL, build, learning_curve, normalised, train_one

PAIRS = [(task, arm) for task in TASKS for arm in ARMS if has(task, arm)]


@pytest.mark.parametrize("runs", [4, 5, 7, 20, 23])
def test_interquartile_mean_is_scipys(runs):
    scores = np.random.default_rng(runs).normal(size=(3, runs))
    assert np.allclose(interquartile_mean(scores), trim_mean(scores, 0.25, axis=1))


def test_comparison_by_hand():
    theirs = {"a": [0.0, 0.1, 0.2, 0.3], "b": [0.5, 0.5, 0.5, 0.5], "c": [9.0]}
    ours = {"a": [1.0, 1.1, 1.2, 1.3], "b": [0.4, 0.4, 0.6, 0.5]}
    found = compare(ours, theirs)
    assert found["mean over mlp"][0] == pytest.approx((1.15 + 0.475) / 2 - (0.15 + 0.5) / 2)
    assert found["iqm"][0] == pytest.approx((0.5 + 0.6 + 1.0 + 1.1) / 4)
    # of "c" ours has no runs, and it does not count
    assert found["over mlp"][0] == pytest.approx(0.8 - (0.2 + 0.3 + 0.5 + 0.5) / 4)
    assert found["P(improvement)"][0] == pytest.approx((1 + (1 / 4 + 0.5 / 4)) / 2)
    for value, low, high in found.values():
        assert low < value < high
    # within a task: what a bootstrap over all runs would do is draw none of "a" at times
    assert found["P(improvement)"][1] >= 0.5
    assert compare(ours, theirs) == found


def test_two_runs_say_nothing_of_their_spread():
    found = compare({"a": [1.0, 2.0, 3.0], "b": [1.0, 2.0]}, {"a": [0.0] * 3, "b": [0.0] * 3})
    assert found["P(improvement)"][0] == 1
    assert np.isnan([interval[1:] for interval in found.values()]).all()


def test_intervals_are_percentiles_of_a_bootstrap_within_tasks():
    runs = np.array([0.0, 1.0, 4.0])
    draw = np.random.default_rng(0)
    drawn = runs[draw.integers(3, size=(2000, 3))]
    means = np.quantile(drawn.mean(1), (0.025, 0.975))  # three runs: IQM is the mean
    found = compare({"a": list(runs)}, {"a": [0.0, 0.0, 0.0]})
    assert found["iqm"] == pytest.approx([5 / 3, *means])
    assert found["over mlp"] == pytest.approx([5 / 3, *means])
    assert found["mean over mlp"] == pytest.approx([5 / 3, *means])
    # a 27th of all draws has 4 alone, another has 0 alone: the ends of 95 %
    assert found["iqm"][1:] == [0, 4]
    wins = (drawn > 0).mean(1) + 0.5 * (drawn == 0).mean(1)
    assert found["P(improvement)"] == pytest.approx([5 / 6, *np.quantile(wins, (0.025, 0.975))])


def test_the_mean_over_tasks_sees_a_lost_task():
    mlp = {"a": [1.0] * 5, "b": [1.0] * 5, "c": [1.0] * 5, "d": [1.0] * 5, "e": [1.0] * 5}
    lost = {**mlp, "a": [0.0] * 5}
    found = compare(lost, mlp)
    assert found["over mlp"][0] == 0
    assert found["mean over mlp"] == pytest.approx([-0.2, -0.2, -0.2])


def test_intervals_cover_the_truth():
    draw = np.random.default_rng(1)
    means = {"a": 0.2, "b": 0.6}
    truth = np.mean(list(means.values()))  # the scores are symmetric about it
    covered = 0
    for _ in range(20):
        ours = {t: list(draw.normal(m, 0.3, 10)) for t, m in means.items()}
        _, low, high = compare(ours, ours)["iqm"]
        covered += low < truth < high
    assert covered >= 16


@pytest.mark.studies
@pytest.mark.parametrize(("task", "arm"), PAIRS)
def test_parameters_are_matched(task, arm):
    spec = TASKS[task]
    widths = matched_widths(spec, arm)
    base = dict.fromkeys(widths, spec["net_arch"][0])
    want = counts(spec, policy_kwargs(spec, "mlp", base))
    found = counts(spec, policy_kwargs(spec, arm, widths))
    assert found == pytest.approx(want, rel=0.035)
    if arm == "mlp":
        assert widths == base
        kwargs = {"net_arch": spec["net_arch"]}
        stock = build(spec, kwargs, 0, "MlpPolicy").policy
        online = [p for name, p in stock.named_parameters() if "target" not in name]
        assert sum(p.numel() for p in online) == sum(want.values())


def test_jobs_are_whole_seeds():
    jobs = quality.jobs()
    assert len(jobs) == 5 * (8 + 8 + 8 + 12 + 12)
    seeds = [job["seed"] for job in jobs.values()]
    assert seeds == sorted(seeds)
    for job in jobs.values():
        assert definition(job) == json.loads(json.dumps(definition(job)))
    simba = jobs["sac-pendulum-simba-seed1"]
    assert (simba["nets"], simba["depths"]) == (["simba", "simba"], {"simba": 1})
    assert jobs["sac-pendulum-star-seed1"]["default_acts"] == {"star": "tanh"}
    assert len({json.dumps(definition(job)) for job in jobs.values()}) == 48
    assert all(job["scale"] == 1 for job in jobs.values())
    assert "dqn-cartpole-star_critic-seed0" not in jobs
    assert "ppo-cartpole-star_relu-seed0" not in jobs  # its mlp has tanh, as its star
    assert "ppo-cartpole-product-seed0" not in jobs


def small(task, arm, **settings):
    spec = quality.specification(task, smoke=True)
    return {"task": task, "arm": arm, "seed": 3, "spec": spec, "scale": 1.0, **settings}


@pytest.mark.studies
@pytest.mark.parametrize(
    ("task", "arm"),
    [("ppo-cartpole", "simba"), ("dqn-cartpole", "star"), ("td3-pendulum", "product")],
)
def test_a_run_is_the_same_again(task, arm):
    job = small(task, arm)
    job["spec"] = {**job["spec"], "normalize": task == "ppo-cartpole"}
    runs = [train_one(job) for _ in range(2)]
    for run in runs:
        assert run.pop("seconds") > 0
        assert run.pop("steps_per_cpu_second") > 0
    assert runs[0] == runs[1]
    run, spec = runs[0], job["spec"]
    assert len(run["curve"]["returns"]) == len(run["curve"]["timesteps"]) == EVALUATIONS
    assert run["curve"]["timesteps"] == sorted(run["curve"]["timesteps"])
    assert run["curve"]["timesteps"][-1] == run["steps"] >= spec["steps"]
    assert run["final"] == pytest.approx(np.mean(run["final_returns"]))
    assert len(run["final_returns"]) == FINAL
    assert run["auc"] == pytest.approx(normalised(spec, np.mean(run["curve"]["returns"])))
    assert run["initial_scale"].keys() == run["parameters"].keys()
    assert all(scale > 0 for scale in run["initial_scale"].values())
    assert json.loads(json.dumps(run)) == run


@pytest.mark.studies
@pytest.mark.parametrize("task", ["ppo-cartpole", "sac-pendulum", "td3-pendulum", "dqn-cartpole"])
def test_the_mlp_arm_is_sb3s_policy(task):
    job = small(task, "mlp")
    stock = build(job["spec"], {"net_arch": job["spec"]["net_arch"]}, 3000, "MlpPolicy")
    assert learning_curve(stock, job["spec"])[0] == train_one(job)["curve"]


def test_scores_are_0_at_random_and_1_at_the_anchor():
    for spec in TASKS.values():
        assert normalised(spec, [spec["random"], spec["anchor"]]).tolist() == [0, 1]
        assert spec["random"] < spec["anchor"]


@pytest.mark.studies
@pytest.mark.parametrize(("arm", "net"), [("star", "star"), ("simba", "simba")])
def test_default_activations_are_those_of_the_definition(arm, net):
    spec = {**TASKS["ppo-cartpole"], "net_arch": [8, 8]}
    kwargs = policy_kwargs(spec, arm, {"pi": 8, "vf": 8})
    policy = build(spec, kwargs, 0).policy
    acts = {m.act for m in policy.modules() if isinstance(getattr(m, "act", None), str)}
    acts |= {type(m).__name__.lower() for m in policy.modules() if isinstance(m, torch.nn.ReLU)}
    assert acts == {DEFAULT_ACTS[net]}


def records():
    made = []
    for seed in range(4):
        for task, arms in (("ppo-cartpole", ("mlp", "star")), ("sac-pendulum", ARMS)):
            for i, arm in enumerate(arms):
                if has(task, arm):
                    name = f"{task}-{arm}-seed{seed}"
                    metrics = {
                        "curve": {"timesteps": [1, 2], "returns": [-seed, i - seed]},
                        "final": 100.0 + i + seed,
                        "score": 0.5 + 0.1 * i,
                        "auc": 0.5 - 0.01 * i,
                        "parameters": {"pi": 10, "qf": 20},
                        "steps_per_cpu_second": 100.0 / (1 + i),
                    }
                    what = {"task": task, "spec": TASKS[task]}
                    made.append(Record("rl", name, arm, seed, what, metrics))
    return {r.run: r for r in made}


def test_tables_and_figures_are_made_from_the_records_alone(tmp_path):
    made = records()
    text = quality.tables(made)
    assert "| star | 102.5 ± 2.1 | 105.5 ± 2.1 |" in text
    assert "| product | - | 111.5 ± 2.1 |" in text
    one = "+1.00 [+1.00, +1.00]"
    assert f"| product (1 task) | 1.50 [1.50, 1.50] | {one} | {one} | -0.10 [-0.10, -0.10]" in text
    rows = quality.summarise(made)
    assert rows["star"]["seeds"] == {"ppo-cartpole": 4, "sac-pendulum": 4}
    assert rows["star"]["speed over tasks"] == pytest.approx((1 / 2 * 1 / 5) ** 0.5)
    assert rows["star"]["score"]["P(improvement)"] == [1, 1, 1]
    assert rows["star"]["auc"]["P(improvement)"] == [0, 0, 0]
    report.plot_curves(made, tmp_path / "curves.png")
    report.plot_intervals(rows, tmp_path / "intervals.png")
    for figure in ("curves.png", "intervals.png"):
        assert (tmp_path / figure).stat().st_size > 10_000


@pytest.mark.studies
def test_time_matching_is_measured_once(tmp_path):
    share = quality.time_share("td3-pendulum", "product", True, tmp_path)
    (file,) = tmp_path.iterdir()
    (line,) = file.read_text().splitlines()
    content = json.loads(line)
    assert content["metrics"]["ratios"].keys() == {str(share)}
    assert quality.time_share("td3-pendulum", "product", True, tmp_path) == share
    assert file.read_text().count("\n") == 1
    known = {name: content[name] for name in ("study", "run", "arm", "seed", "definition")}
    append(Record(**known, metrics={"ratios": {"0.85": 1.3, "0.4": 1.05, "0.25": 0.9}}), tmp_path)
    assert quality.time_share("td3-pendulum", "product", True, tmp_path) == 0.4


@pytest.mark.studies
def test_speed_of_what_computes_the_same(monkeypatch):
    rows = speed.ppo(smoke=True)
    for row in rows.values():
        assert list(row) == [speed.BASELINE, "mlp", "star"]
        assert row[speed.BASELINE]["ratio"] == 1
        assert row["mlp"]["parameters"] == row[speed.BASELINE]["parameters"]
    assert speed.table(rows).count("\n") == 2 + 3 * len(rows) == 2 + 3 * 6
    model = build(TASKS["ppo-cartpole"], {"net_arch": [8]}, 0)
    speed.check(model.policy)
    shifted = type(model.policy.mlp_extractor).forward
    monkeypatch.setattr(
        type(model.policy.mlp_extractor), "forward", lambda s, x: [y + 1 for y in shifted(s, x)]
    )
    with pytest.raises(AssertionError):
        speed.check(model.policy)
