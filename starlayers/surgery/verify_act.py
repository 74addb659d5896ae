"""Name an activation exactly: by its graph, and by values all over the range of float32."""

from collections.abc import Callable
from functools import partial
from itertools import product
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from starlayers.activations import ACTIVATIONS
from starlayers.surgery.formula import activation_name, read_chain
from starlayers.surgery.graph import SIZES, trace
from starlayers.surgery.sandbox import sandbox_copy
from starlayers.surgery.snapshot import signature
from starlayers.surgery.trial_run import MismatchError

#: PyTorch's own modules without options, which need no trial
STOCK: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.Hardswish: "hardswish",
    nn.Identity: "identity",
}


#: names by what decides about them, and the objects whose ids are in it
_names: dict[Any, tuple[str | None, Any]] = {}
MOST_NAMES = 256


class _Function(nn.Module):
    """Function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def name_of_act(act: nn.Module | Callable[[Tensor], Tensor]) -> str | None:
    """Return the name in `ACTIVATIONS` of an activation, `None` if it is none of them.

    It has to be the same element-wise function in both modes, with and without gradients, in all
    dtypes, with no parameter of its own.

    Example:
        >>> name_of_act(nn.SiLU()), name_of_act(nn.Hardtanh(0, 10)), name_of_act(nn.PReLU())
        ('silu', None, None)
    """
    if isinstance(act, nn.Module) and "forward" not in vars(act) and type(act) in STOCK:
        return STOCK[type(act)]
    if not isinstance(act, (nn.Module, FunctionType, BuiltinFunctionType)):
        return None  # an object whose state nobody watches
    own, kept = signature(act) if isinstance(act, nn.Module) else (id(act), [act])
    key = own, tuple(map(id, ACTIVATIONS.values()))
    if key not in _names:
        if len(_names) >= MOST_NAMES:
            _names.clear()
        _names[key] = _traced_name(act), (kept, *ACTIVATIONS.values())
    return _names[key][0]


def _traced_name(act: nn.Module | Callable[[Tensor], Tensor]) -> str | None:
    from torch._subclasses.fake_tensor import FakeTensorMode  # heavy, as `torch.export` is

    texts: set[str] = set()
    name = None
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for train, grad, dtype in product((False, True), (True, False), dtypes):
        try:
            with FakeTensorMode(allow_non_fake_inputs=True), torch.set_grad_enabled(grad):
                fake = partial(_fake, dtype)
                body = sandbox_copy(act, make=fake) if isinstance(act, nn.Module) else act
                module = _Function(body).train(train)
                x = torch.empty(SIZES, dtype=dtype, device="cpu")
                graph = trace(module, x, ())
            chain = read_chain(graph, graph.output, [graph.x])
        except MismatchError:
            return None
        if not texts:
            name = activation_name(chain)
        texts.add(chain.text)
    return name if len(texts) == 1 and name is not None and _agrees(act, name) else None


def _agrees(act: nn.Module | Callable[[Tensor], Tensor], name: str) -> bool:
    """Return True if values and gradients are those of a row of `ACTIVATIONS`, however it is run.

    A graph shows no gradient that a function makes itself, and no choice by shape or autocast.
    """
    f = sandbox_copy(act) if isinstance(act, nn.Module) else act
    shapes = ((64,), (1, 64), (8, 8), (1, 8, 8), (4, 2, 8), (2, 2, 4, 4))
    for dtype, shape, low in product((torch.float32, torch.float64), shapes, (False, True)):
        x = torch.linspace(-9.01, 9, 64, dtype=dtype, device="cpu").view(shape)
        ways = []
        for function in (f, ACTIVATIONS[name].fn):
            inputs = x.clone().requires_grad_()
            with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
                y = function(inputs.clone())
                (gradient,) = torch.autograd.grad(y.sum(), inputs)
            with torch.inference_mode():
                z = function(x.clone())
            ways.append((y.detach(), gradient, z.clone()))
        if any(not torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*ways)):
            return False
    return True


def _fake(dtype: torch.dtype, tensor: Tensor) -> Any:
    return torch.empty(tensor.shape, dtype=dtype, device="cpu")
