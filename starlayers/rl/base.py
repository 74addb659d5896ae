"""Base classes of the star policies: their options, and networks with star trunks."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar, cast

from stable_baselines3.common.policies import BaseModel, BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor, NatureCNN
from torch import nn

from starlayers.checks import positive_int
from starlayers.rl.extractors import StarCnnExtractor, StarCombinedExtractor
from starlayers.rl.spec import DEFAULT, NetSpec, default_widths, resolve_specs, uniform_widths
from starlayers.rl.trunks import Norm, activation_factory


class StarPolicy(BasePolicy):
    """Options of all star policies: their defaults, their checks, and saving them.

    A class that derives from it and from a policy of SB3 is a star policy.

    Args:
        observation_space, action_space, lr_schedule: as for the policies of SB3.
        net_arch: widths as in SB3, a list or one per side; one layer (or residual block) each.
            By default SB3's own widths, made smaller so that the parameters match.
        activation_fn: a name from `ACTIVATIONS`, or a class as in SB3. By default tanh for stars,
            relu for "simba", and SB3's for the other nets.
        net: a name in `NETS`, or one per side; "product" for critics of states and actions.
        norm: "layer", "rms", "none", or `None` for the net's own default.
        width, depth: short for `net_arch=[width] * depth`.
        kwargs: everything else that the policy of SB3 takes.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: an option out of range; the message names it.
    """

    #: SB3's own default widths, and those behind a convolutional extractor, by side: "pi" is the
    #: actor, "vf", "qf" or "q" are critics
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
        activation_fn: str | type[nn.Module] | None = DEFAULT,
        net: str | Mapping[str, str] = "star",
        norm: str | None = None,
        width: int | None = None,
        depth: int | None = None,
        **kwargs: Any,
    ) -> None:
        extractor = kwargs.setdefault("features_extractor_class", self.base_extractor)
        options = {"net": net, "norm": norm, "activation_fn": activation_fn}
        layers = self._resolve(extractor, net_arch, width, depth, options)
        if kwargs.get("features_extractor_kwargs") is not None:
            # a copy, because SB3 writes into the dictionary that it gets
            kwargs["features_extractor_kwargs"] = dict(kwargs["features_extractor_kwargs"])
        super().__init__(observation_space, action_space, lr_schedule, **layers, **kwargs)

    def _resolve(
        self,
        extractor: type[BaseFeaturesExtractor],
        net_arch: Any,
        width: int | None,
        depth: int | None,
        options: dict[str, Any],
    ) -> dict[str, Any]:
        """Set `options` and `specs`; return widths and activation of SB3's own layers."""
        name, act = type(self).__name__, options["activation_fn"]
        self.options = options
        self.specs = resolve_specs(name, self.base_arch, self.base_activation, **options)
        net_arch = uniform_widths(name, width, depth, net_arch) or net_arch
        for widths in net_arch.values() if isinstance(net_arch, dict) else [net_arch or []]:
            for i, n in enumerate(widths):
                positive_int(name, f"net_arch[{i}]", n)
        return {
            "net_arch": self._default_arch(extractor) if net_arch is None else net_arch,
            "activation_fn": activation_factory(self.base_activation if act == DEFAULT else act),
        }

    def _default_arch(self, extractor: type[BaseFeaturesExtractor]) -> Any:
        """Return the widths at which the networks have about the parameters of SB3's."""
        convolutional = issubclass(extractor, (NatureCNN, StarCnnExtractor))
        base = self.cnn_arch if convolutional else self.base_arch
        without_effect = [
            f"{option}={value!r}"
            for option, value in self.options.items()
            if value not in ("star", "mlp", None, DEFAULT)
        ]
        if without_effect and not any(base.values()):
            raise ValueError(
                f"{type(self).__name__}: behind a convolutional extractor there is no layer by "
                f"default, and {', '.join(without_effect)} would shape none; give net_arch=[64], "
                "or leave it out"
            )
        widths = {side: default_widths(spec.net, base[side]) for side, spec in self.specs.items()}
        return widths if len(widths) > 1 else next(iter(widths.values()))

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        data.update(self.options)
        if hasattr(self, "share_features_extractor"):
            # SB3 leaves it out, and an unshared policy would come back shared
            data["share_features_extractor"] = self.share_features_extractor
        return data


class StarNetwork(BaseModel):
    """Network of SB3 whose hidden layers are those that a spec asks for."""

    #: attribute with the layers of the network
    layers: ClassVar[str]

    def __init__(self, *args: Any, spec: NetSpec, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.spec = spec
        if not spec.is_stock:
            self.replace_layers(kwargs["features_dim"], kwargs["net_arch"], self.renorm(kwargs))

    def renorm(self, kwargs: Mapping[str, Any]) -> Norm | None:
        """Return a maker of norms before linear layers, which only CrossQ has."""
        return None

    def replace_layers(self, features: int, net_arch: Sequence[int], renorm: Norm | None) -> None:
        """Put a trunk over `features` channels in the place of SB3's hidden layers."""
        trunk = self.spec.trunk(features, net_arch, renorm)
        setattr(self, self.layers, with_trunk(getattr(self, self.layers), trunk, net_arch, renorm))

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "spec": self.spec}


class LatentActor(StarNetwork):
    """Actor that is a trunk `latent_pi` up to its heads, as those of SAC and TQC."""

    def replace_layers(self, features: int, net_arch: Sequence[int], renorm: Norm | None) -> None:
        self.latent_pi: Any = self.spec.trunk(features, net_arch)


class StarCritics(StarNetwork):
    """Critics `qf0`, `qf1`, ... of states and actions."""

    def replace_layers(self, features: int, net_arch: Sequence[int], renorm: Norm | None) -> None:
        actions = get_action_dim(self.action_space)
        networks: list[nn.Module] = self.q_networks  # type: ignore[assignment]
        for i, network in enumerate(networks):
            trunk = self.spec.critic_trunk(features, actions, net_arch, renorm)
            networks[i] = with_trunk(network, trunk, net_arch, renorm)
            setattr(self, f"qf{i}", networks[i])


def with_trunk(
    network: Any, trunk: nn.Module, net_arch: Sequence[int], renorm: Norm | None = None
) -> nn.Sequential:
    """Put a trunk in the place of a network's linear layers, norms and activations per width."""
    rest = network[(3 if renorm else 2) * len(net_arch) :]
    for layer in rest:
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()  # what a seed gives depends on the order of the draws
    return nn.Sequential(trunk, *rest)


class OffPolicyActorCritic(StarPolicy):
    """Star policy of an off-policy algorithm with an actor and critics."""

    actor_class: ClassVar[type[StarNetwork]]
    critic_class: ClassVar[type[Any]]

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> Any:
        kwargs = self._update_features_extractor(self.actor_kwargs, features_extractor)  # type: ignore
        return self.actor_class(**kwargs, spec=self.specs["pi"]).to(self.device)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> Any:
        kwargs = self._update_features_extractor(self.critic_kwargs, features_extractor)  # type: ignore
        return self.critic_class(**kwargs, spec=self.specs["qf"]).to(self.device)


P = TypeVar("P", bound=StarPolicy)


def image_and_dict(policy: type[P], algorithm: str) -> tuple[type[P], type[P]]:
    """Make the subclasses of a policy for images and for dictionaries of observations.

    Both differ from `policy` in their default features extractor. Assign them to the names
    `Star...CnnPolicy` and `Star...MultiInputPolicy` in the module of `policy`: pickle and SB3's
    zip files refer to classes by module and name.

    Args:
        policy: class for flat observations, named `Star...Policy`.
        algorithm: one that takes it, for the examples: "stable_baselines3.PPO".
    """
    package, _, name = algorithm.rpartition(".")
    discrete = "qf" not in policy.base_arch
    settings = "" if "vf" in policy.base_arch else "buffer_size=100, "
    images = f"FakeImageEnv(screen_height=36, screen_width=36, discrete={discrete})"
    dictionaries = f"SimpleMultiObsEnv(discrete_actions={discrete})"
    made = []
    for part, observations, extractor, env in (
        ("Cnn", "images", StarCnnExtractor, images),
        ("MultiInput", "dictionaries", StarCombinedExtractor, dictionaries),
    ):
        doc = f"""`{policy.__name__}` for {observations}, behind a `{extractor.__name__}`.

        Options are those of `{policy.__name__}`.

        Example:
            >>> from {package} import {name}
            >>> from stable_baselines3.common.envs import {env.partition("(")[0]}
            >>> env = {env}
            >>> model = {name}("Star{part}Policy", env, {settings}device="cpu")
            >>> action, _ = model.predict(env.observation_space.sample())
            >>> env.action_space.contains(action)
            True
        """
        namespace = {"__module__": policy.__module__, "__doc__": doc, "base_extractor": extractor}
        class_name = f"{policy.__name__.removesuffix('Policy')}{part}Policy"
        made.append(cast(type[P], type(class_name, (policy,), namespace)))
    return made[0], made[1]
