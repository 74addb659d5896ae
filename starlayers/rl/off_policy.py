"""Star policies of SAC, TD3, DDPG and DQN."""

from collections.abc import Mapping
from typing import Any, ClassVar

from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.dqn.policies import DQNPolicy, QNetwork
from stable_baselines3.sac.policies import Actor as SACActor
from stable_baselines3.sac.policies import SACPolicy
from stable_baselines3.td3.policies import Actor as TD3Actor
from stable_baselines3.td3.policies import TD3Policy
from torch import nn

from starlayers.rl.base import (
    ContinuousOptions,
    LatentActor,
    StarNetwork,
    StarOptions,
    critic_nets,
    headed,
)
from starlayers.rl.extractors import StarCnnExtractor, StarCombinedExtractor

__all__ = [
    "StarDQNCnnPolicy",
    "StarDQNMultiInputPolicy",
    "StarDQNPolicy",
    "StarSACCnnPolicy",
    "StarSACMultiInputPolicy",
    "StarSACPolicy",
    "StarTD3CnnPolicy",
    "StarTD3MultiInputPolicy",
    "StarTD3Policy",
]


class StarSACActor(LatentActor, SACActor):  # type: ignore[misc]
    """The actor of SAC, its trunk by a spec."""


class StarTD3Actor(StarNetwork, TD3Actor):
    """The actor of TD3 and DDPG, its trunk by a spec."""

    def replace(self, given: Mapping[str, Any]) -> None:
        trunk = self.spec.trunk(self.features_dim, self.net_arch)
        self.mu = headed(trunk, get_action_dim(self.action_space), nn.Tanh())


class StarCritic(StarNetwork, ContinuousCritic):  # type: ignore[misc]
    """The critic of SAC, TD3 and DDPG, its networks by a spec."""

    def replace(self, given: Mapping[str, Any]) -> None:
        critic_nets(self, given, 1)


class StarQNetwork(StarNetwork, QNetwork):
    """The Q network of DQN, its trunk by a spec."""

    def replace(self, given: Mapping[str, Any]) -> None:
        trunk = self.spec.trunk(self.features_dim, self.net_arch)
        self.q_net = headed(trunk, int(self.action_space.n))


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
