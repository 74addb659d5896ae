"""What a star policy is built from: one `NetSpec` per side, resolved from `policy_kwargs`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import mul
from typing import Any

from torch import nn

from starlayers.modules import positive_int
from starlayers.rl.critics import ProductTrunk
from starlayers.rl.trunks import (
    NETS,
    NORMS,
    RESIDUAL,
    Activation,
    Norm,
    Trunk,
    activation,
    activation_row,
    build_trunk,
)

__all__ = ["PRODUCT", "NetSpec", "default_widths", "resolve"]

#: the net that only critics of states and actions can have
PRODUCT = "product"

#: net -> its activation unless another is asked for. With a bounded first branch a star layer grows
#: as an MLP's does; with relu it grows with the square of its input, and values that bootstrap can
#: run away. SimBa is published with relu.
DEFAULTS = {"star": "tanh", "star_residual": "tanh", "simba": "relu"}


@dataclass(frozen=True)
class NetSpec:
    """The net, activation and norm of one side of a policy.

    Args:
        net: a row of `NETS`, or "product" for a critic of states and actions.
        act: a row of `ACTIVATIONS`, or a class where the net has no star.
        norm: a row of `NORMS`, "none", or `None` for what the net does by itself.

    Example:
        >>> NetSpec("star", "tanh").trunk(4, [32, 16]).out_features
        16
    """

    net: str
    act: Activation
    norm: str | None = None

    @property
    def stock(self) -> bool:
        """Whether SB3's own network is just this one, and stays."""
        return self.net == "mlp" and self.norm in (None, "none")

    @property
    def row(self) -> str:
        """The activation of a star layer."""
        return activation_row(self.act)

    @property
    def plain_star(self) -> bool:
        """Whether the trunk is star layers and nothing else."""
        return self.net == "star" and self.norm in (None, "none")

    def trunk(self, in_features: int, net_arch: Sequence[int], before: Norm | None = None) -> Trunk:
        """The trunk over one input."""
        norm = None if self.norm == "none" else self.norm
        return build_trunk(self.net, in_features, net_arch, act=self.act, norm=norm, before=before)

    def critic_trunk(self, states: int, actions: int, net_arch: Sequence[int]) -> nn.Module:
        """The trunk over states and actions, as SB3 concatenates them."""
        if self.net != PRODUCT:
            return self.trunk(states + actions, net_arch)
        return ProductTrunk(states, actions, net_arch, act=self.row, norm=self.norm or "layer")


def resolve(
    owner: str,
    sides: Sequence[str],
    net: str | Mapping[str, str],
    norm: str | None,
    *,
    act: Activation | None,
    given: bool = True,
) -> dict[str, NetSpec]:
    """The spec of each side, from the values a user gave.

    `act` is what the user has `given`, or else what SB3 takes, which `DEFAULTS` overrules.

    Raises:
        ValueError: an unknown net, norm or side, or a product where there is no action to take in.

    Example:
        >>> specs = resolve("P", ("pi", "vf"), {"vf": "simba"}, None, act="gelu", given=False)
        >>> {side: (spec.net, spec.act) for side, spec in specs.items()}
        {'pi': ('star', 'tanh'), 'vf': ('simba', 'relu')}
    """
    if norm not in (None, "none", *NORMS):
        raise ValueError(
            f"{owner}: unknown norm {norm!r}, choose one of {', '.join(NORMS)}, 'none' or None"
        )
    if not isinstance(net, (str, Mapping)):
        raise TypeError(f"{owner}: net must be a name or one per side, got {net!r}")
    if not isinstance(net, str):
        unknown = sorted(set(net) - set(sides))
        if unknown:
            raise ValueError(
                f"{owner} has the sides {', '.join(sides)}; net={dict(net)} names {unknown[0]!r}"
            )
    specs = {}
    for side in sides:
        name = net if isinstance(net, str) else net.get(side, "star")
        choices = [*NETS, PRODUCT] if side == "qf" else [*NETS]
        if name == PRODUCT and isinstance(net, str) and "qf" in sides:
            # of the two sides only the critic sees actions; the actor is then a star
            name = PRODUCT if side == "qf" else "star"
        elif name not in choices:
            raise ValueError(
                f"{owner}: unknown net {name!r} for {side!r}, choose one of {', '.join(choices)}"
            )
        own = act if given else DEFAULTS.get(name, act)
        specs[side] = NetSpec(name, activation(own), norm)
    return specs


def default_widths(net: str, base: Sequence[int]) -> list[int]:
    """A `net_arch` whose trunk has about the parameters of a linear one of the widths `base`.

    A star layer has two branches (`width / sqrt 2`); one residual block holds eight (SimBa) or
    six (star) times its width squared. Widths come in fours: others cost a CPU up to a tenth more.

    Example:
        >>> default_widths("star", [64, 64]), default_widths("simba", [256, 256])
        ([44, 44], [92])
    """
    if not base:
        return []
    if net in RESIDUAL:
        products = sum(map(mul, base, base[1:])) or base[0] ** 2
        return [_in_fours(math.sqrt(products / (8 if net == "simba" else 6)))]
    if net in ("star", PRODUCT):
        return [_in_fours(width / math.sqrt(2)) for width in base]
    return list(base)


def _in_fours(width: float) -> int:
    return max(4, 4 * round(width / 4))


def uniform(owner: str, width: int | None, depth: int | None, given: Any) -> list[int] | None:
    """`[width] * depth`, or `None` where neither is given.

    Raises:
        ValueError: only one of the two is given, or a `net_arch` beside them.
    """
    if width is None and depth is None:
        return None
    if given is not None:
        raise ValueError(
            f"{owner}: width={width}, depth={depth} and net_arch={given} say the same twice"
        )
    if width is None or depth is None:
        raise ValueError(f"{owner}: width={width} and depth={depth} must be given together")
    return [positive_int(owner, "width", width)] * positive_int(owner, "depth", depth)
