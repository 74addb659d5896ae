"""Star layers for small networks: packed branches, stacked networks."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from starlayers.functional import star_packed, star_product, star_reference

#: gain of the second branch under SB3's orthogonal initialisation: a star starts near an MLP
GATE_GAIN = 0.1


class PackedStar(nn.Module):
    """Star layer with both branches in one `nn.Linear`.

    `act(h1) * (1 + h2)` with `[h1, h2] = proj(x)`: the same as
    `StarOp(in_features, out_features, act=act, offset=1)` with the weight of `f1` stacked on that
    of `f2`. Policies are small and called often, so the number of operations sets their speed: one
    matrix product in place of two, and half as many tensors for the optimizer.

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
        """Initialise each branch orthogonally: the first with `gain`, the second with 0.1."""
        for branch, g in zip(self.proj.weight.data.chunk(2), (gain, GATE_GAIN)):
            nn.init.orthogonal_(branch, g)
        nn.init.zeros_(self.proj.bias)

    def star_vectors(self) -> list[tuple[Tensor, Tensor]]:
        """Return both factors of every product, for `starlayers.coefficients`."""
        return [_factors(torch.cat([self.proj.weight, self.proj.bias[:, None]], 1))]

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, act={self.act!r}"


class StarStack(nn.Module):
    """Several networks of star layers over one input, computed in one pass.

    Every layer is `act(h1) * (1 + h2)` with `[h1, h2] = x @ weight + bias`. Network k computes what
    a trunk of `PackedStar` layers with the weights `weight[k]` and `bias[k]` computes. At the batch
    sizes of rollouts and updates the time of a policy is set by its number of operations and of
    parameter tensors; a stack of two has half of each, and one matrix product per layer.

    Beware that the networks are slices of shared parameter tensors: an algorithm that treats the
    tensors of an actor and a critic differently, as TRPO does, needs separate networks.

    Shapes: (batch, in_features) -> (nets, batch, out_features).

    Example:
        >>> stack = StarStack(2, 4, [32, 16], act="tanh")
        >>> pi, vf = stack(torch.randn(8, 4)).unbind()
        >>> pi.shape, [tuple(weight.shape) for weight, _ in stack.layers()]
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

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Return weight and bias of each layer."""
        parameters = list(self._parameters.values())  # in the order of their registration
        return list(zip(parameters[::2], parameters[1::2]))  # type: ignore[arg-type]

    def reset_parameters(self) -> None:
        """Initialise as `nn.Linear` does."""
        for weight, bias in self.layers():
            bound = 1 / math.sqrt(weight.shape[1])
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    def reset_branches(self, gain: float) -> None:
        """Initialise each branch of each network orthogonally: first `gain`, second 0.1."""
        for weight, bias in self.layers():
            for net_weight in weight.data:
                for branch, g in zip(net_weight.chunk(2, -1), (gain, GATE_GAIN)):
                    branch.copy_(nn.init.orthogonal_(torch.empty_like(branch.t()), g).t())
            nn.init.zeros_(bias)

    def forward(self, x: Tensor, only: int | None = None) -> Tensor:
        """Compute all networks, or network `only`: (1, batch, out_features)."""
        combine = star_product if x.is_cuda else star_reference
        y = x.expand(self.nets if only is None else 1, *x.shape)
        for weight, bias in self.layers():
            if only is not None:
                weight, bias = weight[only : only + 1], bias[only : only + 1]
            h1, h2 = torch.baddbmm(bias, y, weight).chunk(2, -1)
            y = combine(h1, h2, self.act, offset=1.0)
        return y

    def star_vectors(self) -> list[tuple[Tensor, Tensor]]:
        """Return both factors of every product by layer, for `starlayers.coefficients`."""
        return [_factors(torch.cat([weight, bias], 1).mT) for weight, bias in self.layers()]

    def extra_repr(self) -> str:
        widths = [weight.shape[-1] // 2 for weight, _ in self.layers()]
        return f"{self.nets}, {self.in_features}, {widths}, act={self.act!r}"


def _factors(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Split packed weights into both factors over (x, 1), the second plus 1.

    Shapes: (..., 2 * channels, in_features + 1) -> twice (channels, 1, in_features + 1), with the
    channels of several networks one after another.
    """
    w1, w2 = packed.chunk(2, -2)
    w2 = torch.cat([w2[..., :-1], w2[..., -1:] + 1], -1)
    return w1.reshape(-1, 1, w1.shape[-1]), w2.reshape(-1, 1, w2.shape[-1])
