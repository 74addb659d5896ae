"""Pages: their Python runs, and they are short."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
MOST_WORDS = 2500


@pytest.mark.parametrize("page", PAGES, ids=[p.name for p in PAGES])
def test_python_of_a_page_runs_as_a_session(page):
    """pytest runs the sessions (`>>>`) of all pages, and nothing else."""
    assert all(code.startswith(">>> ") for code in BLOCK.findall(page.read_text()))


@pytest.mark.parametrize("page", PAGES, ids=[p.name for p in PAGES])
def test_a_page_is_short_enough_to_read(page):
    assert len(page.read_text().split()) <= MOST_WORDS


def test_home_and_quickstart_are_read_in_minutes():
    words = (
        len((ROOT / "docs" / name).read_text().split()) for name in ("index.md", "quickstart.md")
    )
    assert sum(words) < 900
    assert len((ROOT / "README.md").read_text().splitlines()) <= 90
