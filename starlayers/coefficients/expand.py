"""Polynomials of small star layers with named monomials."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from starlayers.coefficients.form import Star, check_form, quadratic_form
from starlayers.coefficients.optional import require

if TYPE_CHECKING:
    import sympy  # type: ignore[import-untyped]

__all__ = ["Polynomial", "expand"]

#: largest number of monomials by default: as many can still be printed and read
MAX_TERMS = 100_000


@dataclass(frozen=True)
class Polynomial:
    """Polynomial of degree two, with the coefficient of every monomial.

    A monomial is a tuple of names. `terms` is in order of degree, squares and products first; the
    constant has the key `()`. Calling the polynomial evaluates it: inputs (..., d) -> (...).

    Args:
        names: names of the d inputs.
        terms: coefficients, as `{("x0", "x0"): 2.0, ("x0", "x1"): -1.0, ("x1",): 3.0, (): 1.0}`.

    Example:
        >>> p = Polynomial(("a", "b"), {("a", "a"): 2.0, ("a", "b"): -1.0, (): 0.5})
        >>> print(p)
        2*a**2 - a*b + 0.5
        >>> p(torch.tensor([3.0, 1.0]))
        tensor(15.5000)
    """

    names: tuple[str, ...]
    terms: dict[tuple[str, ...], float]

    def __call__(self, x: Tensor) -> Tensor:
        if x.ndim == 0 or x.shape[-1] != len(self.names):
            raise ValueError(
                f"the polynomial has {len(self.names)} variables, got inputs of shape "
                f"{tuple(x.shape)}"
            )
        column = {name: x[..., i] for i, name in enumerate(self.names)}
        total = x.new_zeros(x.shape[:-1])
        for monomial, coefficient in self.terms.items():
            value = torch.full_like(total, coefficient)
            for name in monomial:
                value = value * column[name]
            total = total + value
        return total

    def __str__(self) -> str:
        parts = [part for term in self.terms.items() for part in _format(*term)]
        text = " ".join(parts) or "0"
        return text.removeprefix("+ ") if text.startswith("+ ") else text.replace("- ", "-", 1)

    def sympy(self) -> "sympy.Expr":
        """Return the polynomial as an expression of sympy, with a symbol for each name.

        Raises:
            ImportError: sympy is not installed.
        """
        require("Polynomial.sympy", "sympy")
        import sympy

        symbols = {name: sympy.Symbol(name) for name in self.names}
        return sympy.Add(
            *(
                sympy.Float(coefficient) * sympy.Mul(*(symbols[name] for name in monomial))
                for monomial, coefficient in self.terms.items()
            )
        )


def _format(monomial: tuple[str, ...], coefficient: float) -> Iterator[str]:
    if coefficient == 0.0:
        return
    factors = [*monomial]
    if len(factors) == 2 and factors[0] == factors[1]:
        factors = [f"{factors[0]}**2"]
    size = f"{abs(coefficient):.6g}"
    if size != "1" or not factors:
        factors.insert(0, size)
    yield "+" if coefficient > 0 else "-"
    yield "*".join(factors)


def expand(
    op: Star,
    names: Sequence[str] | None = None,
    *,
    outputs: int | Sequence[int] | None = None,
    max_terms: int = MAX_TERMS,
) -> list[Polynomial]:
    """Expand each output of a small star layer to a polynomial with named monomials.

    Args:
        op: as for `quadratic_form`.
        names: names of the inputs; by default "x0", "x1", ...
        outputs: number of an output, or several; `None` for all.
        max_terms: largest number of monomials of all polynomials together.

    Returns:
        A `Polynomial` for each output, with `(d + 1)(d + 2) / 2` terms each.

    Raises:
        TypeError, ValueError: as `quadratic_form`; the numbers of names and inputs differ, a name
            is repeated, or there are too many terms.

    Example:
        >>> from starlayers import StarOp
        >>> op = StarOp(2, 1, act=None)
        >>> with torch.no_grad():
        ...     _ = op.f1.weight.copy_(torch.tensor([[1.0, 2.0]])), op.f1.bias.fill_(0)
        ...     _ = op.f2.weight.copy_(torch.tensor([[1.0, 0.0]])), op.f2.bias.fill_(3)
        >>> print(expand(op, names=["u", "v"])[0])  # (u + 2 v) (u + 3)
        u**2 + 2*u*v + 3*u + 6*v
    """
    check_form("expand", op)
    d = op.in_features
    variables = tuple(f"x{i}" for i in range(d)) if names is None else tuple(names)
    if len(variables) != d or len(set(variables)) != d:
        raise ValueError(f"expand: {d} different names are needed for {d} inputs, got {variables}")
    chosen = range(op.out_features) if outputs is None else outputs
    count = 1 if isinstance(chosen, int) else len(chosen)
    if (terms := count * (d + 1) * (d + 2) // 2) > max_terms:
        raise ValueError(
            f"expand: {count} outputs on {d} inputs have {terms:,} terms, more than max_terms="
            f"{max_terms:,}; choose some by outputs=, or take the matrices of quadratic_form"
        )
    forms = quadratic_form(op, outputs).detach().tolist()
    return [Polynomial(variables, _terms(q, variables)) for q in forms]


def _terms(q: list[list[float]], names: tuple[str, ...]) -> dict[tuple[str, ...], float]:
    d = len(names)
    pairs = combinations_with_replacement(range(d + 1), 2)  # d is the constant coordinate
    return {
        tuple(names[n] for n in (i, j) if n < d): q[i][j] if i == j else 2 * q[i][j]
        for i, j in sorted(pairs, key=lambda pair: pair.count(d))
    }
