"""Variants of the star with other coefficients: sums, several products, learned factors.

Each is a layer like `StarOp` and a module like `StarMLP`, which fits into `StarBlock(dim, mlp)` and
`StarNet(mlp_layer=...)`.
"""

import copy
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from starlayers.checks import boolean, positive_int
from starlayers.dispatch import Plan, declined
from starlayers.functional import star_product
from starlayers.initialisation import reset_inside, start_smaller
from starlayers.kernels.registration import MLPWeights
from starlayers.modules import StarMLP, StarOp
from starlayers.recompute import recomputed
from starlayers.reference import sum_reference
from starlayers.state_dicts import rearrange_ranks
from starlayers.tracing import record

__all__ = [
    "DynamicStarMLP",
    "DynamicStarOp",
    "RankStarMLP",
    "RankStarOp",
    "ScaledStarMLP",
    "ScaledStarOp",
    "SumMLP",
    "SumOp",
]


class SumOp(StarOp):
    """Sum of two linear branches, the paper's ablation: `act(f1(x)) + f2(x)`.

    Shapes: (..., in_features) -> (..., out_features). It has the parameters of a `StarOp`.

    Args:
        in_features, out_features: as for `StarOp`.
        options: of `StarOp`, but no offset.

    Raises:
        ValueError: an offset, which a sum has no product for.

    Source: Ma et al., "Rewrite the Stars", CVPR 2024, arXiv 2403.19967, section 3.4.

    Example:
        >>> op, x = SumOp(4, 3, act=None), torch.randn(2, 4)
        >>> torch.allclose(op(x), op.f1(x) + op.f2(x))
        True
    """

    def __init__(self, in_features: int, out_features: int, **options: Any) -> None:
        super().__init__(in_features, out_features, **options)
        if self.offset:
            raise ValueError(
                f"{type(self).__name__}: offset={self.offset} needs a product; leave it at 0"
            )

    def products(self, x: Tensor) -> Tensor:
        """Compute the sums, which take the place of products."""
        self._decline()
        return sum_reference(*self.branches(x), self.act)

    def plan(self, x: Tensor) -> Plan:
        """Return the plan for the sum, which is always its definition.

        Raises:
            RuntimeError: the backend is "triton" or "cpu".
        """
        self.check_input(x)
        return self._decline()

    def _decline(self) -> Plan:
        layer = type(self).__name__
        return declined(f"{layer} has no product to fuse", f"this {layer}")


class SumMLP(StarMLP, SumOp):
    """MLP with a sum in the place of the product: `g(act(f1(x)) + f2(x))`.

    Shapes: (..., dim) -> (..., out_features). Arguments are those of `StarMLP`, without an offset.

    Example:
        >>> SumMLP(4, 8, act="gelu")(torch.randn(2, 4)).shape
        torch.Size([2, 4])
    """


class ScaledStarOp(StarOp):
    """Star with a learned factor and offset for every product.

    `act(f1(x)) * scale * (shift + f2(x))`, where `scale` starts at 1 and `shift` at `offset`.

    Shapes: (..., in_features) -> (..., out_features).

    Args:
        in_features, out_features, options: as for `StarOp`.

    Example:
        >>> op, x = ScaledStarOp(4, 3), torch.randn(2, 4)
        >>> _ = nn.init.normal_(op.scale)
        >>> plain = op.fold()
        >>> type(plain).__name__, torch.allclose(plain(x), op(x), atol=1e-6)
        ('StarOp', True)
    """

    def __init__(self, in_features: int, out_features: int, **options: Any) -> None:
        super().__init__(in_features, out_features, **options)
        factory: dict[str, Any] = {name: options.get(name) for name in ("device", "dtype")}
        self.scale = nn.Parameter(torch.empty(out_features, **factory))
        self.shift = nn.Parameter(torch.empty(out_features, **factory))
        self.reset_factors()

    def reset_parameters(self) -> None:
        """Initialise the layers inside, `scale` and `shift` again."""
        super().reset_parameters()
        self.reset_factors()

    def reset_factors(self) -> None:
        """Set `scale` to 1 and `shift` to the offset."""
        nn.init.ones_(self.scale)
        nn.init.constant_(self.shift, self.offset)

    def products(self, x: Tensor) -> Tensor:
        """Compute the products, each with its factor."""
        h1, h2 = self.branches(x)
        # under autocast the parameters are wider than the branch
        return star_product(h1, self._scaled(x, h2).to(h2.dtype), self.act)

    def _scaled(self, x: Tensor, h2: Tensor) -> Tensor:
        return self.scale * (self.shift + h2)

    @torch.no_grad()
    def fold(self) -> StarOp:
        """Return a `StarOp` or `StarMLP` that computes the same, with the factors in `f2`.

        Fused paths need that. Its `f1` and `g` are those of this layer. `f2` is a new one, which
        has a bias if it needs one.

        Raises:
            ValueError: the factors depend on the input, or `f2` is wrapped or parametrised.
        """
        layer, name = type(self).__name__, "f12" if self.packed else "f2"
        f2 = self._modules.get(name)
        if not isinstance(f2, nn.Linear) or "weight" not in f2._parameters:
            raise ValueError(
                f"{layer}: {name} is a wrapped or parametrised {type(f2).__name__}; merge it first"
            )
        f2 = copy.deepcopy(f2)
        scale, shift = self.scale.double(), self.shift.double()
        rows = slice(len(f2.weight) - len(scale), None)  # packed, f1 comes before
        bias = 0.0 if f2.bias is None else f2.bias[rows].double()
        # the offset stays outside of the bias: 1 + 1e-3 would round to 1 in bfloat16
        bias = scale * (shift + bias) - self.offset
        f2.weight[rows] = (scale[:, None] * f2.weight[rows].double()).to(f2.weight)
        if f2.bias is None and bias.any():
            zeros = f2.weight.new_zeros(len(f2.weight))
            f2.bias = nn.Parameter(zeros, requires_grad=f2.weight.requires_grad)
        if f2.bias is not None:
            f2.bias[rows] = bias.to(f2.bias)
        options: dict[str, Any] = {"act": self.act, "offset": self.offset, "init": self.init}
        if isinstance(self, StarMLP):
            options |= {"out_features": self.out_features, "recompute": self.recompute}
            plain: StarOp = StarMLP(
                self.in_features, self.hidden_features, **options, device="meta"
            )
        else:
            options["packed"] = self.packed
            plain = StarOp(self.in_features, self.out_features, **options, device="meta")
        for child_name, child in {**self._modules, name: f2}.items():
            if child_name in plain._modules:
                plain._modules[child_name] = child
        return plain.train(self.training)


class ScaledStarMLP(StarMLP, ScaledStarOp):
    """Star MLP with a learned factor and offset for every product.

    `g(act(f1(x)) * scale * (shift + f2(x)))`; `fold()` makes it a `StarMLP`.

    Shapes: (..., dim) -> (..., out_features). Arguments are those of `StarMLP`.

    Example:
        >>> mlp = ScaledStarMLP(4, 8)
        >>> mlp(torch.randn(2, 4)).shape, tuple(mlp.scale.shape)
        (torch.Size([2, 4]), (8,))
    """

    def fusable(self) -> MLPWeights | str:
        """Return the reason why no fused op computes this layer."""
        return f"{type(self).__name__} has factors of its own; fold() makes it a StarMLP"


def mean_between(x: Tensor) -> Tensor:
    """Return the mean over all dimensions between the first and the last, which become 1.

    torch.fx records it as one call, since its dimensions depend on the input.
    """
    dims = list(range(1, x.dim() - 1))
    return x.mean(dims, keepdim=True) if len(dims) > 0 else x


torch.fx.wrap("mean_between")


class DynamicStarOp(ScaledStarOp):
    """Star with learned factors, and one more of each product that depends on the sample.

    `act(f1(x)) * scale * (shift + f2(x)) * (1 + tanh(gate(mean(x))))`, the mean over all dimensions
    between the first and the last. The gate starts at zero. The mean sees whole sequences, so the
    layer is not for causal models.

    Shapes: (..., in_features) -> (..., out_features).

    Args:
        in_features, out_features, options: as for `StarOp`.

    Example:
        >>> op, x = DynamicStarOp(4, 3), torch.randn(2, 5, 4)
        >>> _ = nn.init.normal_(op.gate[-1].bias)
        >>> factors = 1 + op.gate(x.mean(1, keepdim=True)).tanh()
        >>> torch.allclose(op(x), StarOp.products(op, x) * factors, atol=1e-6)
        True
    """

    def __init__(self, in_features: int, out_features: int, **options: Any) -> None:
        super().__init__(in_features, out_features, **options)
        factory: dict[str, Any] = {name: options.get(name) for name in ("device", "dtype")}
        squeezed = max(8, in_features // 16)
        first = nn.Linear(in_features, squeezed, **factory)
        last = nn.Linear(squeezed, out_features, **factory)
        self.gate = nn.Sequential(first, nn.ReLU(), last)
        start_smaller(last, 0, 0.0)

    def _scaled(self, x: Tensor, h2: Tensor) -> Tensor:
        gate = self.gate(mean_between(x))
        return super()._scaled(x, h2) * (1 + gate.tanh())  # type: ignore[no-any-return]

    def fold(self) -> StarOp:
        """Raise ValueError: factors that depend on the input have no place in the weights."""
        raise ValueError(
            f"{type(self).__name__}: factors that depend on the input: nothing to fold"
        )


class DynamicStarMLP(StarMLP, DynamicStarOp):
    """Star MLP whose products have learned factors and one that depends on the sample.

    Shapes: (batch, ..., dim) -> (batch, ..., out_features). Arguments are those of `StarMLP`; the
    factors are those of `DynamicStarOp`.

    Example:
        >>> DynamicStarMLP(4, 8)(torch.randn(2, 5, 4)).shape
        torch.Size([2, 5, 4])
    """


class RankStarOp(nn.Module):
    """Sum of several products for each channel: `sum_r act(f1_r(x)) * (offset + f2_r(x))`.

    The child `star` computes all products, laid out (channels, rank), so that a part of its rows
    holds whole products when tensor parallelism divides them by columns. State dicts of the time
    when the rank was an option of `StarOp` load, with their rows rearranged; an optimizer's state
    of that time does not. Weights of a plain `StarOp` go into the child: `op.star.load_state_dict`.

    Shapes: (..., in_features) -> (..., out_features).

    Args:
        in_features, out_features: channels of the input and of the result.
        rank: products of each channel.
        options: of `StarOp`.

    Example:
        >>> op, x = RankStarOp(4, 3, rank=2), torch.randn(5, 4)
        >>> torch.allclose(op(x), op.star(x)[:, 0::2] + op.star(x)[:, 1::2])
        True
    """

    def __init__(
        self, in_features: int, out_features: int, *, rank: int = 2, **options: Any
    ) -> None:
        super().__init__()
        layer = type(self).__name__
        self.in_features = positive_int(layer, "in_features", in_features)
        self.out_features = positive_int(layer, "out_features", out_features)
        self.rank = positive_int(layer, "rank", rank)
        self.star = StarOp(self.in_features, self.rank * self.out_features, **options)

    @property
    def act(self) -> str:
        """Name of the activation."""
        return self.star.act

    @property
    def offset(self) -> float:
        """Constant added to the second factor."""
        return self.star.offset

    def reset_parameters(self) -> None:
        """Initialise the layers inside again."""
        reset_inside(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.products(x)

    def products(self, x: Tensor) -> Tensor:
        """Compute the sums of products, of shape (..., channels)."""
        return self.star(x).unflatten(-1, (-1, self.rank)).sum(-1)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}"

    __prepare_scriptable__ = record

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        rearrange_ranks(state_dict, prefix, self.rank)
        super()._load_from_state_dict(state_dict, prefix, *args)


class RankStarMLP(RankStarOp):
    """Star MLP with several products for each hidden channel: `g(sum_r act(f1_r) * f2_r)`.

    Shapes: (..., dim) -> (..., out_features) through `hidden` channels.

    Args:
        dim, hidden, out_features, bias, recompute: as for `StarMLP`.
        rank: products of each hidden channel.
        options: of `StarOp`.

    Example:
        >>> mlp = RankStarMLP(4, 8, rank=3)
        >>> mlp(torch.randn(2, 4)).shape, mlp.star.out_features
        (torch.Size([2, 4]), 24)
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        rank: int = 2,
        out_features: int | None = None,
        bias: bool = True,
        recompute: bool = False,
        **options: Any,
    ) -> None:
        layer = type(self).__name__
        dim = positive_int(layer, "dim", dim)
        hidden = 4 * dim if hidden is None else positive_int(layer, "hidden", hidden)
        out = dim if out_features is None else positive_int(layer, "out_features", out_features)
        super().__init__(dim, hidden, rank=rank, bias=bias, **options)
        self.hidden_features, self.out_features = hidden, out
        self.recompute = boolean(layer, "recompute", recompute)
        factory: dict[str, Any] = {name: options.get(name) for name in ("device", "dtype")}
        self.g = nn.Linear(hidden, out, bias, **factory)

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return recomputed(self._definition, x)
        return self._definition(x)

    def _definition(self, x: Tensor) -> Tensor:
        return self.g(self.products(x))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        sizes = f"{self.in_features}, {self.hidden_features}, {self.out_features}"
        return f"{sizes}, rank={self.rank}"
