"""Star policies of SAC, TD3, DDPG and DQN."""

from collections.abc import Mapping
from typing import ClassVar

from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.dqn import policies as dqn
from stable_baselines3.sac import policies as sac
from stable_baselines3.td3 import policies as td3

from starlayers.rl.base import (
    LatentActor,
    OffPolicyActorCritic,
    StarCritics,
    StarNetwork,
    StarPolicy,
    image_and_dict,
)


class StarSACActor(LatentActor, sac.Actor):  # type: ignore[misc]
    """Actor of SAC with a star trunk."""


class StarTD3Actor(StarNetwork, td3.Actor):
    """Actor of TD3 and DDPG with a star trunk."""

    layers = "mu"


class StarCritic(StarCritics, ContinuousCritic):  # type: ignore[misc]
    """Critics of SAC, TD3 and DDPG with star trunks."""


class StarQNetwork(StarNetwork, dqn.QNetwork):
    """Q network of DQN with a star trunk."""

    layers = "q_net"


class StarSACPolicy(OffPolicyActorCritic, sac.SACPolicy):
    """Star policy of SAC: `SAC("StarMlpPolicy", env, policy_kwargs=...)`.

    SB3's `SACPolicy` with star layers in actor and critics; `net=dict(pi="star", qf="product")`
    multiplies state and action (`ProductTrunk`). It takes all arguments of SB3's policy, and in
    addition `net`, `norm`, `width`, `depth` and names for `activation_fn` (docs/rl.md).

    Raises:
        TypeError, ValueError: an option of the wrong type, or out of range.

    Example:
        >>> from stable_baselines3 import SAC
        >>> kwargs = {"net": {"pi": "mlp", "qf": "star"}, "width": 64, "depth": 2}
        >>> model = SAC("StarMlpPolicy", "Pendulum-v1", policy_kwargs=kwargs, device="cpu")
        >>> model.critic.qf0[0][0]
        PackedStar(
          4, 64, act='tanh', offset=1.0, packed=True
          (f12): Linear(in_features=4, out_features=128, bias=True)
        )
    """

    actor_class, critic_class = StarSACActor, StarCritic


class StarTD3Policy(OffPolicyActorCritic, td3.TD3Policy):
    """Star policy of TD3 and DDPG: `TD3("StarMlpPolicy", env, policy_kwargs=...)`.

    SB3's `TD3Policy` with star layers in actor and critics, and the options of `StarSACPolicy`.

    Raises:
        TypeError, ValueError: an option of the wrong type, or out of range.

    Example:
        >>> from stable_baselines3 import TD3
        >>> model = TD3("StarMlpPolicy", "Pendulum-v1", device="cpu")
        >>> [layer.out_features for layer in model.actor.mu[0]]  # SB3's 400 and 300 over sqrt(2)
        [284, 212]
    """

    base_arch: ClassVar[Mapping[str, list[int]]] = {"pi": [400, 300], "qf": [400, 300]}
    actor_class, critic_class = StarTD3Actor, StarCritic


class StarDQNPolicy(StarPolicy, dqn.DQNPolicy):
    """Star policy of DQN: `DQN("StarMlpPolicy", env, policy_kwargs=...)`.

    SB3's `DQNPolicy` with a star trunk. Its one network, the side "q", takes no action, so that
    there is no "product". It takes all arguments of SB3's policy, and in addition `net`, `norm`,
    `width`, `depth` and names for `activation_fn` (docs/rl.md).

    Raises:
        TypeError, ValueError: an option of the wrong type, or out of range.

    Example:
        >>> from stable_baselines3 import DQN
        >>> model = DQN("StarMlpPolicy", "CartPole-v1", device="cpu")
        >>> [layer.out_features for layer in model.q_net.q_net[0]]  # SB3's [64, 64] over sqrt(2)
        [44, 44]
    """

    base_arch: ClassVar[Mapping[str, list[int]]] = {"q": [64, 64]}
    cnn_arch: ClassVar[Mapping[str, list[int]]] = {"q": []}

    def make_q_net(self) -> dqn.QNetwork:
        kwargs = self._update_features_extractor(self.net_args, features_extractor=None)
        return StarQNetwork(**kwargs, spec=self.specs["q"]).to(self.device)


StarSACCnnPolicy, StarSACMultiInputPolicy = image_and_dict(StarSACPolicy, "stable_baselines3.SAC")
StarTD3CnnPolicy, StarTD3MultiInputPolicy = image_and_dict(StarTD3Policy, "stable_baselines3.TD3")
StarDQNCnnPolicy, StarDQNMultiInputPolicy = image_and_dict(StarDQNPolicy, "stable_baselines3.DQN")
