"""Factors of the products of star layers, kept where a trained layer has them: in its branches."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from starlayers.coefficients.form import find_stars
from starlayers.modules import StarOp

__all__ = ["Products", "star_layers"]


def star_layers(
    owner: str, model: nn.Module, layers: str | Sequence[str] | None = None
) -> dict[str, "Products"]:
    """The products of a model's star layers by the layers' names, "" for a model that is one.

    Args:
        layers: names, or patterns as in `fnmatch`, of layers or of modules above them.

    Raises:
        ValueError: the model has no star layers, or a pattern matches none.

    Example:
        >>> list(star_layers("this", nn.Sequential(nn.Linear(4, 4), StarOp(4, 8))))
        ['1']
    """
    found = {n: m for n, m in find_stars(owner, model).items() if isinstance(m, StarOp)}
    if not found:
        raise ValueError(
            f"{owner}: {type(model).__name__} has no star layers with factors of their own "
            "(StarOp, StarMLP)"
        )
    chosen = found
    if layers is not None:
        asked = [layers] if isinstance(layers, str) else list(layers)
        chosen = {name: m for name, m in found.items() if any(_fits(name, p) for p in asked)}
        for pattern in asked:
            if not any(_fits(name, pattern) for name in found):
                raise ValueError(
                    f"{owner}: layers={pattern!r} matches none of the {len(found)} star layers, "
                    f"{', '.join(map(repr, found))}"
                )
    return {name: Products(owner, name, m) for name, m in chosen.items()}


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


class Products:
    """The products of one star layer, `act(h1) * (offset + h2)`, and factors for each.

    Products are the rows of the branches: `rank * out_features`, laid out as these are. A factor
    `s` goes into the second branch, `s * (offset + h2)`, or into the layer's own `scale` where it
    has one, and so changes nothing but the size of the product.

    Raises:
        ValueError: the second branch is not a plain linear layer, or has no bias and an offset.

    Example:
        >>> op, x = StarOp(4, 3), torch.randn(2, 4)
        >>> before, products = op(x), Products("this", "", op)
        >>> products.write(torch.tensor([1.0, 2.0, 0.0]))
        >>> torch.allclose(op(x), before * torch.tensor([1.0, 2.0, 0.0]))
        True
        >>> products.restore()
        >>> torch.equal(op(x), before)
        True
    """

    def __init__(self, owner: str, name: str, op: StarOp) -> None:
        f2, where = op.f2, f"{owner}: layer {name!r}"
        weight = f2._parameters.get("weight")
        if not isinstance(f2, nn.Linear) or weight is None or not weight.is_floating_point():
            raise ValueError(
                f"{where} has a second branch of type {type(f2).__name__}, whose weights cannot be "
                "scaled; merge adapters and dequantise first"
            )
        self.op, self.rows = op, weight.shape[0]
        own = op._parameters.get("scale")
        self._kept: list[tuple[Tensor, Tensor]]
        if own is not None:
            self._kept = [(own, own.detach().clone())]
        else:
            if f2.bias is None and op.offset:
                raise ValueError(
                    f"{where} has offset={op.offset} and no bias that could take up a factor of "
                    "it; build it with bias=True"
                )
            parts = (weight,) if f2.bias is None else (weight, f2.bias)
            self._kept = [(p, p.detach().clone()) for p in parts]

    @torch.no_grad()
    def write(self, factors: Tensor) -> None:
        """Multiply each product as it was at first by its factor, (rows,)."""
        offset = 0.0 if "scale" in self.op._parameters else self.op.offset
        for parameter, start in self._kept:
            s = factors.to(start)
            if start.ndim == 2:
                parameter.copy_(start * s[:, None])
            else:
                parameter.copy_(start * s + offset * (s - 1))

    @torch.no_grad()
    def restore(self) -> None:
        """Put the parameters back to what they were."""
        for parameter, start in self._kept:
            parameter.copy_(start)

    def sizes(self) -> Tensor:
        """`|w1| |w2|` of each product, (rows,)."""
        first, second = (f.weight.detach().norm(dim=1) for f in (self.op.f1, self.op.f2))
        return first * second  # type: ignore[no-any-return]

    def groups(self, count: int | None) -> list[Tensor]:
        """The rows in `count` groups of neighbours in size, the largest first; `None`: one each."""
        order = self.sizes().argsort(descending=True, stable=True).cpu()
        return list(order.tensor_split(min(count or self.rows, self.rows)))
