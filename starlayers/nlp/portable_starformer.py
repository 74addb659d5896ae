"""StarMLP and StarBlock in plain PyTorch, for use without starlayers.

`save_with_code` copies this file into model folders. Parameter names are those of
`starlayers.StarMLP` and `starlayers.StarBlock`, so the same weights load into both. Where
starlayers is installed, its own layers are used instead of these.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_FUNCTIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "squared_relu": lambda x: F.relu(x).square(),
    "hardswish": F.hardswish,
}
_ALIASES = {
    "identity": None,
    "bilinear": None,
    "reglu": "relu",
    "geglu": "gelu",
    "swiglu": "silu",
    "swish": "silu",
    "glu": "sigmoid",
    "relu2": "squared_relu",
}


class Activation(NamedTuple):
    """Activation function and its name in `starlayers.ACTIVATIONS`."""

    name: str | None
    fn: Callable[[Tensor], Tensor]


def get_activation(act: str | None) -> Activation:
    """Look up an activation by its name, an alias, or `None` for the identity."""
    name = _ALIASES.get(act, act) if act is not None else None
    if name not in _FUNCTIONS:
        raise ValueError(
            f"activation {act!r} is not known without starlayers: pip install starlayers"
        )
    return Activation(name, _FUNCTIONS[name])


def star_product(x1: Tensor, x2: Tensor, act: str | None) -> Tensor:
    """Compute `act(x1) * x2`."""
    return get_activation(act).fn(x1) * x2


def recomputed(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Run `call(x)` as a checkpoint: save `x` alone, repeat the call in the backward."""
    y: Tensor = checkpoint(call, x, use_reentrant=False)
    return y


class StarMLP(nn.Module):
    """Star MLP `g(act(f1(x)) * (offset + f2(x)))`, as `starlayers.StarMLP`.

    Only that one fuses and recomputes.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        act: str | None = "relu6",
        offset: float = 0.0,
        bias: bool = True,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.act, self.offset = act, offset
        self.f1 = nn.Linear(dim, hidden, bias=bias)
        self.f2 = nn.Linear(dim, hidden, bias=bias)
        self.g = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y, x2 = get_activation(self.act).fn(self.f1(x)), self.f2(x)
        return self.g(y * (x2 + self.offset if self.offset else x2))  # type: ignore[no-any-return]


class SumMLP(StarMLP):
    """MLP with a sum in the place of the product: `g(act(f1(x)) + f2(x))`."""

    def forward(self, x: Tensor) -> Tensor:
        return self.g(get_activation(self.act).fn(self.f1(x)) + self.f2(x))  # type: ignore[no-any-return]


class StarBlock(nn.Module):
    """Residual block `x + post(mlp(pre(x)))`, as `starlayers.StarBlock`."""

    def __init__(
        self,
        dim: int,
        mlp: nn.Module,
        *,
        pre: nn.Module | None = None,
        post: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.pre = pre or nn.Identity()
        self.mlp = mlp
        self.post = post or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.post(self.mlp(self.pre(x)))  # type: ignore[no-any-return]
