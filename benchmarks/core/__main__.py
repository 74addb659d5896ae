"""The layers themselves: `python -m benchmarks.core COMMAND [--smoke | --page]`.

`overhead` is what a small layer costs beside its matrix products, `host` what launching a fused
block costs, `sweep` from which size on a CPU runs a star MLP in blocks of rows, `start` what the
near-linear start is worth in deep stacks.
"""

import typer

from benchmarks.core import host as host_study
from benchmarks.core import overhead as overhead_study
from benchmarks.core import start as start_study
from benchmarks.core import sweep as sweep_study
from benchmarks.harness.records import RESULTS
from benchmarks.harness.study import Out, Page, Processes, Smoke, WritePage

PAGE = Page(
    "core",
    "Evidence: the layers",
    (overhead_study.STUDY, host_study.STUDY, sweep_study.STUDY, start_study.STUDY),
)
app = typer.Typer(help=__doc__, pretty_exceptions_enable=False)


@app.command()
def overhead(smoke: Smoke = False, page: WritePage = False, out: Out = RESULTS) -> None:
    """Time small layers beside the same matrix products written out."""
    if page:
        return PAGE.write()
    overhead_study.STUDY.measure(overhead_study.job(smoke), smoke=smoke, out=out)


@app.command()
def host(smoke: Smoke = False, page: WritePage = False, out: Out = RESULTS) -> None:
    """Time what Python needs to launch a fused block, on a GPU that computes nothing."""
    if page:
        return PAGE.write()
    host_study.STUDY.measure(host_study.job(smoke), smoke=smoke, out=out)


@app.command()
def sweep(smoke: Smoke = False, page: WritePage = False, out: Out = RESULTS) -> None:
    """Time the row-blocked star MLP against its definition over widths and sizes."""
    if page:
        return PAGE.write()
    sweep_study.STUDY.measure(sweep_study.job(smoke), smoke=smoke, out=out)


@app.command()
def start(
    seeds: int = 3,
    processes: Processes = 2,
    smoke: Smoke = False,
    page: WritePage = False,
    out: Out = RESULTS,
) -> None:
    """Train deep stacks of stars on a formula, from both starts."""
    if page:
        return PAGE.write()
    jobs = start_study.jobs(smoke, seeds)
    start_study.STUDY.run(jobs, processes=processes, smoke=smoke, out=out)


if __name__ == "__main__":
    app()
