"""The coefficients of the implicit space of star layers: measure, penalise, learn, search.

Imports PyTorch alone; what draws or searches needs `pip install 'starlayers[coefficients]'`.
"""

from starlayers.coefficients._pictures import plot_eigenfeatures
from starlayers.coefficients.dimension import empirical_rank, implicit_dimension
from starlayers.coefficients.eigen import Attribution, Eigenfeatures, attribute, eigenfeatures
from starlayers.coefficients.expand import Polynomial, expand
from starlayers.coefficients.form import branch_vectors, iter_quadratic_forms, quadratic_form
from starlayers.coefficients.kernel import (
    DecisionBoundary,
    decision_boundary,
    plot_boundaries,
    star_kernel,
)
from starlayers.coefficients.penalty import CoefficientPenalty
from starlayers.coefficients.plots import plot_spectrum
from starlayers.coefficients.search import SearchResult, search
from starlayers.coefficients.space import apply_initialisation, coefficient_space
from starlayers.coefficients.spectrum import Spectrum, spectrum
from starlayers.coefficients.spectrum_logger import SpectrumLogger
from starlayers.coefficients.truncation import TruncationCurve, truncate, truncation_curve
from starlayers.coefficients.tune import TuneResult, tune_coefficients

__all__ = [
    "Attribution",
    "CoefficientPenalty",
    "DecisionBoundary",
    "Eigenfeatures",
    "Polynomial",
    "SearchResult",
    "Spectrum",
    "SpectrumLogger",
    "TruncationCurve",
    "TuneResult",
    "apply_initialisation",
    "attribute",
    "branch_vectors",
    "coefficient_space",
    "decision_boundary",
    "eigenfeatures",
    "empirical_rank",
    "expand",
    "implicit_dimension",
    "iter_quadratic_forms",
    "plot_boundaries",
    "plot_eigenfeatures",
    "plot_spectrum",
    "quadratic_form",
    "search",
    "spectrum",
    "star_kernel",
    "truncate",
    "truncation_curve",
    "tune_coefficients",
]
