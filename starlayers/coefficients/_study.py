"""Running trials: one after another or in processes, on a file that outlives the process."""

import os
import pickle
import sqlite3
import threading
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from starlayers.coefficients._trials import Objective, Space, make_sampler, quiet, run_trial

if TYPE_CHECKING:
    import optuna

#: as often is a trial begun whose process ends under it, before it counts as failed
ATTEMPTS = 2
LOCK_TIMEOUT_S = 60

Trials = Generator["optuna.trial.FrozenTrial", None, None]


class Runner:
    """A study in a file or in memory, and the trials that it still lacks.

    Args:
        owner: the function that its errors name.
        path: SQLite file, made with its folder where it is missing; `None` for memory.
        settings: what must be the same whenever the study goes on.
    """

    def __init__(
        self,
        owner: str,
        path: Path | None,
        name: str,
        settings: Mapping[str, Any],
        objective: Objective,
        space: Space | None,
    ) -> None:
        self.owner, self.path, self.name = owner, path, name
        self.objective, self.space = objective, space
        self.method, self.seed = settings["method"], settings["seed"]
        with quiet():
            self.study = open_study(path, name, settings["directions"])
            self._check(settings)
        self._put_back()

    def _check(self, settings: Mapping[str, Any]) -> None:
        before = self.study.user_attrs.get("settings")
        wanted = [d.upper() for d in settings["directions"]]
        found = [d.name for d in self.study.directions]
        if before is None and found == wanted:
            self.study.set_user_attr("settings", dict(settings))
            return
        old = before or {"directions": [d.lower() for d in found]}
        for key, value in settings.items():
            if old.get(key, value) != value:
                raise ValueError(
                    f"{self.owner}: the study {self.name!r} in {self.path} was begun with "
                    f"{key}={old[key]!r}, and now {key}={value!r}: go on with what it was, or "
                    "give another name= or storage="
                )

    def _put_back(self) -> list[int]:
        """Queue the trials again that their process left unfinished; return their numbers."""
        from optuna.trial import TrialState

        storage, numbers = self.study._storage, []
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            times = trial.user_attrs.get("interrupted", 0) + 1
            storage.set_trial_user_attr(trial._trial_id, "interrupted", times)
            state = TrialState.WAITING
            if times >= ATTEMPTS:
                error = f"the process ended during this trial, {times} times"
                storage.set_trial_user_attr(trial._trial_id, "error", error)
                state = TrialState.FAIL
            storage.set_trial_state_values(trial._trial_id, state)
            numbers.append(trial.number)
        return numbers

    def missing(self, total: int) -> list[int]:
        """Numbers of the trials to run: those that wait, then new ones."""
        from optuna.trial import TrialState

        every = self.study.get_trials(deepcopy=False)
        waiting = [t.number for t in every if t.state == TrialState.WAITING]
        return [*waiting, *range(len(every), total)]

    def here(self, total: int) -> "Trials":
        """Run the missing trials one after another in this process."""
        for index in self.missing(total):
            sampler = make_sampler(self.method, self.seed, index, self.space)
            yield run_trial(self.study, self.objective, self.space, sampler)

    def in_processes(self, total: int, jobs: int) -> "Trials":
        """Run the missing trials in `jobs` processes at a time."""
        try:
            payload = pickle.dumps((self.objective, self.space))
        except Exception as error:
            raise ValueError(
                f"{self.owner}: jobs={jobs} runs the objective in other processes, and "
                f"{self.objective!r} cannot be sent there ({error}): use a function of a module, "
                "or jobs=1"
            ) from error
        first: list[int] = []
        while indices := first or self.missing(total):
            # the trials under which a process ended have one process each, the second time
            workers = 1 if first else jobs
            threads = max(1, torch.get_num_threads() // workers)
            begin = partial(
                _start_worker, self.path, self.name, payload, self.method, self.seed, threads
            )
            pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=begin)
            futures = [pool.submit(_work, index) for index in indices]
            try:
                for future in as_completed(futures):
                    number = future.result()
                    yield self.study.get_trials(deepcopy=False)[number]
                first = []
            except BrokenProcessPool:
                pool.shutdown()
                if not self._put_back():
                    raise  # it ended before any trial: there is no use in another try
                first = self.missing(0)
            finally:
                pool.shutdown(cancel_futures=True)


def open_study(path: Path | None, name: str, directions: Any) -> "optuna.Study":
    """The study of that name, made where there is none."""
    import optuna

    storage = None if path is None else file_storage(path)
    return optuna.create_study(
        storage=storage, study_name=name, directions=directions, load_if_exists=True
    )


def file_storage(path: Path | None) -> "optuna.storages.RDBStorage":
    """Optuna's tables in an SQLite file, with patience for the other processes that write."""
    from optuna.storages import RDBStorage

    patience = {"connect_args": {"timeout": LOCK_TIMEOUT_S}}
    return RDBStorage(f"sqlite:///{path}", engine_kwargs=patience)


@contextmanager
def only_one(owner: str, path: Path | None) -> Iterator[None]:
    """Hold the file of a study, so that unfinished trials in it are nobody's; ends with us.

    The system releases SQLite's lock with its process, however that ends.
    """
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = sqlite3.connect(f"{path}.lock", timeout=0, isolation_level=None)
    try:
        try:
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            raise RuntimeError(
                f"{owner}: another search is running on {path}; wait for it, give another "
                "storage=, or have trials run side by side with jobs="
            ) from error
        yield
    finally:
        lock.close()


_worker: dict[str, Any] = {}


def _start_worker(
    path: Path | None, name: str, payload: bytes, method: str, seed: int, threads: int
) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    objective, space = pickle.loads(payload)
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.load_study(study_name=name, storage=file_storage(path))
    _worker.update(study=study, objective=objective, space=space, method=method, seed=seed)


def _end_with_parent() -> None:
    """Trials whose search was killed are another's to run."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _work(index: int) -> int:
    sampler = make_sampler(_worker["method"], _worker["seed"], index, _worker["space"])
    trial = run_trial(_worker["study"], _worker["objective"], _worker["space"], sampler)
    return trial.number
