"""K7: depthwise convolution and star MLP in one kernel, for inference on small feature maps.

`starlayers::dw_star_mlp(x, k, kb, w1, b1, w2, b2, w3, b3, act, offset)` convolves x
(N, height, width, C) with k (C, 1, K, K) and bias kb (C), zero padded, and takes the result
through the star MLP; returns (N, height, width, out). It has no gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from starlayers.functional import star_mlp_reference
from starlayers.kernels._op import cast, define_op
from starlayers.kernels.star_mlp_launch import dw_star_mlp_kernel

__all__ = ["dw_star_mlp"]


def _plain(
    x: Tensor,
    k: Tensor,
    kb: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w3: Tensor,
    b3: Tensor | None,
    act: str,
    offset: float,
) -> Tensor:
    images = x.permute(0, 3, 1, 2)
    v = F.conv2d(images, k.to(x.dtype), kb.to(x.dtype), padding=k.shape[-1] // 2, groups=k.shape[0])
    v = v.permute(0, 2, 3, 1)
    b1, b2, b3 = (cast(b, x.dtype) for b in (b1, b2, b3))
    return star_mlp_reference(v, w1, b1, w2, b2, w3, b3, act, offset=offset).contiguous()


def _fake(
    x: Tensor,
    k: Tensor,
    kb: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w3: Tensor,
    b3: Tensor | None,
    act: str,
    offset: float,
) -> Tensor:
    return torch.empty((*x.shape[:-1], w3.shape[0]), dtype=x.dtype, device=x.device)


dw_star_mlp = define_op("dw_star_mlp", dw_star_mlp_kernel, plain=_plain, fake=_fake)
