"""The package: what it offers, and what it leaves unimported until it is used."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import starlayers
from starlayers import datasets
from starlayers.datasets.optional import require

HEAVY = ("torchvision", "transformers", "datasets", "pandas", "sklearn", "PIL", "huggingface_hub")


def test_names_are_pinned():
    assert datasets.__all__ == [
        "ImageData",
        "Pretrained",
        "RatingData",
        "TableData",
        "TextData",
        "byte_level_bpe",
        "load_image",
        "load_images",
        "load_prose",
        "load_ratings",
        "load_sentiment",
        "load_table",
        "load_translation",
        "pretrained_minilm",
        "windows",
    ]
    assert set(dir(datasets)) >= set(datasets.__all__)
    assert sorted(name for names in datasets.MODULES.values() for name in names) == sorted(
        datasets.__all__
    )


@pytest.mark.parametrize("name", datasets.__all__)
def test_a_name_comes_from_its_module(name):
    thing = getattr(datasets, name)
    assert thing.__module__.startswith("starlayers.datasets.")
    assert getattr(importlib.import_module(thing.__module__), name) is thing


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"'starlayers\.datasets' has no attribute 'load_all'"):
        datasets.load_all  # noqa: B018
    with pytest.raises(ImportError, match="load_all"):
        from starlayers.datasets import load_all  # noqa: F401


def test_nothing_heavy_is_imported_before_it_is_needed():
    code = f"""
import sys
import starlayers.datasets
from starlayers.datasets import packages, splits, corpora, bibles
loaded = set({HEAVY!r}) & set(sys.modules)
assert not loaded, loaded
from starlayers.datasets import load_images
loaded = set({HEAVY!r}) & set(sys.modules)
assert not loaded, loaded
load_images("digits")
assert "torchvision" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("module", "missing", "extra"),
    [
        ("huggingface", "datasets", "datasets"),
        ("text", "datasets", "datasets"),
        ("tables", "pandas", "datasets"),
        ("ratings", "pandas", "datasets"),
        ("image_folder", "PIL.Image", "datasets"),
        ("pretrained", "huggingface_hub", "datasets"),
        ("tokens", "tokenizers", "datasets,nlp"),
        ("tokens", "transformers", "datasets,nlp"),
    ],
)
def test_a_missing_package_names_the_extra(monkeypatch, module, missing, extra):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, f"starlayers.datasets.{module}", raising=False)
    package = missing.partition(".")[0]
    message = rf"needs {package}: pip install 'starlayers\[{extra}\]'"
    with pytest.raises(ImportError, match=message):
        importlib.import_module(f"starlayers.datasets.{module}")


def test_images_name_the_extra(monkeypatch):
    message = r"needs sklearn: pip install 'starlayers\[datasets\]'"
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=message):
        datasets.load_images("digits")
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(ImportError, match="needs torchvision"):
        datasets.load_images("SVHN")


def test_a_package_that_is_there_is_returned():
    assert require("json.decoder").JSONDecoder


def imports(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_the_package_stands_alone():
    root = Path(starlayers.__file__).parent
    for file in root.rglob("*.py"):
        ours = [name for name in imports(file) if name and name.split(".")[0] == "starlayers"]
        if file.parent.name == "datasets":
            assert [n for n in ours if not n.startswith("starlayers.datasets")] == [], file
