"""Time of the row-blocked star MLP against its definition over sizes, on a CPU."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.harness.report import conditions, first_definition, markdown_table
from benchmarks.harness.runner import Job, Records
from benchmarks.harness.study import Study
from benchmarks.harness.timing import cpu_clock, interleave
from starlayers import StarMLP, use_backend

WIDTHS = (16, 32, 64, 96, 128, 192, 256)
MEGABYTES = (1, 2, 4, 8, 16, 32, 64, 128)
TEXT = """\
## From which size on a star MLP runs in blocks of rows on a CPU

**What was done.** `StarMLP(dim)` (four times as many hidden channels, silu, float32, one thread) on
as many rows as make one hidden branch so large: the row-blocked op (`use_backend("cpu")`), the
definition ("eager") and what "auto" takes, in turn; medians of {rounds} rounds of CPU time over the
definition's. Bold: "auto" takes the op.

{tables}
**What this shows.** Where "auto" takes the op, that takes at most {worst:.2f} of the definition's
time in inference and {worst_training:.2f} in training; elsewhere "auto" is the definition.

**Conditions**

{conditions}
"""


def run_of(mlp: nn.Module, x: torch.Tensor, backend: str, training: bool) -> Callable[[], None]:
    """Return a function that runs one inference or training step on a backend."""

    def run() -> None:
        with use_backend(backend):
            if not training:
                with torch.no_grad():
                    mlp(x)
            else:
                mlp(x).sum().backward()

    return run


def job(smoke: bool = False) -> Job:
    """Make the job: widths, sizes of a hidden branch, rounds."""
    sizes = {"widths": WIDTHS, "megabytes": MEGABYTES, "rounds": 7}
    if smoke:
        sizes = {"widths": (16,), "megabytes": (1,), "rounds": 1}
    return {"arm": None, "seed": None, "act": "silu", "clock": "CPU", **sizes}


def work(job: Job) -> dict[str, Any]:
    """Time the op, the definition and "auto" for every width and size."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    cells: dict[str, dict[str, Any]] = {}
    for dim in job["widths"]:
        mlp = StarMLP(dim, act=job["act"])
        for megabytes in job["megabytes"]:
            x = torch.randn(megabytes * 2**20 // (4 * dim * 4), dim)
            for task in ("inference", "training"):
                names = ("eager", "cpu", "auto")
                runs: dict[str, Callable[[], object]] = {
                    name: run_of(mlp, x, name, task == "training") for name in names
                }
                with torch.set_grad_enabled(task == "training"):
                    path = mlp.plan(x).path
                timed = interleave(
                    runs, baselines=["eager"], repeats=job["rounds"], clock=cpu_clock
                )
                ratios = {name: timed[name]["ratio"] for name in names}
                cells[f"{task}, {dim}, {megabytes}"] = {"path": path, **ratios}
    return {"cells": cells}


def tables(records: Records) -> str:
    """Return one table of ratios for each task."""
    (record,) = records.values()
    d, cells, parts = first_definition(records), record.metrics["cells"], []
    for task in ("inference", "training"):
        header = [f"{task}: dim", *(f"{m} MB" for m in d["megabytes"])]
        body = []
        for dim in d["widths"]:
            row = [cells[f"{task}, {dim}, {m}"] for m in d["megabytes"]]
            body.append(
                [str(dim), *(f"**{c['cpu']:.2f}**" if c["path"] == "cpu" else f"{c['cpu']:.2f}"
                             for c in row)]
            )  # fmt: skip
        parts.append(markdown_table(header, body))
    return "\n".join(parts)


def text(records: Records) -> str:
    """Make the page's part."""
    (record,) = records.values()
    worst = {
        task: max(
            c["cpu"]
            for name, c in record.metrics["cells"].items()
            if c["path"] == "cpu" and name.startswith(task)
        )
        for task in ("inference", "training")
    }
    return TEXT.format(
        rounds=first_definition(records)["rounds"],
        tables=tables(records),
        worst=worst["inference"],
        worst_training=worst["training"],
        conditions=conditions([record]),
    )


STUDY = Study(
    "core-cpu-sweep", "python -m benchmarks.core sweep", lambda: {"sweep": job()}, work, tables,
    text,
)  # fmt: skip
