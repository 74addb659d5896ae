"""Starified models: `python -m benchmarks.starify STUDY [--smoke | --page]`.

The studies are quality, tune, speed, liger and families.
Every run of a study is a line of its record file, and a stopped study goes on where it was.
`--smoke` takes seconds and shows that a study works, not a result; `--page` writes the page of
evidence from the records and runs nothing.
"""

import typer

from benchmarks.harness.records import RESULTS
from benchmarks.harness.study import Out, Page, Processes, Smoke, WritePage
from benchmarks.starify import families_study
from benchmarks.starify import liger as liger_study
from benchmarks.starify import quality as quality_study
from benchmarks.starify import speed as speed_study

PAGE = Page(
    "starify",
    "Evidence: starify",
    (
        quality_study.STUDY,
        quality_study.TUNING,
        speed_study.STUDY,
        liger_study.STUDY,
        families_study.STUDY,
    ),
)
app = typer.Typer(help=__doc__, pretty_exceptions_enable=False)


@app.command()
def quality(
    processes: Processes = 2, smoke: Smoke = False, page: WritePage = False, out: Out = RESULTS
) -> None:
    """Fine-tune every arm with the learning rates that `tune` chose, and compare them."""
    if page:
        return PAGE.write()
    jobs = quality_study.jobs(smoke)
    quality_study.STUDY.run(jobs, processes=processes, smoke=smoke, out=out)


@app.command()
def tune(
    processes: Processes = 2, smoke: Smoke = False, page: WritePage = False, out: Out = RESULTS
) -> None:
    """Try every arm's grid, and print what is best on the validation split."""
    if page:
        return PAGE.write()
    jobs = quality_study.tuning_jobs(smoke)
    quality_study.TUNING.run(jobs, processes=processes, smoke=smoke, out=out)


@app.command()
def speed(smoke: Smoke = False, page: WritePage = False, out: Out = RESULTS) -> None:
    """Measure the cost of gates and the gain of fusing, in time and in memory."""
    if page:
        return PAGE.write()
    speed_study.STUDY.measure(speed_study.job(smoke), smoke=smoke, out=out)


@app.command()
def liger(smoke: Smoke = False, page: WritePage = False, out: Out = RESULTS) -> None:
    """Count memory and time of Llama's MLP: as it is, with Liger's kernels, and starified."""
    if page:
        return PAGE.write()
    jobs = liger_study.jobs(smoke, liger_study.here())
    liger_study.STUDY.run(jobs, processes=1, smoke=smoke, out=out)


@app.command()
def families(
    processes: Processes = 2, smoke: Smoke = False, page: WritePage = False, out: Out = RESULTS
) -> None:
    """Convert a tiny model of every family of transformers, and list what is left and why."""
    if page:
        return PAGE.write()
    jobs = families_study.jobs(smoke)
    families_study.STUDY.run(jobs, processes=processes, smoke=smoke, out=out)


if __name__ == "__main__":
    app()
