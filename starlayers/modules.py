"""Star layers over stock `nn.Linear` branches: StarOp, StarMLP, StarBlock."""

from typing import Any, cast

import torch
import torch.fx
from torch import Tensor, nn

from starlayers.activations import get_activation
from starlayers.attached import attached
from starlayers.checks import (
    boolean,
    finite,
    floating_dtype,
    floating_tensor,
    one_of,
    positive_int,
    probability,
)
from starlayers.dispatch import (
    FORWARDS,
    Plan,
    calls_directly,
    declined,
    is_plain,
    linear,
    plain_weights,
    plan_mlp,
    plan_star,
)
from starlayers.drop_path import DropPath
from starlayers.functional import star_packed_product, star_product
from starlayers.initialisation import reset_inside, start_smaller
from starlayers.kernels.layer import run_mlp
from starlayers.kernels.registration import MLPWeights
from starlayers.plans import PLAIN
from starlayers.recompute import recomputed
from starlayers.reference import star_mlp_reference
from starlayers.state_dicts import pack_branches, remove_old_options, split_branches
from starlayers.tracing import add_residual, is_optional, is_traced, record

torch.fx.wrap("add_residual")  # torch.fx records its call

__all__ = ["DropPath", "StarBlock", "StarMLP", "StarOp"]

#: start of the second branch: as `nn.Linear`, or at `GATE_GAIN` of it
INITS = ("linear", "near_linear")
GATE_GAIN = 0.1
#: dtypes in which layers compute
WIDE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _is_dense(x: Tensor) -> bool:
    return x.is_floating_point() and x.layout is torch.strided and not x.is_nested


class StarOp(nn.Module):
    """Two linear branches and their product: `act(f1(x)) * (offset + f2(x))`.

    Shapes: (..., in_features) -> (..., out_features), any floating dtype.

    Args:
        in_features: channels of the input.
        out_features: channels of the result.
        act: name in `ACTIVATIONS` of the first branch's activation; `None` for none.
        offset: constant added to the second branch. With `offset=1` and a zero `f2` the layer is
            a plain `act(f1(x))`, which makes function-preserving conversion possible.
        bias: give the branches biases.
        packed: compute both branches by one linear layer `f12` of `2 * out_features` outputs, `f1`
            first. Small layers are faster so. Either kind loads the other's state dict.
        init: "linear" starts both branches as `nn.Linear`. "near_linear" starts the second at a
            tenth of that and needs an offset: the layer then begins close to
            `offset * act(f1(x))`, and a deep stack without norms can be trained.
        device, dtype: of the parameters.

    Raises:
        TypeError: an argument is of the wrong type, or the input is no dense floating tensor.
        ValueError: a size is below 1, a name is unknown, `offset` is not finite, or the input has
            another number of channels.

    Source: Ma et al., "Rewrite the Stars", CVPR 2024, arXiv 2403.19967.

    Example:
        >>> StarOp(16, 32, act="gelu")(torch.randn(2, 5, 16)).shape
        torch.Size([2, 5, 32])
    """

    # class defaults for layers pickled before these options existed
    packed: bool = False
    init: str = "linear"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        act: str | None = "relu6",
        offset: float = 0.0,
        bias: bool = True,
        packed: bool = False,
        init: str = "linear",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        layer = type(self).__name__
        self.in_features = positive_int(layer, "in_features", in_features)
        self.out_features = positive_int(layer, "out_features", out_features)
        self.act = get_activation(act).name
        self.offset = finite(layer, "offset", offset)
        self.packed = boolean(layer, "packed", packed)
        one_of(layer, "init", init, INITS)
        if init == "near_linear" and not self.offset:
            raise ValueError(f"{layer}: init='near_linear' needs an offset, such as 1, not 0")
        self.init = init
        factory: dict[str, Any] = {"bias": boolean(layer, "bias", bias), "device": device}
        factory["dtype"] = floating_dtype(layer, dtype)
        n, out = self.in_features, self.out_features
        if packed:
            self.f12 = nn.Linear(n, 2 * out, **factory)
        else:
            self.f1, self.f2 = nn.Linear(n, out, **factory), nn.Linear(n, out, **factory)
        if init == "near_linear":
            start_smaller(*((self.f12, out) if packed else (self.f2, 0)), GATE_GAIN)

    def reset_parameters(self) -> None:
        """Initialise the layers inside again, the second branch as `init` says."""
        reset_inside(self)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        return self.products(x)

    def products(self, x: Tensor) -> Tensor:
        """Compute the products of the branches, of shape (..., channels of a branch)."""
        if self.packed:
            h = linear(self._modules["f12"], x)
            return star_packed_product(h, self.act, offset=self.offset)
        return star_product(*self.branches(x), self.act, offset=self.offset)

    def branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute both branches, of shape (..., channels of a branch)."""
        layers = self._modules
        if self.packed:
            h1, h2 = linear(layers["f12"], x).chunk(2, -1)
            return h1, h2
        return linear(layers["f1"], x), linear(layers["f2"], x)

    def branch_layers(self) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
        """Return weight and bias of each branch, without gradients; they share its memory."""
        branches = [self.f12] if self.packed else [self.f1, self.f2]
        weights = [w for f in branches for w in f.weight.detach().chunk(1 + self.packed)]
        biases: list[Tensor | None] = [None, None]
        if branches[0].bias is not None:
            biases = [b for f in branches for b in f.bias.detach().chunk(1 + self.packed)]
        return (weights[0], biases[0]), (weights[1], biases[1])

    def plan(self, x: Tensor) -> Plan:
        """Return the plan for the product of the branches: what runs, or why it is the definition.

        Raises:
            RuntimeError: the backend is "triton" and no kernel applies.

        Example:
            >>> StarOp(4, 4).plan(torch.ones(1, 4)).reason
            "no Triton kernel for device 'cpu'"
        """
        self.check_input(x)
        h = x.new_empty(1).expand(*x.shape[:-1], self.out_features)
        return plan_star(h, h, self.act)

    def check_input(self, x: Tensor) -> None:
        """Raise if `x` is not a dense floating tensor of `in_features` channels.

        Raises:
            TypeError: `x` is no tensor, not floating or sparse.
            ValueError: `x` is a scalar or has another number of channels.
        """
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return  # a tracer records the network, not its checks
        if type(x) is not Tensor or not _is_dense(x):
            if is_traced(x):
                return
            floating_tensor(type(self).__name__, x)
        width = x.shape[-1] if x.ndim else None
        if width != self.in_features:
            got = "a scalar" if width is None else f"{width} (shape {tuple(x.shape)})"
            raise ValueError(
                f"{type(self).__name__} expects {self.in_features} input features, got {got}"
            )

    def extra_repr(self) -> str:
        defaults = {"offset": 0.0, "packed": False, "init": "linear", "recompute": False}
        changed = [k for k, default in defaults.items() if getattr(self, k, default) != default]
        extras = [f"{k}={getattr(self, k)!r}" for k in ("act", *changed)]
        return ", ".join([*map(str, self._sizes()), *extras])

    def _sizes(self) -> tuple[int, ...]:
        return self.in_features, self.out_features

    __prepare_scriptable__ = record

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self.packed:
            pack_branches(state_dict, prefix, self.out_features)
        else:
            split_branches(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled layer, also of the time when sums and scales were options of it."""
        remove_old_options(type(self).__name__, state)
        super().__setstate__(state)  # type: ignore[no-untyped-call]


class StarMLP(StarOp):
    """Star operation and a linear layer: `g(act(f1(x)) * (offset + f2(x)))`.

    Shapes: (..., dim) -> (..., out_features) through `hidden` channels.

    Args:
        dim: channels of the input.
        hidden: channels of the product; default `4 * dim`.
        out_features: channels of the result; default `dim`.
        act, offset, bias, init, device, dtype: as for `StarOp`; `bias` covers `g` too.
        recompute: save only the input for the backward, and compute both branches again there.
            The fused kernels for narrow layers always do that; the option covers all other paths.

    Raises:
        TypeError, ValueError: as `StarOp`, and for a residual of another shape than the result.

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
        offset: float = 0.0,
        bias: bool = True,
        init: str = "linear",
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        layer = type(self).__name__
        dim = positive_int(layer, "dim", dim)
        hidden = 4 * dim if hidden is None else positive_int(layer, "hidden", hidden)
        out = dim if out_features is None else positive_int(layer, "out_features", out_features)
        factory: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        super().__init__(dim, hidden, act=act, offset=offset, init=init, **factory)
        self.hidden_features = hidden
        self.recompute = boolean(layer, "recompute", recompute)
        self.out_features = out
        self.g = nn.Linear(hidden, out, **factory)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        self.check_input(x)
        if residual is not None:
            self._check_residual(x, residual)
        weights = self.fusable()
        if isinstance(weights, str):
            declined(weights, f"this {type(self).__name__}")
        else:
            plan = plan_mlp(x, weights, self.act, residual, recompute=self.recompute)
            if plan.weights is not None:
                options = (self.act, self.offset, residual)
                return run_mlp(plan.path, x, weights, *options, recompute=self.recompute)
        if self.recompute and torch.is_grad_enabled():
            y = recomputed(self._definition, x)
        elif not (self.recompute or isinstance(weights, str)) and calls_directly(x):
            y = star_mlp_reference(x, *weights, self.act, offset=self.offset)
        else:
            y = self._definition(x)
        if residual is None:
            return y
        return add_residual(y, residual) if is_optional(residual) else residual + y

    def _definition(self, x: Tensor) -> Tensor:
        return linear(self._modules["g"], self.products(x))

    def _check_residual(self, x: Tensor, residual: Tensor) -> None:
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return
        if type(residual) is not Tensor or not _is_dense(residual):
            if is_traced(x):
                return
            floating_tensor(f"{type(self).__name__}: residual", residual)
        # another linear layer may have taken the place of g
        out = getattr(self._modules["g"], "out_features", self.out_features)
        shape = (*x.shape[:-1], out)
        if residual.shape != shape:
            raise ValueError(
                f"{type(self).__name__}: residual must have the shape of the result, {shape}, got "
                f"{tuple(residual.shape)}"
            )

    def plan(self, x: Tensor, residual: Tensor | None = None) -> Plan:
        """Return the plan for a call: what runs, or why it is the definition.

        Raises:
            TypeError, ValueError: as a call.
            RuntimeError: the backend is "triton" or "cpu" and cannot serve the call.

        Example:
            >>> StarMLP(4).plan(torch.ones(1, 4)).reason
            'hidden activation of 64 bytes is small enough for eager'
        """
        self.check_input(x)
        weights = self.fusable()
        if isinstance(weights, str):
            return declined(weights, f"this {type(self).__name__}")
        return plan_mlp(x, weights, self.act, residual, recompute=self.recompute)

    def fusable(self) -> MLPWeights | str:
        """Return the weights for a fused op, or the reason why none computes this layer."""
        kind, own = type(self), self.__dict__
        for name, original in OWN_METHODS.items():
            if getattr(kind, name) is not original or name in own:
                return f"{kind.__name__} computes its products by a method of its own"
        if self.act is None or not isinstance(self.offset, int | float):
            return "act is None or offset no number, which only the definition computes"
        layers = self._modules
        weights = plain_weights(layers["f1"], layers["f2"], layers["g"])
        if weights is not None:
            return weights
        return attached({name: layers[name] for name in ("f1", "f2", "g")})

    def _sizes(self) -> tuple[int, ...]:
        sizes = (self.in_features, self.hidden_features)
        return sizes if self.out_features == self.in_features else (*sizes, self.out_features)


FORWARDS[StarMLP] = StarMLP.forward
#: methods that say what a star MLP computes; one that was replaced or overridden has to run
OWN_METHODS = {
    "products": StarOp.products,
    "branches": StarOp.branches,
    "_definition": StarMLP._definition,
}


class StarBlock(nn.Module):
    """Residual block: `x + drop_path(gamma * post(mlp(pre(x))))`.

    Shapes: (..., dim) -> (..., dim), vectors and tokens alike.

    Args:
        dim: channels.
        mlp: module (..., dim) -> (..., dim), such as a `StarMLP` of any options; `StarMLP(dim)` by
            default.
        pre, post: modules before and after the MLP, (..., dim) -> (..., dim); `None` for none.
        drop_path: probability of dropping the branch for a whole sample in training.
        layer_scale: start value of the learned per-channel factor `gamma`, which has the device and
            dtype of the MLP's parameters; `None` for no factor.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: `dim` below 1, `drop_path` outside [0, 1), or a module changes the shape.

    Example:
        >>> block = StarBlock(16, StarMLP(16, 32, act="gelu"), pre=nn.LayerNorm(16))
        >>> block(torch.randn(2, 5, 16)).shape
        torch.Size([2, 5, 16])
    """

    mlp: Any  # any module: what is read of it depends on its class

    def __init__(
        self,
        dim: int,
        mlp: nn.Module | None = None,
        *,
        pre: nn.Module | None = None,
        post: nn.Module | None = None,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        layer = type(self).__name__
        dim = positive_int(layer, "dim", dim)
        for name, module in {"mlp": mlp, "pre": pre, "post": post}.items():
            if not (module is None or isinstance(module, nn.Module)):
                raise TypeError(f"{layer}: {name} must be a module or None, got {module!r}")
        for name in ("in_features", "out_features"):
            if getattr(mlp, name, dim) not in (dim, 0):  # lazy layers have 0
                size = getattr(mlp, name)
                raise ValueError(f"{layer}: mlp must keep {dim} channels, its {name} is {size}")
        drop_path = probability(layer, "drop_path", drop_path)
        self.pre = nn.Identity() if pre is None else pre
        self.mlp = StarMLP(dim) if mlp is None else mlp
        self.post = nn.Identity() if post is None else post
        self.layer_scale = (
            None if layer_scale is None else finite(layer, "layer_scale", layer_scale)
        )
        self.gamma = None
        if layer_scale is not None:
            # parameters of lazy layers have no shape yet, those of quantised ones no such dtype
            known = (p for p in self.mlp.parameters() if type(p) in PLAIN and p.dtype in WIDE)
            like = next(known, torch.empty(0))
            self.gamma = nn.Parameter(torch.empty(dim, device=like.device, dtype=like.dtype))
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
        if not is_traced(x):
            self._check_shapes(x, y)
        if self.gamma is not None:
            y = y * self.gamma
        return x + self.drop_path(y)  # type: ignore[no-any-return]

    def _check_shapes(self, x: Tensor, y: Tensor) -> None:
        layer, shape = type(self).__name__, tuple(x.shape)
        if y.shape != x.shape:
            inside = ", ".join(type(m).__name__ for m in (self.pre, self.mlp, self.post))
            raise ValueError(f"{layer}: {inside} must keep the shape {shape}, got {tuple(y.shape)}")
        if x.ndim == 1 and self.training and isinstance(self.drop_path, DropPath):
            raise ValueError(f"{layer}: drop_path needs a batch, got shape {shape}; use x[None]")

    __prepare_scriptable__ = record

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
