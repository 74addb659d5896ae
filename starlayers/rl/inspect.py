"""Inspection of a model of SB3: networks, optimizers, a forward pass."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium.vector.utils import batch_space
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from starlayers.backend import use_backend


@dataclass(frozen=True)
class Network:
    """One network of a policy, or one parameter outside of networks.

    Args:
        name: its path in the policy.
        kind: name of its class.
        shared: other paths to the same network.
        parameters: number of its parameters.
        trained: number of those that need gradients and are in an optimizer.
        flops: of matrix products and convolutions for one observation, two per multiply-add.
        optimizers: names of the optimizers that hold parameters of it.
        learning_rates: of those parameters, now.

    Example:
        >>> from stable_baselines3 import PPO
        >>> from starlayers.rl import describe
        >>> model = PPO("MlpPolicy", "CartPole-v1", device="cpu")
        >>> describe(model).networks[-1]  # doctest: +NORMALIZE_WHITESPACE
        Network(name='value_net', kind='Linear', shared=(), parameters=65, trained=65, flops=128,
                optimizers=('policy.optimizer',), learning_rates=(0.0003,))
    """

    name: str
    kind: str
    shared: tuple[str, ...]
    parameters: int
    trained: int
    flops: int
    optimizers: tuple[str, ...]
    learning_rates: tuple[float, ...]

    def cells(self) -> tuple[str, ...]:
        """Format the fields for a table, one string per column."""
        trains = "yes" if self.trained == self.parameters else f"{self.trained:,} of them"
        return (
            self.name,
            self.kind,
            ", ".join(self.shared),
            f"{self.parameters:,}",
            f"{self.flops:,}",
            ", ".join(self.optimizers),
            ", ".join(f"{rate:g}" for rate in self.learning_rates),
            (trains if self.trained else "no") if self.parameters else "",
        )


class Inspector:
    """Access to the parts of a model by name, and ways to run them, for the function `caller`."""

    def __init__(self, model: Any, caller: str = "Inspector") -> None:
        if not isinstance(model, BaseAlgorithm):
            raise TypeError(
                f"{caller} takes a model of stable-baselines3 or sb3-contrib, such as PPO, "
                f"got {type(model).__name__}"
            )
        self.model: Any = model
        # a compiled policy wraps the one that was built
        self.policy: Any = getattr(model.policy, "_orig_mod", model.policy)
        #: parts with a forward of their own: the actor, critics, Q networks and their targets
        self.parts = {
            name: part
            for name, part in self.policy.named_children()
            if hasattr(part, "observation_space")
        }
        self.actor_critic = hasattr(self.policy, "mlp_extractor")
        self.optimizers = {
            f"{name}.optimizer": part.optimizer
            for name, part in {"policy": self.policy, **self.parts}.items()
            if isinstance(getattr(part, "optimizer", None), torch.optim.Optimizer)
        }
        #: id of a parameter -> names and learning rates of the optimizers that hold it
        self.optimizers_of: dict[int, list[tuple[str, float]]] = {}
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                for p in group["params"]:
                    self.optimizers_of.setdefault(id(p), []).append((name, float(group["lr"])))

    def is_algorithm(self, name: str) -> bool:
        """Return True if the model is of the named algorithm, which need not be installed."""
        return any(cls.__name__ == name for cls in type(self.model).__mro__)

    @contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """Set evaluation mode; afterwards restore modes, buffers and random seeds."""
        modules = [(m, m.training) for m in self.policy.modules()]
        buffers = [(b, b.clone()) for b in self.policy.buffers()]
        devices = [self.policy.device] if self.policy.device.type == "cuda" else []
        self.policy.train(False)
        try:
            with use_backend("eager"), torch.random.fork_rng(devices):
                yield
        finally:
            for module, training in modules:
                module.training = training
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)

    def observations(self, n: int) -> Any:
        """Sample `n` observations as tensors, as the policy takes them."""
        space = batch_space(self.model.observation_space, n)
        space.seed(0)
        return self.policy.obs_to_tensor(space.sample())[0]

    def run(self, n: int = 1) -> None:
        """Run actor, critics and targets on `n` random observations."""
        obs = self.observations(n)
        with torch.no_grad():
            if state := self.lstm_state(n):
                self.distribution(obs, n)
                self.policy.predict_values(obs, *state)
            elif not self.parts:
                self.policy(obs)
            for name, part in self.parts.items():
                if name.startswith("critic"):
                    size = int(np.prod(self.policy.action_space.shape))
                    part(obs, torch.zeros(n, size, device=self.policy.device))
                else:
                    part(obs)

    def distribution(self, obs: Any, n: int) -> Any:
        """Return the distribution of the actions for `n` observations."""
        result = self.policy.get_distribution(obs, *self.lstm_state(n))
        # a recurrent policy returns its state as well
        return result[0] if isinstance(result, tuple) else result

    def lstm_state(self, n: int) -> tuple[Any, ...]:
        """Return zero states and episode starts of a recurrent policy, else `()`."""
        lstm = getattr(self.policy, "lstm_actor", None)
        if lstm is None:
            return ()
        zeros = torch.zeros(lstm.num_layers, n, lstm.hidden_size, device=self.policy.device)
        return (zeros, zeros), torch.zeros(n, device=self.policy.device)

    def networks(self) -> Iterator[Network]:
        """Yield a `Network` for each network, under its first name."""
        named: dict[int, tuple[Any, list[str]]] = {}
        for path, net in self._paths():
            of_module = isinstance(net, nn.Module) and "features_extractor" not in path
            if not of_module or any(True for _ in net.parameters()):
                named.setdefault(id(net), (net, []))[1].append(path)
        flops = self.flops([net for net, _ in named.values()])
        for key, (net, (name, *shared)) in named.items():
            parameters = list(net.parameters()) if isinstance(net, nn.Module) else [net]
            holders = [h for p in parameters for h in self.optimizers_of.get(id(p), ())]
            trained = [p for p in parameters if p.requires_grad and id(p) in self.optimizers_of]
            if self.is_algorithm("ARS") and parameters:  # it searches without gradients
                progress = self.model._current_progress_remaining
                holders = [("ARS", float(self.model.lr_schedule(progress)))]
                trained = parameters
            yield Network(
                name,
                type(net).__name__,
                tuple(shared),
                sum(p.numel() for p in parameters),
                sum(p.numel() for p in trained),
                flops.get(key, 0),
                tuple(dict.fromkeys(name for name, _ in holders)),
                tuple(dict.fromkeys(rate for _, rate in holders)),
            )

    def _paths(self) -> Iterator[tuple[str, Any]]:
        """Yield path and module (or parameter) of everything that counts as a network."""
        # an actor-critic policy has its first extractor under two names
        skipped = {*self.parts, *(["features_extractor"] if self.actor_critic else [])}
        for name, net in _members(self.policy):
            if name == "mlp_extractor" and not net._parameters:
                for inner, trunk in net._modules.items():
                    yield f"mlp_extractor.{inner}", trunk
                if getattr(net, "share", False):  # `share_trunk=True`
                    yield "mlp_extractor.value_net", net.policy_net
            elif name not in skipped:
                yield name, net
        for prefix, part in self.parts.items():
            yield from ((f"{prefix}.{name}", net) for name, net in _members(part))

    def flops(self, networks: list[Any]) -> dict[int, int]:
        """Count the FLOPs of each network for one observation, by its id."""
        calls: dict[nn.Module, tuple[Any, Any]] = {}

        def record(module: nn.Module, args: Any, kwargs: Any) -> None:
            calls.setdefault(module, (args, kwargs))

        with ExitStack() as hooks:
            for module in (net for net in networks if isinstance(net, nn.Module)):
                hooks.enter_context(module.register_forward_pre_hook(record, with_kwargs=True))
            self.run()
        counts = {}
        for module, (args, kwargs) in calls.items():
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                module(*args, **kwargs)
            counts[id(module)] = counter.get_total_flops()
            if isinstance(module, nn.RNNBase):  # runs as one operation, which is not counted
                weights = [p for n, p in module.named_parameters() if "weight" in n]
                counts[id(module)] = 2 * sum(p.numel() for p in weights)
        return counts

    def running_statistics(self) -> list[str]:
        """Return the names of the buffers that a forward pass in training mode changes."""
        before = {name: buffer.clone() for name, buffer in self.policy.named_buffers()}
        online = [part for name, part in self.parts.items() if not name.endswith("_target")]
        with self.evaluation_mode():
            for part in online or [self.policy]:
                part.train(True)
            self.run(4)
            return [
                name
                for name, buffer in self.policy.named_buffers()
                if buffer.is_floating_point() and not torch.equal(buffer, before[name])
            ]


def _members(module: nn.Module) -> list[tuple[str, Any]]:
    """Return children and own parameters of a module by name, under all of their names."""
    members = [*module._modules.items(), *module._parameters.items()]
    return [(name, member) for name, member in members if member is not None]
