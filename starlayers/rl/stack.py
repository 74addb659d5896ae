"""Star layers for small nets called often: branches in one matrix, and several nets in one."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from starlayers.functional import star_packed, star_product, star_reference

__all__ = ["PackedStar", "StarStack"]

#: gain of the second branches under SB3's orthogonal initialisation: a star starts near an MLP
GATE_GAIN = 0.1


class PackedStar(nn.Module):
    """A star layer whose branches are one `nn.Linear`: `act(h1) * (1 + h2)`, `[h1, h2] = proj(x)`.

    The `StarOp(in_features, out_features, act=act, offset=1)` with the rows of `f1` above those of
    `f2`. Policies are small and called often: half as many layers is half as many operations, and
    half as many tensors for the optimizer.

    Shapes: (..., in_features) -> (..., out_features).

    Example:
        >>> from starlayers import StarOp
        >>> layer, op = PackedStar(4, 8, act="tanh"), StarOp(4, 8, act="tanh", offset=1)
        >>> _ = layer.proj.weight.data.copy_(torch.cat([op.f1.weight, op.f2.weight]))
        >>> _ = layer.proj.bias.data.copy_(torch.cat([op.f1.bias, op.f2.bias]))
        >>> x = torch.randn(2, 4)
        >>> torch.allclose(layer(x), op(x), atol=1e-6)
        True
    """

    def __init__(self, in_features: int, out_features: int, *, act: str) -> None:
        super().__init__()
        self.in_features, self.out_features, self.act = in_features, out_features, act
        self.proj = nn.Linear(in_features, 2 * out_features)

    def forward(self, x: Tensor) -> Tensor:
        h = self.proj(x)
        if h.is_cuda:
            return star_packed(h, self.act, offset=1.0)
        # on a CPU the checks of a fused product would cost more than the product
        h1, h2 = h.chunk(2, -1)
        return star_reference(h1, h2, self.act, offset=1.0)

    def reset_branches(self, gain: float) -> None:
        """Orthogonal branches, each by itself; the second a small one."""
        for branch, g in zip(self.proj.weight.data.chunk(2), (gain, GATE_GAIN)):
            nn.init.orthogonal_(branch, g)
        nn.init.zeros_(self.proj.bias)

    def star_vectors(self) -> list[tuple[Tensor, Tensor]]:
        """Both factors of every product, for `starlayers.coefficients`."""
        return [_vectors(torch.cat([self.proj.weight, self.proj.bias[:, None]], 1))]

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, act={self.act!r}"


class StarStack(nn.Module):
    """Several nets of star layers on one input, as one: `act(h1) * (1 + h2)`, `[h1, h2] = x w + b`.

    Net k computes what a trunk of `PackedStar` layers with the weights `w[k]`, `b[k]` computes. At
    the batch sizes of rollouts and updates the time of a policy is its number of operations and of
    parameter tensors; this has half of each, and one matrix product per layer.

    Beware that the nets share parameter tensors, each with rows of its own: an algorithm that
    treats the tensors of an actor and a critic differently, as TRPO does, needs separate nets.

    Shapes: (batch, in_features) -> (nets, batch, out_features).

    Args:
        nets: how many.
        in_features: channels of the input.
        net_arch: widths of the layers, at least one.
        act: a row of `ACTIVATIONS`.

    Example:
        >>> stack = StarStack(2, 4, [32, 16], act="tanh")
        >>> pi, vf = stack(torch.randn(8, 4)).unbind()
        >>> pi.shape, [tuple(w.shape) for w, _ in stack.rows()]
        (torch.Size([8, 16]), [(2, 4, 64), (2, 32, 32)])
    """

    def __init__(self, nets: int, in_features: int, net_arch: Sequence[int], *, act: str) -> None:
        super().__init__()
        self.nets, self.in_features, self.out_features = nets, in_features, net_arch[-1]
        self.act = act
        for i, (n, width) in enumerate(zip([in_features, *net_arch], net_arch)):
            self.register_parameter(f"weight{i}", nn.Parameter(torch.empty(nets, n, 2 * width)))
            self.register_parameter(f"bias{i}", nn.Parameter(torch.empty(nets, 1, 2 * width)))
        self.reset_parameters()

    def rows(self) -> list[tuple[Tensor, Tensor]]:
        """Weight and bias of each layer."""
        own = list(self._parameters.values())  # in the order of their registration
        return list(zip(own[::2], own[1::2]))  # type: ignore[arg-type]

    def reset_parameters(self) -> None:
        """Start as `nn.Linear` does."""
        for weight, bias in self.rows():
            bound = 1 / math.sqrt(weight.shape[1])
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    def reset_branches(self, gain: float) -> None:
        """Orthogonal branches, each of each net by itself; the second ones small."""
        for weight, bias in self.rows():
            for net in weight.data:
                for branch, g in zip(net.chunk(2, -1), (gain, GATE_GAIN)):
                    branch.copy_(nn.init.orthogonal_(torch.empty_like(branch.t()), g).t())
            nn.init.zeros_(bias)

    def forward(self, x: Tensor, only: int | None = None) -> Tensor:
        """The results of all nets, or of `only` one, (1, batch, out_features)."""
        combine = star_product if x.is_cuda else star_reference
        y = x.expand(self.nets if only is None else 1, *x.shape)
        for weight, bias in self.rows():
            if only is not None:
                weight, bias = weight[only : only + 1], bias[only : only + 1]
            h1, h2 = torch.baddbmm(bias, y, weight).chunk(2, -1)
            y = combine(h1, h2, self.act, offset=1.0)
        return y

    def star_vectors(self) -> list[tuple[Tensor, Tensor]]:
        """Both factors of every product, layer by layer, for `starlayers.coefficients`."""
        return [_vectors(torch.cat([weight, bias], 1).mT) for weight, bias in self.rows()]

    def extra_repr(self) -> str:
        widths = [weight.shape[-1] // 2 for weight, _ in self.rows()]
        return f"{self.nets}, {self.in_features}, {widths}, act={self.act!r}"


def _vectors(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `[w1; w2]` over (x, 1) of one net or several as (channels, 1, d + 1), w2 with its 1."""
    w1, w2 = packed.chunk(2, -2)
    w2 = torch.cat([w2[..., :-1], w2[..., -1:] + 1], -1)
    return w1.reshape(-1, 1, w1.shape[-1]), w2.reshape(-1, 1, w2.shape[-1])
