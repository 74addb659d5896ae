"""Activation table: one row per activation, looked up by name everywhere."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "Activation", "get_activation", "register_activation"]


@dataclass(frozen=True)
class Activation:
    """Row of the table: an element-wise function and its derivative.

    `fn(x)` and `derivative(x)` map a floating tensor of any shape to one of the same shape and
    dtype. At a kink the derivative is the one PyTorch's own backward uses (0 for relu at 0); it
    need not be differentiable itself. `closed_form` is False where it goes through autograd,
    which a fused op cannot do.

    Example:
        >>> ACTIVATIONS["relu6"].fn(torch.tensor([-1.0, 2.0, 7.0]))
        tensor([0., 2., 6.])
        >>> ACTIVATIONS["relu6"].derivative(torch.tensor([-1.0, 2.0, 7.0]))
        tensor([0., 1., 0.])
    """

    name: str
    fn: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    closed_form: bool = True


#: name -> row. `None` is the activation-free row; GLU-family names are aliases of their gate.
ACTIVATIONS: dict[str | None, Activation] = {}


def get_activation(act: str | None) -> Activation:
    """Look up a row of `ACTIVATIONS` by name, alias or `None` (no activation).

    Raises:
        TypeError: `act` is neither a string nor `None`.
        ValueError: no row has that name; the message lists the names there are.

    Example:
        >>> get_activation("swiglu").name
        'silu'
    """
    if act is not None and not isinstance(act, str):
        raise TypeError(
            f"act must be a name from ACTIVATIONS or None, got {act!r}; "
            "register_activation(name, fn) adds a function of your own"
        )
    row = ACTIVATIONS.get(act)
    if row is None:
        known = ", ".join(sorted(name for name in ACTIVATIONS if name is not None))
        raise ValueError(
            f"unknown activation {act!r}; known: {known}, or None. "
            "register_activation(name, fn) adds one"
        )
    return row


def register_activation(
    name: str,
    fn: Callable[[Tensor], Tensor],
    derivative: Callable[[Tensor], Tensor] | None = None,
    *,
    aliases: Iterable[str | None] = (),
) -> Activation:
    """Add a row to `ACTIVATIONS`, usable at once as `act=name` in every star layer.

    `fn` must be element-wise, a pure function of its input and differentiable by PyTorch;
    `derivative` defaults to autograd through `fn`. Register before using a pickled module that
    names it.

    Raises:
        TypeError: a name is not a string.
        ValueError: `name` or an alias is taken, or `fn` does not keep the shape.

    Example:
        >>> row = register_activation("cube", lambda x: x**3, lambda x: 3 * x**2)
        >>> row.derivative(torch.tensor([2.0]))
        tensor([12.])
        >>> del ACTIVATIONS["cube"]
    """
    names = (name, *aliases)
    if not all(n is None or isinstance(n, str) for n in names):
        raise TypeError(f"activation names must be strings, got {names}")
    taken = [n for n in names if n in ACTIVATIONS]
    if taken:
        raise ValueError(f"activation name(s) already registered: {taken}; choose another name")
    probe = fn(torch.zeros(2, 3))
    if probe.shape != (2, 3):
        raise ValueError(
            f"activation {name!r} must be element-wise: it turned shape (2, 3) into "
            f"{tuple(probe.shape)}"
        )
    row = Activation(name, fn, derivative or _autograd_derivative(fn), derivative is not None)
    ACTIVATIONS.update(dict.fromkeys(names, row))
    return row


def _autograd_derivative(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def derivative(x: Tensor) -> Tensor:
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            (grad,) = torch.autograd.grad(fn(x).sum(), x, create_graph=create_graph)
        return grad

    return derivative


def _native(backward: Callable[..., Tensor], *args: object) -> Callable[[Tensor], Tensor]:
    """Return a derivative that calls PyTorch's own backward op.

    Kinks and NaN then agree with autograd.
    """

    def derivative(x: Tensor) -> Tensor:
        return backward(torch.ones_like(x), x, *args)

    return derivative


def _identity(x: Tensor) -> Tensor:
    return x


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_derivative(x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(torch.ones_like(x), x)  # type: ignore[no-any-return]


def _gelu_tanh_derivative(x: Tensor) -> Tensor:
    ones = torch.ones_like(x)
    return torch.ops.aten.gelu_backward(ones, x, approximate="tanh")  # type: ignore[no-any-return]


def _sigmoid_derivative(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 - s)


def _tanh_derivative(x: Tensor) -> Tensor:
    return 1 - torch.tanh(x).square()


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _squared_relu_derivative(x: Tensor) -> Tensor:
    return 2 * F.relu(x)


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _quick_gelu_derivative(x: Tensor) -> Tensor:
    s = torch.sigmoid(1.702 * x)
    return s * (1 + 1.702 * x * (1 - s))


_aten = torch.ops.aten
register_activation("identity", _identity, torch.ones_like, aliases=(None, "bilinear"))
register_activation("relu", F.relu, _native(_aten.threshold_backward, 0.0), aliases=("reglu",))
register_activation("relu6", F.relu6, _native(_aten.hardtanh_backward, 0.0, 6.0))
register_activation("gelu", F.gelu, _gelu_derivative, aliases=("geglu",))
register_activation("gelu_tanh", _gelu_tanh, _gelu_tanh_derivative)
register_activation("silu", F.silu, _native(_aten.silu_backward), aliases=("swiglu", "swish"))
register_activation("quick_gelu", _quick_gelu, _quick_gelu_derivative)
register_activation("sigmoid", torch.sigmoid, _sigmoid_derivative, aliases=("glu",))
register_activation("tanh", torch.tanh, _tanh_derivative)
register_activation("softplus", F.softplus, torch.sigmoid)
register_activation("squared_relu", _squared_relu, _squared_relu_derivative, aliases=("relu2",))
register_activation("hardswish", F.hardswish, _native(_aten.hardswish_backward))
