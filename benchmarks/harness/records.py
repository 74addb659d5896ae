"""Records of runs: one JSON line a run, one file a study.

A line has the fields of `Record`. Two more mark what is not as the run wrote it:
`"command_repaired": true` (the recorded command was incomplete, and was completed from the study)
and `"definition_from": "repaired"` (the definition was filled in later from the study's code).
A field that nobody knows is null, and a field of its name with `_unknown` says why.
"""

import fcntl
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
FIELDS = ("study", "run", "arm", "seed", "definition", "metrics")
FIELDS += ("hardware", "versions", "command", "date")


@dataclass(frozen=True)
class Record:
    """Result of one run.

    Args:
        study: name of the study and of its file.
        run: name of the run within the study.
        arm: name of the variant that ran; None where a run compares several variants.
        seed: seed of the run; None where nothing is drawn.
        definition: everything that decides what the arm computes, as plain data.
        metrics: measured values.
        hardware, versions, command, date: conditions of the run.
        marks: further fields of the line.
    """

    study: str
    run: str
    arm: str | None
    seed: int | None
    definition: dict[str, Any] | None
    metrics: dict[str, Any]
    hardware: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    command: str | None = None
    date: str | None = None
    marks: dict[str, Any] = field(default_factory=dict)

    def line(self) -> str:
        """Return the record as one line of JSON, NaN and infinity as null."""
        content = asdict(self)
        content |= content.pop("marks")
        return json.dumps(plain(content), ensure_ascii=False) + "\n"


def plain(content: Any) -> Any:
    """Return what JSON makes of `content`: lists for tuples, null for NaN and infinity."""
    return json.loads(json.dumps(content), parse_constant=lambda _: None)


def file_of(study: str, folder: Path = RESULTS) -> Path:
    """Return the file of a study's records."""
    return folder / f"{study}.jsonl"


def append(record: Record, folder: Path = RESULTS) -> None:
    """Add a record to its study's file, whole or not at all, and wait until it is on disk.

    A line that an earlier process left incomplete is removed first. Several processes may append
    to one file.
    """
    line = record.line().encode()
    folder.mkdir(parents=True, exist_ok=True)
    with file_of(record.study, folder).open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        content = file.read()
        if whole := content.rfind(b"\n") + 1 - len(content):
            file.truncate(len(content) + whole)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def load(study: str, folder: Path = RESULTS) -> list[Record]:
    """Read all records of a study, in the order they were written; none without a file.

    A later record of the same run and definition replaces an earlier one: speed is measured again.
    The last line is ignored where it is incomplete.

    Raises:
        ValueError: any other line is no record.
    """
    file = file_of(study, folder)
    if not file.is_file():
        return []
    *lines, _ = file.read_text().split("\n")
    records: dict[str, Record] = {}
    for number, line in enumerate(lines, 1):
        try:
            content = json.loads(line)
            known = {name: content.pop(name) for name in FIELDS}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}, line {number}: not a record ({error!r})") from error
        record = Record(**known, marks=content)
        key = json.dumps((record.run, record.arm, record.seed, record.definition), sort_keys=True)
        records.pop(key, None)
        records[key] = record
    return list(records.values())
