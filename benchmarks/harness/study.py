"""A study: its runs, its tables, its page of evidence, and the options of its command."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.harness.records import RESULTS
from benchmarks.harness.report import Page
from benchmarks.harness.runner import Job, Records, current, measure_once, run_study

Processes = Annotated[int, typer.Option(help="runs at a time, one thread each; 0 only tabulates")]
Smoke = Annotated[bool, typer.Option("--smoke", help="seconds instead of hours, no result")]
Out = Annotated[Path, typer.Option(help="folder of the records")]
WritePage = Annotated[bool, typer.Option("--page", help="only write the page, from the records")]

Figures = dict[str, Callable[[Path], None]]


@dataclass(frozen=True)
class Study:
    """A study.

    Args:
        name: name of its records and of its page.
        command: command that runs it.
        jobs: all jobs of the study, by name.
        work: function that runs one job and returns its metrics; None if all records were made
            elsewhere.
        tables: function that makes the tables that the command prints.
        text: function that makes the page's Markdown.
        figures: function that makes a drawing function for each figure's file name.
        sources: names of other studies that the page is made from.
    """

    name: str
    command: str
    jobs: Callable[[], dict[str, Job]]
    work: Callable[[Job], dict[str, Any]] | None
    tables: Callable[[Records], str]
    text: Callable[[Records], str]
    figures: Callable[[Records], Figures] = lambda _: {}
    sources: tuple[str, ...] = ()

    def page(self, folder: Path = RESULTS) -> Page:
        """Make the page from the current records."""
        records = current(self.name, self.jobs(), folder)
        if not records:
            raise FileNotFoundError(f"no current records of {self.name} in {folder}")
        sources = (self.name, *self.sources)
        command = f"{self.command} --page" if self.work else self.command
        return Page(self.name, command, self.text(records), self.figures(records), sources)

    def run(
        self,
        jobs: dict[str, Job] | None = None,
        *,
        processes: int = 0,
        page: bool = False,
        smoke: bool = False,
        out: Path = RESULTS,
    ) -> None:
        """Run the jobs that have no record (all of the study by default), and print the tables.

        With `page` nothing is run: the page and its figures are written from the records. A smoke
        run has records of its own, and draws the figures beside them.
        """
        if page:
            self.page(out).write()
            return
        name = f"{self.name}-smoke" if smoke else self.name
        chosen = self.jobs() if jobs is None else jobs
        assert self.work is not None
        records = run_study(name, chosen, self.work, processes=processes, folder=out)
        self._show(records, out if smoke else None)

    def measure(
        self, job: Job, *, page: bool = False, smoke: bool = False, out: Path = RESULTS
    ) -> None:
        """Measure in this process, append the record, and print the tables.

        For comparisons of speed, whose variants are timed in turn within one run. They are
        measured anew whenever they are asked for; a page has the last record.
        """
        if page:
            self.page(out).write()
            return
        name = f"{self.name}-smoke" if smoke else self.name
        assert self.work is not None
        record = measure_once(name, job, self.work(job), folder=out)
        self._show({name: record}, out if smoke else None)

    def _show(self, records: Records, draw_in: Path | None) -> None:
        print(self.tables(records))
        if draw_in is not None:
            for file, draw in self.figures(records).items():
                draw(draw_in / file)


def chosen_names(names: str, known: list[str], kind: str) -> list[str]:
    """Split names given with commas or spaces between; all that are known where none is given.

    Raises:
        typer.BadParameter: a name is not known.
    """
    chosen = [n.strip() for n in names.split(",") if n.strip()] if "," in names else names.split()
    if unknown := [name for name in chosen if name not in known]:
        raise typer.BadParameter(f"unknown {kind} {unknown}, choose from {', '.join(known)}")
    return chosen or known
