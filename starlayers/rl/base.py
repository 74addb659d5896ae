"""What star policies of all algorithms share: the options, and networks that a spec replaces."""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

from stable_baselines3.common.policies import BaseModel, BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    FlattenExtractor,
    NatureCNN,
)
from torch import nn

from starlayers.rl.extractors import StarCnnExtractor
from starlayers.rl.spec import NetSpec, default_widths, resolve, uniform
from starlayers.rl.trunks import activation, activation_module

__all__ = [
    "ContinuousOptions",
    "LatentActor",
    "StarNetwork",
    "StarOptions",
    "critic_nets",
    "headed",
]


class StarOptions(BasePolicy):
    """What all star policies share: the options, their defaults, and that they are saved.

    Args:
        net_arch: widths as in SB3, a list or one per side; one layer (or residual block) each.
            By default SB3's own widths, made smaller so that the parameters match.
        activation_fn: a name from `ACTIVATIONS`, or a class as in SB3; by default tanh for stars,
            SB3's for other nets.
        net: a row of `NETS`, or one per side; "product" for critics of states and actions.
        norm: "layer", "rms", "none", or `None` for what the net does by itself.
        width, depth: short for `net_arch=[width] * depth`.
        kwargs: everything the policy of SB3 takes.

    Raises:
        TypeError, ValueError: an option out of range, naming it.
    """

    sides: ClassVar[tuple[str, ...]] = ("pi", "qf")
    #: SB3's own default widths, and those behind a convolutional extractor
    base_arch: ClassVar[Mapping[str, list[int]]] = {"pi": [256, 256], "qf": [256, 256]}
    cnn_arch: ClassVar[Mapping[str, list[int]]] = base_arch
    base_activation: ClassVar[type[nn.Module]] = nn.ReLU
    base_extractor: ClassVar[type[BaseFeaturesExtractor]] = FlattenExtractor

    def __init__(
        self,
        observation_space: Any,
        action_space: Any,
        lr_schedule: Any,
        *,
        net_arch: Any = None,
        activation_fn: str | type[nn.Module] | None = "default",
        net: str | Mapping[str, str] = "star",
        norm: str | None = None,
        width: int | None = None,
        depth: int | None = None,
        **kwargs: Any,
    ) -> None:
        owner = type(self).__name__
        given = activation_fn != "default"
        self.options: dict[str, Any] = {"net": net, "activation_fn": activation_fn, "norm": norm}
        usual = self.base_activation
        self.specs = resolve(
            owner, self.sides, net, norm, act=activation_fn if given else usual, given=given
        )
        extractor = kwargs.setdefault("features_extractor_class", self.base_extractor)
        arch = uniform(owner, width, depth, net_arch)
        if arch is None and net_arch is None:
            convolutional = issubclass(extractor, (NatureCNN, StarCnnExtractor))
            base = self.cnn_arch if convolutional else self.base_arch
            options = {"net": net, "norm": norm, "activation_fn": activation_fn}
            idle = ("star", "mlp", None, "default")
            asked = [f"{k}={v!r}" for k, v in options.items() if v not in idle]
            if asked and not any(base.values()):
                raise ValueError(
                    f"{owner}: behind a convolutional extractor there is no layer by default, and "
                    f"{', '.join(asked)} would shape none; give net_arch=[64], or leave it out"
                )
            widths = {side: default_widths(self.specs[side].net, base[side]) for side in self.sides}
            net_arch = widths if len(self.sides) > 1 else widths[self.sides[0]]
        if kwargs.get("features_extractor_kwargs") is not None:
            # SB3 writes into the caller's own dictionary
            kwargs["features_extractor_kwargs"] = dict(kwargs["features_extractor_kwargs"])
        # SB3 calls it to make each of its own layers
        stock: Any = activation(activation_fn if given else usual)
        stock = stock if isinstance(stock, type) else partial(activation_module, stock)
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,  # type: ignore[arg-type]
            net_arch=net_arch if arch is None else arch,  # type: ignore[call-arg]
            activation_fn=stock,  # type: ignore[call-arg]
            **kwargs,
        )

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        data.update(self.options)
        if hasattr(self, "share_features_extractor"):
            # SB3 leaves it out, and an unshared policy comes back shared
            data["share_features_extractor"] = self.share_features_extractor
        return data


class StarNetwork(BaseModel):
    """A network of SB3 whose layers a spec replaces, unless they are what the spec says already."""

    def __init__(self, *args: Any, spec: NetSpec, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.spec = spec
        if not spec.stock:
            self.replace(kwargs)

    def replace(self, given: Mapping[str, Any]) -> None:
        """Put the star layers where SB3's were; `given` are the constructor's arguments."""
        raise NotImplementedError

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "spec": self.spec}


class LatentActor(StarNetwork):
    """An actor whose trunk is `latent_pi`: those of SAC and TQC."""

    def replace(self, given: Mapping[str, Any]) -> None:
        self.latent_pi: Any = self.spec.trunk(given["features_dim"], given["net_arch"])


def headed(trunk: nn.Module, outputs: int, *tail: nn.Module) -> nn.Sequential:
    """A trunk, a linear layer from it to so many outputs, and what comes last."""
    width: Any = trunk.out_features
    return nn.Sequential(trunk, nn.Linear(width, outputs), *tail)


def critic_nets(critic: Any, given: Mapping[str, Any], outputs: int) -> None:
    """Give a critic of SB3 its Q networks anew, by its spec."""
    states, actions = given["features_dim"], get_action_dim(critic.action_space)
    critic.q_networks = []
    for i in range(critic.n_critics):
        net = headed(critic.spec.critic_trunk(states, actions, given["net_arch"]), outputs)
        setattr(critic, f"qf{i}", net)
        critic.q_networks.append(net)


class ContinuousOptions(StarOptions):
    """The hooks of policies with an actor and a critic network."""

    actor_class: ClassVar[type[StarNetwork]]
    critic_class: ClassVar[type[Any]]

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> Any:
        given = self._update_features_extractor(self.actor_kwargs, features_extractor)  # type: ignore
        return self.actor_class(**given, spec=self.specs["pi"]).to(self.device)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> Any:
        given = self._update_features_extractor(self.critic_kwargs, features_extractor)  # type: ignore
        return self.critic_class(**given, spec=self.specs["qf"]).to(self.device)
