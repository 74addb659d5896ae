"""What a model of stable-baselines3 is made of, what trains it, and what silently does not work."""

from dataclasses import dataclass

from stable_baselines3.common.base_class import BaseAlgorithm

from starlayers.rl.checks import CHECKS
from starlayers.rl.inspect import Network, Subject

__all__ = ["Description", "Network", "describe"]


@dataclass(frozen=True)
class Description:
    """The networks of a model and its problems; `print(description)` gives a table.

    Args:
        algorithm, policy: names of the classes.
        networks: a row each.
        problems: one sentence each; empty for a healthy model.

    Example:
        >>> Description("PPO", "ActorCriticPolicy", (), ("no optimizer owns net.weight",)).problems
        ('no optimizer owns net.weight',)
    """

    algorithm: str
    policy: str
    networks: tuple[Network, ...]
    problems: tuple[str, ...]

    def __str__(self) -> str:
        head = (
            "network",
            "class",
            "shared with",
            "parameters",
            "FLOPs",
            "optimizer",
            "lr",
            "trains",
        )
        lines = [head, *(network.cells() for network in self.networks)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        table = [
            "  ".join(
                cell.rjust(width) if i in (3, 4) else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths))
            ).rstrip()
            for line in lines
        ]
        total = sum(n.parameters for n in self.networks)
        trained = sum(n.trained for n in self.networks)
        count = len(self.problems)
        return "\n".join(
            [
                f"{self.algorithm} with {self.policy}: {total:,} parameters, {trained:,} trained; "
                "FLOPs per observation, two per multiply-add",
                *table,
                f"{count} problem{'s' * (count != 1)}" if count else "no problems found",
                *(f"- {problem}" for problem in self.problems),
            ]
        )


def describe(model: BaseAlgorithm, *, strict: bool = False) -> Description:
    """What a model is made of, which optimizer owns what, and what silently does not work.

    It looks for parameters that nothing trains, for an optimizer, alias or target that module
    surgery left behind, for what TRPO, `policy.load`, `ortho_init` and target updates leave out,
    and for batch statistics where an algorithm does not keep them right (docs/rl.md). The model
    stays as it is.

    Args:
        model: any algorithm of stable-baselines3 or sb3-contrib.
        strict: raise where there is a problem.

    Raises:
        TypeError: not a model of stable-baselines3.
        ValueError: `strict` and a problem; all of them are in the message.

    Example:
        >>> from stable_baselines3 import PPO
        >>> model = PPO("MlpPolicy", "CartPole-v1", device="cpu", policy_kwargs={"net_arch": [8]})
        >>> found = describe(model)
        >>> [(n.name, n.parameters, n.flops) for n in found.networks if n.kind == "Linear"]
        [('action_net', 18, 32), ('value_net', 9, 16)]
        >>> print(found)  # doctest: +ELLIPSIS
        PPO with ActorCriticPolicy: 107 parameters, 107 trained; ...
        no problems found
    """
    if not isinstance(model, BaseAlgorithm):
        raise TypeError(
            "describe takes a model of stable-baselines3 or sb3-contrib, such as PPO, "
            f"got {type(model).__name__}"
        )
    subject = Subject(model)
    with subject.untouched():
        found = Description(
            type(model).__name__,
            type(model.policy).__name__,
            tuple(subject.networks()),
            tuple(p for check in CHECKS for p in check(subject)),
        )
    if strict and found.problems:
        raise ValueError("\n".join([f"{found.algorithm}:", *(f"- {p}" for p in found.problems)]))
    return found
