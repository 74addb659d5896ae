"""Kernel of a star layer: Gram matrix of its channels."""

import copy
from typing import Any

import torch
from torch import Tensor

from starlayers.coefficients.form import Star, branch_vectors, check_form, rank_of

__all__ = ["star_kernel"]


def star_kernel(op: Star, x: Any, y: Any = None, *, analytic: bool = False) -> Tensor:
    """Return the Gram matrix of the channels of a star.

    `K(x, y) = mean_k star_k(x) star_k(y)`. With `analytic=True` the result is its expectation over
    random weights instead of the op's own. If the weights of branch `i` are independent with mean 0
    and variance `v_i`, and its biases (`offset` included) have mean square `c_i`, then
    `E[f_i(x) f_i(y)] = v_i x.y + c_i`. The branches are independent of each other, and so are the
    `rank` products of a channel, so that

        E[K(x, y)] = rank (v_1 x.y + c_1) (v_2 x.y + c_2)

    a polynomial kernel of degree 2, `v^2 (x.y + c / v)^2` for equal branches. `v_i` and `c_i` are
    the mean squares of the op's weights, exact for its initialisation up to sampling. A sum of the
    same branches would have the linear kernel `(v_1 + v_2) x.y + c_1 + c_2`.

    Args:
        op: a `StarOp`; of a `StarMLP` the product, without `g`.
        x, y: (n, in_features) and (m, in_features), tensors or arrays; `y` defaults to `x`.
            `functools.partial(star_kernel, op)` is a kernel for scikit-learn.
        analytic: return the expectation; only for a star without activation.

    Returns:
        (n, m) in float64 on the CPU, symmetric and positive semidefinite for `y=None`.

    Raises:
        ValueError: inputs of another size, or `analytic` for a star with an activation, a sum or
            coefficients that depend on the input.

    Example:
        >>> import starlayers
        >>> x, op = torch.randn(5, 3), starlayers.StarOp(3, 100_000, act=None)
        >>> expected = star_kernel(op, x, analytic=True)
        >>> torch.allclose(star_kernel(op, x), expected, rtol=0.05, atol=0.05)
        True
    """
    first = _checked(op, "x", x)
    second = first if y is None else _checked(op, "y", y)
    if analytic:
        check_form("star_kernel(analytic=True)", op)
        products = first @ second.T
        expected = torch.full_like(products, rank_of(op))
        for vectors in branch_vectors(op):
            squares = vectors.detach().double().cpu().square().flatten(0, 1).mean(0)
            expected *= squares[:-1].mean() * products + squares[-1]
        return expected
    exact = copy.deepcopy(op).cpu().double()
    features = exact.products  # not `forward`: that of a StarMLP applies g
    with torch.no_grad():
        a = features(first)
        b = a if y is None else features(second)
    return a @ b.T / a.shape[1]


def _checked(op: Star, name: str, inputs: Any) -> Tensor:
    x = torch.as_tensor(inputs).detach().cpu().double()
    if x.ndim != 2 or x.shape[1] != op.in_features:
        raise ValueError(
            f"star_kernel: {name} must be (n, {op.in_features}) for this op, got {tuple(x.shape)}"
        )
    return x
