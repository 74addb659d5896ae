"""Starified models: `python -m benchmarks.starify quality | tune | speed [--smoke] [--page]`.

Every run of a study is a line of its record file, and a stopped study goes on where it was.
`--smoke` takes seconds and shows that a study works, not a result.
"""

import typer

from benchmarks.harness.records import RESULTS
from benchmarks.harness.study import Out, Processes, Smoke, WritePage
from benchmarks.starify import pages
from benchmarks.starify import quality as quality_study
from benchmarks.starify import speed as speed_study

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False)


@app.command()
def quality(
    processes: Processes = 2, smoke: Smoke = False, page: WritePage = False, out: Out = RESULTS
) -> None:
    """Fine-tune every arm with the learning rates that `tune` chose, and compare them."""
    jobs = quality_study.jobs(smoke)
    pages.QUALITY.run(jobs, processes=processes, page=page, smoke=smoke, out=out)


@app.command()
def tune(
    processes: Processes = 2, smoke: Smoke = False, page: WritePage = False, out: Out = RESULTS
) -> None:
    """Try every arm's grid, and print what is best on the validation split."""
    jobs = quality_study.tuning_jobs(smoke)
    pages.TUNING.run(jobs, processes=processes, page=page, smoke=smoke, out=out)


@app.command()
def speed(smoke: Smoke = False, page: WritePage = False, out: Out = RESULTS) -> None:
    """Measure the cost of gates and the gain of fusing, in time and in memory."""
    pages.SPEED.measure(speed_study.job(smoke), page=page, smoke=smoke, out=out)


if __name__ == "__main__":
    app()
