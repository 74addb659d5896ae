"""Searches: every method, failing trials, stopped and shared searches, wrong arguments."""

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
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import optuna
import pytest
import sqlalchemy
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from starlayers.coefficients.search import open_storage, quiet, search
from starlayers.coefficients.space import METHODS
from tests.coefficients import objectives
from tests.coefficients.objectives import SPACE, hill

ROOT = Path(__file__).parents[2]
PATIENCE_S = 300
#: a draw of a Gaussian process takes a fraction of a second, of the others a millisecond
TRIALS = dict.fromkeys(METHODS, 40) | {"gp": 18}
slow = partial(pytest.param, marks=pytest.mark.slow)
MIXED = {
    "x": FloatDistribution(1e-3, 1.0, log=True),
    "n": IntDistribution(1, 4),
    "kind": CategoricalDistribution(("a", "b")),
}


def mixed(trial):
    v = trial.params
    return v["n"] * (v["kind"] == "b") - abs(math.log10(v["x"]) + 2)


def mixed_x(trial):
    return trial.params["x"]


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


@pytest.mark.parametrize(
    ("method", "sampler"),
    [
        ("tpe", "TPESampler"),
        ("gp", "GPSampler"),
        ("cma", "CmaEsSampler"),
        ("nsga2", "NSGAIISampler"),
        ("random", "RandomSampler"),
    ],
)
def test_each_method_is_a_sampler_of_optuna(method, sampler):
    study = quick(hill, SPACE, method=method, trials=1).study
    assert type(study.sampler) is getattr(optuna.samplers, sampler)
    if method == "nsga2":
        assert study.sampler._population_size == 20


@pytest.mark.parametrize(("values", "diagonal"), [(64, False), (65, True)])
def test_many_values_have_a_diagonal_covariance(values, diagonal):
    space = {f"x{i}": FloatDistribution(-1, 1) for i in range(values)}
    sampler = quick(hill, space, method="cma", trials=1).study.sampler
    assert sampler._use_separable_cma is diagonal
    assert type(sampler._independent_sampler) is optuna.samplers.TPESampler


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
    with pytest.raises(ValueError, match=r"2 directions have no single best trial.*\.front"):
        _ = result.best


def test_a_first_guess_is_tried_first(tmp_path):
    guess = {"x0": 0.25, "x1": 0.5, "x2": 0.75}
    for trials in (1, 6):
        result = quick(hill, SPACE, first=guess, trials=trials, storage=tmp_path / "s.db")
        assert result.trials[0].params == guess
        assert len(result.trials) == trials
    assert sum(t.params == guess for t in result.trials) == 1


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize("method", ["tpe", "cma"])
def test_a_failing_trial_is_recorded_and_ends_nothing(in_file, method, tmp_path):
    storage = tmp_path / "search.db" if in_file else None
    options = {"method": method, "trials": 13, "storage": storage}
    result = quick(objectives.fails_at_times, SPACE, **options)
    assert len(result.trials) == 13
    assert [t.number for t in result.failed] == [2, 7, 12]
    for trial in result.failed:
        assert trial.user_attrs["error"] == f"ArithmeticError: no luck with {trial.number}"
        assert "in fails_at_times" in trial.user_attrs["traceback"]
        assert set(trial.params) == set(SPACE)
    assert result.value == max(t.value for t in result.trials if t.state.name == "COMPLETE")
    if in_file:  # failed trials count, also when the search goes on
        assert len(quick(hill, SPACE, **options).study.trials) == 13


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


def test_the_best_so_far_skips_failed_trials():
    values = iter([2.0, math.nan, 3.0, 1.0])
    down = quick(lambda t: next(values), trials=4, directions="minimize")
    assert down.best_so_far == [2.0, 2.0, 2.0, 1.0]
    assert (down.value, down.best, [t.number for t in down.front]) == (1.0, {}, [3])
    values = iter([math.nan, 2.0])
    up = quick(lambda t: next(values), trials=2)
    assert math.isnan(up.best_so_far[0])
    assert up.best_so_far[1] == 2.0


def test_pruned_trials_count():
    def objective(trial):
        trial.report(hill(trial), 0)
        if trial.number == 2:
            raise optuna.TrialPruned
        return hill(trial)

    result = quick(objective, SPACE, trials=5)
    assert Counter(t.state.name for t in result.trials) == {"COMPLETE": 4, "PRUNED": 1}


# Searches that are stopped, killed and shared ----------------------------------------------------


class Killed(BaseException):
    """Ends a trial as the end of its process does: Optuna does not see it."""


def is_running(storage) -> int:
    return execute(storage, "select count(*) from trials where state = 'RUNNING'").fetchone()[0]


def execute(storage, statement):
    with sqlite3.connect(storage, timeout=60) as db:
        return db.execute(statement)


def age_heartbeats(storage, seconds) -> None:
    execute(
        storage, f"update trial_heartbeats set heartbeat = datetime('now', '-{seconds} seconds')"
    )


def killed_at(numbers, objective=hill):
    """An objective that loses its process in the first trial of each number."""
    left = set(numbers)

    def run(trial):
        if trial.number in left:
            left.remove(trial.number)
            raise Killed
        return objective(trial)

    return run


@pytest.mark.parametrize(
    ("stop", "method"),
    [
        (Killed, "tpe"),
        (KeyboardInterrupt, "cma"),
        *(slow(Killed, m) for m in METHODS if m != "tpe"),
        *(slow(KeyboardInterrupt, m) for m in METHODS if m != "cma"),
    ],
)
def test_stopped_and_resumed_is_as_if_never_stopped(stop, method, tmp_path):
    """After Ctrl-C at once, and after a kill when its heartbeat is a minute old."""
    storage, trials, at = tmp_path / "search.db", 13, 6
    options = {"method": method, "storage": storage, "trials": trials}

    def objective(trial):
        if trial.number == at:
            raise stop
        return hill(trial)

    with pytest.raises(stop):
        quick(objective, SPACE, **options)
    age_heartbeats(storage, 61)
    result = quick(objective, SPACE, **options)
    unstopped = params(quick(hill, SPACE, method=method, trials=trials))
    # Optuna's CMA-ES draws by the number of the trial, and the repeated trial has one of its own
    same = at + 1 if method == "cma" else trials
    assert params(result)[:same] == unstopped[:same]
    assert [t.number for t in result.trials] == [n for n in range(trials + 1) if n != at]
    assert {t.state.name for t in result.trials} == {"COMPLETE"}
    assert result.failed == []
    assert [t.state.name for t in result.study.trials].count("FAIL") == 1  # the first attempt
    # a search that is complete has nothing more to do
    calls = []
    assert len(quick(calls.append, SPACE, **options).trials) == trials
    assert calls == []


@pytest.mark.parametrize("age", [0, 40])
def test_resumed_at_once_another_trial_takes_the_place_of_the_lost_one(age, tmp_path):
    storage = tmp_path / "search.db"
    options = {"method": "random", "storage": storage, "trials": 8}
    with pytest.raises(Killed):
        quick(killed_at({3}), SPACE, **options)
    age_heartbeats(storage, age)
    result = quick(hill, SPACE, **options)
    assert [t.number for t in result.trials] == [0, 1, 2, 4, 5, 6, 7, 8]
    assert is_running(storage) == 1
    # it is run when there are more to run, and counts once
    age_heartbeats(storage, 61)
    more = quick(hill, SPACE, **options | {"trials": 10})
    lost = more.study.trials[3]
    assert [t.number for t in more.trials] == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]
    assert more.study.trials[9].params == lost.params
    assert (lost.state.name, is_running(storage)) == ("FAIL", 0)


def test_a_trial_that_lost_its_process_twice_is_given_up(tmp_path):
    storage, seen = tmp_path / "search.db", []

    def objective(trial):
        seen.append(trial.params)
        if len(seen) in (3, 4):
            raise Killed
        return hill(trial)

    options = {"storage": storage, "trials": 5}
    for _ in range(2):
        with pytest.raises(Killed):
            quick(objective, SPACE, **options)
        age_heartbeats(storage, 61)
    result = quick(objective, SPACE, **options)
    assert len(result.trials) == 5
    assert seen[2] == seen[3]
    assert seen.count(seen[2]) == 2
    assert seen[2] not in params(result)


def test_a_process_that_is_killed(tmp_path):
    check_killed("tpe", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gp", "cma", "nsga2", "random"])
def test_a_process_that_is_killed_with_other_methods(method, tmp_path):
    check_killed(method, tmp_path)


def check_killed(method, folder):
    storage, trials, at = folder / "search.db", 16, random.randrange(1, 10)
    process = start(storage, "slow_hill", method, trials)
    kill_at(process, storage, at)
    assert at < begun(storage) < trials, at
    result = objectives.run(storage, "slow_hill", method, trials)
    assert len(result.trials) == trials, at
    assert {t.state.name for t in result.trials} == {"COMPLETE"}, at
    assert len({tuple(p.values()) for p in params(result)}) == trials, at
    assert result.value == max(t.value for t in result.trials)


def start(storage, objective, method, trials):
    command = [sys.executable, "-m", "tests.coefficients.objectives"]
    arguments = map(str, [storage, objective, method, trials])
    return subprocess.Popen([*command, *arguments], cwd=ROOT, stderr=subprocess.PIPE)


def begun(storage) -> int:
    """Trials in the file, read as any other program would."""
    try:
        return execute(storage, "select count(*) from trials").fetchone()[0]
    except sqlite3.OperationalError:  # no tables yet
        return 0


def kill_at(process, storage, trial) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while begun(storage) <= trial:
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < give_up
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()


def test_processes_share_a_storage(tmp_path):
    """The same call in another process: no draw comes twice, and the end is seen by both."""
    storage, trials = tmp_path / "new" / "search.db", 24
    other = start(storage, "process_id", "random", trials)
    give_up = time.monotonic() + PATIENCE_S
    while begun(storage) < 2:
        assert other.poll() is None, other.stderr.read().decode()
        assert time.monotonic() < give_up
        time.sleep(0.01)
    result = objectives.run(storage, "process_id", "random", trials)
    assert other.wait(PATIENCE_S) == 0, other.stderr.read().decode()
    other.stderr.close()
    assert trials <= len(result.trials) <= trials + 1  # both were in a trial at the end
    assert {t.state.name for t in result.trials} == {"COMPLETE"}
    assert len({tuple(p.values()) for p in params(result)}) == len(result.trials)
    assert {t.user_attrs["pid"] for t in result.trials} == {os.getpid(), other.pid}
    wanted = params(quick(hill, SPACE, method="random", trials=len(result.trials)))
    assert params(result) == wanted  # a trial draws by its number, in whichever process


def test_heartbeats_of_a_file():
    with quiet():
        storage = open_storage("search", "sqlite://")
    assert (storage.heartbeat_interval, storage.grace_period) == (10, 60)
    retry = storage.heartbeat_stale_trial_callback
    assert type(retry) is optuna.storages.RetryHeartbeatStaleTrialCallback
    assert retry._max_retry == 1


@pytest.mark.parametrize("failures", [0, 1, 2, 3])
def test_tables_that_another_process_creates_at_the_moment(failures, monkeypatch, tmp_path):
    """Optuna raises an error then: the storage is opened again, three times in all."""
    calls, slept, create = [], [], optuna.storages.RDBStorage.__init__

    def fails_at_first(self, url, *args, **kwargs):
        calls.append(url)
        if len(calls) <= failures:
            raise sqlalchemy.exc.IntegrityError("insert", {}, Exception("alembic_version"))
        create(self, url, *args, **kwargs)

    monkeypatch.setattr(optuna.storages.RDBStorage, "__init__", fails_at_first)
    monkeypatch.setattr(time, "sleep", slept.append)
    path = tmp_path / "search.db"
    if failures == 3:
        with pytest.raises(sqlalchemy.exc.IntegrityError, match="alembic_version"):
            quick(hill, SPACE, trials=1, storage=path)
    else:
        assert len(quick(hill, SPACE, trials=1, storage=path).trials) == 1
    assert calls == [f"sqlite:///{path}"] * min(failures + 1, 3)
    assert slept == [1] * min(failures, 2)


def test_storages(tmp_path):
    """A path, Optuna's URL of it, and storages of Optuna's own."""
    path = tmp_path / "a" / "search.db"
    journal = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(tmp_path / "journal.log"))
    )
    for same in ((path, str(path), f"sqlite:///{path}"), (journal, journal)):
        for i, storage in enumerate(same, start=1):
            result = quick(hill, SPACE, trials=2 * i, method="random", storage=storage)
            assert len(result.trials) == 2 * i
    assert open_storage("search", journal) is journal
    assert open_storage("search", None) is None
    assert not isinstance(quick(hill, SPACE, trials=1).study._storage, optuna.storages.RDBStorage)


# Options of Optuna that are handed through -------------------------------------------------------


def test_a_timeout_ends_it_between_trials():
    result = quick(lambda t: time.sleep(0.05) or hill(t), SPACE, trials=500, timeout=0.2)
    assert 0 < len(result.trials) < 20


def test_callbacks_see_every_trial_and_may_stop():
    seen = []

    def callback(study, trial):
        seen.append((type(study), trial.number, trial.state.name))
        if trial.number == 3:
            study.stop()

    result = quick(objectives.fails_at_times, SPACE, trials=9, callbacks=[callback])
    states = ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE"]
    assert seen == [(optuna.Study, n, state) for n, state in enumerate(states)]
    assert len(result.trials) == 4


def test_a_sampler_of_optunas_own():
    grid = optuna.samplers.GridSampler({"x": [1, 2, 3]}, seed=0)
    result = quick(lambda t: t.suggest_float("x", 0, 5), trials=3, sampler=grid)
    assert {t.params["x"] for t in result.trials} == {1, 2, 3}
    assert result.value == 3


@pytest.mark.parametrize("on_terminal", [False, True])
@pytest.mark.parametrize("progress", [False, True])
def test_a_bar_on_terminals_only(progress, on_terminal, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: on_terminal, raising=False)
    shown, optimize = [], optuna.Study.optimize

    def record(*args, show_progress_bar, **kwargs):
        shown.append(show_progress_bar)
        optimize(*args, **kwargs)

    monkeypatch.setattr(optuna.Study, "optimize", record)
    quick(hill, SPACE, trials=1, progress=progress)
    assert shown == [progress and on_terminal]
    search(hill, SPACE, trials=1)
    assert shown[1] is on_terminal


# Calls that go on --------------------------------------------------------------------------------


def test_more_trials_may_be_asked_for_and_fewer_do_no_harm(tmp_path):
    options = {"method": "cma", "storage": tmp_path / "search.db"}
    for trials, there in ((5, 5), (12, 12), (3, 12)):
        assert len(quick(hill, SPACE, trials=trials, **options).trials) == there


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


# Wrong arguments ----------------------------------------------------------------------------------

WRONG = [
    ({"method": "bayes"}, ValueError, "unknown method 'bayes', choose one of tpe, gp, cma, nsga2"),
    ({"directions": "up"}, ValueError, "unknown direction 'up', choose maximize or minimize"),
    ({"directions": ["maximize", 3]}, ValueError, "unknown direction 3"),
    ({"directions": []}, ValueError, r"'tpe' needs at least one direction, .* got \[\]"),
    ({"trials": 0}, ValueError, "trials must be at least 1, got 0"),
    ({"trials": 2.5}, TypeError, "trials must be an integer, got 2.5"),
    ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
    ({"seed": 1.5}, TypeError, "seed must be an integer, got 1.5"),
    ({"timeout": 0}, ValueError, "timeout must be above 0 seconds, got 0"),
    ({"timeout": math.nan}, ValueError, "timeout must be above 0 seconds, got nan"),
    ({"space": {3: FloatDistribution(0, 1)}}, TypeError, r"space\[3\] must be an Optuna .* got F"),
    ({"space": {}}, ValueError, "the space is empty"),
    ({"space": [1, 2]}, TypeError, r"space must be a dict .* got \[1, 2\]"),
    ({"space": {"l2": (0, 1)}}, TypeError, r"space\['l2'\] must be an Optuna .* got \(0, 1\)"),
    (
        {"method": "cma", "directions": ["maximize"] * 2},
        ValueError,
        r"'cma' only one \(use 'nsga2' for several\), got \['maximize', 'maximize'\]",
    ),
    (
        {"method": "cma", "space": {"a": FloatDistribution(0, 1), "b": FloatDistribution(1, 1)}},
        ValueError,
        r"at least two numbers that vary, and the space has 1 \(a\): use 'tpe' or 'gp'",
    ),
    (
        {"method": "cma", "space": {"kind": CategoricalDistribution((1, 2))}},
        ValueError,
        r"the space has 0 \(none\)",
    ),
    ({"seed": True}, TypeError, "seed must be an integer, got True"),
    ({"storage": "/"}, ValueError, "storage must be an SQLite file, '/' is a folder"),
]


@pytest.mark.parametrize(("change", "error", "words"), WRONG, ids=[w for _, _, w in WRONG])
def test_wrong_arguments_are_named(change, error, words):
    with pytest.raises(error, match=f"^search: .*{words}"):
        quick(hill, **{"space": SPACE, "trials": 2} | change)


@pytest.mark.parametrize(
    ("method", "package"),
    [("tpe", "optuna"), ("gp", "scipy"), ("cma", "cmaes"), ("nsga2", "optuna")],
)
def test_a_package_that_is_not_installed_is_named(method, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"search needs {package}: pip install 'starlayers\[coefficients\]'"
    with pytest.raises(ImportError, match=message):
        search(hill, SPACE, method=method, trials=1)


def test_figures_need_matplotlib(monkeypatch, tmp_path):
    result = quick(hill, SPACE, trials=1)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"SearchResult.plot needs matplotlib: .*\[plots\]'"):
        result.plot(tmp_path)


# Figures and logs ---------------------------------------------------------------------------------


def test_figures(tmp_path):
    before = dict(plt.rcParams)
    result = quick(mixed, MIXED, trials=12)
    files = result.plot(tmp_path / "figures")
    assert [f.stem for f in files] == ["history", "slice", "parallel", "importances"]
    for file in files:
        assert plt.imread(file).std() > 0.01
    for n, names in ((2, ["front.png"]), (3, ["front.png"]), (4, [])):
        many = quick(lambda t: n * [mixed(t)], MIXED, trials=3, directions=["maximize"] * n)  # noqa: B023
        assert [f.name for f in many.plot(tmp_path)] == names
    assert quick(lambda t: 1 / 0, MIXED, trials=2).plot(tmp_path) == []
    # importances need values that differ, and several parameters
    for objective, space in ((lambda t: 1.0, MIXED), (mixed_x, {"x": MIXED["x"]})):
        files = quick(objective, space, trials=4).plot(str(tmp_path))
        assert [f.stem for f in files] == ["history", "slice", "parallel"]
    assert plt.get_fignums() == []
    assert dict(plt.rcParams) == before


@pytest.mark.parametrize("level", [logging.INFO, logging.ERROR])
def test_it_is_quiet_and_leaves_optunas_log_as_it_was(level, capfd):
    before = logging.getLogger("optuna").level
    logging.getLogger("optuna").setLevel(level)
    quick(hill, {f"x{i}": FloatDistribution(-1, 1) for i in range(70)}, method="cma", trials=6)
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("optuna").level == level
    logging.getLogger("optuna").setLevel(before)
