"""Description of a model of SB3: its networks, optimizers and problems."""

from dataclasses import dataclass

from stable_baselines3.common.base_class import BaseAlgorithm

from starlayers.rl.checks import CHECKS
from starlayers.rl.inspect import Inspector, Network
from starlayers.surgery.report import aligned

COLUMNS = ("network", "class", "shared with", "parameters", "FLOPs", "optimizer", "lr", "trains")
#: columns of numbers, aligned to the right
NUMBERS = (3, 4)


@dataclass(frozen=True)
class Description:
    """Networks of a model and its problems; `print(description)` shows a table.

    Args:
        algorithm: name of the class of the model.
        policy: name of the class of its policy.
        networks: one entry per network.
        problems: one sentence each; empty for a healthy model.

    Example:
        >>> from stable_baselines3 import PPO
        >>> model = PPO("MlpPolicy", "CartPole-v1", device="cpu")
        >>> model.policy.value_net.bias = torch.nn.Parameter(torch.zeros(1))  # surgery by hand
        >>> describe(model).problems[0]
        'no optimizer has value_net.bias, so that training does not change it'
    """

    algorithm: str
    policy: str
    networks: tuple[Network, ...]
    problems: tuple[str, ...]

    def __str__(self) -> str:
        lines = [COLUMNS, *(network.cells() for network in self.networks)]
        total = sum(n.parameters for n in self.networks)
        trained = sum(n.trained for n in self.networks)
        count = len(self.problems)
        return "\n".join(
            [
                f"{self.algorithm} with {self.policy}: {total:,} parameters, {trained:,} trained; "
                "FLOPs per observation, two per multiply-add",
                *aligned(lines, right=NUMBERS),
                f"{count} problem{'s' * (count != 1)}" if count else "no problems found",
                *(f"- {problem}" for problem in self.problems),
            ]
        )


def describe(model: BaseAlgorithm, *, strict: bool = False) -> Description:
    """List a model's networks, their optimizers, and faults that raise no error.

    It looks for parameters that no optimizer holds; optimizers, aliases and targets that changes by
    hand left behind; parameters that TRPO, `policy.load`, `ortho_init` and target updates leave
    out; and batch statistics that differ between acting and learning (docs/rl.md). The model stays
    as it is.

    Args:
        model: any algorithm of stable-baselines3 or sb3-contrib.
        strict: raise if there is a problem.

    Raises:
        TypeError: not a model of stable-baselines3.
        ValueError: `strict` and a problem; all of them are in the message.

    Example:
        >>> from stable_baselines3 import PPO
        >>> model = PPO("MlpPolicy", "CartPole-v1", device="cpu", policy_kwargs={"net_arch": [8]})
        >>> description = describe(model)
        >>> [(n.name, n.parameters, n.flops) for n in description.networks if n.kind == "Linear"]
        [('action_net', 18, 32), ('value_net', 9, 16)]
        >>> print(description)  # doctest: +ELLIPSIS
        PPO with ActorCriticPolicy: 107 parameters, 107 trained; ...
        no problems found
    """
    inspector = Inspector(model, "describe")
    with inspector.evaluation_mode():
        description = Description(
            type(model).__name__,
            type(model.policy).__name__,
            tuple(inspector.networks()),
            tuple(problem for check in CHECKS for problem in check(inspector)),
        )
    if strict and description.problems:
        raise ValueError("\n- ".join([f"{description.algorithm}:", *description.problems]))
    return description
