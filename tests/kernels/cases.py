"""Inputs and definitions of the library's ops, for all kernel tests."""

import os

import pytest
import torch
import torch.nn.functional as F

from starlayers.functional import star_mlp_reference, star_reference
from starlayers.kernels.dwconv import dwconv, dwconv_backward
from starlayers.kernels.star import star, star_backward
from starlayers.kernels.star_mlp import star_mlp, star_mlp_backward
from tests.helpers import randn

#: "cuda" runs the tests marked `interpret` compiled, on a GPU
DEVICE = os.environ.get("STARLAYERS_TEST_DEVICE", "cpu")
#: parameter of tests that run in torch code and, in the slow tier, in the interpreter
EITHER = ["plain", pytest.param("triton", marks=(pytest.mark.interpret, pytest.mark.slow))]
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def drawn(shapes, missing, dtype):
    """Return a tensor for each name -> shape, `None` for a name in `missing`.

    Matrices are scaled by 1/sqrt(fan_in). `dtype` is one for all or name -> dtype.
    """
    tensors = []
    for seed, (name, shape) in enumerate(shapes.items()):
        scale = 1 / shape[-1] ** 0.5 if name.startswith("w") else 2.0 if name == "x" else 1.0
        kind = dtype[name] if isinstance(dtype, dict) else dtype
        t = (scale * randn(*shape, seed=seed, dtype=torch.float64)).to(kind).requires_grad_()
        tensors.append(None if name in missing else t)
    return tensors


def with_mean_and_variance(y, stats):
    """Return `y`, with `stats` also mean and biased variance of its channels."""
    if not stats:
        return y
    rows = (y if y.dtype == torch.float64 else y.float()).flatten(0, -2)
    return y, rows.mean(0), (rows - rows.mean(0)).square().mean(0)


# star: x1, x2


def star_pair(act, offset=0.0, clamp1=(), clamp2=()):
    """Return the op and its definition as functions of two tensors or a packed one."""

    def op(x1, x2=None):
        return star(x1, x2, act, offset, list(clamp1), list(clamp2))

    def definition(x1, x2=None):
        a, b = x1.chunk(2, -1) if x2 is None else (x1, x2)
        return star_reference(
            a, b, act, offset=offset, clamp1=clamp1 or None, clamp2=clamp2 or None
        )

    return op, definition


# star_mlp: x, w1, b1, w2, b2, w3, b3, residual


def mlp_tensors(rows, channels, hidden, out, *, missing=(), dtype=torch.float32):
    shapes = {
        "x": (rows, channels),
        "w1": (hidden, channels),
        "b1": (hidden,),
        "w2": (hidden, channels),
        "b2": (hidden,),
        "w3": (out, hidden),
        "b3": (out,),
        "residual": (rows, out),
    }
    return drawn(shapes, missing, dtype)


def mlp_pair(act, offset=0.0, stats=False):
    def op(*tensors):
        return star_mlp(*tensors, act, offset, stats)

    def definition(*tensors):
        *weights, residual = tensors
        y = star_mlp_reference(*weights, act, offset=offset)
        return with_mean_and_variance(y if residual is None else y + residual, stats)

    return op, definition


# dwconv: x, k, b, scale, shift, residual


def conv_tensors(n, height, width, channels, size, *, missing=(), dtype=torch.float32):
    shapes = {
        "x": (n, height, width, channels),
        "k": (channels, 1, size, size),
        "b": (channels,),
        "scale": (channels,),
        "shift": (channels,),
        "residual": (n, height, width, channels),
    }
    return drawn(shapes, missing, dtype)


def conv_pair(stats=False):
    def op(*tensors):
        return dwconv(*tensors, stats)

    def definition(x, k, b, scale, shift, residual):
        v = x if scale is None else (x * scale + shift).to(x.dtype)
        y = convolved(v, k, b)
        return with_mean_and_variance(y if residual is None else y + residual, stats)

    return op, definition


def convolved(x, k, b):
    """Compute the zero-padded depthwise convolution of (N, height, width, C)."""
    images = x.permute(0, 3, 1, 2)
    b = None if b is None else b.to(x.dtype)
    y = F.conv2d(images, k.to(x.dtype), b, padding=k.shape[-1] // 2, groups=k.shape[0])
    return y.permute(0, 2, 3, 1)


def calls(*, dtype=torch.float32, device=None):
    """Return name -> (op, arguments): every op with and without optional arguments."""

    def detached(tensors):
        return [
            None if t is None else t.detach().to(device or torch.get_default_device())
            for t in tensors
        ]

    def training(tensors):
        return [None if t is None else t.requires_grad_() for t in detached(tensors)]

    x1, x2 = (randn(5, 12, seed=s, dtype=dtype) for s in range(2))
    ops = {
        "star": (star, (*training([x1, x2]), "silu", 0.0, [], [])),
        "star packed, clamped": (
            star,
            (*training([x1, None]), "relu6", 1.0, [-float("inf"), 1.0], [-1.0, 1.0]),
        ),
        "star_backward": (star_backward, (*detached([x1, x2, x1]), "silu", 0.0, [], [], True)),
        "star_backward packed, clamped": (
            star_backward,
            (
                *detached([x2[:, :6], x1, None]),
                "relu6",
                1.0,
                [-1.0, 1.0],
                [-1.0, 1.0],
                False,
            ),
        ),
    }
    full = mlp_tensors(21, 17, 40, 24, dtype=dtype)
    bare = mlp_tensors(21, 17, 40, 24, missing=("b1", "b2", "b3", "residual"), dtype=dtype)
    dy = full[-1]
    # gradients of the statistics of y come in float32, whatever y is
    mean, p, q = (randn(24, seed=s) for s in range(3))
    ops |= {
        "star_mlp": (star_mlp, (*training(full), "silu", 1.0, True)),
        "star_mlp bare": (star_mlp, (*training(bare), "relu6", 0.0, False)),
        "star_mlp_backward": (
            star_mlp_backward,
            (*detached([dy, dy, mean, p, q, *full[:7]]), "silu", 1.0),
        ),
        "star_mlp_backward bare": (
            star_mlp_backward,
            (*detached([dy, None, None, None, None, *bare[:7]]), "relu6", 0.0),
        ),
    }
    full = conv_tensors(2, 4, 3, 18, 3, dtype=dtype)
    bare = conv_tensors(2, 4, 3, 18, 3, missing=("b", "scale", "shift", "residual"), dtype=dtype)
    x, k, _, scale, shift, dy = full
    mean, p, q = (randn(18, seed=s) for s in range(3))
    ops |= {
        "dwconv": (dwconv, (*training(full), True)),
        "dwconv bare": (dwconv, (*training(bare), False)),
        "dwconv_backward": (dwconv_backward, detached([dy, dy, mean, p, q, x, k, scale, shift])),
        "dwconv_backward bare": (
            dwconv_backward,
            detached([dy, None, None, None, None, x, k, None, None]),
        ),
    }
    return ops
