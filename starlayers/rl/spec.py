"""Specifications of a policy's networks, made from `policy_kwargs`."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import mul
from typing import Any

from torch import nn

from starlayers.checks import positive_int
from starlayers.rl.critics import ProductTrunk
from starlayers.rl.trunks import (
    NETS,
    NORMS,
    RESIDUAL,
    Activation,
    Norm,
    Trunk,
    activation_name,
    build_trunk,
    parse_activation,
)

#: name of the net that only critics of states and actions can have
PRODUCT = "product"

#: value of `activation_fn` that leaves the choice to `DEFAULT_ACTS`
DEFAULT = "default"

#: net -> its default activation. With a bounded first branch a star layer grows as an MLP's does;
#: with relu it grows with the square of its input, and bootstrapped values can diverge. SimBa is
#: published with relu. The other nets have SB3's default.
DEFAULT_ACTS = {"star": "tanh", "star_residual": "tanh", "simba": "relu"}


@dataclass(frozen=True)
class NetSpec:
    """Net, activation and norm of one side of a policy: its actor, or its critics.

    Args:
        net: a name in `NETS`, or "product" for a critic of states and actions.
        act: a name in `ACTIVATIONS`, or a module class where the net has no star.
        norm: "layer", "rms", "none", or `None` for the net's own default.
    """

    net: str
    act: Activation
    norm: str | None = None

    @property
    def is_stock(self) -> bool:
        """True if SB3's own network is what the spec asks for."""
        return self.net == "mlp" and self.norm in (None, "none")

    @property
    def is_plain_star(self) -> bool:
        """True if the trunk has star layers and nothing else."""
        return self.net == "star" and self.norm in (None, "none")

    def trunk(
        self, in_features: int, net_arch: Sequence[int], norm_before: Norm | None = None
    ) -> Trunk:
        """Build the trunk over one input."""
        return build_trunk(
            self.net, in_features, net_arch, act=self.act, norm=self.norm, norm_before=norm_before
        )

    def critic_trunk(
        self, states: int, actions: int, net_arch: Sequence[int], norm_before: Norm | None = None
    ) -> nn.Module:
        """Build the trunk over states and actions, as SB3 concatenates them."""
        if self.net != PRODUCT:
            return self.trunk(states + actions, net_arch, norm_before)
        act = activation_name(self.act)
        return ProductTrunk(states, actions, net_arch, act=act, norm=self.norm or "layer")


def resolve_specs(
    policy: str,
    sides: Iterable[str],
    sb3_activation: type[nn.Module],
    *,
    net: str | Mapping[str, str],
    norm: str | None,
    activation_fn: Activation | None,
) -> dict[str, NetSpec]:
    """Make the spec of each side of a policy from the options a user passed.

    Args:
        policy: name of the policy class, for messages.
        sides: keys of the result, such as ("pi", "vf").
        sb3_activation: SB3's default, for nets without a default of their own.
        net: a name for all sides, or a mapping from side to name; sides left out are stars.
        norm: "layer", "rms", "none" or `None`.
        activation_fn: a name, a module class, `None` for the identity, or "default".
    """
    if norm not in (None, "none", *NORMS):
        raise ValueError(
            f"{policy}: unknown norm {norm!r}, choose one of {', '.join(NORMS)}, 'none' or None"
        )
    if not isinstance(net, (str, Mapping)):
        raise TypeError(f"{policy}: net must be a name or one per side, got {net!r}")
    if net == PRODUCT and "qf" in sides:
        net = {"qf": PRODUCT}  # only the critic takes actions; the actor is a star
    nets = dict.fromkeys(sides, net if isinstance(net, str) else "star")
    if isinstance(net, Mapping):
        nets.update(net)
    if unknown := sorted(set(nets) - set(sides)):
        raise ValueError(
            f"{policy} has the sides {', '.join(sides)}; net={net} names {unknown[0]!r}"
        )
    specs = {}
    for side, name in nets.items():
        choices = [*NETS, PRODUCT] if side == "qf" else [*NETS]
        if name not in choices:
            raise ValueError(
                f"{policy}: unknown net {name!r} for {side!r}, choose one of {', '.join(choices)}"
            )
        default = DEFAULT_ACTS.get(name, sb3_activation)
        act = parse_activation(default if activation_fn == DEFAULT else activation_fn)
        specs[side] = NetSpec(name, act, norm)
    return specs


def default_widths(net: str, base: Sequence[int]) -> list[int]:
    """Return widths at which a net has about the parameters of an MLP of `base`.

    A star layer has two branches, so its width is that of the MLP over the square root of two. One
    residual block holds eight (SimBa) or six (star) times the square of its width. Widths are
    multiples of four: others cost a CPU up to a tenth more.
    """
    if net in RESIDUAL and base:
        products = sum(map(mul, base, base[1:])) or base[0] ** 2
        widths = [math.sqrt(products / (8 if net == "simba" else 6))]
    elif net in ("star", PRODUCT):
        widths = [width / math.sqrt(2) for width in base]
    else:
        return list(base)
    return [max(4, 4 * round(width / 4)) for width in widths]


def uniform_widths(
    policy: str, width: int | None, depth: int | None, net_arch: Any
) -> list[int] | None:
    """Return `[width] * depth`, or `None` if neither was passed."""
    if width is None and depth is None:
        return None
    if net_arch is not None:
        raise ValueError(
            f"{policy}: width={width}, depth={depth} and net_arch={net_arch} say the same twice; "
            "pass width and depth, or net_arch"
        )
    if width is None or depth is None:
        raise ValueError(f"{policy}: width={width} and depth={depth} must be given together")
    return [positive_int(policy, "width", width)] * positive_int(policy, "depth", depth)
