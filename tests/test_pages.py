"""Code of the pages: what runs as a session, and the few blocks that cannot."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
#: page -> first line of blocks that no test runs as they are
NOT_RUN = {
    "deploy.md": "from transformers.exporters",  # prints a lot; tests/nlp run it
    "migration.md": "# before\nfrom liger_kernel",  # a package for GPUs
    "vision.md": "model.cuda().train()",  # a loop on a GPU
}
MOST_WORDS = 2500


@pytest.mark.parametrize("page", PAGES, ids=[p.name for p in PAGES])
def test_python_of_a_page_runs_as_a_session(page):
    """pytest runs sessions (`>>>`) of all pages; other blocks are told here, and parse."""
    others = [code for code in BLOCK.findall(page.read_text()) if not code.startswith(">>> ")]
    known = NOT_RUN.get(page.name)
    assert [code.startswith(known or "?") for code in others] == [True] * bool(known)
    for code in others:
        ast.parse(code)


@pytest.mark.parametrize("page", PAGES, ids=[p.name for p in PAGES])
def test_a_page_is_short_enough_to_read(page):
    assert len(page.read_text().split()) <= MOST_WORDS


def test_home_and_quickstart_are_read_in_minutes():
    words = (
        len((ROOT / "docs" / name).read_text().split()) for name in ("index.md", "quickstart.md")
    )
    assert sum(words) < 900
    assert len((ROOT / "README.md").read_text().splitlines()) <= 90
