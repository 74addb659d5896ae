"""Language benchmarks: `python -m benchmarks.nlp quality | speed [--smoke | --page]`.

Every run of a study is a line of its record file, and a stopped study goes on where it was.
`--smoke` takes seconds and shows that a study works, not a result; `--page` writes the page of
evidence from the records and runs nothing.
"""

import typer

from benchmarks.harness.records import RESULTS
from benchmarks.harness.study import Out, Page, Processes, Smoke, WritePage
from benchmarks.nlp import quality as quality_study
from benchmarks.nlp import speed as speed_study

PAGE = Page("nlp", "Evidence: language", (quality_study.STUDY, speed_study.STUDY))
app = typer.Typer(help=__doc__, pretty_exceptions_enable=False)


@app.command()
def quality(
    processes: Processes = 2, smoke: Smoke = False, page: WritePage = False, out: Out = RESULTS
) -> None:
    """Compare star MLPs, gated attention and hybrids on sentiment, prose and translation."""
    if page:
        return PAGE.write()
    jobs = quality_study.jobs(smoke)
    quality_study.STUDY.run(jobs, processes=processes, smoke=smoke, out=out)


@app.command()
def speed(smoke: Smoke = False, page: WritePage = False, out: Out = RESULTS) -> None:
    """Measure tokens per second and memory of the same variants, in turn."""
    if page:
        return PAGE.write()
    speed_study.STUDY.measure(speed_study.job(smoke), smoke=smoke, out=out)


if __name__ == "__main__":
    app()
