"""Committed pages are what the committed records make of them."""

import json
from pathlib import Path

import pytest

from benchmarks.harness.records import FIELDS, RESULTS, load
from benchmarks.harness.study import DOCS

#: without those of GPUs, whose page tests/benchmarks/test_gpu.py compares with its records
STUDIES = sorted(path.stem for path in RESULTS.glob("*.jsonl") if not path.stem.startswith("gpu-"))


@pytest.mark.studies
def test_every_page_is_written_from_the_records_byte_for_byte():
    from benchmarks.evidence import PAGES, contents

    made = contents()
    folder = DOCS / "evidence"
    assert {path.name for path in folder.iterdir()} == made.keys()
    for name, text in made.items():
        committed = (folder / name).read_text()
        assert committed == text, f"run python -m benchmarks.evidence: {name} differs"
    figures = {
        name for page in PAGES for study in page.studies for name in study.figures(study.records())
    }
    for name in figures:
        assert (DOCS / "figures" / name).is_file()
    # each study's records are on a page
    assert {study.name for page in PAGES for study in page.studies} == set(STUDIES)


def test_there_is_a_page_and_a_file_for_every_study():
    assert len(STUDIES) == 23
    assert (DOCS / "evidence" / "index.md").is_file()


@pytest.mark.parametrize("study", STUDIES)
def test_records_are_complete(study):
    records = load(study)
    assert records
    assert len({(r.run, json.dumps(r.definition)) for r in records}) == len(records)
    for r in records:
        assert r.study == study
        assert r.metrics
        assert r.definition or r.marks["definition_unknown"]
        assert r.command.startswith(("python -m benchmarks.", "python examples/"))
        assert len(r.command.split()) >= (2 if study == "examples" else 4), r.command
        assert r.date.startswith("2026-")
        assert r.hardware["cpu"]
        assert r.versions["torch"]
        line = json.loads(r.line())
        assert set(FIELDS) <= line.keys()
        assert str(Path.home()) not in r.line()
