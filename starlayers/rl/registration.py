"""Registration of the star policies by name, such as `PPO("StarMlpPolicy", env)`."""

from collections.abc import Mapping
from importlib.util import find_spec

from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy

from starlayers.rl import actor_critic, off_policy

__all__ = ["register"]

#: names of policies for flat observations, images and dictionaries
NAMES = ("StarMlpPolicy", "StarCnnPolicy", "StarMultiInputPolicy")

Policies = tuple[type[BasePolicy], ...]


def register() -> None:
    """Enter the star policies in the `policy_aliases` of every algorithm.

    `Algorithm("StarMlpPolicy", env)` looks names up there. Algorithms of sb3-contrib are included
    if that package is installed. Importing `starlayers.rl` calls this.

    Example:
        >>> register()
        >>> PPO.policy_aliases["StarMlpPolicy"]
        <class 'starlayers.rl.actor_critic.StarPPOPolicy'>
    """
    for algorithm, policies in _policies().items():
        # a dictionary for each algorithm: DDPG has the same object as TD3
        algorithm.policy_aliases = {**algorithm.policy_aliases, **dict(zip(NAMES, policies))}


def _policies() -> Mapping[type[BaseAlgorithm], Policies]:
    """Return the star policies of each algorithm, in the order of `NAMES`."""
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
    policies: dict[type[BaseAlgorithm], Policies] = {
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
    return {**policies, **(_contrib_policies() if find_spec("sb3_contrib") else {})}


def _contrib_policies() -> dict[type[BaseAlgorithm], Policies]:
    """Return those of sb3-contrib's algorithms, which is an optional dependency."""
    import sb3_contrib

    from starlayers.rl import contrib

    return {
        # not the policies of PPO: TRPO needs separate tensors for actor and critic
        sb3_contrib.TRPO: (
            actor_critic.StarActorCriticPolicy,
            actor_critic.StarActorCriticCnnPolicy,
            actor_critic.StarActorCriticMultiInputPolicy,
        ),
        sb3_contrib.MaskablePPO: (
            contrib.StarMaskablePolicy,
            contrib.StarMaskableCnnPolicy,
            contrib.StarMaskableMultiInputPolicy,
        ),
        sb3_contrib.RecurrentPPO: (
            contrib.StarRecurrentPolicy,
            contrib.StarRecurrentCnnPolicy,
            contrib.StarRecurrentMultiInputPolicy,
        ),
        sb3_contrib.TQC: (
            contrib.StarTQCPolicy,
            contrib.StarTQCCnnPolicy,
            contrib.StarTQCMultiInputPolicy,
        ),
        sb3_contrib.QRDQN: (
            contrib.StarQRDQNPolicy,
            contrib.StarQRDQNCnnPolicy,
            contrib.StarQRDQNMultiInputPolicy,
        ),
        sb3_contrib.CrossQ: (contrib.StarCrossQPolicy,),
        sb3_contrib.ARS: (contrib.StarARSPolicy,),
    }
