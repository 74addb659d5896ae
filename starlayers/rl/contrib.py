"""Star policies for the algorithms of sb3-contrib, which need that package."""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

from gymnasium import spaces
from sb3_contrib.ars.policies import ARSPolicy
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from sb3_contrib.common.torch_layers import BatchRenorm1d
from sb3_contrib.crossq.policies import Actor as CrossQActor
from sb3_contrib.crossq.policies import CrossQCritic, CrossQPolicy
from sb3_contrib.qrdqn.policies import QRDQNPolicy, QuantileNetwork
from sb3_contrib.tqc.policies import Actor as TQCActor
from sb3_contrib.tqc.policies import Critic as TQCCritic
from sb3_contrib.tqc.policies import TQCPolicy
from stable_baselines3.common.preprocessing import get_action_dim
from torch import nn

from starlayers.rl.actor_critic import ActorCriticOptions
from starlayers.rl.base import (
    ContinuousOptions,
    LatentActor,
    StarNetwork,
    StarOptions,
    critic_nets,
    headed,
)
from starlayers.rl.extractors import StarCnnExtractor, StarCombinedExtractor
from starlayers.rl.spec import PRODUCT, default_widths, resolve, uniform
from starlayers.rl.trunks import RESIDUAL, Norm, activation, activation_module

__all__ = [
    "StarARSPolicy",
    "StarCrossQPolicy",
    "StarMaskableCnnPolicy",
    "StarMaskableMultiInputPolicy",
    "StarMaskablePolicy",
    "StarQRDQNCnnPolicy",
    "StarQRDQNMultiInputPolicy",
    "StarQRDQNPolicy",
    "StarRecurrentCnnPolicy",
    "StarRecurrentMultiInputPolicy",
    "StarRecurrentPolicy",
    "StarTQCCnnPolicy",
    "StarTQCMultiInputPolicy",
    "StarTQCPolicy",
]


class StarMaskablePolicy(ActorCriticOptions, MaskableActorCriticPolicy):  # type: ignore[misc]
    """The star policy of MaskablePPO, with the options of `StarActorCriticPolicy`.

    Raises:
        TypeError, ValueError: an option out of range, naming it.

    Example:
        >>> StarMaskablePolicy.joint
        True
    """

    joint = True


class StarMaskableCnnPolicy(StarMaskablePolicy):
    """`StarMaskablePolicy` for images, behind a `StarCnnExtractor`.

    Example:
        >>> StarMaskableCnnPolicy.base_extractor.__name__
        'StarCnnExtractor'
    """

    base_extractor = StarCnnExtractor


class StarMaskableMultiInputPolicy(StarMaskablePolicy):
    """`StarMaskablePolicy` for dictionaries, behind a `StarCombinedExtractor`.

    Example:
        >>> StarMaskableMultiInputPolicy.base_extractor.__name__
        'StarCombinedExtractor'
    """

    base_extractor = StarCombinedExtractor


class StarRecurrentPolicy(ActorCriticOptions, RecurrentActorCriticPolicy):  # type: ignore[misc]
    """The star policy of RecurrentPPO: star trunks behind its LSTMs.

    Options as for `StarActorCriticPolicy`.

    Raises:
        TypeError, ValueError: an option out of range, naming it.

    Example:
        >>> from sb3_contrib import RecurrentPPO
        >>> kwargs = {"lstm_hidden_size": 16, "net_arch": [8]}
        >>> model = RecurrentPPO("StarMlpPolicy", "CartPole-v1", policy_kwargs=kwargs)
        >>> model.policy.mlp_extractor.policy_net.in_features
        16
    """

    #: what it takes beside the arguments of an actor-critic policy, and SB3 does not save
    lstm_options: ClassVar[tuple[str, ...]] = (
        "lstm_hidden_size",
        "n_lstm_layers",
        "shared_lstm",
        "enable_critic_lstm",
        "lstm_kwargs",
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.lstm_given = {key: kwargs[key] for key in self.lstm_options if key in kwargs}
        super().__init__(*args, **kwargs)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), **self.lstm_given}


class StarRecurrentCnnPolicy(StarRecurrentPolicy):
    """`StarRecurrentPolicy` for images, behind a `StarCnnExtractor`.

    Example:
        >>> StarRecurrentCnnPolicy.base_extractor.__name__
        'StarCnnExtractor'
    """

    base_extractor = StarCnnExtractor


class StarRecurrentMultiInputPolicy(StarRecurrentPolicy):
    """`StarRecurrentPolicy` for dictionaries, behind a `StarCombinedExtractor`.

    Example:
        >>> StarRecurrentMultiInputPolicy.base_extractor.__name__
        'StarCombinedExtractor'
    """

    base_extractor = StarCombinedExtractor


class StarTQCActor(LatentActor, TQCActor):  # type: ignore[misc]
    """The actor of TQC, its trunk by a spec."""


class StarTQCCritic(StarNetwork, TQCCritic):
    """The quantile critics of TQC, their networks by a spec."""

    def replace(self, given: Mapping[str, Any]) -> None:
        critic_nets(self, given, self.n_quantiles)


class StarTQCPolicy(ContinuousOptions, TQCPolicy):
    """The star policy of TQC, with the options of `StarSACPolicy`.

    Raises:
        TypeError, ValueError: an option out of range, naming it.

    Example:
        >>> from sb3_contrib import TQC
        >>> model = TQC("StarMlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [32]})
        >>> model.critic.qf0[1].out_features
        25
    """

    actor_class, critic_class = StarTQCActor, StarTQCCritic


class StarTQCCnnPolicy(StarTQCPolicy):
    """`StarTQCPolicy` for images, behind a `StarCnnExtractor`.

    Example:
        >>> StarTQCCnnPolicy.base_extractor.__name__
        'StarCnnExtractor'
    """

    base_extractor = StarCnnExtractor


class StarTQCMultiInputPolicy(StarTQCPolicy):
    """`StarTQCPolicy` for dictionaries, behind a `StarCombinedExtractor`.

    Example:
        >>> StarTQCMultiInputPolicy.base_extractor.__name__
        'StarCombinedExtractor'
    """

    base_extractor = StarCombinedExtractor


def renorm_of(given: Mapping[str, Any]) -> Norm | None:
    """The batch renormalisation that CrossQ puts before each layer, from its constructor's values.

    It has to be the class of sb3-contrib: CrossQ switches between the statistics of a batch and the
    running ones by that class.
    """
    if not given.get("batch_norm", True):
        return None
    return partial(
        BatchRenorm1d,
        momentum=given.get("batch_norm_momentum", 0.01),
        eps=given.get("batch_norm_eps", 0.001),
        warmup_steps=given.get("renorm_warmup_steps", 100_000),
    )


class StarCrossQActor(StarNetwork, CrossQActor):
    """The actor of CrossQ, its trunk by a spec between batch renormalisations."""

    def replace(self, given: Mapping[str, Any]) -> None:
        renorm = renorm_of(given)
        trunk = self.spec.trunk(self.features_dim, self.net_arch, renorm)
        last = [renorm(self.net_arch[-1])] if renorm and self.net_arch else []
        self.latent_pi = nn.Sequential(trunk, *last)


class StarCrossQCritic(StarNetwork, CrossQCritic):
    """The critics of CrossQ, their trunks by a spec between batch renormalisations."""

    def replace(self, given: Mapping[str, Any]) -> None:
        renorm, arch = renorm_of(given), given["net_arch"]
        inputs = given["features_dim"] + get_action_dim(self.action_space)
        self.q_networks = []
        for i in range(self.n_critics):
            trunk: Any = self.spec.trunk(inputs, arch, renorm)
            last = [renorm(trunk.out_features)] if renorm else []
            net = nn.Sequential(trunk, *last, nn.Linear(trunk.out_features, 1))
            setattr(self, f"qf{i}", net)
            self.q_networks.append(net)


class StarCrossQPolicy(ContinuousOptions, CrossQPolicy):
    """The star policy of CrossQ, with sb3-contrib's batch renormalisation before each layer.

    Options as for `StarSACPolicy`, without the product critic and the residual nets, whose norms
    would stand beside CrossQ's own.

    Raises:
        TypeError, ValueError: an option out of range, naming it.

    Example:
        >>> from sb3_contrib import CrossQ
        >>> model = CrossQ("StarMlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [32]})
        >>> [type(layer).__name__ for layer in model.critic.qf0[0]]
        ['BatchRenorm1d', 'PackedStar']
    """

    base_arch: ClassVar[Mapping[str, list[int]]] = {"pi": [256, 256], "qf": [1024, 1024]}
    actor_class, critic_class = StarCrossQActor, StarCrossQCritic

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        net = kwargs.get("net", "star")
        for name in [net] if isinstance(net, str) else net.values():
            if name in (PRODUCT, *RESIDUAL):
                raise ValueError(f"StarCrossQPolicy: net={name!r} brings norms beside CrossQ's own")
        super().__init__(*args, **kwargs)


class StarQuantileNetwork(StarNetwork, QuantileNetwork):
    """The quantile network of QR-DQN, its trunk by a spec."""

    def replace(self, given: Mapping[str, Any]) -> None:
        trunk = self.spec.trunk(self.features_dim, self.net_arch)
        self.quantile_net = headed(trunk, int(self.action_space.n) * self.n_quantiles)


class StarQRDQNPolicy(StarOptions, QRDQNPolicy):
    """The star policy of QR-DQN, with the options of `StarDQNPolicy`.

    Raises:
        TypeError, ValueError: an option out of range, naming it.

    Example:
        >>> from sb3_contrib import QRDQN
        >>> model = QRDQN("StarMlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": [8]})
        >>> model.quantile_net.quantile_net[1].out_features
        400
    """

    sides = ("q",)
    base_arch: ClassVar[Mapping[str, list[int]]] = {"q": [64, 64]}
    cnn_arch: ClassVar[Mapping[str, list[int]]] = {"q": []}

    def make_quantile_net(self) -> QuantileNetwork:
        given = self._update_features_extractor(self.net_args, features_extractor=None)
        return StarQuantileNetwork(**given, spec=self.specs["q"]).to(self.device)


class StarQRDQNCnnPolicy(StarQRDQNPolicy):
    """`StarQRDQNPolicy` for images, behind a `StarCnnExtractor`.

    Example:
        >>> StarQRDQNCnnPolicy.base_extractor.__name__
        'StarCnnExtractor'
    """

    base_extractor = StarCnnExtractor


class StarQRDQNMultiInputPolicy(StarQRDQNPolicy):
    """`StarQRDQNPolicy` for dictionaries, behind a `StarCombinedExtractor`.

    Example:
        >>> StarQRDQNMultiInputPolicy.base_extractor.__name__
        'StarCombinedExtractor'
    """

    base_extractor = StarCombinedExtractor


class StarARSPolicy(ARSPolicy):
    """The star policy of ARS, which searches over all parameters as one vector.

    Args:
        observation_space, action_space: as for ARS.
        net_arch, activation_fn, net, norm, width, depth: as for the other star policies.
        squash_output: whether continuous actions end in a tanh.

    Raises:
        TypeError, ValueError: an option out of range, naming it.

    Example:
        >>> from sb3_contrib import ARS
        >>> model = ARS("StarMlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": [8]})
        >>> sum(p.numel() for p in model.policy.parameters()) == 2 * (4 + 1) * 8 + (8 + 1) * 2
        True
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        net_arch: list[int] | None = None,
        activation_fn: str | type[nn.Module] | None = "default",
        squash_output: bool = True,
        *,
        net: str = "star",
        norm: str | None = None,
        width: int | None = None,
        depth: int | None = None,
    ) -> None:
        owner, given = type(self).__name__, activation_fn != "default"
        act: Any = activation_fn if given else nn.ReLU
        spec = resolve(owner, ("pi",), net, norm, act=act, given=given)["pi"]
        net_arch = uniform(owner, width, depth, net_arch) or net_arch
        if net_arch is None:
            net_arch = default_widths(spec.net, [64, 64])
        stock: Any = activation(act)
        stock = stock if isinstance(stock, type) else partial(activation_module, stock)
        super().__init__(
            observation_space, action_space, net_arch, stock, squash_output=squash_output
        )
        self.options = {"activation_fn": activation_fn, "net": net, "norm": norm}
        self.squashed = squash_output
        if not spec.stock:
            trunk = spec.trunk(self.features_dim, net_arch)
            head: Any = self.action_net[-2 if isinstance(self.action_net[-1], nn.Tanh) else -1]
            tail = [nn.Tanh()] if self.squash_output else []
            self.action_net = headed(trunk, head.out_features, *tail)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        return {**data, **self.options, "squash_output": self.squashed}
