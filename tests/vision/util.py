"""Randomised models, timm's model with the same weights, and the network written out by hand."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.starnet import StarNet as TimmStarNet
from torch import Tensor, nn

from starlayers.coefficients.modules import ScaledStarOp
from starlayers.vision import StarBlock2d, StarNet, to_timm_state_dict

M = TypeVar("M", bound=nn.Module)

TINY = {"base_dim": 8, "depths": (1, 2)}

#: every name and alias in the activation table, written independently of it
ACTS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "identity": lambda x: x,
    "bilinear": lambda x: x,
    "relu": lambda x: x.clamp(min=0),
    "reglu": lambda x: x.clamp(min=0),
    "relu6": lambda x: x.clamp(0, 6),
    "gelu": F.gelu,
    "geglu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": lambda x: x * x.sigmoid(),
    "swiglu": lambda x: x * x.sigmoid(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": lambda x: (1 + x.exp()).log(),
    "squared_relu": lambda x: x.clamp(min=0) ** 2,
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "hardswish": lambda x: x * (x + 3).clamp(0, 6) / 6,
}


@torch.no_grad()
def randomise(model: M, seed: int = 0) -> M:
    """Draw weights for outputs of order 1, and BatchNorm statistics other than 0 and 1."""
    g = torch.Generator().manual_seed(seed)

    def fill(t: Tensor, mean: float, spread: float) -> None:
        t.copy_(torch.randn(t.shape, generator=g, dtype=torch.float64) * spread + mean)

    for m in model.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            fill(m.weight, 0, m.weight[0].numel() ** -0.5)
            if m.bias is not None:
                fill(m.bias, 0, 0.3)
        elif isinstance(m, nn.BatchNorm2d | nn.LayerNorm):
            fill(m.weight, 1, 0.2)
            fill(m.bias, 0, 0.3)
        if isinstance(m, nn.BatchNorm2d):
            fill(m.running_mean, 0, 0.3)
            m.running_var.copy_(torch.rand(m.num_features, generator=g) + 0.5)
            m.num_batches_tracked.fill_(7)
    for m in model.modules():
        if isinstance(m, StarBlock2d):
            m.post.conv.weight.mul_(0.3)  # else the residual stream grows with depth
    return model


def learned(model: M) -> M:
    """Draw all weights and learned factors of a model away from their start values."""
    for star in randomise(model).modules():
        if isinstance(star, ScaledStarOp):
            nn.init.normal_(star.scale, 1, 0.3)
            nn.init.normal_(star.shift, 0, 0.3)
    return model


def tiny(seed: int = 0, **kwargs: object) -> StarNet:
    """Return a StarNet of two stages with randomised weights and 10 classes."""
    args = {**TINY, "stage_strides": (2, 2), "num_classes": 10, **kwargs}
    return randomise(StarNet(**args), seed)


def tiny_timm(ours: StarNet, **kwargs: object) -> TimmStarNet:
    """Return timm's network of the shape of `tiny` with the weights and mode of `ours`."""
    args = {**TINY, "num_classes": ours.num_classes, "in_chans": ours.in_chans, **kwargs}
    theirs = TimmStarNet(**args)
    theirs.load_state_dict(to_timm_state_dict(ours))
    return theirs.train(ours.training)


def image(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return the largest absolute difference over the largest absolute value wanted."""
    assert got.shape == want.shape
    return ((got - want).abs().max() / want.abs().max()).item()


def timm_named_grads(ours: StarNet) -> dict[str, Tensor]:
    """Return the gradients of `ours` under the names and shapes of timm's parameters."""
    carrier = copy.deepcopy(ours)
    for theirs, p in zip(carrier.parameters(), ours.parameters(), strict=True):
        assert p.grad is not None
        theirs.data = p.grad.clone()
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return {k: v for k, v in to_timm_state_dict(carrier).items() if not k.endswith(statistics)}


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def saved(state: object, path: Path) -> Path:
    torch.save(state, path)
    return path


def saved_safely(state: dict[str, Tensor], path: Path) -> Path:
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    return path


def assert_same_tensors(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Check that both have the same keys, and equal bits under each."""
    assert got.keys() == want.keys()
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=0, atol=0, msg=key)


def reference_block(
    block: StarBlock2d, x: Tensor, act: Callable[[Tensor], Tensor], combine: str = "mul"
) -> Tensor:
    """Compute the residual branch of a block in NCHW, with 1x1 convolutions, from its own parts."""

    def pointwise(y: Tensor, linear: nn.Linear) -> Tensor:
        return F.conv2d(y, linear.weight[..., None, None], linear.bias)

    y = block.pre.bn(block.pre.conv(x))
    a, b = act(pointwise(y, block.mlp.f1)), pointwise(y, block.mlp.f2)
    y = pointwise(a * b if combine == "mul" else a + b, block.mlp.g)
    return block.post.conv(block.post.bn(y))


def reference_features(
    model: StarNet, x: Tensor, act: str | None = "relu6", combine: str = "mul"
) -> Tensor:
    """Compute `forward_features` in NCHW, written out."""
    fn = ACTS[act]
    x = fn(model.stem.bn(model.stem.conv(x)))
    for down, *blocks in model.stages:
        x = down.bn(down.conv(x))
        for block in blocks:
            x = x + reference_block(block, x, fn, combine)
    return model.norm(x)
