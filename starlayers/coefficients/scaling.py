"""Factors for the products of star layers, written into their weights."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from starlayers.coefficients.form import Star, find_stars
from starlayers.coefficients.modules import RankStarOp
from starlayers.surgery.find import matches


def star_layers(
    owner: str, model: nn.Module, layers: str | Sequence[str] | None = None
) -> dict[str, "ProductScaler"]:
    """Return a scaler for each star layer of a model, by the layer's name.

    `layers` are names, or patterns as in `fnmatch`, of layers or of modules above them.
    """
    stars = {n: m for n, m in find_stars(owner, model).items() if isinstance(m, Star)}
    if not stars:
        raise ValueError(
            f"{owner}: {type(model).__name__} has no star layers with factors of their own "
            "(StarOp, StarMLP)"
        )
    layers = "*" if layers is None else layers
    patterns = [layers] if isinstance(layers, str) else list(layers)
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in stars):
            raise ValueError(
                f"{owner}: layers={pattern!r} matches none of the {len(stars)} star layers, "
                f"{', '.join(map(repr, stars))}"
            )
    chosen = [name for name in stars if matches(name, patterns)]
    return {name: ProductScaler(owner, name, stars[name]) for name in chosen}


class ProductScaler:
    """Scaler of the products `act(h1) * (offset + h2)` of one star layer.

    The layer has `products` of them, one for each output of its branches. A factor `s` is written
    into the second branch, `s * (offset + h2)`, or into the layer's own `scale` if it has one, and
    so changes only the size of the product.
    """

    def __init__(self, owner: str, name: str, op: Star) -> None:
        op = op.star if isinstance(op, RankStarOp) else op
        f2: Any = op.f12 if op.packed else op.f2
        layer = f"{owner}: layer {name!r}"
        weight = f2._parameters.get("weight")
        if not isinstance(f2, nn.Linear) or weight is None or not weight.is_floating_point():
            raise ValueError(
                f"{layer} has a second branch of type {type(f2).__name__}, whose weights cannot be "
                "scaled; merge adapters and dequantise first"
            )
        _, second = op.branch_layers()
        self.op, self.products = op, len(second[0])
        parameters: list[Tensor] = [p for p in second if p is not None]
        if "scale" in op._parameters:
            parameters = [cast(Tensor, op.scale)]
        elif f2.bias is None and op.offset:
            raise ValueError(
                f"{layer} has offset={op.offset} and no bias to hold a factor of it; build it "
                "with bias=True"
            )
        self._initial = [(p, p.detach().clone()) for p in parameters]

    @torch.no_grad()
    def write(self, factors: Tensor) -> None:
        """Multiply the initial products by `factors` (products,)."""
        offset = 0.0 if "scale" in self.op._parameters else self.op.offset
        for parameter, initial in self._initial:
            s = factors.to(initial)
            if initial.ndim == 2:
                parameter.copy_(initial * s[:, None])
            else:
                parameter.copy_(initial * s + offset * (s - 1))

    @torch.no_grad()
    def restore(self) -> None:
        """Set the parameters to their initial values."""
        for parameter, initial in self._initial:
            parameter.copy_(initial)

    def groups(self, count: int | None) -> list[Tensor]:
        """Return the products in groups of similar `|w1| |w2|`; `None` for one each."""
        first, second = (weight.norm(dim=1) for weight, _ in self.op.branch_layers())
        order = (first * second).argsort(descending=True, stable=True).cpu()
        return list(order.tensor_split(min(count or self.products, self.products)))
