"""Star operation as functions that check their inputs and run the fastest path."""

import torch
from torch import Tensor

from starlayers.activations import get_activation
from starlayers.checks import finite, floating_tensor
from starlayers.dispatch import plan_mlp, plan_star
from starlayers.kernels.layer import run_mlp
from starlayers.kernels.registration import MLPWeights
from starlayers.kernels.star import star as star_op
from starlayers.reference import Limits, star_mlp_reference, star_reference

__all__ = [
    "star",
    "star_mlp",
    "star_mlp_reference",
    "star_packed",
    "star_reference",
]


def star_product(
    x1: Tensor,
    x2: Tensor,
    act: str | None = "relu6",
    *,
    offset: float = 0.0,
    clamp1: Limits | None = None,
    clamp2: Limits | None = None,
) -> Tensor:
    """Compute `star_reference`, with the fused kernel if the backend allows it.

    Inputs are not checked. A tensor in the place of `offset`, such as a parameter that replaced a
    layer's, is trained by the definition.

    Example:
        >>> star_product(torch.tensor([2.0]), torch.tensor([3.0]), "relu6")
        tensor([6.])
    """
    if isinstance(offset, Tensor) or not plan_star(x1, x2, act).fused:
        return star_reference(x1, x2, act, offset=offset, clamp1=clamp1, clamp2=clamp2)
    if x1.ndim == 4 and not x1.is_contiguous() and _channels_last(x1) and _channels_last(x2):
        x1, x2 = x1.permute(0, 2, 3, 1), x2.permute(0, 2, 3, 1)
        return _fused_star(x1, x2, act, offset, clamp1, clamp2).permute(0, 3, 1, 2)
    return _fused_star(x1, x2, act, offset, clamp1, clamp2)


def _fused_star(
    x1: Tensor,
    x2: Tensor | None,
    act: str | None,
    offset: float,
    clamp1: Limits | None,
    clamp2: Limits | None,
) -> Tensor:
    limits = [list(clamp1 or ()), list(clamp2 or ())]
    return star_op(x1, x2, get_activation(act).name, float(offset), *limits)  # type: ignore[no-any-return]


def _channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def star_packed_product(
    h: Tensor,
    act: str | None = "relu6",
    *,
    offset: float = 0.0,
    clamp1: Limits | None = None,
    clamp2: Limits | None = None,
) -> Tensor:
    """Compute `star_product` of both halves of one tensor: (..., 2 n) -> (..., n).

    Example:
        >>> star_packed_product(torch.tensor([2.0, 3.0]))
        tensor([6.])
    """
    x1, x2 = h.chunk(2, -1)
    if isinstance(offset, Tensor) or not plan_star(x1, x2, act).fused:
        return star_reference(x1, x2, act, offset=offset, clamp1=clamp1, clamp2=clamp2)
    return _fused_star(h, None, act, offset, clamp1, clamp2)


def star(
    x1: Tensor,
    x2: Tensor,
    act: str | None = "relu6",
    *,
    offset: float = 0.0,
    clamp1: Limits | None = None,
    clamp2: Limits | None = None,
) -> Tensor:
    """Compute the star of two branches: `act(x1) * (offset + x2)`, element-wise.

    Args:
        x1: the branch that passes through the activation, shape (...), floating dtype.
        x2: the linear branch, same shape and dtype as `x1`.
        act: name in `ACTIVATIONS`, or `None` for none.
        offset: constant added to `x2`; with `offset=1` and `x2 = 0` the star is just `act(x1)`.
        clamp1, clamp2: least and greatest value of each branch, applied before the activation and
            the offset; infinite for no limit on that side. gpt-oss, whose products would overflow
            half precision, uses `clamp1=(-inf, 7), clamp2=(-7, 7), offset=1`.

    If both branches are halves of one tensor, `star_packed` saves a copy in the backward.

    Returns:
        A new tensor of the shape and dtype of the inputs; neither input is written to.

    Raises:
        TypeError: an input is not a dense floating tensor, the dtypes differ, or `offset` is not a
            number (a tensor of offsets can be added to `x2`).
        ValueError: the shapes differ, `act` is unknown, `offset` is not finite, or a limit is empty
            or not a pair.

    Source: Ma et al., "Rewrite the Stars", CVPR 2024, arXiv 2403.19967.

    Example:
        >>> star(torch.tensor([2.0, 9.0]), torch.tensor([3.0, -1.0]))
        tensor([ 6., -6.])
    """
    for x in (x1, x2):
        floating_tensor("star", x)
    if x1.dtype != x2.dtype:
        raise TypeError(f"star needs branches of one dtype, got {x1.dtype} and {x2.dtype}")
    if x1.shape != x2.shape:
        raise ValueError(
            f"star needs branches of one shape, got {tuple(x1.shape)} and {tuple(x2.shape)}; "
            "expand() the smaller one"
        )
    offset = finite("star", "offset", offset)
    _check_limits(clamp1=clamp1, clamp2=clamp2)
    return star_product(x1, x2, act, offset=offset, clamp1=clamp1, clamp2=clamp2)


def star_packed(
    h: Tensor,
    act: str | None = "relu6",
    *,
    offset: float = 0.0,
    clamp1: Limits | None = None,
    clamp2: Limits | None = None,
) -> Tensor:
    """Compute the star of both halves of one tensor, as a packed projection yields.

    `star(h[..., :n], h[..., n:])` with n half the last dimension: (..., 2 n) -> (..., n). The
    fused kernel reads the halves, and writes the halves of the gradient, without a copy.

    Args:
        h: both branches side by side, shape (..., 2 n), floating dtype.
        act, offset, clamp1, clamp2: as for `star`.

    Raises:
        TypeError, ValueError: as `star`, and for an odd last dimension.

    Example:
        >>> star_packed(torch.tensor([2.0, 9.0, 3.0, -1.0]))
        tensor([ 6., -6.])
    """
    floating_tensor("star_packed", h)
    if h.ndim == 0 or h.shape[-1] % 2:
        raise ValueError(f"star_packed needs an even last dimension, got shape {tuple(h.shape)}")
    offset = finite("star_packed", "offset", offset)
    _check_limits(clamp1=clamp1, clamp2=clamp2)
    return star_packed_product(h, act, offset=offset, clamp1=clamp1, clamp2=clamp2)


def star_mlp(
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
    residual: Tensor | None = None,
) -> Tensor:
    """Compute a star MLP from its weights: `(act(x w1' + b1) * (offset + x w2' + b2)) w3' + b3`.

    It takes the path that `StarMLP` takes, fused where the backend allows it: the hidden activation
    is then neither stored nor saved for the backward.

    Args:
        x: input, shape (..., in), floating dtype.
        w1, b1: weight (hidden, in) and bias (hidden) of the branch with the activation, as in
            `nn.Linear`; `None` for no bias.
        w2, b2: the same of the linear branch.
        w3, b3: weight (out, hidden) and bias (out) of the last layer.
        act: name in `ACTIVATIONS`, or `None` for none.
        offset: constant added to the second branch.
        residual: added to the result, of the same shape (..., out).

    Returns:
        A new tensor of shape (..., out).

    Raises:
        TypeError: an argument is not a dense floating tensor, or `offset` not a number.
        ValueError: two shapes do not fit, `offset` is not finite, or `act` is unknown.
        RuntimeError: the backend is "triton" or "cpu" and its kernel does not apply.

    Source: Ma et al., "Rewrite the Stars", CVPR 2024, arXiv 2403.19967.

    Example:
        >>> x, w = torch.ones(1, 2), torch.eye(2)
        >>> star_mlp(x, w, None, 3 * w, None, w, None, residual=x)
        tensor([[4., 4.]])
    """
    weights = MLPWeights(w1, b1, w2, b2, w3, b3)
    offset = _check_mlp(x, weights, residual, offset)
    plan = plan_mlp(x, weights, act, residual)
    if plan.weights is not None:
        return run_mlp(plan.path, x, weights, act, offset, residual)
    y = star_mlp_reference(x, w1, b1, w2, b2, w3, b3, act, offset=offset)
    return y if residual is None else residual + y


def _check_mlp(x: Tensor, weights: MLPWeights, residual: Tensor | None, offset: float) -> float:
    """Raise unless all arguments of a star MLP fit together; return the offset as a float."""
    offset = finite("star_mlp", "offset", offset)
    tensors = {"x": x, **weights._asdict(), "residual": residual}
    for name, t in tensors.items():
        optional = name[0] in "br"
        if not (t is None and optional):
            floating_tensor(f"star_mlp: {name}", t)  # type: ignore[arg-type]
    if weights.w1.ndim != 2 or weights.w3.ndim != 2 or x.ndim == 0:
        shapes = {name: tuple(tensors[name].shape) for name in ("x", "w1", "w3")}  # type: ignore[union-attr]
        raise ValueError(f"star_mlp needs x (..., in) and weights (out, in), got {shapes}")
    (hidden, width), out = weights.w1.shape, weights.w3.shape[0]
    expected = {
        "x": (*x.shape[:-1], width),
        "b1": (hidden,),
        "w2": (hidden, width),
        "b2": (hidden,),
        "w3": (out, hidden),
        "b3": (out,),
        "residual": (*x.shape[:-1], out),
    }
    for name, shape in expected.items():
        t = tensors[name]
        if t is not None and t.shape != shape:
            raise ValueError(
                f"star_mlp: {name} must have shape {tuple(shape)} for w1 {(hidden, width)} and w3 "
                f"{tuple(weights.w3.shape)}, got {tuple(t.shape)}"
            )
    return offset


def _check_limits(**clamps: Limits | None) -> None:
    for name, limits in clamps.items():
        if limits is not None and (len(limits) != 2 or not limits[0] <= limits[1]):
            raise ValueError(f"star: {name} must be (least, greatest), got {limits!r}")
