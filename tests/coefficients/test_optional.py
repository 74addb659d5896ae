"""Errors for packages that are not installed."""

import sys

import pytest

from starlayers.coefficients.optional import require


def test_a_module_that_is_there_is_fine(monkeypatch):
    require("call", "json")
    require("call", "json.decoder", "other", extra="x")
    monkeypatch.setitem(sys.modules, "json.decoder", None)
    require("call", "json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing.part",), r"call needs missing: pip install 'starlayers\[coefficients\]'"),
        (("missing.part", "its-name"), r"call needs its-name: pip install"),
    ],
)
def test_the_package_is_named(arguments, message):
    with pytest.raises(ImportError, match=f"^{message}"):
        require("call", *arguments)
    with pytest.raises(ImportError, match=r"'starlayers\[nlp\]'$"):
        require("call", *arguments, extra="nlp")
