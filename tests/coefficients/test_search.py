"""Searching: every method, failures, kills, processes, words for what is wrong."""

import logging
import math
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from starlayers.coefficients._trials import METHODS
from starlayers.coefficients.search import search
from tests.coefficients import objectives
from tests.coefficients.objectives import SPACE, hill

ROOT = Path(__file__).parents[2]
PATIENCE_S = 300
#: a Gaussian process costs a fraction of a second, the others a millisecond
TRIALS = dict.fromkeys(METHODS, 40) | {"gp": 18}
MIXED = {
    "x": FloatDistribution(1e-3, 1.0, log=True),
    "n": IntDistribution(1, 4),
    "kind": CategoricalDistribution(("a", "b")),
}


def mixed(trial):
    v = trial.params
    return v["n"] * (v["kind"] == "b") - abs(math.log10(v["x"]) + 2)


def quick(objective, space=None, **options):
    return search(objective, space, **({"progress": False, "seed": 3} | options))


def params(result):
    return [t.params for t in result.trials]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_finds_something(method):
    trials = TRIALS[method]
    result = quick(hill, SPACE, method=method, trials=trials)
    assert [t.number for t in result.trials] == list(range(trials))
    assert {t.state.name for t in result.trials} == {"COMPLETE"}
    assert all(-2 <= x <= 2 for values in params(result) for x in values.values())
    values = [t.value for t in result.trials]
    assert result.value == max(values) == hill(result.study.best_trial)
    assert result.best == result.trials[values.index(max(values))].params
    assert result.best_so_far == [max(values[: i + 1]) for i in range(trials)]
    # the mean of such a hill over its box is -4.75
    assert result.value > -1.5
    # a seed gives the same search again, another seed another one
    assert params(quick(hill, SPACE, method=method, trials=12)) == params(result)[:12]
    assert params(quick(hill, SPACE, method=method, trials=3, seed=4)) != params(result)[:3]


@pytest.mark.parametrize("method", ["tpe", "gp", "cma"])
def test_methods_that_learn_are_better_in_the_end(method):
    trials = TRIALS[method] + 8
    values = [t.value for t in quick(hill, SPACE, method=method, trials=trials).trials]
    assert sum(values[-10:]) / 10 > sum(values[:10]) / 10 + 1


@pytest.mark.parametrize("method", METHODS)
def test_choices_and_integers(method):
    result = quick(mixed, MIXED, method=method, trials=TRIALS[method] - 4)
    assert {type(t.params["n"]) for t in result.trials} == {int}
    assert {t.params["kind"] for t in result.trials} == {"a", "b"}
    assert result.best["kind"] == "b"


def test_an_objective_may_ask_by_itself():
    given, asked = (
        quick(f, space, method="random", trials=8)
        for f, space in ((hill, SPACE), (objectives.asks_itself, None))
    )
    assert params(given) == params(asked)

    def both(trial):
        return hill(trial) + (trial.suggest_categorical("more", [1, 0]) if trial.number else 0)

    result = quick(both, SPACE, trials=20)
    assert set(result.trials[0].params) == set(SPACE)
    assert set(result.trials[1].params) == {*SPACE, "more"}


def test_minimum_and_several_directions():
    result = quick(lambda t: -hill(t), SPACE, directions="minimize", trials=30)
    assert result.value == min(t.value for t in result.trials)
    assert result.best_so_far[-1] == result.value

    def two(trial):
        x = trial.params["x0"]
        return x**2, (x - 1) ** 2

    for method in ("nsga2", "tpe", "gp", "random"):
        result = quick(two, SPACE, method=method, directions=["minimize"] * 2, trials=14)
        for a in result.front:
            assert not any(
                b.values[0] < a.values[0] and b.values[1] < a.values[1] for b in result.trials
            )
    assert len(result.front) > 1
    with pytest.raises(ValueError, match=r"2 directions has no single best trial.*\.front"):
        _ = result.best


def test_a_first_guess_is_tried_first(tmp_path):
    guess = {"x0": 0.25, "x1": 0.5, "x2": 0.75}
    for trials in (1, 6):
        result = quick(hill, SPACE, first=guess, trials=trials, storage=tmp_path / "s.db")
        assert result.trials[0].params == guess
        assert len(result.trials) == trials
    assert sum(t.params == guess for t in result.trials) == 1


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("method", ["tpe", "cma"])
def test_a_failing_trial_is_recorded_and_ends_nothing(jobs, method, tmp_path):
    result = quick(
        objectives.fails_at_times,
        SPACE,
        method=method,
        trials=13,
        jobs=jobs,
        storage=tmp_path / "search.db",
    )
    assert len(result.trials) == 13
    assert [t.number for t in result.failed] == [2, 7, 12]
    for trial in result.failed:
        assert trial.user_attrs["error"] == f"ArithmeticError: no luck with {trial.number}"
        assert "in fails_at_times" in trial.user_attrs["traceback"]
        assert set(trial.params) == set(SPACE)
    assert result.value == max(t.value for t in result.trials if t.state.name == "COMPLETE")


@pytest.mark.parametrize("returned", [math.nan, None, "much", (1.0, 2.0), []])
def test_what_is_no_number_is_a_failure(returned):
    result = quick(lambda t: returned if t.number == 1 else 1.0, SPACE, trials=3)
    assert [t.state.name for t in result.trials] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert result.failed[0].user_attrs["error"].startswith(("ValueError: ", "TypeError: "))


def test_nothing_but_failures_says_why():
    result = quick(lambda t: t.params["x9"], SPACE, trials=4)
    assert math.isnan(result.best_so_far[-1])
    with pytest.raises(ValueError, match=r"none of the 4 trials .* failed with KeyError: 'x9'"):
        _ = result.value


def test_pruned_trials_count():
    def objective(trial):
        trial.report(hill(trial), 0)
        if trial.number == 2:
            raise optuna.TrialPruned
        return hill(trial)

    result = quick(objective, SPACE, trials=5)
    assert Counter(t.state.name for t in result.trials) == {"COMPLETE": 4, "PRUNED": 1}


# A process that is killed while it searches ------------------------------------------------------


def start(storage, objective, method, trials, jobs):
    command = [sys.executable, "-m", "tests.coefficients.objectives"]
    arguments = [storage, objective, method, trials, jobs]
    return subprocess.Popen([*command, *map(str, arguments)], cwd=ROOT, stderr=subprocess.PIPE)


def begun(storage) -> int:
    """Trials in the file, read as any other program would."""
    if not storage.exists():
        return 0
    try:
        with sqlite3.connect(f"file:{storage}?mode=ro", uri=True) as db:
            return db.execute("select count(*) from trials").fetchone()[0]
    except sqlite3.OperationalError:  # no tables yet, or just being written
        return 0


def kill_at(process, storage, trial) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while begun(storage) <= trial:
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < give_up
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()


@pytest.mark.parametrize("method", ["tpe", "gp", "cma", "nsga2", "random"])
def test_killed_and_resumed_is_as_if_never_stopped(method, tmp_path):
    trials = 20
    at = random.randrange(1, trials - 6)
    storage = tmp_path / "search.db"
    kill_at(start(storage, "slow_hill", method, trials, 1), storage, at)
    left = optuna.load_study(study_name="search", storage=f"sqlite:///{storage}").trials
    assert at < len(left) < trials, at

    result = objectives.run(storage, "slow_hill", method, trials, 1)
    assert [t.number for t in result.trials] == list(range(trials)), at
    assert {t.state.name for t in result.trials} == {"COMPLETE"}, at
    assert params(result) == params(quick(hill, SPACE, method=method, trials=trials)), at
    interrupted = [t.number for t in result.trials if "interrupted" in t.user_attrs]
    assert interrupted in ([], [len(left) - 1]), at
    # and once it is complete there is nothing more to do
    objectives.run(storage, "slow_hill", method, trials, 1)
    assert len(result.trials) == trials


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("at", [1, 2, 13, 38, 44])
def test_cut_off_while_it_drew(method, at, tmp_path, monkeypatch):
    options = {"method": method, "storage": tmp_path / "search.db", "trials": 16}
    calls, store = [], optuna.storages._CachedStorage.set_trial_param

    def stored(*args):
        calls.append(args)
        if len(calls) == at + 1:
            raise KeyboardInterrupt
        store(*args)

    monkeypatch.setattr(optuna.storages._CachedStorage, "set_trial_param", stored)
    with pytest.raises(KeyboardInterrupt):
        quick(mixed, MIXED, **options)
    result = quick(mixed, MIXED, **options)
    assert result.trials[at // 3].user_attrs == {"interrupted": 1}
    assert params(result) == params(quick(mixed, MIXED, method=method, trials=16))


def test_killed_and_resumed_with_processes(tmp_path):
    trials = 30
    at = random.randrange(2, trials - 10)
    storage = tmp_path / "search.db"
    kill_at(start(storage, "slow_hill", "tpe", trials, 2), storage, at)
    time.sleep(1)
    alone = begun(storage)
    time.sleep(1)
    assert begun(storage) == alone < trials, at  # its workers ended with it

    result = objectives.run(storage, "slow_hill", "tpe", trials, 2)
    assert [t.number for t in result.trials] == list(range(trials)), at
    assert {t.state.name for t in result.trials} == {"COMPLETE"}, at


def test_a_trial_that_kills_its_process_twice_has_failed(tmp_path):
    storage = tmp_path / "search.db"
    for attempt in range(2):
        process = start(storage, "kills_its_process", "tpe", 6, 1)
        assert process.wait(PATIENCE_S) == -signal.SIGKILL
        process.stderr.close()
        assert begun(storage) == 4, attempt
    result = objectives.run(storage, "kills_its_process", "tpe", 6, 1)
    states = [t.state.name for t in result.trials]
    assert states == ["COMPLETE"] * 3 + ["FAIL"] + ["COMPLETE"] * 2
    assert "the process ended during this trial, 2 times" in result.failed[0].user_attrs["error"]


def test_a_worker_that_is_killed_takes_nobody_along(tmp_path):
    result = objectives.run(tmp_path / "search.db", "kills_its_process", "random", 9, 2)
    assert [t.number for t in result.trials] == list(range(9))
    assert [t.number for t in result.failed] == [3]
    assert result.failed[0].user_attrs["interrupted"] == 2
    assert sum(t.state.name == "COMPLETE" for t in result.trials) == 8


def test_jobs_are_processes(tmp_path):
    result = quick(objectives.process_id, SPACE, trials=12, jobs=2, storage=tmp_path / "a" / "s.db")
    pids = {t.user_attrs["pid"] for t in result.trials}
    assert len(pids) == 2
    assert os.getpid() not in pids
    assert len({tuple(p.values()) for p in params(result)}) == 12  # no two drew the same


def test_ctrl_c_is_no_failure(tmp_path):
    stop = iter([True, True, True])

    def objective(trial):
        if trial.number == 2 and next(stop, False):
            raise KeyboardInterrupt
        return hill(trial)

    options = {"trials": 5, "method": "random", "storage": tmp_path / "search.db"}
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            quick(objective, SPACE, **options)
    result = quick(objective, SPACE, **options)
    assert [t.state.name for t in result.trials] == ["COMPLETE"] * 5
    assert params(result) == params(quick(hill, SPACE, trials=5, method="random"))


def test_more_trials_may_be_asked_for_and_fewer_do_no_harm(tmp_path):
    options = {"method": "cma", "storage": tmp_path / "search.db"}
    for trials, there in ((5, 5), (12, 12), (3, 12)):
        assert len(quick(hill, SPACE, trials=trials, **options).trials) == there


def test_one_search_at_a_time_on_a_file(tmp_path):
    storage = tmp_path / "search.db"

    def objective(trial):
        with pytest.raises(RuntimeError, match=r"another search is running on .*search\.db"):
            quick(hill, SPACE, storage=storage, name="other")
        return hill(trial)

    assert quick(objective, SPACE, trials=2, storage=storage).failed == []
    assert len(quick(hill, SPACE, trials=2, storage=storage, name="other").trials) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "cma"}, r"begun with method='tpe', and now method='cma'"),
        ({"seed": 9}, r"begun with seed=3, and now seed=9"),
        ({"directions": "minimize"}, r"begun with directions=\['maximize'\]"),
        ({"space": {"x0": FloatDistribution(0, 1)}}, r"begun with space="),
    ],
)
def test_a_study_goes_on_with_its_own_settings(change, words, tmp_path):
    options = {"space": SPACE, "trials": 2, "storage": tmp_path / "search.db"}
    quick(hill, **options)
    with pytest.raises(ValueError, match=words):
        quick(hill, **options | change)
    assert len(quick(hill, **options | change, name="another").trials) == 2


def test_a_study_of_optunas_own_may_go_on(tmp_path):
    storage = tmp_path / "search.db"
    study = optuna.create_study(
        storage=f"sqlite:///{storage}", study_name="search", direction="maximize"
    )
    study.optimize(objectives.asks_itself, n_trials=3)
    assert len(quick(objectives.asks_itself, trials=5, storage=f"sqlite:///{storage}").trials) == 5
    optuna.create_study(storage=f"sqlite:///{storage}", study_name="down")
    with pytest.raises(ValueError, match="begun with directions="):
        quick(hill, SPACE, storage=storage, name="down")


# Words -------------------------------------------------------------------------------------------

WRONG = [
    ({"method": "bayes"}, ValueError, "unknown method 'bayes', choose one of tpe, gp, cma, nsga2"),
    ({"directions": "up"}, ValueError, "unknown direction 'up', choose one of maximize, minimize"),
    ({"directions": []}, ValueError, "directions is empty"),
    ({"trials": 0}, ValueError, "trials must be at least 1, got 0"),
    ({"trials": 2.5}, TypeError, "trials must be an integer, got 2.5"),
    ({"jobs": 0}, ValueError, "jobs must be at least 1, got 0"),
    ({"jobs": 2}, ValueError, r"jobs=2 needs storage="),
    ({"space": {}}, ValueError, "the space is empty"),
    ({"space": [1, 2]}, TypeError, r"space must be a dict .* got \[1, 2\]"),
    ({"space": {"l2": (0, 1)}}, TypeError, r"space\['l2'\] must be an Optuna .* got \(0, 1\)"),
    ({"method": "cma", "directions": ["maximize"] * 2}, ValueError, "one direction, got 2"),
    (
        {"method": "cma", "space": {"a": FloatDistribution(0, 1), "b": FloatDistribution(1, 1)}},
        ValueError,
        r"at least two numbers that vary, and the space has 1 \(a\): use 'tpe' or 'gp'",
    ),
    ({"storage": "postgresql://db/x"}, ValueError, "path of an SQLite file, got 'postgresql:"),
    ({"storage": "/"}, ValueError, "'/' is a folder"),
]


@pytest.mark.parametrize(("change", "error", "words"), WRONG, ids=[w for _, _, w in WRONG])
def test_wrong_arguments_are_named(change, error, words):
    with pytest.raises(error, match=f"^search: .*{words}"):
        quick(hill, **{"space": SPACE, "trials": 2} | change)


def test_an_objective_that_no_process_can_be_sent(tmp_path):
    with pytest.raises(ValueError, match=r"jobs=2 .* processes, and .*<lambda> at .* cannot"):
        quick(lambda t: 1.0, SPACE, trials=2, jobs=2, storage=tmp_path / "search.db")


def test_without_optuna_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"pip install 'starlayers\[coefficients\]'"):
        search(hill, {"x": 1})


# What is seen ------------------------------------------------------------------------------------


def test_figures(tmp_path):
    before = dict(plt.rcParams)
    result = quick(mixed, MIXED, trials=12)
    files = result.plot(tmp_path / "figures")
    assert [f.stem for f in files] == ["history", "slice", "parallel", "importances"]
    for file in files:
        assert plt.imread(file).std() > 0.01
    two = quick(lambda t: (mixed(t), -mixed(t)), MIXED, trials=5, directions=["maximize"] * 2)
    assert [f.name for f in two.plot(tmp_path)] == ["front.png"]
    assert quick(lambda t: 1 / 0, MIXED, trials=2).plot(tmp_path) == []
    assert plt.get_fignums() == []
    assert dict(plt.rcParams) == before


def test_it_is_quiet_and_leaves_optunas_log_as_it_was(capfd):
    level = logging.getLogger("optuna").level
    quick(hill, {f"x{i}": FloatDistribution(-1, 1) for i in range(70)}, method="cma", trials=6)
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("optuna").level == level
