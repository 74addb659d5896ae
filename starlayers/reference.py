"""Definitions of the star operation and of the star MLP, in plain PyTorch.

Every fused path is held to these functions in value, gradient and second gradient.
"""

import torch.nn.functional as F
from torch import Tensor

from starlayers.activations import get_activation

__all__ = ["Limits", "star_mlp_reference", "star_reference", "sum_reference"]

#: least and greatest value of a branch
Limits = tuple[float, float]


def star_reference(
    x1: Tensor,
    x2: Tensor,
    act: str | None = "relu6",
    *,
    offset: float = 0.0,
    clamp1: Limits | None = None,
    clamp2: Limits | None = None,
) -> Tensor:
    """Compute the definition, `act(x1) * (offset + x2)`, in plain PyTorch.

    Shapes: `x1`, `x2` (...) -> (...), any floating dtype. `clamp1` and `clamp2` limit a branch
    before the activation and the offset. Inputs are not checked.

    Example:
        >>> star_reference(torch.tensor([2.0]), torch.tensor([3.0]), "relu6")
        tensor([6.])
    """
    x1 = x1 if clamp1 is None else x1.clamp(*clamp1)
    x2 = x2 if clamp2 is None else x2.clamp(*clamp2)
    return get_activation(act).fn(x1) * (x2 + offset if offset else x2)


def sum_reference(x1: Tensor, x2: Tensor, act: str | None = "relu6") -> Tensor:
    """Compute the paper's ablation `act(x1) + x2`: a sum instead of a product.

    Example:
        >>> sum_reference(torch.tensor([2.0]), torch.tensor([3.0]), "relu6")
        tensor([5.])
    """
    return get_activation(act).fn(x1) + x2


def star_mlp_reference(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w3: Tensor,
    b3: Tensor | None,
    act: str | None = "relu6",
    *,
    offset: float = 0.0,
) -> Tensor:
    """Compute the definition of the star MLP in plain PyTorch.

    `(act(x w1' + b1) * (offset + x w2' + b2)) w3' + b3`. Shapes: `x` (..., in); `w1`, `w2`
    (hidden, in); `w3` (out, hidden), as in `nn.Linear`; result (..., out).

    Example:
        >>> x, w = torch.ones(1, 2), torch.eye(2)
        >>> star_mlp_reference(x, w, None, 3 * w, None, w, None)
        tensor([[3., 3.]])
    """
    hidden = star_reference(F.linear(x, w1, b1), F.linear(x, w2, b2), act, offset=offset)
    return F.linear(hidden, w3, b3)
