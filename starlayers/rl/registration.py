"""Registration of the star policies by name, such as `PPO("StarMlpPolicy", env)`."""

from importlib.util import find_spec

import stable_baselines3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy

from starlayers.rl import actor_critic, off_policy

#: aliases of the policies `Star{family}Policy`, `Star{family}CnnPolicy`, ... of an algorithm
ALIASES = {"": "StarMlpPolicy", "Cnn": "StarCnnPolicy", "MultiInput": "StarMultiInputPolicy"}

#: algorithm -> family of its policies
SB3 = {"PPO": "PPO", "A2C": "PPO", "SAC": "SAC", "TD3": "TD3", "DDPG": "TD3", "DQN": "DQN"}
CONTRIB = {
    # not the policies of PPO: TRPO needs separate tensors for actor and critic
    "TRPO": "ActorCritic",
    "MaskablePPO": "Maskable",
    "RecurrentPPO": "Recurrent",
    **{name: name for name in ("TQC", "QRDQN", "CrossQ", "ARS")},
}


def register() -> None:
    """Enter the star policies in the `policy_aliases` of every algorithm.

    `Algorithm("StarMlpPolicy", env)` looks names up there. Algorithms of sb3-contrib are included
    if that package is installed. Importing `starlayers.rl` calls this.

    Example:
        >>> register()
        >>> stable_baselines3.PPO.policy_aliases["StarMlpPolicy"]
        <class 'starlayers.rl.actor_critic.StarPPOPolicy'>
    """
    for algorithm, policies in star_policies().items():
        # a dictionary for each algorithm: DDPG has the same object as TD3
        algorithm.policy_aliases = {**algorithm.policy_aliases, **policies}


def star_policies() -> dict[type[BaseAlgorithm], dict[str, type[BasePolicy]]]:
    """Return the star policies of each algorithm that is installed, by alias."""
    classes, families = {**vars(actor_critic), **vars(off_policy)}, {stable_baselines3: SB3}
    if find_spec("sb3_contrib"):
        import sb3_contrib

        from starlayers.rl import contrib

        classes.update(vars(contrib))
        families[sb3_contrib] = CONTRIB
    return {
        getattr(package, name): {
            alias: classes[policy]
            for part, alias in ALIASES.items()
            if (policy := f"Star{family}{part}Policy") in classes
        }
        for package, names in families.items()
        for name, family in names.items()
    }
