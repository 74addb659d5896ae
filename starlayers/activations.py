"""Activation table: one row per activation, looked up by name everywhere."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

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
    which a fused op cannot do. `triton` is the name of its form in Triton, `None` without one.
    `gradient(grad, x)` is what autograd computes for `grad`, to the last bit, zeros and NaN
    included; `None` for `grad * derivative(x)`.

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
    triton: str | None = None
    gradient: Callable[[Tensor, Tensor], Tensor] | None = None

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        """Return the gradient of `fn` at `x` for the gradient `grad` of its result.

        Example:
            >>> grad, x = torch.tensor([torch.inf, 5.0]), torch.tensor([7.0, 1.0])
            >>> ACTIVATIONS["relu6"].backward(grad, x)
            tensor([0., 5.])
        """
        if self.gradient is not None:
            return self.gradient(grad, x)
        return grad * self.derivative(x)


ACTIVATIONS: dict[str | None, Activation] = {}
"""Table of the activations, by name.

`None` is the activation-free row; GLU-family names are aliases of their gate.

Example:
    >>> from starlayers import ACTIVATIONS
    >>> ACTIVATIONS["swiglu"] is ACTIVATIONS["silu"]
    True
"""


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
    `derivative` defaults to autograd through `fn`. Calls of both on a few CPU tensors check this.
    Register before using a pickled module that names it.

    Raises:
        TypeError: a name is not a string, `aliases` is one, or a function returns no tensor.
        ValueError: a name is taken, empty or repeated; a function fails in float32, changes its
            input, shape or dtype; `fn` is random, not element-wise or without a gradient, or
            `derivative` is not that gradient.

    Example:
        >>> row = register_activation("cube", lambda x: x**3, lambda x: 3 * x**2)
        >>> row.derivative(torch.tensor([2.0]))
        tensor([12.])
        >>> del ACTIVATIONS["cube"]
    """
    if isinstance(aliases, str) or not isinstance(aliases, Iterable):
        raise TypeError(f"aliases of {name!r} must be a tuple of names, got {aliases!r}")
    names = (name, *aliases)
    if name is None or not all(n is None or isinstance(n, str) for n in names):
        raise TypeError(f"activation names must be strings, got {names}")
    if "" in names or len({*names}) < len(names):
        raise ValueError(f"activation names must be distinct and not empty, got {names}")
    if taken := [n for n in names if n in ACTIVATIONS]:
        raise ValueError(f"activation name(s) already registered: {taken}; choose another name")
    for f in (fn,) if derivative is None else (fn, derivative):
        if not callable(f):
            raise TypeError(f"activation {name!r} needs functions such as torch.sin, got {f!r}")
    row = Activation(name, fn, derivative or _autograd_derivative(fn), bool(derivative))
    _probe(row)
    return _add(row, *names[1:])


def _add(row: Activation, *aliases: str | None) -> Activation:
    ACTIVATIONS.update(dict.fromkeys((row.name, *aliases), row))
    return row


def _probe(row: Activation) -> None:
    """Raise unless `fn` is pure, element-wise and differentiable, and `derivative` its gradient."""
    act, slope = f"activation {row.name!r}", f"derivative of activation {row.name!r}"
    autograd = f"autograd through {act}", _autograd_derivative(row.fn)
    calls = (*[(act, row.fn)] * 2, autograd, (slope, row.derivative))
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autograd.set_detect_anomaly(False),
        torch.device("cpu"),
        torch.autocast("cpu", enabled=False),
        torch.random.fork_rng(devices=[]),
    ):
        # no point is at a usual kink, and their mean is not 0
        x = torch.linspace(-12.0317, 12.1571, 840, dtype=torch.float64)
        x = x[torch.randperm(840, generator=torch.Generator().manual_seed(0))].view(4, 5, 6, 7)
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            few, must = x[0, 0, 0, :6].view(2, 3).to(dtype), dtype == torch.float32
            works = all(_applied(subject, f, few, must) is not None for subject, f in calls)
        x = x if works else x.float()
        y, again, grad, slopes = (_applied(subject, f, x) for subject, f in calls)
        x_part, y_part = (t[(x > -9) & (x < 5)].flip(0)[None] for t in (x, y))
        moved = _applied(act, row.fn, x_part)
        grad = grad.where(grad.isfinite(), slopes)
        with torch.enable_grad():
            if row.closed_form and row.fn(x).requires_grad:
                raise ValueError(
                    f"{act} depends on a tensor that is trained, to which a derivative of x brings "
                    "no gradient; register it without the derivative, or detach that tensor"
                )
        for words, at, a, b, kinks in (
            (f"{act} must not be random, so put modules in eval mode: two calls", x, y, again, 0),
            (f"{act} must be element-wise, y[i] from x[i]: two shapes", x_part, y_part, moved, 0),
            (f"{slope} must be corrected or omitted: it and autograd", x, slopes, grad, 4),
        ):
            atol = 1e-4 * min(1.0, float(b.nan_to_num(0, 0, 0).abs().max()))
            differ = ~a.isclose(b, rtol=1e-4, atol=atol, equal_nan=True)
            if (count := int(differ.sum())) > kinks:
                x0, a0, b0 = (f"{float(t[differ][0]):.6g}" for t in (at, a, b))
                raise ValueError(
                    f"{words} gave {a0} and {b0} at x = {x0}; {count} of {a.numel()} differ"
                )


def _applied(subject: str, f: Callable[[Tensor], Tensor], x: Tensor, must: bool = True) -> Any:
    """Return `f(x)` if it leaves `x`, shape and dtype; `None` if it fails and need not work."""
    kept = x.clone()
    try:
        y: Any = f(x)
    except Exception as error:  # a foreign callable may raise anything
        if not must:
            return None
        raise ValueError(
            f"{subject} must work, with differentiable torch functions alone; for {x.dtype} "
            f"of shape {tuple(x.shape)} it raised {type(error).__name__}: {error}"
        ) from error
    if not isinstance(y, Tensor):
        raise TypeError(f"{subject} must return a tensor by torch functions, got {type(y)}")
    old, new = ((tuple(t.shape), t.dtype, t.device) for t in (kept, y))
    for what, a, b in zip(("shape", "dtype", "device"), old, new, strict=True):
        if a != b:
            raise ValueError(f"{subject} must be element-wise: keep x.{what}, not {a} into {b}")
    if not torch.equal(x, kept):
        raise ValueError(
            f"{subject} must not work in place: it changed {int((x != kept).sum())} of {x.numel()} "
            "inputs; clone them first"
        )
    return y.detach()


def _autograd_derivative(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def derivative(x: Tensor) -> Tensor:
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            (grad,) = torch.autograd.grad(fn(x).sum(), x, create_graph=create_graph)
        return grad

    return derivative


_aten = torch.ops.aten


def _built_in(
    name: str,
    fn: Callable[[Tensor], Tensor],
    gradient: Callable[[Tensor, Tensor], Tensor],
    *aliases: str | None,
) -> None:
    """Add a row whose gradient is PyTorch's own, so that kinks, zeros and NaN agree with it."""

    def derivative(x: Tensor) -> Tensor:
        return gradient(torch.ones_like(x), x)

    _add(Activation(name, fn, derivative, triton=name, gradient=gradient), *aliases)


def _identity(x: Tensor) -> Tensor:
    return x


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _relu2_gradient(grad: Tensor, x: Tensor) -> Tensor:
    r = F.relu(x)
    return _aten.threshold_backward(grad * (2 * r), r, 0.0)  # type: ignore[no-any-return]


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _quick_gelu_gradient(grad: Tensor, x: Tensor) -> Tensor:
    s = torch.sigmoid(1.702 * x)
    return grad * s + _aten.sigmoid_backward(grad * x, s) * 1.702  # type: ignore[no-any-return]


_built_in("identity", _identity, lambda g, x: g, None, "bilinear")
_built_in("relu", F.relu, lambda g, x: _aten.threshold_backward(g, x, 0.0), "reglu")
_built_in("relu6", F.relu6, lambda g, x: _aten.hardtanh_backward(g, x, 0.0, 6.0))
_built_in("gelu", F.gelu, lambda g, x: _aten.gelu_backward(g, x), "geglu")
_built_in("gelu_tanh", _gelu_tanh, lambda g, x: _aten.gelu_backward(g, x, approximate="tanh"))
_built_in("silu", F.silu, lambda g, x: _aten.silu_backward(g, x), "swiglu", "swish")
_built_in("quick_gelu", _quick_gelu, _quick_gelu_gradient)
_built_in("sigmoid", torch.sigmoid, lambda g, x: _aten.sigmoid_backward(g, x.sigmoid()), "glu")
_built_in("tanh", torch.tanh, lambda g, x: _aten.tanh_backward(g, x.tanh()))
_built_in("softplus", F.softplus, lambda g, x: _aten.softplus_backward(g, x, 1.0, 20.0))
_built_in("squared_relu", _relu2, _relu2_gradient, "relu2")
_built_in("hardswish", F.hardswish, lambda g, x: _aten.hardswish_backward(g, x))
