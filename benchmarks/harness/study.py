"""Studies: runs, tables, their part of a page of evidence, and options of their commands."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.harness.records import RESULTS
from benchmarks.harness.runner import Job, Records, current, measure_once, run_study

DOCS = Path(__file__).parents[2] / "docs"
NOTICE = "<!-- Written by `python -m benchmarks.evidence` from benchmarks/results; do not edit. -->"

Processes = Annotated[int, typer.Option(help="runs at a time, one thread each; 0 only tabulates")]
Smoke = Annotated[bool, typer.Option("--smoke", help="seconds instead of hours, no result")]
Out = Annotated[Path, typer.Option(help="folder of the records")]
WritePage = Annotated[bool, typer.Option("--page", help="only write the page, from the records")]

Figures = dict[str, Callable[[Path], None]]


@dataclass(frozen=True)
class Study:
    """Study with its runs, tables, and part of a page.

    Args:
        name: name of the file of its records.
        command: command that runs it.
        jobs: all jobs of the study, by name.
        work: function that runs one job and returns its metrics; None if all records were made
            elsewhere.
        tables: function that makes the tables that the command prints.
        text: function that makes the study's part of the page, as Markdown.
        figures: function that makes a drawing function for each figure's file name.
    """

    name: str
    command: str
    jobs: Callable[[], dict[str, Job]]
    work: Callable[[Job], dict[str, Any]] | None
    tables: Callable[[Records], str]
    text: Callable[[Records], str]
    figures: Callable[[Records], Figures] = lambda _: {}

    def records(self, folder: Path = RESULTS) -> Records:
        """Load the current records of all jobs.

        Raises:
            FileNotFoundError: there are none.
        """
        records = current(self.name, self.jobs(), folder)
        if not records:
            raise FileNotFoundError(f"no current records of {self.name} in {folder}")
        return records

    def run(
        self,
        jobs: dict[str, Job],
        *,
        processes: int,
        smoke: bool = False,
        out: Path = RESULTS,
    ) -> Records:
        """Run the jobs that have no record, print the tables, and return the records.

        A smoke run has records of its own, and draws the figures beside them.
        """
        assert self.work is not None
        name = f"{self.name}-smoke" if smoke else self.name
        records = run_study(name, jobs, self.work, processes=processes, folder=out)
        self._show(records, out if smoke else None)
        return records

    def measure(self, job: Job, *, smoke: bool = False, out: Path = RESULTS) -> None:
        """Measure in this process, append the record, and print the tables.

        For comparisons of speed, whose variants are timed in turn within one run. They are
        measured anew whenever they are asked for; a page has the last record.
        """
        assert self.work is not None
        name = f"{self.name}-smoke" if smoke else self.name
        (run,) = self.jobs()
        record = measure_once(name, job, self.work(job), run=run, folder=out)
        self._show({run: record}, out if smoke else None)

    def _show(self, records: Records, draw_in: Path | None) -> None:
        print(self.tables(records))
        if draw_in is not None:
            for file, draw in self.figures(records).items():
                draw(draw_in / file)


@dataclass(frozen=True)
class Page:
    """Page of evidence, docs/evidence/<name>.md, with the parts of some studies."""

    name: str
    title: str
    studies: tuple[Study, ...]

    def markdown(self, folder: Path = RESULTS) -> str:
        """Return the content of the page."""
        parts = [study.text(study.records(folder)).strip() for study in self.studies]
        return "\n\n".join([f"# {self.title}", NOTICE, *parts]) + "\n"

    def write(self, docs: Path = DOCS, folder: Path = RESULTS) -> None:
        """Write the page and draw its figures."""
        for part in ("evidence", "figures"):
            (docs / part).mkdir(parents=True, exist_ok=True)
        (docs / "evidence" / f"{self.name}.md").write_text(self.markdown(folder))
        for study in self.studies:
            for name, draw in study.figures(study.records(folder)).items():
                draw(docs / "figures" / name)


def chosen_names(names: str, known: list[str], kind: str) -> list[str]:
    """Split names given with commas or spaces between; all that are known where none is given.

    Raises:
        typer.BadParameter: a name is not known.
    """
    chosen = [n.strip() for n in names.split(",") if n.strip()] if "," in names else names.split()
    if unknown := [name for name in chosen if name not in known]:
        raise typer.BadParameter(f"unknown {kind} {unknown}, choose from {', '.join(known)}")
    return chosen or known
