"""The names of star policies among the policies that algorithms know by name."""

from collections.abc import Mapping
from importlib.util import find_spec

from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy

from starlayers.rl import actor_critic, off_policy

__all__ = ["register"]

NAMES = ("StarMlpPolicy", "StarCnnPolicy", "StarMultiInputPolicy")

Policies = tuple[type[BasePolicy], ...]


def register() -> None:
    """Enter the star policies into `policy_aliases`, SB3's table of names, of every algorithm.

    `Algorithm("StarMlpPolicy", env)` finds them there. Algorithms of sb3-contrib take part where
    that package is installed.

    Example:
        >>> register()
        >>> PPO.policy_aliases["StarMlpPolicy"].__name__
        'StarPPOPolicy'
    """
    for algorithm, classes in _policies().items():
        # DDPG has TD3's own dictionary, and each gets its own here
        algorithm.policy_aliases = {**algorithm.policy_aliases, **dict(zip(NAMES, classes))}


def _policies() -> Mapping[type[BaseAlgorithm], Policies]:
    separate = (
        actor_critic.StarActorCriticPolicy,
        actor_critic.StarActorCriticCnnPolicy,
        actor_critic.StarActorCriticMultiInputPolicy,
    )
    ppo = (
        actor_critic.StarPPOPolicy,
        actor_critic.StarPPOCnnPolicy,
        actor_critic.StarPPOMultiInputPolicy,
    )
    td3 = (
        off_policy.StarTD3Policy,
        off_policy.StarTD3CnnPolicy,
        off_policy.StarTD3MultiInputPolicy,
    )
    table: dict[type[BaseAlgorithm], Policies] = {
        PPO: ppo,
        A2C: ppo,
        SAC: (
            off_policy.StarSACPolicy,
            off_policy.StarSACCnnPolicy,
            off_policy.StarSACMultiInputPolicy,
        ),
        TD3: td3,
        DDPG: td3,
        DQN: (
            off_policy.StarDQNPolicy,
            off_policy.StarDQNCnnPolicy,
            off_policy.StarDQNMultiInputPolicy,
        ),
    }
    if find_spec("sb3_contrib") is None:
        return table
    import sb3_contrib

    from starlayers.rl import contrib

    table[sb3_contrib.TRPO] = separate
    table[sb3_contrib.MaskablePPO] = (
        contrib.StarMaskablePolicy,
        contrib.StarMaskableCnnPolicy,
        contrib.StarMaskableMultiInputPolicy,
    )
    table[sb3_contrib.RecurrentPPO] = (
        contrib.StarRecurrentPolicy,
        contrib.StarRecurrentCnnPolicy,
        contrib.StarRecurrentMultiInputPolicy,
    )
    table[sb3_contrib.TQC] = (
        contrib.StarTQCPolicy,
        contrib.StarTQCCnnPolicy,
        contrib.StarTQCMultiInputPolicy,
    )
    table[sb3_contrib.QRDQN] = (
        contrib.StarQRDQNPolicy,
        contrib.StarQRDQNCnnPolicy,
        contrib.StarQRDQNMultiInputPolicy,
    )
    table[sb3_contrib.CrossQ] = (contrib.StarCrossQPolicy,)
    table[sb3_contrib.ARS] = (contrib.StarARSPolicy,)
    return table
