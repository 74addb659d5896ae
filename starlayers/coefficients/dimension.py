"""Implicit dimension of star layers: counted, and measured as a rank."""

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from starlayers.checks import positive_int
from starlayers.coefficients.form import Star, check_bytes

__all__ = ["empirical_rank", "implicit_dimension"]


def implicit_dimension(d: int, layers: int = 1, *, exact: bool = True) -> int | float:
    """Return the number of monomials that activation-free star layers span.

    Each layer doubles the degree, so that `layers` of them compute polynomials of degree
    `n = 2^layers` of `d` inputs; these have `C(d + n, n)` monomials, the constant among them.

    Args:
        d: number of inputs of the first layer.
        layers: number of consecutive star layers.
        exact: count the monomials; otherwise return the paper's approximation `(d / sqrt 2)^n`,
            which for one layer is the largest term of the count. For more layers it counts equal
            monomials several times, and is too large by up to `n! / 2^(n / 2)`.

    Raises:
        TypeError, ValueError: `d` or `layers` is not an integer of at least 1.

    Source: Ma et al., "Rewrite the Stars", CVPR 2024, arXiv 2403.19967, section 3.

    Example:
        >>> implicit_dimension(2)  # x^2, xy, y^2, x, y, 1
        6
        >>> implicit_dimension(128, layers=2), implicit_dimension(128, layers=2, exact=False)
        (12082785, 67108864.0)
    """
    d = positive_int("implicit_dimension", "d", d)
    degree = 2 ** positive_int("implicit_dimension", "layers", layers)
    if exact:
        return math.comb(d + degree, degree)
    try:
        # d^n / 2^(n / 2), which the square root of 2 would round
        return float((d * d / 2) ** (degree // 2))
    except OverflowError:
        return math.inf


def empirical_rank(
    model: nn.Module | Callable[[Tensor], Tensor],
    d: int | None = None,
    *,
    samples: int | None = None,
    seed: int = 0,
    tol: float | None = None,
) -> int:
    """Measure the dimension of the space of functions that a model's outputs span.

    This is the rank of the matrix of outputs on random inputs, in float64. For one star layer it is
    `implicit_dimension(d)`, for two `implicit_dimension(d, 2)`, for a sum of branches d + 1,
    provided that there are at least as many outputs: a rank cannot exceed their number.

    Args:
        model: a module, called as a float64 copy on the CPU in eval mode, or a function of inputs
            (samples, d) in float64. Its result is flattened to (samples, outputs).
        d: size of an input; by default that of a model which starts with a star layer.
        samples: number of random inputs; by default twice the number of outputs.
        seed: seed of the inputs.
        tol: smallest singular value that counts, relative to the largest, of the matrix with
            columns of equal length; by default the rounding error of a matrix of that size.

    Raises:
        TypeError: `d` or `samples` is not an integer.
        ValueError: `d` is missing, there are fewer samples than outputs, an output is not finite,
            or the matrix would take more than 1 GiB.

    Example:
        >>> from starlayers import StarOp
        >>> from starlayers.coefficients.modules import SumOp
        >>> empirical_rank(StarOp(3, 20, act=None)), implicit_dimension(3)
        (10, 10)
        >>> empirical_rank(SumOp(3, 20, act=None))
        4
    """
    if d is None:
        first: object = model
        while isinstance(first, nn.Sequential) and len(first):
            first = first[0]
        if not isinstance(first, Star):
            raise ValueError(
                f"empirical_rank: {type(model).__name__} does not start with a star layer; say how "
                "many numbers an input has, d="
            )
        d = first.in_features
    d = positive_int("empirical_rank", "d", d)
    call = copy.deepcopy(model).cpu().double().eval() if isinstance(model, nn.Module) else model
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        outputs = call(torch.zeros(1, d, dtype=torch.float64)).numel()
        rows = 2 * outputs if samples is None else samples
        rows = positive_int("empirical_rank", "samples", rows)
        if rows < outputs:
            raise ValueError(f"empirical_rank: {rows} samples are too few for {outputs} outputs")
        matrix = f"empirical_rank: a matrix of {rows} samples and {outputs} outputs takes"
        check_bytes(8 * rows * outputs, matrix, "take a smaller d, fewer outputs or samples=")
        x = torch.randn(rows, d, generator=draw, dtype=torch.float64)
        y = call(x).reshape(rows, -1)
        if not y.isfinite().all():
            raise ValueError("empirical_rank: an output is infinite or not a number")
        # scaling rows and columns keeps the rank and brings the singular values closer together
        y = y / y.norm(dim=1, keepdim=True).clamp(min=torch.finfo(y.dtype).tiny)
        y = y / y.norm(dim=0).clamp(min=torch.finfo(y.dtype).tiny)
        return int(torch.linalg.matrix_rank(y, rtol=tol))
