"""The public names, and what every one of them must have: types, words and an example."""

import importlib
import inspect

import pytest

import starlayers

MODULES = [
    "starlayers",
    "starlayers.activations",
    "starlayers.backend",
    "starlayers.coefficients",
    "starlayers.functional",
    "starlayers.modules",
    "starlayers.nlp",
    "starlayers.datasets",
    "starlayers.datasets.packages",
    "starlayers.datasets.text",
    "starlayers.datasets.pretrained",
    "starlayers.datasets.tokens",
    "starlayers.rl",
    "starlayers.rl.contrib",
    "starlayers.surgery",
    "starlayers.vision",
]
#: tables and tuples, documented by the comment above them
CONSTANTS = {"ACTIVATIONS", "BACKENDS", "COMBINE", "NETS", "RECIPES", "SPECIAL_TOKENS", "STARNETS"}


def public():
    for module in map(importlib.import_module, MODULES):
        for name in module.__all__:
            yield module.__name__, name, getattr(module, name)


OBJECTS = {id(thing): (f"{m}.{n}", thing) for m, n, thing in public() if n not in CONSTANTS}
things = pytest.mark.parametrize(
    "thing", [thing for _, thing in OBJECTS.values()], ids=[name for name, _ in OBJECTS.values()]
)


def signature_owner(thing):
    return thing.__init__ if inspect.isclass(thing) else thing


def test_names_are_pinned():
    assert set(starlayers.__all__) == {
        "ACTIVATIONS",
        "DropPath",
        "StarBlock",
        "StarMLP",
        "StarOp",
        "backend_name",
        "from_pretrained",
        "get_activation",
        "param_groups",
        "register_activation",
        "star",
        "starify",
        "use_backend",
    }
    assert starlayers.__version__ == "0.1.0"


@pytest.mark.parametrize("name", MODULES)
def test_every_listed_name_is_there_once(name):
    module = importlib.import_module(name)
    assert len(set(module.__all__)) == len(module.__all__)
    assert [n for n in module.__all__ if not hasattr(module, n)] == []
    assert module.__doc__


def test_nothing_else_of_ours_looks_public():
    found = {
        name
        for name, thing in vars(starlayers).items()
        if not name.startswith("_") and not inspect.ismodule(thing)
    }
    assert found == set(starlayers.__all__)


@things
def test_docstring_has_an_example(thing):
    text = inspect.getdoc(thing)
    assert text
    assert "Example:" in text
    assert ">>> " in text.split("Example:")[1]


@things
def test_annotations_are_complete(thing):
    signature = inspect.signature(signature_owner(thing))
    missing = [
        name
        for name, parameter in signature.parameters.items()
        if name != "self" and parameter.annotation is inspect.Parameter.empty
    ]
    assert missing == []
    assert signature.return_annotation is not inspect.Signature.empty


@pytest.mark.parametrize("name", ["StarOp", "StarMLP", "StarBlock"])
def test_constructors_take_options_by_keyword_with_device_and_dtype_last(name):
    parameters = list(inspect.signature(getattr(starlayers, name)).parameters.values())
    assert [p.name for p in parameters[-2:]] == ["device", "dtype"]
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters[2:])
    mutable = [p.name for p in parameters if isinstance(p.default, (list, dict, set))]
    assert mutable == []
