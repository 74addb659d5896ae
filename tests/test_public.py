"""Public names, what every one of them must have, and what their import loads."""

import dataclasses
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import starlayers

MODULES = [
    "starlayers",
    "starlayers.activations",
    "starlayers.backend",
    "starlayers.coefficients",
    "starlayers.coefficients.modules",
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
    "starlayers.vision.training",
    "starlayers.vision.yolo",
]
SIGNATURES = Path(__file__).parent / "golden" / "signatures.txt"
#: tables and tuples, documented by the string below them; tests/site runs its example
CONSTANTS = {"ACTIVATIONS", "BACKENDS", "NETS", "RECIPES", "SPECIAL_TOKENS", "STARNETS"}


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


def signature(thing):
    """Return names, kinds and defaults of the parameters of `thing`, without annotations.

    Fields that a dataclass of another package adds are left out: they change with its version.
    """
    parameters = inspect.signature(thing).parameters.values()
    if dataclasses.is_dataclass(thing):
        ours = (c for c in thing.__mro__ if c.__module__.startswith("starlayers."))
        fields = {name for c in ours for name in inspect.get_annotations(c)}
        parameters = [p for p in parameters if p.name in fields]
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    return str(inspect.Signature(bare))


def test_signatures_are_pinned():
    # in a file of its own, since a changed default is a change for users: edit it by hand
    pinned = dict(line.split(" ", 1) for line in SIGNATURES.read_text().splitlines())
    found = {name: signature(thing) for name, thing in OBJECTS.values()}
    assert found.keys() == pinned.keys()
    assert {name: text for name, text in found.items() if text != pinned[name]} == {}


def test_names_are_pinned():
    assert set(starlayers.__all__) == {
        "ACTIVATIONS",
        "DropPath",
        "StarBlock",
        "StarMLP",
        "StarOp",
        "backend_name",
        "explain",
        "from_pretrained",
        "get_activation",
        "param_groups",
        "register_activation",
        "star",
        "star_mlp",
        "star_packed",
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
    if getattr(thing, "_is_protocol", False):  # nobody calls it: its attributes count
        attributes = [p.fget for p in vars(thing).values() if isinstance(p, property)]
        assert attributes
        assert all("return" in inspect.get_annotations(f) for f in attributes)
        return
    signature = inspect.signature(signature_owner(thing))
    missing = [
        name
        for name, parameter in signature.parameters.items()
        if name != "self" and parameter.annotation is inspect.Parameter.empty
    ]
    assert missing == []
    assert signature.return_annotation is not inspect.Signature.empty


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("StarOp", ["device", "dtype"]),
        ("StarMLP", ["device", "dtype"]),
        ("StarBlock", ["drop_path", "layer_scale"]),  # whose modules have a device and a dtype
    ],
)
def test_constructors_take_options_by_keyword_with_device_and_dtype_last(name, last):
    parameters = list(inspect.signature(getattr(starlayers, name)).parameters.values())
    assert [p.name for p in parameters[-2:]] == last
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters[2:])
    mutable = [p.name for p in parameters if isinstance(p.default, (list, dict, set))]
    assert mutable == []


# --- import of the library: quiet, nothing but torch


CHILD = """
import sys, warnings
import torch
before = set(sys.modules)
warnings.simplefilter("error")
import starlayers
loaded = set(sys.modules) - before
print(*sorted(name for name in loaded if name.split(".")[0] != "starlayers"))
print(*sorted(name for name in loaded if name.split(".")[0] == "starlayers"))
print(torch.cuda.is_initialized())
print(starlayers.star(torch.tensor([2.0]), torch.tensor([3.0])).tolist())

warnings.resetwarnings()
from starlayers import StarMLP, plans, use_backend
plans.MIN_HIDDEN_BYTES_INFERENCE = plans.MIN_HIDDEN_BYTES_TRAINING = 0
plans.HIDDEN_BYTES_A_CHANNEL = 0
mlp, x = StarMLP(2), torch.ones(1, 2)
with use_backend("eager"):
    expected = mlp(x)
print(torch.allclose(mlp(x), expected))
print("starlayers.kernels.device" in sys.modules)
"""


@pytest.fixture(scope="module")
def child():
    """Output of a fresh process, line by line."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_core_import_loads_torch_alone_and_warns_of_nothing(child):
    others, own, initialized, value = child[:4]
    forbidden = {"triton", "transformers", "stable_baselines3", "timm", "torchvision", "einops"}
    assert not forbidden & {name.split(".")[0] for name in others.split()}
    assert others.split() == []
    # ops are registered at once, their Triton code and the adapters are not loaded
    rooms = {name.split(".")[1] for name in own.split() if "." in name}
    core = {"activations", "backend", "checks", "dispatch", "explain", "functional", "modules"}
    core |= {
        "attached",
        "drop_path",
        "initialisation",
        "plans",
        "recompute",
        "reference",
        "state_dicts",
        "tracing",
    }
    assert rooms == core | {"kernels", "surgery"}
    assert "starlayers.kernels.device" not in own.split()
    assert initialized == "False"
    assert value == "[6.0]"


def test_a_fused_call_on_a_cpu_loads_no_triton_code(child):
    agrees, device = child[4:]
    assert (agrees, device) == ("True", "False")
