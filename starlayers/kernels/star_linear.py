"""Matrix products of a wide star MLP with the star fused, as library ops.

`starlayers::star_linear(x, w1, b1, w2, b2, act, offset, save)` returns `(s, h1, h2)`: both branches
of x (rows, in) and their star s (rows, out); h1 and h2 are empty without `save`.
`starlayers::dgated(dy, w3, h1, h2, act, offset)` returns `(d1, d2, s)` for y = s w3': the gradients
of both branches, and the star again so that it need not be saved. `starlayers::product_dgated` is
the same by a matrix product of the vendor's library and `star`.

The kernels of the first two need Hopper's tensor descriptors and 16-bit types. Elsewhere
`star_linear.plain` and `product_dgated` are faster. No op of these has a gradient; `star_mlp_wide`
combines them.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from starlayers.kernels.registration import ceil_div, define_op, launch, pointer
from starlayers.kernels.star import Options, launch_backward, star, star_backward

__all__ = ["dgated", "product_dgated", "star_linear"]

BM, BN, BK = 128, 128, 64  # rows, columns and depth of a tile
GROUP = 8  # row tiles in a group that shares the columns it reads in cache
WARPS = 8
STAGES = {"star_linear": 4, "dgated": 4}


class Branches(NamedTuple):
    """Parameters of both branches; a missing bias is `None`."""

    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None


def _plain(
    x: Tensor, branches: Branches, act: str, offset: float, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    w1, b1, w2, b2 = branches
    h1, h2 = F.linear(x, w1, b1), F.linear(x, w2, b2)
    s = star(h1, h2, act, offset, [], [])
    return (s, h1, h2) if save else (s, x.new_empty(0), x.new_empty(0))


def _kernel(
    x: Tensor, branches: Branches, act: str, offset: float, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from starlayers.kernels.device.star_linear import TensorDescriptor, star_linear

    w1, b1, w2, b2 = branches
    x, w1, w2 = _aligned(x), _aligned(w1), _aligned(w2)
    m, k = x.shape
    n = w1.shape[0]
    s = x.new_empty(m, n)
    h1, h2 = (x.new_empty(m, n), x.new_empty(m, n)) if save else (s, s)

    def described(t: Tensor, rows: int, cols: int) -> Any:
        return TensorDescriptor.from_tensor(t, [rows, cols])

    if s.numel():
        launch(
            star_linear, (ceil_div(m, BM) * ceil_div(n, BN),),
            described(x, BM, BK), described(w1, BN, BK), pointer(b1, w1),
            described(w2, BN, BK), pointer(b2, w1),
            described(s, BM, BN), described(h1, BM, BN), described(h2, BM, BN), m, n, k,
            ACT=act, OFFSET=offset, BIAS1=b1 is not None, BIAS2=b2 is not None, SAVE=save,
            BM=BM, BN=BN, BK=BK, GROUP=GROUP, num_warps=WARPS, num_stages=STAGES["star_linear"],
        )  # fmt: skip
    return (s, h1, h2) if save else (s, x.new_empty(0), x.new_empty(0))


def _aligned(t: Tensor) -> Tensor:
    """Return `t` contiguous and at a multiple of 16 bytes, as descriptors require."""
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def _fake(
    x: Tensor, branches: Branches, act: str, offset: float, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (x.shape[0], branches.w1.shape[0])
    saved = shape if save else (0,)
    return x.new_empty(shape), x.new_empty(saved), x.new_empty(saved)


star_linear = define_op("star_linear", _kernel, plain=_plain, fake=_fake)


def _plain_dgated(
    dy: Tensor, w3: Tensor, h1: Tensor, h2: Tensor, act: str, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    return star_backward(dy @ w3, h1, h2, act, offset, [], [], True)  # type: ignore[no-any-return]


def _product_dgated(
    dy: Tensor, w3: Tensor, h1: Tensor, h2: Tensor, act: str, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    ds = dy @ w3
    d1, s = (h1.new_empty(h1.shape) for _ in range(2))
    # d2 takes the place of ds: one tensor of this size less at the peak of a wide MLP's backward
    launch_backward(ds, h1, h2, Options(act, offset, [], []), d1, ds, s)
    return d1, ds, s


def _dgated_kernel(
    dy: Tensor, w3: Tensor, h1: Tensor, h2: Tensor, act: str, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    from starlayers.kernels.device.star_linear import TensorDescriptor, dgated

    dy, w3, h1, h2 = (_aligned(t) for t in (dy, w3, h1, h2))
    m, k = dy.shape
    n = w3.shape[1]
    d1, d2, s = (torch.empty_like(h1) for _ in range(3))
    if s.numel():
        halves = (TensorDescriptor.from_tensor(t, [BM, BN // 2]) for t in (h1, h2, d1, d2, s))
        launch(
            dgated, (ceil_div(m, BM) * ceil_div(n, BN),),
            TensorDescriptor.from_tensor(dy, [BM, BK]), TensorDescriptor.from_tensor(w3, [BK, BN]),
            *halves, m, n, k, ACT=act, OFFSET=offset,
            BM=BM, BN=BN, BK=BK, GROUP=GROUP, num_warps=WARPS, num_stages=STAGES["dgated"],
        )  # fmt: skip
    return d1, d2, s


def _fake_dgated(
    dy: Tensor, w3: Tensor, h1: Tensor, h2: Tensor, act: str, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    d1, d2, s = (h1.new_empty(h1.shape) for _ in range(3))
    return d1, d2, s


dgated = define_op("dgated", _dgated_kernel, plain=_plain_dgated, fake=_fake_dgated)
product_dgated = define_op(
    "product_dgated", _product_dgated, plain=_plain_dgated, fake=_fake_dgated
)
