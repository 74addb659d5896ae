"""Names in code, and names that code makes."""

import pytest

from starlayers.surgery.bytecode import names_of


@pytest.mark.parametrize(
    ("function", "makes"),
    [
        (lambda s: getattr(s, "x", None), False),
        (lambda s: getattr(s.a.b(3, 4), "x", s.c.d(1) * 2), False),
        (lambda s: getattr(getattr(s, "u"), "v") if hasattr(s, "q") else s, False),  # noqa: B009
        (lambda s: getattr(s, f"act_{s.k}", None), True),
        (lambda s: getattr(s, "a" + s.k), True),
        (lambda s: [hasattr(s, k) for k in s.z], True),
        (lambda s: map(getattr, s), True),
        (lambda s: getattr(getattr(s, "u"), s.k), True),  # noqa: B009
    ],
)
def test_names_that_are_made(function, makes):
    assert names_of(function.__code__).makes is makes


def test_names_that_are_read():
    def function(x):
        import os.path as path

        from . import edited

        return [path.sep, edited.act(LIMIT), getattr(x, "scale")] + [x.a for x in ("b",)]  # noqa: B009, F821

    names = names_of(function.__code__)
    assert {"sep", "act", "scale", "a", "b", "LIMIT", "edited"} <= names.read
    assert names.variables >= {"LIMIT", "getattr"}
    assert {("os.path", 0), ("", 1)} <= names.imports
