"""Processes that compile and measure: one that dies or hangs takes one row with it, not the run."""

import os
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from torch._inductor.runtime.cache_dir_utils import cache_dir

from benchmarks.gpu.trial import Row, reason

#: of Inductor in each process; many of them compile at once
COMPILE_THREADS = "4"

Job = tuple[str, str, tuple[str, ...]]  # "measure" or "warm", name of the row, programs


class Worker:
    """Process with the GPU, or with its stand-ins in a dry run."""

    def __init__(self, *, dry: bool) -> None:
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", COMPILE_THREADS)
        spawn = get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(theirs, dry))
        self.process.start()
        theirs.close()  # so that the end of the process ends the pipe
        self.alive = True

    def ask(self, job: Job, seconds: float) -> dict[str, Any]:
        """Return what a job gives; status "lost" if the process dies or takes too long."""
        began = time.monotonic()
        try:
            self.pipe.send(job)
            if self.pipe.poll(max(0.0, seconds)):
                result: dict[str, Any]
                result, self.alive = self.pipe.recv()
                return result | {"took_s": time.monotonic() - began}
            why = f"no answer in {seconds:.0f} s"
        except (EOFError, OSError):
            self.process.join()
            why = f"the process died with exit code {self.process.exitcode}"
        self.end()
        return {"status": "lost", "reason": why, "took_s": time.monotonic() - began}

    def end(self) -> None:
        """End the process."""
        self.alive = False
        self.pipe.close()
        self.process.kill()
        self.process.join()


def serve(pipe: Connection, dry: bool) -> None:
    """Do jobs until the pipe closes, or until the GPU no longer answers this process."""
    from benchmarks.gpu.lab import make_lab
    from benchmarks.gpu.rows import rows
    from benchmarks.gpu.trial import measure, warm

    lab = make_lab(dry=dry)
    known = {row.name: row for row in [*rows(), *rows(tune=True)]}
    alive = True
    while alive:
        try:
            what, name, programs = pipe.recv()
        except EOFError:
            return
        try:
            if what == "warm":
                warm(known[name].build(lab), programs)
                result: dict[str, Any] = {"status": "compiled"}
            else:
                result = measure(lab, known[name].build(lab))
        except Exception as error:
            result = {"status": "failed", "reason": reason(error)}
        try:
            lab.clean()
        except RuntimeError:
            alive = False
        pipe.send((result, alive))


def compile_first(rows: list[Row], *, processes: int, deadline: float, dry: bool) -> int:
    """Compile for the rows, several at a time, and return how many jobs were done in time.

    The programs are run once: Triton and Inductor keep what they compiled on disk. What fails here
    is compiled when it is measured, or fails there.
    """
    began = time.time()
    jobs = deque(("warm", row.name, names) for row in rows for names in _separately(row))
    done: list[str] = []

    def work() -> None:
        worker = Worker(dry=dry)
        while jobs and time.monotonic() < deadline:
            try:
                job = jobs.popleft()
            except IndexError:  # another thread was faster
                break
            result = worker.ask(job, deadline - time.monotonic())
            if result["status"] == "compiled":
                done.append(job[1])
            else:
                print(f"not compiled: {job[1]} {', '.join(job[2])}: {result['reason']}", flush=True)
            if not worker.alive:
                worker.end()
                worker = Worker(dry=dry)
        worker.end()

    with ThreadPoolExecutor(processes) as pool:
        for future in [pool.submit(work) for _ in range(min(processes, len(jobs)))]:
            future.result()
    forget_choices(began)
    return len(done)


def forget_choices(since: float) -> None:
    """Remove what Inductor has chosen by timing since then, when the GPU was shared.

    The process that times chooses again, among kernels that are compiled.
    """
    for file in Path(cache_dir()).rglob("*.best_config"):
        if file.stat().st_mtime >= since:
            file.unlink()


def _separately(row: Row) -> list[tuple[str, ...]]:
    return [(name,) for name in row.warm] or [()]
