"""The stateless star operation and the reference definitions every fast path is held to."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from starlayers.activations import get_activation

__all__ = ["COMBINE", "star", "star_mlp_reference", "star_reference", "sum_reference"]


def star_reference(
    x1: Tensor, x2: Tensor, act: str | None = "relu6", *, offset: float = 0.0
) -> Tensor:
    """The definition: `act(x1) * (offset + x2)` in plain PyTorch, without checks.

    Shapes: `x1`, `x2` (...) -> (...), any floating dtype.

    Example:
        >>> star_reference(torch.tensor([2.0]), torch.tensor([3.0]), "relu6")
        tensor([6.])
    """
    return get_activation(act).fn(x1) * (x2 + offset if offset else x2)


def sum_reference(
    x1: Tensor, x2: Tensor, act: str | None = "relu6", *, offset: float = 0.0
) -> Tensor:
    """The paper's ablation, `act(x1) + x2`: the same two branches joined by a sum.

    `offset` exists so that both rows of `COMBINE` are called alike; modules only allow 0 here.

    Example:
        >>> sum_reference(torch.tensor([2.0]), torch.tensor([3.0]), "relu6")
        tensor([5.])
    """
    return get_activation(act).fn(x1) + (x2 + offset if offset else x2)


#: name -> how two branches become one: "mul" is the star operation, "sum" the paper's ablation.
COMBINE: dict[str, Callable[..., Tensor]] = {"mul": star_reference, "sum": sum_reference}


def star(x1: Tensor, x2: Tensor, act: str | None = "relu6", *, offset: float = 0.0) -> Tensor:
    """The star operation on two ready branches: `act(x1) * (offset + x2)`, element-wise.

    Args:
        x1: the branch that passes through the activation, shape (...), floating dtype.
        x2: the linear branch, same shape and dtype as `x1`.
        act: a row of `ACTIVATIONS`, or `None` for none.
        offset: constant added to `x2`; with `offset=1` and `x2 = 0` the star is just `act(x1)`.

    Returns:
        A new tensor of the shape and dtype of the inputs; neither input is written to.

    Raises:
        TypeError: an input is not a floating tensor, or the dtypes differ.
        ValueError: the shapes differ, or `act` is unknown.

    Source: Ma et al., "Rewrite the Stars", CVPR 2024, arXiv 2403.19967.

    Example:
        >>> star(torch.tensor([2.0, 9.0]), torch.tensor([3.0, -1.0]))
        tensor([ 6., -6.])
    """
    if not (x1.is_floating_point() and x2.is_floating_point()):
        raise TypeError(
            f"star needs floating tensors, got {x1.dtype} and {x2.dtype}; convert with .float()"
        )
    if x1.dtype != x2.dtype:
        raise TypeError(f"star needs branches of one dtype, got {x1.dtype} and {x2.dtype}")
    if x1.shape != x2.shape:
        raise ValueError(
            f"star needs branches of one shape, got {tuple(x1.shape)} and {tuple(x2.shape)}; "
            "expand() the smaller one"
        )
    return star_reference(x1, x2, act, offset=offset)


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
    """The definition of the star MLP: `(act(x w1' + b1) * (offset + x w2' + b2)) w3' + b3`.

    Shapes: `x` (..., in); `w1`, `w2` (hidden, in); `w3` (out, hidden), as in `nn.Linear`;
    result (..., out).

    Example:
        >>> x, w = torch.ones(1, 2), torch.eye(2)
        >>> star_mlp_reference(x, w, None, 3 * w, None, w, None)
        tensor([[3., 3.]])
    """
    hidden = star_reference(F.linear(x, w1, b1), F.linear(x, w2, b2), act, offset=offset)
    return F.linear(hidden, w3, b3)
