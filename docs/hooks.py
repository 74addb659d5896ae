"""Hooks of the site: formulas become MathML, and examples of docstrings code blocks."""

import html
import re

import griffe
from latex2mathml.converter import convert

FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\s*\\([(\[])(.*?)\\[)\]]\s*</\1>', flags=re.DOTALL
)


def on_page_content(content: str, **_: object) -> str:
    """Replace the formulas of a page by MathML, which browsers draw without a script."""

    def formula(match: re.Match[str]) -> str:
        display = "block" if match[2] == "[" else "inline"
        return convert(html.unescape(match[3]), display=display)

    return FORMULA.sub(formula, content)


class Examples(griffe.Extension):
    """Makes a section of each "Example:", which mkdocstrings knows only in the plural."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Rename the section of an object."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)
