"""The names of star policies among the policies that algorithms know by name."""

from collections.abc import Mapping
from importlib.util import find_spec

from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy

from starlayers.rl import policies as own

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
    actor_critic = (
        own.StarActorCriticPolicy,
        own.StarActorCriticCnnPolicy,
        own.StarActorCriticMultiInputPolicy,
    )
    ppo = (own.StarPPOPolicy, own.StarPPOCnnPolicy, own.StarPPOMultiInputPolicy)
    td3 = (own.StarTD3Policy, own.StarTD3CnnPolicy, own.StarTD3MultiInputPolicy)
    table: dict[type[BaseAlgorithm], Policies] = {
        PPO: ppo,
        A2C: ppo,
        SAC: (own.StarSACPolicy, own.StarSACCnnPolicy, own.StarSACMultiInputPolicy),
        TD3: td3,
        DDPG: td3,
        DQN: (own.StarDQNPolicy, own.StarDQNCnnPolicy, own.StarDQNMultiInputPolicy),
    }
    if find_spec("sb3_contrib") is None:
        return table
    import sb3_contrib

    from starlayers.rl import contrib

    table[sb3_contrib.TRPO] = actor_critic
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
