"""Study of all families: one run a family, and the table of what `starify` does to it."""

from collections import Counter
from typing import Any

from benchmarks.harness.records import load
from benchmarks.harness.report import conditions, first_definition, markdown_table
from benchmarks.harness.runner import Job, Records
from benchmarks.harness.study import Study

NAME = "starify-families"
TEXT = """\
## All families of transformers

**What was done.** For each of the {families} model types of transformers that have a model class, a
tiny model was built from its config with random weights, and run on random input. Its outputs in
eval mode (also with all matrices {loud:g} times as large), in train mode with seeded dropout, and
the gradients of all its parameters were held against those after `starify(mode="fuse")` and after
`starify(gate="scale")`, both on the eager backend. `report` was held against a count of the MLPs by
structure alone.

{summary}
"Converted" counts models with one MLP or more that became a star layer. "MLPs missing" are those of
the count that are no row of the report. {not_built} families could not be built this small, or ran
on no input that was tried; they are listed at the end.

**What differs, fails, or is not in the report**

{problems}
**Families with MLPs that are left**

{left}
**Every family that was converted**

{converted}
In {not_run_families} families {not_run} MLPs were converted that the input does not reach (towers
for images or sound in models that were given text): their outputs were not compared there.
{not_compared}

**Not built**

{reasons}
**Conditions**

{conditions}
"""


# transformers is imported where a family is run: the page needs the records alone


def jobs(smoke: bool = False) -> dict[str, Job]:
    """Make a job for each family of the installed transformers."""
    from benchmarks.starify.tiny_models import families

    names = ("llama", "bert", "mixtral", "vit") if smoke else families()
    return {name: _job(name) for name in names}


def recorded_jobs() -> dict[str, Job]:
    """Make a job for each family that has a record, whatever transformers is installed."""
    return {record.run: _job(record.run) for record in load(NAME)}


def _job(family: str) -> Job:
    return {"arm": family, "seed": 0, "family": family, "loud": 20.0}


def work(job: Job) -> dict[str, Any]:
    """Check one family; "not built" is the reason where no tiny model could be made."""
    import transformers

    from benchmarks.starify.families import check, problems
    from benchmarks.starify.tiny_models import NotBuiltError, families

    transformers.logging.set_verbosity_error()
    kind, name = families()[job["family"]]
    try:
        result = check(job["family"], loud=job["loud"])
    except NotBuiltError as error:
        return {"kind": kind, "class": name, "not built": _short(str(error))}
    return result | {"problems": problems(result)}


def _short(text: str, length: int = 160) -> str:
    """Return text on one line that a cell of a table can hold."""
    text = " ".join(text.split()).replace("|", "/")
    return text if len(text) <= length else text[: length - 3] + "..."


def _code(text: str) -> str:
    return f"`{text.replace('`', '')}`"


def _built(records: Records) -> dict[str, dict[str, Any]]:
    return {n: r.metrics for n, r in records.items() if "not built" not in r.metrics}


def _converted(metrics: dict[str, Any]) -> int:
    return sum(metrics[mode].get("converted", 0) for mode in ("fuse", "star"))


def summary(records: Records) -> str:
    """Return the table of the kinds of families."""
    lines = []
    built = _built(records)
    for kind in dict.fromkeys(r.metrics["kind"] for r in records.values()):
        every = [n for n, r in records.items() if r.metrics["kind"] == kind]
        ours = [built[n] for n in every if n in built]
        differing = [m for m in ours if any("missing" not in p for p in _told(m))]
        lines.append(
            [
                kind,
                str(len(every)),
                str(len(ours)),
                str(sum(_converted(m) > 0 for m in ours)),
                str(sum(map(_converted, ours))),
                str(len(differing)),
                str(sum(sum(m["unlisted"].values()) for m in ours)),
            ]
        )
    header = ["kind", "families", "built", "converted", "MLPs converted", "differ or fail"]
    return markdown_table([*header, "MLPs missing"], lines)


def _told(metrics: dict[str, Any]) -> list[str]:
    return [p.replace("not in the report", "missing") for p in metrics["problems"]]


def text(records: Records) -> str:
    """Make the part of the page."""
    built = _built(records)
    told = [[_code(n), _short("; ".join(_told(m)))] for n, m in built.items() if m["problems"]]
    left = [
        [_code(n), _short(f"{count} x {reason}")]
        for n, m in built.items()
        for reason, count in Counter(m["left"]).most_common(3)
    ]
    done = [
        [_code(n), m["class"], *(str(m[mode].get("converted", 0)) for mode in ("fuse", "star"))]
        for n, m in built.items()
        if _converted(m)
    ]
    unmet = [m["not run"] for m in built.values() if m["not run"]]
    loose = [f"`{n}` ({_short(m['not compared'])})" for n, m in built.items() if m["not compared"]]
    missing = [
        [_code(n), _short(r.metrics["not built"])] for n, r in records.items() if n not in built
    ]
    return TEXT.format(
        families=len(records),
        loud=first_definition(records)["loud"],
        summary=summary(records),
        not_built=len(missing),
        problems=markdown_table(["family", "what"], told) if told else "Nothing.\n",
        left=markdown_table(["family", "reason"], left) if left else "None.\n",
        converted=markdown_table(["family", "class", "fused", "star"], done),
        not_run_families=len(unmet),
        not_run=sum(unmet),
        not_compared=f"Not compared in train mode: {', '.join(loose)}." if loose else "",
        reasons=markdown_table(["family", "reason"], missing) if missing else "None.\n",
        conditions=conditions(records.values()),
    )


STUDY = Study(
    NAME,
    "python -m benchmarks.starify families",
    recorded_jobs,
    work,
    summary,
    text,
)
