"""The built site: every public name is in the API reference, and links lead somewhere."""

import ast
import doctest
import importlib
import inspect
import itertools
import re
from collections import Counter
from pathlib import Path

import pytest

from tests.site.links import ROOT, broken_links, build
from tests.test_public import CONSTANTS, MODULES, public

pytestmark = pytest.mark.slow
pytest.importorskip("mkdocs")

ENTRY = re.compile(r'<h3 id="(starlayers[\w.]+)" class="doc doc-heading">(.*?)(?=<h[23] |\Z)', re.S)
#: modules that are entries themselves: importing them registers names elsewhere
REGISTERING = {"starlayers.vision.timm", "starlayers.vision.yolo"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    build(folder)
    return folder


@pytest.fixture(scope="module")
def reference(site):
    """Full name -> HTML of its entry."""
    files = sorted((site / "api").glob("*.html"))
    entries = [match.groups() for file in files for match in ENTRY.finditer(file.read_text())]
    assert Counter(name for name, _ in entries).most_common(1)[0][1] == 1
    return dict(entries)


def thing_of(name):
    module, _, last = name.rpartition(".")
    return getattr(importlib.import_module(module), last)


def test_every_public_name_is_in_the_reference_once(reference):
    documented = {name: thing_of(name) for name in reference if name not in REGISTERING}
    count = Counter(map(id, documented.values()))
    assert {name for name, thing in documented.items() if count[id(thing)] > 1} == set()
    listed = {id(thing): f"{module}.{name}" for module, name, thing in public()}
    assert {full for key, full in listed.items() if key not in count} == set()
    assert {full for full, thing in documented.items() if id(thing) not in listed} == set()


def test_names_are_under_modules_that_list_them(reference):
    modules = {name.rpartition(".")[0] for name in reference if name not in REGISTERING}
    assert modules <= set(MODULES)
    unlisted = {
        name
        for name in reference
        if name not in REGISTERING
        and name.rpartition(".")[2] not in importlib.import_module(name.rpartition(".")[0]).__all__
    }
    assert unlisted == set()


def test_every_entry_has_a_summary_and_an_example(reference):
    assert {name for name, entry in reference.items() if "Examples:" not in entry} == set()
    assert {name for name, entry in reference.items() if "&gt;&gt;&gt;" not in entry} == set()
    # sections that the parser of docstrings did not take for one
    unread = re.compile(r"<p>(Args|Arguments|Attributes|Returns|Raises|Example|Shapes|Source):")
    assert {name: m[0] for name, e in reference.items() if (m := unread.search(e))} == {}


def test_documented_arguments_are_rendered(reference):
    for name, entry in reference.items():
        text = inspect.getdoc(thing_of(name)) if name not in REGISTERING else None
        for section, title in (("Args:", "Parameters:"), ("Raises:", "Raises:")):
            if text and name.rpartition(".")[2] not in CONSTANTS and f"\n{section}\n" in text:
                assert title in entry, (name, title)


def test_table_of_names_links_to_every_entry(site, reference):
    table = (site / "api" / "index.html").read_text()
    links = re.findall(r'<tr>\s*<td><a [^>]*href="\w+\.html#([\w.]+)"[^>]*><code>', table)
    assert sorted(links) == sorted(reference)


def test_links_of_the_site_lead_somewhere(site):
    assert list(broken_links(site)) == []


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html#there">1</a><a href="b.html#gone">2</a>')
    (tmp_path / "b.html").write_text('<p id="there"><img src="c.png"><a href="#there">3</a></p>')
    assert list(broken_links(tmp_path)) == [
        "a.html: b.html#gone: no such anchor",
        "b.html: c.png: no such file",
    ]


def test_examples_of_constants_run():
    # their docstrings are strings below them, which no collector of doctests finds
    found = {}
    for file in (ROOT / "starlayers").rglob("*.py"):
        body = ast.parse(file.read_text()).body
        for node, after in itertools.pairwise(body):
            target = getattr(node, "target", None) or getattr(node, "targets", [None])[0]
            if isinstance(target, ast.Name) and target.id in CONSTANTS:
                found[target.id] = (file, after)
    assert found.keys() == CONSTANTS
    for name, (file, after) in found.items():
        text = ast.literal_eval(after.value)
        test = doctest.DocTestParser().get_doctest(text, {}, name, str(file), 0)
        assert test.examples
        assert doctest.DocTestRunner().run(test).failed == 0


def test_gallery_shows_every_figure():
    gallery = (ROOT / "docs" / "gallery.md").read_text()
    figures = {f.name for f in (ROOT / "docs" / "figures").iterdir() if f.is_file()}
    assert figures == {Path(f).name for f in re.findall(r"!\[[^\]]+\]\((figures/[^)]+)\)", gallery)}
