"""Imports, missing packages and defaults of the package."""

import inspect
import subprocess
import sys
from dataclasses import FrozenInstanceError

import pytest

from starlayers import coefficients
from starlayers.coefficients.optional import require

CHILD = """
import sys, warnings
import torch
before = {name.split(".")[0] for name in sys.modules}
warnings.simplefilter("error")
from starlayers import StarOp
from starlayers.coefficients import CoefficientPenalty, SpectrumLogger, expand, spectrum
op = StarOp(3, 2, act=None)
spectrum(op), SpectrumLogger(op).step(0), str(expand(op)[0])
CoefficientPenalty(op, balance=0.1)().backward()
after = {name.split(".")[0] for name in sys.modules if "." not in name}
names = {"matplotlib", "optuna", "sklearn", "sympy", "scipy", "stable_baselines3", "tensorboard",
         "transformers", "triton", "tqdm"}
print(sorted((after - before) & names))
"""


def test_it_loads_torch_alone_and_warns_of_nothing():
    done = subprocess.run(
        [sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == "[]"


# --- errors for packages that are not installed


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


# --- defaults of every public function of the package


DEFAULTS = {
    "CoefficientPenalty": {"p": 2, "normalise": True, "balance": 0.0, "bound": False},
    "Spectrum": {"entropy": None},
    "SpectrumLogger": {"writer": None, "every": 100, "entropy": False},
    "attribute": {"output": None, "shape": None},
    "coefficient_space": {"layers": 0},
    "eigenfeatures": {"output": None, "k": None, "shape": None},
    "empirical_rank": {"d": None, "samples": None, "seed": 0, "tol": None},
    "expand": {"names": None, "outputs": None, "max_terms": 100_000},
    "implicit_dimension": {"layers": 1, "exact": True},
    "iter_quadratic_forms": {"chunk_bytes": 64 * 2**20},
    "plot_eigenfeatures": {"top": 3, "names": None, "x": None, "shape": None},
    "quadratic_form": {"outputs": None, "chunk": None},
    "search": {
        "space": None,
        "method": "tpe",
        "trials": 100,
        "directions": "maximize",
        "storage": None,
        "name": "search",
        "seed": 0,
        "first": None,
        "sampler": None,
        "timeout": None,
        "callbacks": (),
        "progress": True,
    },
    "spectrum": {"entropy": True},
    "star_kernel": {"y": None, "analytic": False},
    "truncation_curve": {"k": None},
    "tune_coefficients": {
        "method": "cma",
        "trials": 200,
        "layers": None,
        "groups": 8,
        "width": 2.0,
        "direction": "maximize",
        "storage": None,
        "name": "tune",
        "seed": 0,
        "progress": True,
    },
}


@pytest.mark.parametrize("name", coefficients.__all__)
def test_defaults(name):
    parameters = inspect.signature(getattr(coefficients, name)).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    assert defaults == DEFAULTS.get(name, {})


def test_names_of_the_package_are_sorted_and_there():
    assert coefficients.__all__ == sorted(coefficients.__all__)
    assert set(DEFAULTS) <= set(coefficients.__all__)


@pytest.mark.parametrize(
    "name",
    [
        *("Attribution", "Eigenfeatures", "Polynomial", "SearchResult", "Spectrum"),
        *("TruncationCurve", "TuneResult"),
    ],
)
def test_results_cannot_be_changed(name):
    kind = getattr(coefficients, name)
    with pytest.raises(FrozenInstanceError):
        object.__new__(kind).study = None
