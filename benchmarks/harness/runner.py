"""Runs of a study: what is missing is run, what is there is reused."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.environment import conditions
from benchmarks.harness.records import RESULTS, Record, append, file_of, load, plain

Job = dict[str, Any]
Records = dict[str, Record]


def definition(job: Job) -> dict[str, Any]:
    """Return what decides a job's result beside its seed, as plain data."""
    kept: dict[str, Any] = plain({k: v for k, v in job.items() if k not in ("arm", "seed")})
    return kept


def current(study: str, jobs: dict[str, Job], folder: Path = RESULTS) -> Records:
    """Return the records of those jobs whose definition is the job's; of several, the last.

    Records of another definition stay in the file and are not returned.
    """
    wanted = {name: (definition(job), job["seed"]) for name, job in jobs.items()}
    newest = {
        r.run: r
        for r in load(study, folder)
        if r.run in wanted and (r.definition, r.seed) == wanted[r.run]
    }
    return {name: newest[name] for name in jobs if name in newest}


def of_arms(study: str, arms: list[str], folder: Path = RESULTS) -> Records:
    """Return the records of arms that can no longer be run: history."""
    return {r.run: r for r in load(study, folder) if r.arm in arms}


def run_study(
    study: str,
    jobs: dict[str, Job],
    work: Callable[[Job], dict[str, Any]],
    *,
    processes: int,
    folder: Path = RESULTS,
) -> Records:
    """Run `work(job)` for every job without a current record, and return all current records.

    A job is a dictionary with "arm", "seed" and whatever else decides its result; `work` returns
    the metrics. Each record is appended when its run ends, so that a stopped study goes on where
    it was. A job whose definition has changed since its record is run again.

    With `processes=0` nothing is run, with 1 the jobs run in this process, and with more in as
    many others, always on one thread each.

    Raises:
        FileNotFoundError: `processes=0`, and no job has a record.
    """
    from tqdm import tqdm

    done = current(study, jobs, folder)
    todo = {name: job for name, job in jobs.items() if name not in done}
    if not processes and not done:
        file = file_of(study, folder)
        raise FileNotFoundError(f"no runs in {file} yet: give --processes, the runs at a time")
    if not todo or not processes:
        return done
    failed: BaseException | None = None
    with tqdm(total=len(jobs), initial=len(done), unit="run") as bar:
        for name, result in _results(todo, work, processes):
            bar.update()
            if isinstance(result, BaseException):  # the other runs are still worth keeping
                failed = failed or result
                continue
            done[name] = make_record(study, name, jobs[name], result, threads=1)
            append(done[name], folder)
    if failed:
        raise failed
    return {name: done[name] for name in jobs}


def _results(
    jobs: dict[str, Job], work: Callable[[Job], dict[str, Any]], processes: int
) -> Iterator[tuple[str, dict[str, Any] | BaseException]]:
    """Run the jobs, and yield the name and the metrics or the error of each as it ends."""
    if processes == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for name, job in jobs.items():
                try:
                    yield name, work(job)
                except Exception as error:
                    yield name, error
        finally:
            torch.set_num_threads(threads)
        return
    spawn = get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn, initializer=_one_thread) as pool:
        futures = {pool.submit(work, job): name for name, job in jobs.items()}
        for future in as_completed(futures):
            yield futures[future], future.exception() or future.result()


def make_record(
    study: str, run: str, job: Job, metrics: dict[str, Any], *, threads: int | None = None
) -> Record:
    """Return the record of a run that just ended."""
    return Record(
        study,
        run,
        job["arm"],
        job["seed"],
        definition(job),
        plain(metrics),
        **conditions(threads=threads),
    )


def measure_once(
    study: str,
    job: Job,
    metrics: dict[str, Any],
    *,
    run: str | None = None,
    folder: Path = RESULTS,
) -> Record:
    """Append the record of a measurement that is one run: variants timed in turn."""
    record = make_record(study, run or study, job, metrics)
    append(record, folder)
    return record


def _one_thread() -> None:
    torch.set_num_threads(1)
    # the workers take turns on the cores; a gentle priority keeps the machine usable
    os.nice(5)
