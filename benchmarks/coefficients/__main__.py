"""Coefficients of star layers: `python -m benchmarks.coefficients COMMAND [--smoke | --page]`.

Every run of a study is a line of its record file, and a stopped study goes on where it was.
`--smoke` takes seconds and shows that a study works, not a result; `--page` writes the page of
evidence from the records and runs nothing.
"""

from typing import Annotated

import typer

from benchmarks.coefficients import cost as cost_study
from benchmarks.coefficients import dimension as dimension_study
from benchmarks.coefficients import eigen as eigen_study
from benchmarks.coefficients import penalties as penalties_study
from benchmarks.coefficients import search as search_study
from benchmarks.coefficients import search_runs
from benchmarks.harness.records import RESULTS
from benchmarks.harness.study import Out, Page, Processes, Smoke, WritePage, chosen_names

DIMENSIONS = Page("dimensions", "Evidence: dimensions", (dimension_study.STUDY,))
PENALTIES = Page(
    "penalties",
    "Evidence: penalties on coefficients",
    (penalties_study.STUDY, penalties_study.TUNING, cost_study.STUDY),
)
EIGENFEATURES = Page(
    "eigenfeatures", "Evidence: eigenfeatures", (eigen_study.STUDY, eigen_study.TUNING)
)
SEARCHES = Page(
    "searches", "Evidence: searches for coefficients", (search_study.SEARCH, search_study.TUNE)
)
PAGES = (DIMENSIONS, PENALTIES, EIGENFEATURES, SEARCHES)
app = typer.Typer(help=__doc__, pretty_exceptions_enable=False)
searches = typer.Typer(help="Search for coefficients, and tune trained nets.")
app.add_typer(searches, name="searches")
Tune = Annotated[bool, typer.Option("--tune", help="try the strengths of the penalties instead")]


@app.command()
def dimension(
    seeds: int = 5,
    processes: Processes = 2,
    smoke: Smoke = False,
    page: WritePage = False,
    out: Out = RESULTS,
) -> None:
    """Measure the rank of the outputs of star layers against the number of monomials."""
    if page:
        return DIMENSIONS.write()
    jobs = dimension_study.jobs(1 if smoke else seeds, smoke)
    dimension_study.STUDY.run(jobs, processes=processes, smoke=smoke, out=out)


@app.command()
def penalties(
    tasks: Annotated[str, typer.Option(help="names, spaces between [all]")] = "",
    seeds: int = 5,
    processes: Processes = 2,
    tuning: Tune = False,
    smoke: Smoke = False,
    page: WritePage = False,
    out: Out = RESULTS,
) -> None:
    """Compare penalties, and coefficients that are learned."""
    if page:
        return PENALTIES.write()
    names = chosen_names(tasks, list(penalties_study.TASKS), "tasks")
    study, jobs = penalties_study.STUDY, penalties_study.jobs(1 if smoke else seeds, names, smoke)
    if tuning:
        study, jobs = penalties_study.TUNING, penalties_study.tuning_jobs(names, smoke)
    study.run(jobs, processes=processes, smoke=smoke, out=out)


@app.command()
def eigen(
    arms: Annotated[str, typer.Option(help="names, commas between [all]")] = "",
    seeds: int = 5,
    processes: Processes = 2,
    tuning: Tune = False,
    smoke: Smoke = False,
    page: WritePage = False,
    out: Out = RESULTS,
) -> None:
    """Keep the largest eigenvectors of every arm's classes, and compare what is left."""
    if page:
        return EIGENFEATURES.write()
    names = chosen_names(arms + "," * bool(arms), list(eigen_study.ARMS), "arms")
    study, jobs = eigen_study.STUDY, eigen_study.jobs(1 if smoke else seeds, names, smoke)
    if tuning:
        study, jobs = eigen_study.TUNING, eigen_study.tuning_jobs(smoke)
    study.run(jobs, processes=processes, smoke=smoke, out=out)


@app.command()
def cost(smoke: Smoke = False, page: WritePage = False, out: Out = RESULTS) -> None:
    """Measure what the penalty adds to a training step of StarNet-S4."""
    if page:
        return PENALTIES.write()
    cost_study.STUDY.measure(cost_study.job(smoke), smoke=smoke, out=out)


@searches.command()
def search(
    processes: Processes = 2, smoke: Smoke = False, page: WritePage = False, out: Out = RESULTS
) -> None:
    """Search by every method at equal trials, beside the defaults."""
    if page:
        return SEARCHES.write()
    jobs = search_runs.search_jobs(smoke)
    search_study.SEARCH.run(jobs, processes=processes, smoke=smoke, out=out)


@searches.command()
def tune(
    processes: Processes = 2, smoke: Smoke = False, page: WritePage = False, out: Out = RESULTS
) -> None:
    """Tune trained nets on a validation split, and measure what of the gain holds on test."""
    if page:
        return SEARCHES.write()
    jobs = search_runs.tune_jobs(smoke)
    search_study.TUNE.run(jobs, processes=processes, smoke=smoke, out=out)


if __name__ == "__main__":
    app()
