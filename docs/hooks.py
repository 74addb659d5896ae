"""Hooks of the site: the API's docstrings, its table of names and links to it, and formulas."""

import functools
import html
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import griffe
from latex2mathml.converter import convert

import starlayers

FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\s*\\([(\[])(.*?)\\[)\]]\s*</\1>', flags=re.DOTALL
)
HEADING = re.compile(r'(<h3 id="(starlayers\.(?:\w+\.)*)\w+" class="doc doc-heading">\s*)(?=<span)')
#: pages of the API, in the order of the table of names
API = ("core", "functional", "vision", "nlp", "surgery", "rl", "coefficients", "datasets")
#: rooms of the guides that do not have their name
ROOMS = {
    "interpretation": "coefficients",
    "search": "coefficients",
    "starify": "surgery",
    "training": "vision",
}
RL = "starlayers.rl."
DIRECTIVE = re.compile(r"^::: (\S+)$|^(?:#|##) (.+)$", flags=re.MULTILINE)
#: an element whose code is left alone, or code that may be the name of something
CODE = re.compile(
    r"<(?P<close>/?)(?P<tag>a|autoref|b|h[1-6]|math|nav|pre)\b[^>]*>"
    r"|<code>(?P<name>[A-Za-z_][\w.]*)(?P<call>\([^<]*\))?</code>"
)


def on_config(config: object, **_: object) -> None:
    """Tell which version a site is of: each has its own, built from its tag."""
    config.copyright = f"starlayers {starlayers.__version__}"


def on_page_markdown(markdown: str, *, page: object, **_: object) -> str:
    """Mark sessions as such, and write the table of names into the first page of the API."""
    # prompts and results of a session are left out when it is copied (extra.css)
    markdown = re.sub(r"(?m)^```python\n(?=>>> )", "```pycon\n", markdown)
    if page.file.src_uri != "api/index.md":
        return markdown
    tables = "\n".join(_table(page) for page in API)
    return f'{markdown}\n<div class="api-names" markdown>\n\n{tables}\n</div>\n'


def on_page_content(content: str, *, page: object, **_: object) -> str:
    """Make MathML of a page's formulas, and links of the public names in its text."""
    content = FORMULA.sub(_formula, content)
    content = HEADING.sub(r'\1<span class="doc-module">\2</span>', content)
    uri: str = page.file.src_uri
    if uri.startswith("api/"):
        content = re.sub(r"docs/([\w-]+)\.md", r'<a href="../\1.html">docs/\1.md</a>', content)
    return content if uri == "changelog.md" else _linked(content, Path(uri).stem)


def _formula(match: re.Match[str]) -> str:
    # browsers draw MathML without a script
    display = "block" if match[2] == "[" else "inline"
    return convert(html.unescape(match[3]), display=display)


# --- public names


def entries(page: str) -> Iterator[tuple[str, str]]:
    """Yield ("#", title), ("##", heading) and (":::", name) of a page of the API, in order."""
    text = (Path(__file__).parent / "api" / f"{page}.md").read_text()
    for match in DIRECTIVE.finditer(text):
        yield match[0].split(" ", 1)[0], match[1] or match[2]


@functools.cache
def documented() -> dict[str, list[str]]:
    """Return the documented names: last part -> full names."""
    names: dict[str, list[str]] = {}
    for page in API:
        for kind, name in entries(page):
            if kind == ":::":
                names.setdefault(name.rpartition(".")[2], []).append(name)
    return names


@functools.cache
def package() -> griffe.Object | griffe.Alias:
    """Return the package as mkdocstrings reads it."""
    return griffe.load(
        "starlayers",
        search_paths=[Path(__file__).parents[1]],
        extensions=griffe.load_extensions(Docstrings),
    )


def _table(page: str) -> str:
    lines = []
    for kind, name in entries(page):
        if kind == "#":
            lines += [f"## [{name}]({page}.md)"]
        elif kind == "##":
            lines += ["", f"| {name} | |", "|---|---|"]
        else:
            docstring = package()[name.removeprefix("starlayers.")].docstring
            summary = " ".join(docstring.value.split("\n\n")[0].split()).replace("|", r"\|")
            lines += [f"| [`{name.rpartition('.')[2]}`][{name}] | {summary} |"]
    return "\n".join([*lines, ""])


def _linked(content: str, page: str) -> str:
    room = f"starlayers.{ROOMS.get(page, page)}."
    closed = 0  # depth in elements whose code stays as it is

    def link(match: re.Match[str]) -> str:
        nonlocal closed
        if match["tag"]:
            closed += -1 if match["close"] else 1
        if closed or not match["name"]:
            return match[0]
        target = _target(match["name"], room)
        return f'<autoref identifier="{target}">{match[0]}</autoref>' if target else match[0]

    return CODE.sub(link, content)


def _target(name: str, room: str) -> str | None:
    found = documented().get(name.rpartition(".")[2], [])
    found = [full for full in found if f".{full}".endswith(f".{name}")]
    here = [full for full in found if full.startswith(room)]
    if not here and name.islower() and "_" not in name:
        # a word of English, which may mean something else outside its own room
        here = [full for full in found if hasattr(starlayers, name) and not full.startswith(RL)]
        return here[0] if here else None
    return next(iter(here or found), None)


# --- docstrings


class Docstrings(griffe.Extension):
    """Reads what is made when the library is imported, and this library's habits in docstrings."""

    def on_package(self, *, pkg: griffe.Module, **_: object) -> None:
        """Rewrite docstrings, and add public names that reading the files does not find."""
        for obj in _all_objects(pkg):
            if obj.docstring:
                obj.docstring.value = sections(obj.docstring.value)
            if isinstance(obj, griffe.Class) and "strict" in {str(d.value) for d in obj.decorators}:
                _add_init(obj)
        # all are found before the first is put in its place, where it hides what is in a module
        names = [name for page in API for kind, name in entries(page) if kind == ":::"]
        for module, name, member in [_public(pkg, name) for name in names]:
            module.members[name] = member


def _all_objects(obj: griffe.Object) -> Iterator[griffe.Object]:
    yield obj
    for member in obj.members.values():
        if not member.is_alias:
            yield from _all_objects(member)


def sections(text: str) -> str:
    """Rewrite a docstring for the parser of Google's style.

    "Example:" becomes "Examples:", which it takes for a section. "Shapes:" and "Source:" are
    paragraphs with a bold word. An entry for several arguments becomes one for each.
    """
    text = re.sub(r"(?m)^Example:$", "Examples:", text)
    text = re.sub(r"(?m)^(Shapes|Source): ", r"**\1:** ", text)
    others = r"(?m)^    All others: (.*(?:\n     +.*)*)"
    text = re.sub(others, r"\n**All other arguments:** \1", text)

    def split(match: re.Match[str]) -> str:
        return "\n".join(f"    {name}:{match[2]}" for name in match[1].split(", "))

    several = r"(?m)^    ([a-z_0-9]+(?:, [a-z_0-9]+)+):(.*(?:\n     +.*)*)"
    args = r"(?ms)^(?:Args|Attributes):\n.*?(?=^\S|\Z)"
    text = re.sub(args, lambda match: re.sub(several, split, match[0]), text)
    errors = r"(?m)^    ([A-Z]\w+(?:, [A-Z]\w+)+):(.*(?:\n     +.*)*)"
    raises = r"(?ms)^Raises:\n.*?(?=^\S|\Z)"
    return re.sub(raises, lambda match: re.sub(errors, split, match[0]), text)


def _add_init(config: griffe.Class) -> None:
    """Give a configuration of transformers the constructor that its decorator makes."""
    # what griffe read as a ClassVar is no attribute of instances
    fields = (a for a in config.members.values() if "instance-attribute" in a.labels)
    parameters = griffe.Parameters(
        griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword),
        *(
            griffe.Parameter(
                field.name,
                annotation=field.annotation,
                kind=griffe.ParameterKind.keyword_only,
                default=field.value,
            )
            for field in fields
        ),
        griffe.Parameter("kwargs", kind=griffe.ParameterKind.var_keyword),
    )
    config.set_member("__init__", griffe.Function("__init__", parameters=parameters))


def _public(pkg: griffe.Module, name: str) -> tuple[griffe.Module, str, griffe.Object]:
    """Return the module of a public name, its last part, and what it names."""
    path, _, last = name.partition(".")[2].rpartition(".")
    module: griffe.Module = pkg[path] if path else pkg
    member = module.members.get(last)
    try:
        if member and member.is_module and last in member.members:
            # a function in a file of its name: reading finds the file
            return module, last, _alias(module, member.members[last])
        if member and member.docstring:
            return module, last, member
    except griffe.AliasResolutionError:
        pass
    # made by a function: import it
    thing = getattr(importlib.import_module(module.path), last)
    made = griffe.inspect(thing.__module__, filepath=None).members[last]
    made.docstring.value = sections(inspect.getdoc(thing) or "")
    if inspect.isclass(thing):
        home = pkg[thing.__module__.partition(".")[2]]
        made.bases = [griffe.ExprName(base.__name__, parent=home) for base in thing.__bases__]
    return module, last, _alias(module, made)


def _alias(module: griffe.Module, target: griffe.Object | griffe.Alias) -> griffe.Object:
    return griffe.Alias(target.name, target, parent=module)
