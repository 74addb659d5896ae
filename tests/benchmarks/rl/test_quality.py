"""The reinforcement-learning study: matched nets, honest scores, runs that repeat."""

import json

import numpy as np
import pytest
import typer
from scipy.stats import trim_mean

from benchmarks import rl, rl_quality, rl_speed
from benchmarks.common import write_json
from benchmarks.rl_scores import compare, interquartile_mean
from benchmarks.rl_tasks import ARMS, TASKS, counts, has, matched_widths, policy_kwargs
from benchmarks.rl_train import EVALUATIONS, FINAL, build, learning_curve, normalised, train_one

PAIRS = [(task, arm) for task in TASKS for arm in ARMS if has(task, arm)]


@pytest.mark.parametrize("runs", [4, 5, 7, 20, 23])
def test_interquartile_mean_is_scipys(runs):
    scores = np.random.default_rng(runs).normal(size=(3, runs))
    assert np.allclose(interquartile_mean(scores), trim_mean(scores, 0.25, axis=1))


def test_comparison_by_hand():
    theirs = {"a": [0.0, 0.1, 0.2, 0.3], "b": [0.5, 0.5, 0.5, 0.5], "c": [9.0]}
    ours = {"a": [1.0, 1.1, 1.2, 1.3], "b": [0.4, 0.4, 0.6, 0.5]}
    found = compare(ours, theirs)
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


def test_jobs_are_whole_seeds(tmp_path):
    tier = [task for task, spec in TASKS.items() if spec["tier"] == "a"]
    jobs = rl_quality.jobs(tier, list(ARMS), 5, "parameters", False, tmp_path)
    assert len(jobs) == 5 * (8 + 8 + 8 + 12 + 12)
    seeds = [job["seed"] for job in jobs.values()]
    assert seeds == sorted(seeds)
    assert json.loads(json.dumps(jobs)) == jobs  # or a stopped study would not find its runs
    assert all(job["scale"] == 1 for job in jobs.values())
    assert "dqn-cartpole-star_critic-seed0" not in jobs
    assert "ppo-cartpole-star_relu-seed0" not in jobs  # its mlp has tanh, as its star
    assert "ppo-cartpole-product-seed0" not in jobs


def small(task, arm, **settings):
    spec = rl_quality.specification(task, smoke=True)
    return {"task": task, "arm": arm, "seed": 3, "spec": spec, "scale": 1.0, **settings}


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


@pytest.mark.parametrize("task", ["ppo-cartpole", "sac-pendulum", "td3-pendulum", "dqn-cartpole"])
def test_the_mlp_arm_is_sb3s_policy(task):
    job = small(task, "mlp")
    stock = build(job["spec"], {"net_arch": job["spec"]["net_arch"]}, 3000, "MlpPolicy")
    assert learning_curve(stock, job["spec"])[0] == train_one(job)["curve"]


def test_scores_are_0_at_random_and_1_at_the_anchor():
    for spec in TASKS.values():
        assert normalised(spec, [spec["random"], spec["anchor"]]).tolist() == [0, 1]
        assert spec["random"] < spec["anchor"]


def records():
    found = {}
    for seed in range(4):
        for task, arms in (("ppo-cartpole", ("mlp", "star")), ("sac-pendulum", ARMS)):
            for i, arm in enumerate(arms):
                if has(task, arm):
                    found[f"{task}-{arm}-seed{seed}"] = {
                        "job": {
                            "task": task,
                            "arm": arm,
                            "seed": seed,
                            "spec": TASKS[task],
                            "match": "parameters",
                        },
                        "curve": {"timesteps": [1, 2], "returns": [-seed, i - seed]},
                        "final": 100.0 + i + seed,
                        "score": 0.5 + 0.1 * i,
                        "auc": 0.5 - 0.01 * i,
                        "parameters": {"pi": 10, "qf": 20},
                        "steps_per_cpu_second": 100.0 / (1 + i),
                        "versions": {"gymnasium": "1"},
                        "environment": {"cores": 2},
                    }
    return found


def test_tables_and_figures_are_made_from_the_records_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rl_quality, "train_one", None)
    found = records()
    for name, record in found.items():
        write_json(tmp_path / "rl" / f"{name}.json", record)
    jobs = {name: record["job"] for name, record in found.items()}
    rl_quality.run(jobs, tmp_path / "rl", tmp_path / "rl-a", processes=0)
    text = (tmp_path / "rl-a.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    assert "| star | 102.5 ± 2.1 | 105.5 ± 2.1 |" in text
    assert "| product | - | 111.5 ± 2.1 |" in text
    assert "| product (1 tasks) | 1.50 [1.50, 1.50] | +1.00 [+1.00, +1.00] | -0.10" in text
    rows = json.loads((tmp_path / "rl-a.json").read_text())["arms"]
    assert rows["star"]["seeds"] == {"ppo-cartpole": 4, "sac-pendulum": 4}
    assert rows["star"]["speed over tasks"] == pytest.approx((1 / 2 * 1 / 5) ** 0.5)
    assert rows["star"]["score"]["P(improvement)"] == [1, 1, 1]
    assert rows["star"]["auc"]["P(improvement)"] == [0, 0, 0]
    for figure in ("rl-a.png", "rl-a-curves.png"):
        assert (tmp_path / figure).stat().st_size > 10_000
    with pytest.raises(FileNotFoundError, match="no runs"):
        rl_quality.run(jobs, tmp_path / "none", tmp_path / "none", processes=0)


def test_time_matching_is_measured_once(tmp_path):
    share = rl_quality.time_share("td3-pendulum", "product", True, tmp_path)
    (file,) = tmp_path.rglob("td3-pendulum-product.json")
    assert json.loads(file.read_text()).keys() == {str(share)}
    write_json(file, {"0.85": 1.3, "0.4": 1.05, "0.25": 0.9})
    assert rl_quality.time_share("td3-pendulum", "product", True, tmp_path) == 0.4


def test_names_are_checked():
    assert rl.chosen("star, mlp", list(ARMS), "nets") == ["star", "mlp"]
    assert rl.chosen("", ["a", "b"], "tasks") == ["a", "b"]
    with pytest.raises(typer.BadParameter, match=r"unknown nets \['stat'\]"):
        rl.chosen("stat", list(ARMS), "nets")


def test_speed_of_what_computes_the_same(monkeypatch):
    rows = rl_speed.ppo(smoke=True)
    for row in rows.values():
        assert list(row) == [rl_speed.BASELINE, "mlp", "star"]
        assert row[rl_speed.BASELINE]["ratio"] == 1
        assert row["mlp"]["parameters"] == row[rl_speed.BASELINE]["parameters"]
    assert rl_speed.table(rows).count("\n") == 2 + 3 * len(rows) == 2 + 3 * 6
    model = build(TASKS["ppo-cartpole"], {"net_arch": [8]}, 0)
    rl_speed.check(model.policy)
    shifted = type(model.policy.mlp_extractor).forward
    monkeypatch.setattr(
        type(model.policy.mlp_extractor), "forward", lambda s, x: [y + 1 for y in shifted(s, x)]
    )
    with pytest.raises(AssertionError):
        rl_speed.check(model.policy)
