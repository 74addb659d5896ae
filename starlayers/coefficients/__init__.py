"""Coefficients of star layers: measure, penalise, learn, search.

A star layer computes polynomials of its inputs; these are the coefficients of their monomials.

Importing this needs PyTorch alone. Searches need `pip install 'starlayers[coefficients]'`, figures
`pip install 'starlayers[plots]'`.
"""

from starlayers.coefficients.dimension import empirical_rank, implicit_dimension
from starlayers.coefficients.eigen import Attribution, Eigenfeatures, attribute, eigenfeatures
from starlayers.coefficients.expand import Polynomial, expand
from starlayers.coefficients.form import branch_vectors, iter_quadratic_forms, quadratic_form
from starlayers.coefficients.kernel import star_kernel
from starlayers.coefficients.penalty import CoefficientPenalty
from starlayers.coefficients.plots import plot_eigenfeatures, plot_spectrum
from starlayers.coefficients.search import SearchResult, search
from starlayers.coefficients.space import apply_initialisation, coefficient_space
from starlayers.coefficients.spectrum import Spectrum, spectrum
from starlayers.coefficients.spectrum_logger import SpectrumLogger
from starlayers.coefficients.truncation import TruncationCurve, truncate, truncation_curve
from starlayers.coefficients.tune import TuneResult, tune_coefficients

__all__ = [
    "Attribution",
    "CoefficientPenalty",
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
    "eigenfeatures",
    "empirical_rank",
    "expand",
    "implicit_dimension",
    "iter_quadratic_forms",
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
