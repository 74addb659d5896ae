"""Every message that docs/troubleshooting.md quotes is in the source."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")


def quoted() -> Iterator[str]:
    """Yield the messages in the first column of every table."""
    for line in PAGE.splitlines():
        if line.startswith("| `"):
            yield from re.findall(r"`([^`]+)`", line.split(" | ")[0])


def texts() -> Iterator[str]:
    """Yield every text in the code, with `...` for what an f-string fills in; no docstrings."""
    for file in (ROOT / "starlayers").rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                yield "".join(text(part) or "..." for part in node.values)
            elif id(node) not in docstrings:
                yield text(node)


def text(node: ast.AST) -> str:
    """Return the text of a string, empty for anything else."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


TEXTS = "\0".join(texts())


@pytest.mark.parametrize("message", sorted(set(quoted())))
def test_a_quoted_message_is_in_the_source(message):
    # parts in order, all in one text
    parts = [re.escape(part.strip()) for part in message.split("...") if part.strip()]
    assert parts, f"{message!r} has no fixed part"
    assert re.search(r"[^\0]*?".join(parts), TEXTS), f"no text of starlayers has {message!r}"


def test_every_group_is_read():
    assert len(set(quoted())) > 80
    assert re.search(re.escape("no such message"), TEXTS) is None
