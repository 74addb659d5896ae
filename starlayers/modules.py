"""Star layers over stock `nn.Linear` branches: StarOp, StarMLP, StarBlock."""

import math
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from starlayers.activations import get_activation
from starlayers.backend import recomputed
from starlayers.checks import one_of, positive_int, probability
from starlayers.dispatch import (
    NOT_LINEAR,
    Plan,
    declined,
    is_plain,
    is_small,
    plain_weights,
    plan_mlp,
)
from starlayers.functional import COMBINE
from starlayers.kernels.layer import run_mlp
from starlayers.kernels.registration import MLPWeights

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["DropPath", "StarBlock", "StarMLP", "StarOp"]

#: factors of the products: none, learned ones, or learned ones and one per sample
COEFFICIENTS = ("fixed", "scale", "dynamic")


class StarOp(nn.Module):
    """Two linear branches and their product: `act(f1(x)) * (offset + f2(x))`.

    Shapes: (..., in_features) -> (..., out_features), any floating dtype.

    Args:
        in_features: channels of the input.
        out_features: channels of the result.
        act: name in `ACTIVATIONS` of the first branch's activation; `None` for none.
        combine: "mul" is the star operation, "sum" the paper's ablation `act(f1(x)) + f2(x)`.
        offset: constant added to the second branch. With `offset=1` and a zero `f2` the layer is
            a plain `act(f1(x))`, which makes function-preserving conversion possible.
        rank: products summed per output channel (1 is the paper). The branches then have
            `rank * out_features` outputs, laid out (rank, out_features).
        coefficients: "scale" learns a factor and an offset for every product,
            `scale * act(f1(x)) * (shift + f2(x))`, which start at 1 and `offset`; `fold()` makes
            them part of `f2`. "dynamic" has these and a factor per sample, `1 + tanh(gate(mean))`,
            of the input's mean over all dimensions between the first and the last; it starts at 1
            too. That mean sees whole sequences, so it is not for causal models.
        bias: give the branches biases.
        device, dtype: of the parameters.

    Raises:
        TypeError: a size is not an integer, or the input is not floating.
        ValueError: a size is below 1, a name is unknown, `offset` or `coefficients` is set for
            "sum", or the input has another number of channels.

    Source: Ma et al., "Rewrite the Stars", CVPR 2024, arXiv 2403.19967.

    Example:
        >>> StarOp(16, 32, act="gelu")(torch.randn(2, 5, 16)).shape
        torch.Size([2, 5, 32])
    """

    coefficients: str = "fixed"  # class default for layers pickled before the option existed
    scale: nn.Parameter
    shift: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        act: str | None = "relu6",
        combine: str = "mul",
        offset: float = 0.0,
        rank: int = 1,
        coefficients: str = "fixed",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        layer = type(self).__name__
        self.in_features = positive_int(layer, "in_features", in_features)
        self.out_features = positive_int(layer, "out_features", out_features)
        self.rank = positive_int(layer, "rank", rank)
        one_of(layer, "combine", combine, COMBINE)
        one_of(layer, "coefficients", coefficients, COEFFICIENTS)
        if combine != "mul" and offset:
            raise ValueError(f"{layer}: offset={offset} needs combine='mul', got {combine!r}")
        if combine != "mul" and coefficients != "fixed":
            raise ValueError(
                f"{layer}: coefficients={coefficients!r} needs combine='mul', got {combine!r}"
            )
        self.act = get_activation(act).name
        self.combine = combine
        self.offset = float(offset)
        factory: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.f1 = nn.Linear(in_features, rank * out_features, **factory)
        self.f2 = nn.Linear(in_features, rank * out_features, **factory)
        self.coefficients = coefficients
        if coefficients == "fixed":
            return
        factory.pop("bias")
        self.scale = nn.Parameter(torch.empty(rank * out_features, **factory))
        self.shift = nn.Parameter(torch.empty(rank * out_features, **factory))
        if coefficients == "dynamic":
            squeezed = max(8, in_features // 16)
            self.gate = nn.Sequential(
                nn.Linear(in_features, squeezed, **factory),
                nn.ReLU(),
                nn.Linear(squeezed, rank * out_features, **factory),
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reset the learned coefficients; children reset their own parameters."""
        if self.coefficients != "fixed":
            nn.init.ones_(self.scale)
            nn.init.constant_(self.shift, self.offset)
        if self.coefficients == "dynamic":
            for parameter in self.gate[2].parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        return self._combined(x)

    def _combined(self, x: Tensor) -> Tensor:
        h1, h2, offset = self.f1(x), self.f2(x), self.offset
        if self.coefficients != "fixed":
            h2, offset = self._scaled(x, h2), 0.0
        y = COMBINE[self.combine](h1, h2, self.act, offset=offset)
        if self.rank > 1:
            y = y.unflatten(-1, (self.rank, -1)).sum(-2)
        return y

    def _scaled(self, x: Tensor, h2: Tensor) -> Tensor:
        """Return the second branch `h2` with its learned offset and factors."""
        y = self.scale * (self.shift + h2)
        if self.coefficients == "dynamic":
            dims = tuple(range(1, x.ndim - 1))
            y = y * (1 + self.gate(x.mean(dims, keepdim=True) if dims else x).tanh())
        return y.to(h2.dtype)  # under autocast the parameters are wider than the branch

    @torch.no_grad()
    def fold(self) -> "Self":
        """Merge the learned `scale` and `shift` into `f2`, in place; return the layer.

        The layer computes the same up to rounding. It then has `coefficients="fixed"`, which the
        fused paths require. `f2` gets a bias if it has none and needs one. A layer that is fixed
        already stays as it is. An optimizer created before still holds the two parameters.

        Raises:
            ValueError: the coefficients are "dynamic", which depend on the input, or `f2` is
                wrapped or parametrised.

        Example:
            >>> op, x = StarOp(4, 3, coefficients="scale"), torch.randn(2, 4)
            >>> _ = nn.init.normal_(op.scale)
            >>> before = op(x)
            >>> torch.allclose(op.fold()(x), before, atol=1e-6), op.coefficients
            (True, 'fixed')
        """
        layer = type(self).__name__
        if self.coefficients == "dynamic":
            raise ValueError(f"{layer}: dynamic coefficients depend on the input: nothing to fold")
        if self.coefficients == "fixed":
            return self
        f2 = self.f2
        if not isinstance(f2, nn.Linear) or "weight" not in f2._parameters:
            raise ValueError(
                f"{layer}: f2 is a wrapped or parametrised {type(f2).__name__}; merge it first"
            )
        scale, shift = self.scale.double(), self.shift.double()
        bias = 0.0 if f2.bias is None else f2.bias.double()
        # the offset stays outside of the bias: 1 + 1e-3 would round to 1 in bfloat16
        bias = scale * (shift + bias) - self.offset
        f2.weight.copy_(scale[:, None] * f2.weight.double())
        if f2.bias is not None:
            f2.bias.copy_(bias)
        elif bias.any():
            f2.bias = nn.Parameter(bias.to(f2.weight), requires_grad=f2.weight.requires_grad)
        del self.scale, self.shift
        self.coefficients = "fixed"
        return self

    def check_input(self, x: Tensor) -> None:
        """Raise if `x` is not a floating tensor of `in_features` channels.

        Raises:
            TypeError: `x` is not floating.
            ValueError: `x` is a scalar or has another number of channels.
        """
        layer = type(self).__name__
        if not x.is_floating_point():
            raise TypeError(f"{layer} expects a floating tensor, got {x.dtype}; use x.float()")
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            got = "a scalar" if x.ndim == 0 else f"{x.shape[-1]} (shape {tuple(x.shape)})"
            raise ValueError(f"{layer} expects {self.in_features} input features, got {got}")

    def extra_repr(self) -> str:
        defaults = {"combine": "mul", "offset": 0.0, "rank": 1, "recompute": False}
        defaults["coefficients"] = "fixed"
        changed = [k for k, default in defaults.items() if getattr(self, k, default) != default]
        extras = [f"{k}={getattr(self, k)!r}" for k in ("act", *changed)]
        return ", ".join([str(self.in_features), str(self.out_features), *extras])


class StarMLP(StarOp):
    """Star operation and a linear layer: `g(act(f1(x)) * (offset + f2(x)))`.

    Shapes: (..., dim) -> (..., out_features) through `hidden` channels.

    Args:
        dim: channels of the input.
        hidden: channels of the product; default `4 * dim`.
        out_features: channels of the result; default `dim`.
        act, combine, offset, rank, coefficients, bias, device, dtype: as for `StarOp`; `bias`
            covers `g` too.
        recompute: save only the input for the backward, and compute both branches again there.
            The fused kernels for narrow layers always do that; the option covers all other paths.

    Raises:
        TypeError, ValueError: as `StarOp`.

    SwiGLU is `StarMLP(dim, hidden, act="swiglu", bias=False)`. If the backend allows it, the three
    layers run fused, and the backward recomputes the hidden activation instead of saving it.
    `mlp(x, residual)` returns `residual + mlp(x)`, where the sum is fused as well.

    Example:
        >>> mlp = StarMLP(16, act="swiglu", bias=False)
        >>> mlp(torch.randn(2, 5, 16)).shape, mlp.hidden_features
        (torch.Size([2, 5, 16]), 64)
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        out_features: int | None = None,
        act: str | None = "relu6",
        combine: str = "mul",
        offset: float = 0.0,
        rank: int = 1,
        coefficients: str = "fixed",
        bias: bool = True,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        layer = type(self).__name__
        dim = positive_int(layer, "dim", dim)
        hidden = 4 * dim if hidden is None else positive_int(layer, "hidden", hidden)
        out = dim if out_features is None else positive_int(layer, "out_features", out_features)
        factory: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        super().__init__(
            dim,
            hidden,
            act=act,
            combine=combine,
            offset=offset,
            rank=rank,
            coefficients=coefficients,
            **factory,
        )
        self.hidden_features = hidden
        self.recompute = recompute
        self.out_features = out
        self.g = nn.Linear(hidden, out, **factory)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        self.check_input(x)
        if not is_small(x, self.hidden_features):
            plan = self.plan(x, residual)
            if plan.weights is not None:
                options = (self.act, self.offset, residual)
                return run_mlp(plan.path, x, plan.weights, *options, recompute=self.recompute)
        if self.recompute and torch.is_grad_enabled():
            y = recomputed(self._eager, x)
        else:
            y = self._eager(x)
        return y if residual is None else residual + y

    def plan(self, x: Tensor, residual: Tensor | None = None) -> Plan:
        """Return the plan for a call: what runs, or why it is the definition.

        Raises:
            RuntimeError: the backend is "triton" or "cpu" and cannot serve the call.

        Example:
            >>> StarMLP(4, rank=2).plan(torch.ones(1, 4)).reason
            "combine='mul', rank=2 (needs 'mul', 1)"
        """
        weights = self.fusable()
        if isinstance(weights, str):
            return declined(weights, "this StarMLP")
        return plan_mlp(x, weights, self.act, residual, recompute=self.recompute)

    def fusable(self) -> MLPWeights | str:
        """Return the weights for a fused op, or the reason why none computes this layer."""
        if self.combine != "mul" or self.rank != 1:
            return f"combine={self.combine!r}, rank={self.rank} (needs 'mul', 1)"
        if self.coefficients != "fixed":
            advice = "; fold() makes it" if self.coefficients == "scale" else ""
            return f"coefficients={self.coefficients!r} (needs 'fixed'{advice})"
        return plain_weights(self.f1, self.f2, self.g) or NOT_LINEAR

    def _eager(self, x: Tensor) -> Tensor:
        return self.g(self._combined(x))  # type: ignore[no-any-return]


class DropPath(nn.Module):
    """Stochastic depth: zero whole samples with probability `p` in training.

    `x * mask / (1 - p)` with one Bernoulli draw per sample; the identity in evaluation mode. For
    the same seed it draws the same samples as timm's layer of this name.

    Shapes: (batch, ...) -> (batch, ...); the first dimension is the batch.

    Args:
        p: probability of dropping a sample, in [0, 1).

    Raises:
        ValueError: `p` outside [0, 1).

    Source: Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016.

    Example:
        >>> layer, x = DropPath(0.5), torch.ones(1000, 3)
        >>> sorted(set(layer(x).flatten().tolist()))
        [0.0, 2.0]
        >>> layer.eval()(x) is x
        True
    """

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.p = probability("DropPath", "p", p)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.p)
        return x * mask.div_(1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class StarBlock(nn.Module):
    """Residual block: `x + drop_path(gamma * post(mlp(pre(x))))`.

    Shapes: (..., dim) -> (..., dim), vectors and tokens alike.

    Args:
        dim: channels.
        expansion: hidden channels per channel; `dim * expansion` must be a whole number.
        act, combine, offset, rank, coefficients, bias, device, dtype: as for `StarMLP`.
        pre, post: modules before and after the MLP, (..., dim) -> (..., dim); `None` for none.
        drop_path: probability of dropping the branch for a whole sample in training.
        layer_scale: start value of the learned per-channel factor `gamma`; `None` for no factor.

    Raises:
        TypeError, ValueError: as `StarMLP`, and for `drop_path` outside [0, 1).

    Example:
        >>> block = StarBlock(16, pre=nn.LayerNorm(16), layer_scale=1e-6)
        >>> block(torch.randn(2, 5, 16)).shape
        torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        dim: int,
        *,
        expansion: float = 4,
        act: str | None = "relu6",
        pre: nn.Module | None = None,
        post: nn.Module | None = None,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        combine: str = "mul",
        offset: float = 0.0,
        rank: int = 1,
        coefficients: str = "fixed",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        layer = type(self).__name__
        hidden = positive_int(layer, "dim", dim) * expansion
        # compare with a tolerance: 100 * 1.1 is 110.00000000000001
        if not 1 <= hidden < math.inf or abs(hidden - round(hidden)) > 1e-6:
            raise ValueError(
                f"{layer}: dim={dim} times expansion={expansion} gives {hidden} hidden channels; "
                "choose an expansion that makes it a whole number of at least 1"
            )
        drop_path = probability(layer, "drop_path", drop_path)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.pre = nn.Identity() if pre is None else pre
        self.mlp = StarMLP(
            dim,
            round(hidden),
            act=act,
            combine=combine,
            offset=offset,
            rank=rank,
            coefficients=coefficients,
            bias=bias,
            **factory,
        )
        self.post = nn.Identity() if post is None else post
        self.gamma = None if layer_scale is None else nn.Parameter(torch.empty(dim, **factory))
        self.layer_scale = layer_scale
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reset `gamma` to its start value; children reset their own parameters."""
        if self.gamma is not None:
            nn.init.constant_(self.gamma, cast(float, self.layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        if self._ends_in_mlp():
            return self.mlp(self.pre(x), x)  # type: ignore[no-any-return]
        y = self.post(self.mlp(self.pre(x)))
        if self.gamma is not None:
            y = y * self.gamma
        return x + self.drop_path(y)  # type: ignore[no-any-return]

    def _ends_in_mlp(self) -> bool:
        """Return True if the MLP's output goes straight into the sum.

        The MLP can then add `x` itself, which the fused kernels do without a pass of their own.
        """
        return (
            self.gamma is None
            and is_plain(self.post, nn.Identity)
            and is_plain(self.drop_path, nn.Identity)
            and is_plain(self.mlp, StarMLP)
        )
