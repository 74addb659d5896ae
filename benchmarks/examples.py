"""Pages of what the examples reached: records transcribed from earlier pages."""

from benchmarks.harness.records import Record
from benchmarks.harness.report import conditions, listed, markdown_table
from benchmarks.harness.runner import Job, Records
from benchmarks.harness.study import Study

NAME = "examples"
TEXT = """\
## Numbers that the examples reached

One run of each of {names} with default settings, unless seeds are named. The numbers were
printed by the examples and transcribed into the records by hand from earlier pages of this
documentation; the records are marked so. They show what to expect of an example, and are no
comparison.

{tables}
**Conditions**

{conditions}
"""
#: runs by name; a record has the numbers that the example printed
RUNS = ("nlp_sentiment", "nlp_generate", "nlp_translate", "rl_cartpole")
RUNS += ("star_eigenfeatures", "star_boundary")


def jobs() -> dict[str, Job]:
    """Make a job for each example, with its default settings."""
    return {
        name: {"arm": name, "seed": None, "script": f"examples/{name}.py", "settings": "defaults"}
        for name in RUNS
    }


def table(record: Record) -> str:
    """Return the numbers of an example: a line for each thing that it measures."""
    lines = [[name, str(value)] for name, value in record.metrics.items()]
    return markdown_table(["measure", "value"], lines)


def tables(records: Records) -> str:
    """Return a table for each example."""
    return "\n".join(f"#### `examples/{n}.py`\n\n{table(r)}" for n, r in records.items())


def text(records: Records) -> str:
    """Make the page of the examples."""
    return TEXT.format(
        names=listed(f"`{name}.py`" for name in records),
        tables=tables(records),
        conditions=conditions(records.values()),
    )


STUDY = Study(NAME, "python -m benchmarks.evidence", jobs, None, tables, text)
