"""Tasks and arms of the reinforcement-learning study, and widths that match their parameters.

Hyperparameters and anchors are those of rl-baselines3-zoo (`hyperparams/*.yml`, `benchmark.md`,
where MuJoCo agents are -v3 and LunarLander -v2). What deviates, for a study that two cores can
run: budgets are shorter; DQN and TD3 have [64, 64] as PPO does, not [256, 256] and [400, 300];
SAC on Pendulum has [64, 64]; TD3 on Pendulum starts to learn after 1,000 steps, not 10,000. All
arms share a task's optimizer and learning rate. Activations are the defaults of the policies: tanh
for PPO, relu for the others, tanh for stars and relu for SimBa everywhere; where that differs from
the mlp's, mlp_tanh and star_relu tell the activation from the product.
"""

from bisect import bisect_left
from functools import cache
from typing import Any

PENDULUM = {"env": "Pendulum-v1", "tier": "a", "net_arch": [64, 64], "random": -1230.5}
MUJOCO: dict[str, Any] = {
    "algo": "SAC",
    "tier": "b",
    "steps": 50_000,
    "net_arch": [256, 256],
    "settings": {"learning_starts": 10_000},
}
#: `random` is the mean return of uniformly drawn actions over 100 (HalfCheetah) to 2,000 episodes
#: (gymnasium 1.4, environment seeds 10,000 and up, action seed 0); `anchor` is the zoo's result
TASKS: dict[str, dict[str, Any]] = {
    "ppo-cartpole": {
        "algo": "PPO",
        "env": "CartPole-v1",
        "tier": "a",
        "steps": 50_000,
        "n_envs": 8,
        "net_arch": [64, 64],
        "settings": {
            "n_steps": 32,
            "batch_size": 256,
            "gae_lambda": 0.8,
            "gamma": 0.98,
            "n_epochs": 20,
            "learning_rate": "lin_0.001",
            "clip_range": "lin_0.2",
        },
        "random": 22.0,
        "anchor": 500.0,
    },
    "ppo-acrobot": {
        "algo": "PPO",
        "env": "Acrobot-v1",
        "tier": "a",
        "steps": 100_000,
        "n_envs": 16,
        "normalize": True,
        "net_arch": [64, 64],
        "settings": {"n_steps": 256, "gae_lambda": 0.94, "n_epochs": 4},
        "random": -498.0,
        "anchor": -73.5,
    },
    "dqn-cartpole": {
        "algo": "DQN",
        "env": "CartPole-v1",
        "tier": "a",
        "steps": 50_000,
        "net_arch": [64, 64],
        "settings": {
            "learning_rate": 2.3e-3,
            "batch_size": 64,
            "buffer_size": 100_000,
            "learning_starts": 1000,
            "target_update_interval": 10,
            "train_freq": 256,
            "gradient_steps": 128,
            "exploration_fraction": 0.16,
            "exploration_final_eps": 0.04,
        },
        "random": 22.0,
        "anchor": 500.0,
    },
    "sac-pendulum": {
        **PENDULUM,
        "algo": "SAC",
        "steps": 10_000,
        "settings": {"learning_rate": 1e-3},
        "anchor": -157.0,
    },
    "td3-pendulum": {
        **PENDULUM,
        "algo": "TD3",
        "steps": 10_000,
        "noise": 0.1,
        "settings": {
            "learning_rate": 1e-3,
            "gamma": 0.98,
            "buffer_size": 200_000,
            "learning_starts": 1000,
        },
        "anchor": -151.9,
    },
    "sac-halfcheetah": {**MUJOCO, "env": "HalfCheetah-v5", "random": -278.8, "anchor": 9535.0},
    "sac-hopper": {**MUJOCO, "env": "Hopper-v5", "random": 18.9, "anchor": 2326.0},
    "sac-walker2d": {**MUJOCO, "env": "Walker2d-v5", "random": 2.0, "anchor": 3863.0},
}

#: arm -> net of the actor, net of the critic, other policy_kwargs
ARMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mlp": ("mlp", "mlp", {}),
    "mlp_ln": ("mlp", "mlp", {"norm": "layer"}),
    "d2rl": ("d2rl", "d2rl", {}),
    "simba": ("simba", "simba", {"activation_fn": "relu"}),
    "star": ("star", "star", {}),
    "star_ln": ("star", "star", {"norm": "layer"}),
    "star_critic": ("mlp", "star", {}),
    "star_actor": ("star", "mlp", {}),
    "mlp_tanh": ("mlp", "mlp", {"activation_fn": "tanh"}),
    "star_relu": ("star", "star", {"activation_fn": "relu"}),
    "product": ("mlp", "product", {}),
    "product_raw": ("mlp", "product", {"norm": "none"}),
}
#: activations of nets whose arm names none: the policies' defaults
DEFAULT_ACTS = {"star": "tanh", "simba": "relu", "mlp": "SB3's default", "d2rl": "SB3's default"}
#: layers or blocks of the nets that are not as deep as the task's `net_arch`: as published
DEPTHS = {"d2rl": 4, "simba": 1}
#: arms of tasks whose mlp has relu
ACTIVATIONS = ("mlp_tanh", "star_relu")
TIER_B = ("mlp", "simba", "star", "product")
#: sides of a policy -> prefixes of the names of their parameters
SIDES: dict[str, dict[str, tuple[str, ...]]] = {
    "PPO": {
        # equal stars of both sides are one stack, half of it each
        "pi": ("mlp_extractor.policy_net.", "mlp_extractor.stack.", "action_net."),
        "vf": ("mlp_extractor.value_net.", "mlp_extractor.stack.", "value_net."),
    },
    "SAC": {"pi": ("actor.",), "qf": ("critic.",)},
    "TD3": {"pi": ("actor.",), "qf": ("critic.",)},
    "DQN": {"q": ("q_net.",)},
}


def has(task: str, arm: str) -> bool:
    """Return True if a task has the arm: DQN has one net, and V(s) has no action to multiply."""
    pi, vf, _ = ARMS[arm]
    algo, tier = TASKS[task]["algo"], TASKS[task]["tier"]
    if tier == "b":
        return arm in TIER_B
    if arm in ACTIVATIONS:
        return algo != "PPO"
    return pi == vf if algo == "DQN" else vf != "product" or algo in ("SAC", "TD3")


def policy_kwargs(spec: dict[str, Any], arm: str, widths: dict[str, int]) -> dict[str, Any]:
    """Return the `policy_kwargs` that build the arm with a width for each side."""
    *nets, others = ARMS[arm]
    sides = dict(zip(widths, nets))
    arch = {s: [widths[s]] * DEPTHS.get(net, len(spec["net_arch"])) for s, net in sides.items()}
    if len(widths) == 1:
        return {"net": nets[0], "net_arch": arch["q"], **others}
    return {"net": sides, "net_arch": arch, **others}


def counts(spec: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, int]:
    """Count the trainable parameters of each side's online networks."""
    policy_class = algorithm(spec).policy_aliases["StarMlpPolicy"]
    policy = policy_class(*spaces(spec["env"]), lambda _: 1e-3, **kwargs)
    sides = SIDES[spec["algo"]]
    numbers = dict.fromkeys(sides, 0)
    for name, parameter in policy.named_parameters():
        on = [side for side, prefixes in sides.items() if name.startswith(prefixes)]
        if not on and "target" not in name:  # widths would be matched to a part of a net
            raise ValueError(f"{name} of {policy_class.__name__} is on no side of {sides}")
        for side in on:
            numbers[side] += parameter.numel() // len(on)
    return numbers


def matched_widths(spec: dict[str, Any], arm: str) -> dict[str, int]:
    """Return the width of each side whose parameters come closest to the MLP's."""
    base = dict.fromkeys(SIDES[spec["algo"]], spec["net_arch"][0])
    want = counts(spec, policy_kwargs(spec, "mlp", base))
    matched = {}
    for side in base:

        def size(width: int, side: str = side) -> int:
            return counts(spec, policy_kwargs(spec, arm, {**base, side: width}))[side]

        above = 1 + bisect_left(range(1, 4 * base[side]), want[side], key=size)
        matched[side] = min((above, max(1, above - 1)), key=lambda w: abs(size(w) - want[side]))
    return matched


def algorithm(spec: dict[str, Any]) -> Any:
    """Return the class of the task's algorithm."""
    import stable_baselines3

    import starlayers.rl  # noqa: F401  registers the policies

    return getattr(stable_baselines3, spec["algo"])


@cache
def spaces(env: str) -> tuple[Any, Any]:
    """Return the spaces of observations and of actions."""
    import gymnasium

    with gymnasium.make(env) as instance:
        return instance.observation_space, instance.action_space
