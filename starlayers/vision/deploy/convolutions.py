"""StarNets as engines for deployment want them: 1x1 convolutions in NCHW, and no norms."""

import copy
from functools import reduce
from operator import add
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from starlayers.activations import get_activation
from starlayers.attached import attached
from starlayers.backend import use_backend
from starlayers.coefficients.modules import RankStarMLP, SumMLP
from starlayers.dispatch import is_plain
from starlayers.modules import StarMLP
from starlayers.tracing import record
from starlayers.vision.blocks import ConvNorm, StarBlock2d, check_images
from starlayers.vision.layout import OnChannelsLast
from starlayers.vision.starnet import StarNet

#: largest difference between a block and its convolutions, relative to the largest value
AGREEMENT = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def portable(model: nn.Module) -> nn.Module:
    """Return a copy of a network whose graph is fast in other engines.

    Norms are folded as by `StarNet.fuse()`, and the star MLP of every `StarBlock2d` becomes three
    1x1 convolutions in NCHW, so that an exported graph has no transpositions. The copy computes
    the same up to rounding and is in eval mode. In PyTorch itself it is no faster: star MLPs fuse
    only in their own form.

    Every block is compared with its convolutions on random numbers. It stays as it is where they
    differ, and where it has no such form: an MLP with factors that depend on the input or of a
    class of your own, layers with hooks, adapters or parametrisations. `export` lists these.

    Args:
        model: a `StarNet`, or any module with StarNets or `StarBlock2d` inside.

    Raises:
        TypeError: `model` is no module.

    Example:
        >>> from starlayers.vision import StarNet, portable
        >>> model = StarNet(8, (1, 1), stage_strides=(2, 2)).eval()
        >>> copy, x = portable(model), torch.randn(1, 3, 32, 32)
        >>> copy.stages[0][1].f1
        Conv2d(8, 32, kernel_size=(1, 1), stride=(1, 1))
        >>> torch.allclose(copy(x), model(x), atol=1e-5)
        True
    """
    return converted(model)[0]


@torch.no_grad()
def converted(model: nn.Module) -> tuple[nn.Module, dict[str, str]]:
    """Return the portable copy of `model`, and for each block that stayed: name -> reason."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"portable: model must be a module, got {type(model).__name__}")
    model = copy.deepcopy(model).eval()
    for part in list(model.modules()):
        if isinstance(part, StarNet | StarBlock2d | ConvNorm):
            part.fuse()
    kept = {}
    for name, part in list(model.named_modules()):
        if not isinstance(part, StarBlock2d):
            continue
        block = _as_convolutions(part)
        if isinstance(block, str):
            kept[name] = block
        elif name:
            model.set_submodule(name, block)
        else:
            model = block
    for part in model.modules():
        if type(part) is StarNet:
            part.__class__ = PlanarStarNet
    return model, kept


class PlanarStarNet(StarNet):
    """StarNet in inference that keeps the layout of its input, such as NCHW.

    In channels_last an exporter would write the pooling as a gather.
    """

    def _stem(self, x: Tensor) -> Tensor:
        check_images("StarNet", x, self.in_chans)
        return self.stem(x)  # type: ignore[no-any-return]


class ConvStarBlock(nn.Module):
    """Star block of convolutions alone, in NCHW: `x + post(g(act(f1(y)) * f2(y)))`, y = pre(x).

    Args:
        pre, post: what comes before and after the MLP, in NCHW.
        f1, f2, g: 1x1 convolutions.
        act: name in `ACTIVATIONS` of the first branch's activation.
        rank: number of products that are summed, of channels laid out (rank, channels).
        product: False for the sum of the branches.
    """

    def __init__(
        self,
        pre: nn.Module,
        f1: nn.Module,
        f2: nn.Module,
        g: nn.Module,
        post: nn.Module,
        *,
        act: str | None,
        rank: int = 1,
        product: bool = True,
    ) -> None:
        super().__init__()
        self.pre, self.f1, self.f2, self.g, self.post = pre, f1, f2, g, post
        self.act, self.rank, self.product = act, rank, product

    def forward(self, x: Tensor) -> Tensor:
        y = self.pre(x)
        h1, h2 = get_activation(self.act).fn(self.f1(y)), self.f2(y)
        h = h1 * h2 if self.product else h1 + h2
        if self.rank > 1:
            h = reduce(add, h.chunk(self.rank, 1))
        return x + self.post(self.g(h))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        changed = {"rank": self.rank} if self.rank > 1 else {}
        return ", ".join(f"{k}={v!r}" for k, v in {"act": self.act, **changed}.items())

    __prepare_scriptable__ = record


def _as_convolutions(block: StarBlock2d) -> ConvStarBlock | str:
    """Return a block in eval mode as convolutions, or the reason why it has to stay."""
    reason = _reason(block)
    if reason:
        return reason
    mlp = block.mlp
    rank = mlp.rank if isinstance(mlp, RankStarMLP) else 1
    star = mlp.star if isinstance(mlp, RankStarMLP) else mlp
    pre, post = _without_identities(block.pre), _without_identities(block.post)
    (w1, b1), (w2, b2) = star.branch_layers()
    if star.offset:
        b2 = w2.new_zeros(len(w2)) if b2 is None else b2
        b2 = b2 + star.offset
    f1, f2 = (
        _pointwise(_rank_first(w, rank), None if b is None else _rank_first(b, rank))
        for w, b in ((w1, b1), (w2, b2))
    )
    if block.gamma is not None:
        post = copy.deepcopy(post)  # the block is still to be compared with
        last: Any = post[-1]
        last.weight.mul_(block.gamma[:, None, None, None])
        if last.bias is not None:
            last.bias.mul_(block.gamma)
    g = _pointwise(mlp.g.weight, mlp.g.bias)
    options: dict[str, Any] = {"act": star.act, "rank": rank, "product": type(mlp) is not SumMLP}
    convolutions = ConvStarBlock(_single(pre), f1, f2, g, _single(post), **options).eval()
    return _difference(block, convolutions) or convolutions


def _reason(block: StarBlock2d) -> str:
    """Return why a block has no form as convolutions; empty if it has one."""
    if not is_plain(block, StarBlock2d):
        return f"{type(block).__name__} has hooks or a forward of its own"
    mlp = block.mlp
    if type(mlp) not in (StarMLP, SumMLP, RankStarMLP):
        return f"no convolutions are known for a {type(mlp).__name__}"
    if not is_plain(mlp, type(mlp)) or (isinstance(mlp, RankStarMLP) and mlp.star.packed):
        return f"the {type(mlp).__name__} has hooks, a forward of its own or packed branches"
    star = mlp.star if isinstance(mlp, RankStarMLP) else mlp
    if any(not is_plain(layer, nn.Linear) for layer in (star.f1, star.f2, mlp.g)):
        layers = {"f1": star.f1, "f2": star.f2, "g": mlp.g}
        return attached(layers)
    if not all(is_plain(m, OnChannelsLast) for m in (block.pre, block.post)):
        return "pre or post was replaced or has hooks"
    if block.gamma is not None and type(block.post[-1]) is not nn.Conv2d:
        return "post does not end in the convolution that takes up gamma"
    return ""


def _without_identities(layers: nn.Sequential) -> nn.Sequential:
    return nn.Sequential(*[m for m in layers if not is_plain(m, nn.Identity)])


def _single(layers: nn.Sequential) -> nn.Module:
    return layers[0] if len(layers) == 1 else layers


def _rank_first(rows: Tensor, rank: int) -> Tensor:
    """Return rows laid out (channels, rank) as (rank, channels)."""
    return rearrange(rows, "(channels rank) ... -> (rank channels) ...", rank=rank)


def _pointwise(weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """Return the 1x1 convolution of a linear layer's weight (out, in) and bias."""
    out, channels = weight.shape
    conv = nn.Conv2d(channels, out, 1, bias=bias is not None, device="meta")
    conv.weight = nn.Parameter(weight.detach()[..., None, None])
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach())
    return conv


def _difference(block: StarBlock2d, convolutions: ConvStarBlock) -> str:
    """Return in words by how much the two differ on random numbers; empty if they agree."""
    weight = convolutions.f1.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, block.dim, 9, 9, generator=generator).to(weight)  # type: ignore[arg-type]
    with use_backend("eager"):
        want, got = block(x).double(), convolutions(x).double()
    error = ((got - want).abs().max() / want.abs().max().clamp(min=1e-30)).item()
    limit = AGREEMENT[weight.dtype]  # type: ignore[index]
    # written so that NaN is no agreement
    return "" if error <= limit else f"as convolutions it differs by {error:.1e}"
