"""One call of the benchmark: what is left to measure, and the records it adds."""

import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.trial import TIMED, Row
from benchmarks.gpu.workers import Worker
from benchmarks.harness.records import Record, append, load

START = 60  # seconds that a row may take beside ten times its guess: imports, compilation


def finished(metrics: dict[str, Any] | None) -> bool:
    """Return True if a row was measured with all columns and nothing in it failed."""
    if not metrics or metrics["status"] != "measured" or metrics["failures"]:
        return False
    programs = metrics["programs"].values()
    return all(p.get(column) is not None for p in programs for column in TIMED)


def untried(metrics: dict[str, Any] | None) -> bool:
    """Return True if the budget never reached a row."""
    return not metrics or metrics["status"] == "not run"


@dataclass
class Session:
    """Rows measured on one device within a budget.

    Args:
        device: name of the GPU, and of the file of its records.
        out: folder of the records.
        began: start of the call, by `time.monotonic`.
        budget: seconds that the call may take.
        dry: whether it is a dry run.
        commit: of the code, as part of the definition: records of others stay beside the new ones.
        conditions: fields of every record: hardware, versions, command, date, marks.
    """

    device: str
    out: Path
    began: float
    budget: float
    dry: bool
    commit: str | None
    conditions: dict[str, Any]
    latest: dict[str, dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.study = "gpu-" + re.sub(r"[^a-z0-9]+", "-", self.device.lower())
        self.latest = {r.run: r.metrics for r in load(self.study, self.out)}

    @property
    def left(self) -> float:
        """Seconds left of the budget."""
        return self.began + self.budget - time.monotonic()

    def todo(self, rows: list[Row], *, again: bool = False) -> list[Row]:
        """Return the rows to measure: first what was not reached, then what failed."""
        if again:
            return rows
        wanted = [row for row in rows if not finished(self.latest.get(row.name))]
        return sorted(wanted, key=lambda row: not untried(self.latest.get(row.name)))

    def run(self, todo: list[Row]) -> None:
        """Measure the rows until the budget is used up."""
        worker: Worker | None = None
        for row in todo:
            left = self.left
            if left < row.seconds:
                self.put(row, not_run(f"{max(0.0, left):.0f} s left of {self.budget:.0f}"))
                continue
            worker = worker or Worker(dry=self.dry)
            metrics = worker.ask(("measure", row.name, ()), min(left, START + 10 * row.seconds))
            if metrics["status"] == "lost" and self.left <= 0:
                metrics = not_run(f"cut off after {left:.0f} s")
            self.put(row, metrics)
            if not worker.alive:
                worker.end()
                worker = None
        if worker:
            worker.end()

    def put(self, row: Row, metrics: dict[str, Any]) -> None:
        """Append the record of a row, unless it says once more that the row was not run."""
        before = self.latest.get(row.name)
        self.latest[row.name] = metrics
        if before and before["status"] == metrics["status"] == "not run":
            return
        definition = {"case": row.case, "label": row.label, "commit": self.commit}
        record = Record(self.study, row.name, None, 0, definition, metrics, **self.conditions)
        append(record, self.out)
        if metrics["status"] == "not run":
            return
        print(f"{row.name}: {metrics['status']}, {metrics['took_s']:.1f} s", flush=True)
        for failure in metrics.get("failures", [metrics.get("reason")]):
            print(f"  FAILED {failure}", flush=True)


def not_run(why: str) -> dict[str, Any]:
    return {"status": "not run", "reason": why}
