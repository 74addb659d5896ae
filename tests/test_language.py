"""Size of the library's files, and the form of its summaries; ruff sees to D205 and D401.

`python -m tests.test_language` prints the summaries that a reader would have to solve.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent / "starlayers"
FILES = sorted(ROOT.rglob("*.py"))
RIDDLE = re.compile(r"(What|How|Whether|Where|Why|Who|Which|When|The|A|An)\b")
MAX_LINES, MAX_TOTAL = 450, 33_000


def summaries() -> Iterator[tuple[str, str]]:
    """Place and first line of every docstring."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            text = ast.get_docstring(node) if isinstance(node, kinds) else None
            if text:
                place = f"{file.relative_to(ROOT.parent)}:{getattr(node, 'lineno', 1)}"
                yield place, text.splitlines()[0]


def riddles() -> list[str]:
    return [f"{place} {line}" for place, line in summaries() if RIDDLE.match(line)]


def test_summaries_start_with_a_verb_or_a_noun():
    assert riddles() == []


def test_summaries_end_as_sentences():
    assert [f"{p} {line}" for p, line in summaries() if not line.endswith((".", ":", "!"))] == []


def test_files_are_short_enough_to_read():
    lines = {file: len(file.read_text().splitlines()) for file in FILES}
    assert {str(file): n for file, n in lines.items() if n > MAX_LINES} == {}
    assert sum(n for file, n in lines.items() if "datasets" not in file.parts) < MAX_TOTAL


if __name__ == "__main__":
    print(*riddles(), sep="\n")
    total = sum(1 for _ in summaries())
    print(f"{len(riddles())} of {total} summaries start with a question word or an article")
