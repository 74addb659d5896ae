"""Defaults of every public function of the package."""

import inspect
from dataclasses import FrozenInstanceError

import pytest

from starlayers import coefficients

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
