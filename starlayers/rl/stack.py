"""Star layers for small networks: packed branches, stacked networks."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from starlayers.functional import star_product, star_reference
from starlayers.modules import GATE_GAIN, StarOp


class PackedStar(StarOp):
    """Star layer of a policy: `StarOp(in_features, out_features, packed=True, offset=1)`.

    Policies are small and called often, so the number of operations sets their speed: one matrix
    product in place of two, and half as many tensors for the optimizer.

    Shapes: (..., in_features) -> (..., out_features).

    Example:
        >>> layer = PackedStar(4, 8, act="tanh")
        >>> h1, h2 = layer.f12(torch.ones(2, 4)).chunk(2, -1)
        >>> torch.equal(layer(torch.ones(2, 4)), h1.tanh() * (h2 + 1))
        True
    """

    def __init__(self, in_features: int, out_features: int, *, act: str) -> None:
        super().__init__(in_features, out_features, act=act, offset=1.0, packed=True)

    def reset_branches(self, gain: float) -> None:
        """Initialise each branch orthogonally: the first with `gain`, the second with 0.1."""
        for branch, g in zip(self.f12.weight.data.chunk(2), (gain, GATE_GAIN)):
            nn.init.orthogonal_(branch, g)
        nn.init.zeros_(self.f12.bias)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for kind in ("weight", "bias"):  # agents saved before this was a StarOp
            if f"{prefix}proj.{kind}" in state_dict:
                state_dict[f"{prefix}f12.{kind}"] = state_dict.pop(f"{prefix}proj.{kind}")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled layer, also of the time before this was a StarOp."""
        if "proj" in state["_modules"]:
            state["_modules"]["f12"] = state["_modules"].pop("proj")
            state |= {"packed": True, "offset": 1.0}
        super().__setstate__(state)


class StarStack(nn.Module):
    """Several networks of star layers over one input, computed in one pass.

    A `StarOp` holds one network's layer; here one batched product serves all.

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
