"""Star policies for the algorithms of stable-baselines3, as classes with its own constructors."""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

from stable_baselines3.common.policies import (
    ActorCriticPolicy,
    BaseModel,
    BasePolicy,
    ContinuousCritic,
)
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    FlattenExtractor,
    NatureCNN,
)
from stable_baselines3.dqn.policies import DQNPolicy, QNetwork
from stable_baselines3.sac.policies import Actor as SACActor
from stable_baselines3.sac.policies import SACPolicy
from stable_baselines3.td3.policies import Actor as TD3Actor
from stable_baselines3.td3.policies import TD3Policy
from torch import Tensor, nn

from starlayers.rl.extractors import StarCnnExtractor, StarCombinedExtractor
from starlayers.rl.spec import NetSpec, default_widths, resolve, uniform
from starlayers.rl.stack import StarStack
from starlayers.rl.trunks import ActivationLayer, KeepsInit, activation_row

__all__ = [
    "StarActorCriticCnnPolicy",
    "StarActorCriticMultiInputPolicy",
    "StarActorCriticPolicy",
    "StarDQNCnnPolicy",
    "StarDQNMultiInputPolicy",
    "StarDQNPolicy",
    "StarMlpExtractor",
    "StarPPOCnnPolicy",
    "StarPPOMultiInputPolicy",
    "StarPPOPolicy",
    "StarSACCnnPolicy",
    "StarSACMultiInputPolicy",
    "StarSACPolicy",
    "StarTD3CnnPolicy",
    "StarTD3MultiInputPolicy",
    "StarTD3Policy",
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
        row = activation_row(activation_fn if given else self.base_activation)
        self.options: dict[str, Any] = {"net": net, "activation_fn": activation_fn, "norm": norm}
        self.specs = resolve(owner, self.sides, net, norm, act=row if given else None, usual=row)
        extractor = kwargs.setdefault("features_extractor_class", self.base_extractor)
        arch = uniform(owner, width, depth, net_arch)
        if arch is None and net_arch is None:
            convolutional = issubclass(extractor, (NatureCNN, StarCnnExtractor))
            base = self.cnn_arch if convolutional else self.base_arch
            widths = {side: default_widths(self.specs[side].net, base[side]) for side in self.sides}
            net_arch = widths if len(self.sides) > 1 else widths[self.sides[0]]
        if kwargs.get("features_extractor_kwargs") is not None:
            # SB3 writes into the caller's own dictionary
            kwargs["features_extractor_kwargs"] = dict(kwargs["features_extractor_kwargs"])
        # SB3 calls it to make each of its own layers
        stock: Any = activation_fn if given else self.base_activation
        stock = stock if isinstance(stock, type) else partial(ActivationLayer, row)
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


class StarMlpExtractor(KeepsInit):
    """The trunks of an actor-critic policy, in the place of SB3's `MlpExtractor`.

    Shapes: (batch, features_dim) -> (batch, latent_dim_pi), (batch, latent_dim_vf).

    Args:
        features_dim: channels of the input.
        net_arch: widths for both sides, or `dict(pi=..., vf=...)`.
        specs: the spec of each side.
        share: one trunk for both.
        joint: two stars of one shape become one `StarStack`, and run in one pass.

    Raises:
        ValueError: `share` with different sides.

    Example:
        >>> spec = NetSpec("star", "tanh")
        >>> trunks = StarMlpExtractor(4, [32, 16], {"pi": spec, "vf": spec})
        >>> [tuple(y.shape) for y in trunks(torch.randn(2, 4))]
        [(2, 16), (2, 16)]
    """

    def __init__(
        self,
        features_dim: int,
        net_arch: Any,
        specs: Mapping[str, NetSpec],
        *,
        share: bool = False,
        joint: bool = False,
    ) -> None:
        super().__init__()
        arch = net_arch if isinstance(net_arch, dict) else {"pi": net_arch, "vf": net_arch}
        pi, vf = arch.get("pi", []), arch.get("vf", [])
        alike = pi == vf and specs["pi"] == specs["vf"]
        if share and not alike:
            raise ValueError(
                f"share_trunk=True needs equal sides, got pi {specs['pi'].net!r} {pi} and "
                f"vf {specs['vf'].net!r} {vf}"
            )
        self.share = share
        self.stack = None
        if joint and alike and not share and pi and specs["pi"].plain_star:
            self.stack = StarStack(2, features_dim, pi, act=specs["pi"].act)
            self.latent_dim_pi = self.latent_dim_vf = pi[-1]
            return
        # the names are SB3's: TRPO tells critics by "value" in a parameter's name
        self.policy_net = specs["pi"].trunk(features_dim, pi)
        self.latent_dim_pi = self.latent_dim_vf = self.policy_net.out_features
        if not share:
            self.value_net = specs["vf"].trunk(features_dim, vf)
            self.latent_dim_vf = self.value_net.out_features

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        if self.stack is not None:
            pi, vf = self.stack(features).unbind()
            return pi, vf
        latent = self.policy_net(features)
        return latent, latent if self.share else self.value_net(features)

    def forward_actor(self, features: Tensor) -> Tensor:
        if self.stack is not None:
            return self.stack(features, only=0)[0]  # type: ignore[no-any-return]
        return self.policy_net(features)  # type: ignore[no-any-return]

    def forward_critic(self, features: Tensor) -> Tensor:
        if self.stack is not None:
            return self.stack(features, only=1)[0]  # type: ignore[no-any-return]
        return (self.policy_net if self.share else self.value_net)(features)  # type: ignore


class ActorCriticOptions(StarOptions):
    """The hook of the actor-critic policies, over SB3's and over those of sb3-contrib."""

    #: whether both sides may be rows of the same parameter tensors
    joint: ClassVar[bool] = False

    sides = ("pi", "vf")
    base_arch: ClassVar[Mapping[str, list[int]]] = {"pi": [64, 64], "vf": [64, 64]}
    cnn_arch: ClassVar[Mapping[str, list[int]]] = {"pi": [], "vf": []}
    base_activation = nn.Tanh

    def __init__(self, *args: Any, share_trunk: bool = False, **kwargs: Any) -> None:
        self.share_trunk = share_trunk
        super().__init__(*args, **kwargs)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "share_trunk": self.share_trunk}

    def _build_mlp_extractor(self) -> None:
        # a recurrent policy has its LSTM between the features and the trunks
        features: Any = getattr(self, "lstm_output_dim", None) or self.features_dim
        trunks = StarMlpExtractor(
            features,
            self.net_arch,
            self.specs,
            share=self.share_trunk,
            joint=self.joint and bool(self.share_features_extractor),
        )
        self.mlp_extractor: Any = trunks.to(self.device)


class StarActorCriticPolicy(ActorCriticOptions, ActorCriticPolicy):  # type: ignore[misc]
    """The star policy of TRPO, and of any algorithm over SB3's `ActorCriticPolicy`.

    Takes all arguments of SB3's policy; `net`, `norm`, `width`, `depth` and names for
    `activation_fn` come on top (docs/rl.md), and `share_trunk=True` for one trunk. Policy and value
    have parameter tensors of their own, as TRPO demands.

    Raises:
        TypeError, ValueError: an option out of range, naming it.

    Example:
        >>> from sb3_contrib import TRPO
        >>> model = TRPO("StarMlpPolicy", "CartPole-v1", policy_kwargs={"width": 32, "depth": 2})
        >>> model.policy.mlp_extractor.value_net[0].proj.out_features
        64
    """


class StarActorCriticCnnPolicy(StarActorCriticPolicy):
    """`StarActorCriticPolicy` for images, behind a `StarCnnExtractor`.

    Example:
        >>> StarActorCriticCnnPolicy.base_extractor.__name__
        'StarCnnExtractor'
    """

    base_extractor = StarCnnExtractor


class StarActorCriticMultiInputPolicy(StarActorCriticPolicy):
    """`StarActorCriticPolicy` for dictionaries, behind a `StarCombinedExtractor`.

    Example:
        >>> StarActorCriticMultiInputPolicy.base_extractor.__name__
        'StarCombinedExtractor'
    """

    base_extractor = StarCombinedExtractor


class StarPPOPolicy(StarActorCriticPolicy):
    """The star policy of PPO and A2C: `PPO("StarMlpPolicy", env, policy_kwargs=...)`.

    A `StarActorCriticPolicy` whose two trunks, where they are stars of one shape over shared
    features, are one `StarStack` and run in one pass. Not for TRPO, whose value updates spare
    every tensor that the actor uses.

    Raises:
        TypeError, ValueError: an option out of range, naming it.

    Example:
        >>> from stable_baselines3 import PPO
        >>> PPO("StarMlpPolicy", "CartPole-v1").policy.mlp_extractor.stack
        StarStack(2, 4, [44, 44], act='tanh')
    """

    joint = True


class StarPPOCnnPolicy(StarPPOPolicy):
    """`StarPPOPolicy` for images, behind a `StarCnnExtractor`.

    Example:
        >>> StarPPOCnnPolicy.base_extractor.__name__
        'StarCnnExtractor'
    """

    base_extractor = StarCnnExtractor


class StarPPOMultiInputPolicy(StarPPOPolicy):
    """`StarPPOPolicy` for dictionaries, behind a `StarCombinedExtractor`.

    Example:
        >>> StarPPOMultiInputPolicy.base_extractor.__name__
        'StarCombinedExtractor'
    """

    base_extractor = StarCombinedExtractor


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


class StarSACActor(LatentActor, SACActor):  # type: ignore[misc]
    """The actor of SAC, its trunk by a spec."""


class StarTD3Actor(StarNetwork, TD3Actor):
    """The actor of TD3 and DDPG, its trunk by a spec."""

    def replace(self, given: Mapping[str, Any]) -> None:
        trunk: Any = self.spec.trunk(self.features_dim, self.net_arch)
        head = nn.Linear(trunk.out_features, get_action_dim(self.action_space))
        self.mu = nn.Sequential(trunk, head, nn.Tanh())


def critic_nets(critic: Any, given: Mapping[str, Any], outputs: int) -> None:
    """Give a critic of SB3 its Q networks anew, by its spec."""
    states, actions = given["features_dim"], get_action_dim(critic.action_space)
    critic.q_networks = []
    for i in range(critic.n_critics):
        trunk: Any = critic.spec.critic_trunk(states, actions, given["net_arch"])
        net = nn.Sequential(trunk, nn.Linear(trunk.out_features, outputs))
        setattr(critic, f"qf{i}", net)
        critic.q_networks.append(net)


class StarCritic(StarNetwork, ContinuousCritic):  # type: ignore[misc]
    """The critic of SAC, TD3 and DDPG, its networks by a spec."""

    def replace(self, given: Mapping[str, Any]) -> None:
        critic_nets(self, given, 1)


class StarQNetwork(StarNetwork, QNetwork):
    """The Q network of DQN, its trunk by a spec."""

    def replace(self, given: Mapping[str, Any]) -> None:
        trunk: Any = self.spec.trunk(self.features_dim, self.net_arch)
        self.q_net = nn.Sequential(trunk, nn.Linear(trunk.out_features, int(self.action_space.n)))


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


class StarSACPolicy(ContinuousOptions, SACPolicy):
    """The star policy of SAC: `SAC("StarMlpPolicy", env, policy_kwargs=...)`.

    SB3's `SACPolicy` with star layers in actor and critics; `net=dict(pi="star", qf="product")`
    multiplies state and action (`ProductTrunk`). Takes all of SB3's arguments; `net`, `norm`,
    `width`, `depth` and names for `activation_fn` come on top (docs/rl.md).

    Raises:
        TypeError, ValueError: an option out of range, naming it.

    Example:
        >>> from stable_baselines3 import SAC
        >>> kwargs = {"net": {"pi": "mlp", "qf": "product"}, "net_arch": [32]}
        >>> model = SAC("StarMlpPolicy", "Pendulum-v1", policy_kwargs=kwargs)
        >>> type(model.critic.qf0[0]).__name__
        'ProductTrunk'
    """

    actor_class, critic_class = StarSACActor, StarCritic


class StarSACCnnPolicy(StarSACPolicy):
    """`StarSACPolicy` for images, behind a `StarCnnExtractor`.

    Example:
        >>> StarSACCnnPolicy.base_extractor.__name__
        'StarCnnExtractor'
    """

    base_extractor = StarCnnExtractor


class StarSACMultiInputPolicy(StarSACPolicy):
    """`StarSACPolicy` for dictionaries of observations, behind a `StarCombinedExtractor`.

    Example:
        >>> StarSACMultiInputPolicy.base_extractor.__name__
        'StarCombinedExtractor'
    """

    base_extractor = StarCombinedExtractor


class StarTD3Policy(ContinuousOptions, TD3Policy):
    """The star policy of TD3 and DDPG: `TD3("StarMlpPolicy", env, policy_kwargs=...)`.

    SB3's `TD3Policy` with star layers in actor and critics, with the options of `StarSACPolicy`.

    Raises:
        TypeError, ValueError: an option out of range, naming it.

    Example:
        >>> from stable_baselines3 import TD3
        >>> TD3("StarMlpPolicy", "Pendulum-v1").actor.mu[0].out_features
        212
    """

    base_arch: ClassVar[Mapping[str, list[int]]] = {"pi": [400, 300], "qf": [400, 300]}
    actor_class, critic_class = StarTD3Actor, StarCritic


class StarTD3CnnPolicy(StarTD3Policy):
    """`StarTD3Policy` for images, behind a `StarCnnExtractor`.

    Example:
        >>> StarTD3CnnPolicy.base_extractor.__name__
        'StarCnnExtractor'
    """

    base_extractor = StarCnnExtractor


class StarTD3MultiInputPolicy(StarTD3Policy):
    """`StarTD3Policy` for dictionaries of observations, behind a `StarCombinedExtractor`.

    Example:
        >>> StarTD3MultiInputPolicy.base_extractor.__name__
        'StarCombinedExtractor'
    """

    base_extractor = StarCombinedExtractor


class StarDQNPolicy(StarOptions, DQNPolicy):
    """The star policy of DQN: `DQN("StarMlpPolicy", env, policy_kwargs=...)`.

    SB3's `DQNPolicy` with a star trunk. It has one side, and no action to multiply with.
    Takes all of SB3's arguments; `net`, `norm`, `width`, `depth` and names for `activation_fn`
    come on top (docs/rl.md).

    Raises:
        TypeError, ValueError: an option out of range, naming it.

    Example:
        >>> from stable_baselines3 import DQN
        >>> DQN("StarMlpPolicy", "CartPole-v1").q_net.q_net[1]
        Linear(in_features=44, out_features=2, bias=True)
    """

    sides = ("q",)
    base_arch: ClassVar[Mapping[str, list[int]]] = {"q": [64, 64]}
    cnn_arch: ClassVar[Mapping[str, list[int]]] = {"q": []}

    def make_q_net(self) -> QNetwork:
        given = self._update_features_extractor(self.net_args, features_extractor=None)
        return StarQNetwork(**given, spec=self.specs["q"]).to(self.device)


class StarDQNCnnPolicy(StarDQNPolicy):
    """`StarDQNPolicy` for images, behind a `StarCnnExtractor`.

    Example:
        >>> StarDQNCnnPolicy.base_extractor.__name__
        'StarCnnExtractor'
    """

    base_extractor = StarCnnExtractor


class StarDQNMultiInputPolicy(StarDQNPolicy):
    """`StarDQNPolicy` for dictionaries of observations, behind a `StarCombinedExtractor`.

    Example:
        >>> StarDQNMultiInputPolicy.base_extractor.__name__
        'StarCombinedExtractor'
    """

    base_extractor = StarCombinedExtractor
