"""A model of stable-baselines3 under examination: its networks, their owners, ways to run them."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from starlayers.backend import use_backend

__all__ = ["Network", "Subject"]


@dataclass(frozen=True)
class Network:
    """One network, or lone parameter, of a policy.

    Args:
        name: its path in the policy.
        kind: its class.
        shared: other paths that lead to it, of those who share it.
        parameters: all of them.
        trained: those that need gradients and are in an optimizer.
        flops: of matrix products and convolutions for one observation, two per multiply-add.
        optimizers: that own parameters of it.
        learning_rates: of those parameters, now.

    Example:
        >>> Network("action_net", "Linear", (), 130, 130, 256, ("policy.optimizer",), (3e-4,)).flops
        256
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
        """The row of the printed table."""
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


class Subject:
    """A model under examination: its parts by name, and ways to run them."""

    def __init__(self, model: Any) -> None:
        self.model = model
        # a compiled policy wraps the one that was built
        self.policy = getattr(model.policy, "_orig_mod", model.policy)
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
        self.owners: dict[int, list[tuple[str, float]]] = {}
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                for p in group["params"]:
                    self.owners.setdefault(id(p), []).append((name, float(group["lr"])))

    def is_a(self, algorithm: str) -> bool:
        """Whether the model is of the named algorithm, which need not be installed."""
        return any(cls.__name__ == algorithm for cls in type(self.model).__mro__)

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Evaluation mode inside; modes, buffers and seeds as they were afterwards."""
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
        """Random observations, as the policy takes them."""
        space = copy.deepcopy(self.model.observation_space)
        space.seed(0)
        samples = [space.sample() for _ in range(n)]
        if not hasattr(space, "spaces"):
            return self.policy.obs_to_tensor(np.stack([np.asarray(s) for s in samples]))[0]
        stacked = {k: np.stack([np.asarray(s[k]) for s in samples]) for k in space.spaces}
        return self.policy.obs_to_tensor(stacked)[0]

    def run(self, n: int = 1) -> None:
        """Run actor, critics and targets on random observations."""
        obs = self.observations(n)
        with torch.no_grad():
            if self.actor_critic and not self.lstm_state(n):
                self.policy(obs)
            elif self.actor_critic:
                self.distribution(obs, n)
                self.policy.predict_values(obs, *self.lstm_state(n))
            elif not self.parts:
                self.policy(obs)
            for name, part in self.parts.items():
                if name.startswith("critic"):
                    size = int(np.prod(self.policy.action_space.shape))
                    part(obs, torch.zeros(n, size, device=self.policy.device))
                else:
                    part(obs)

    def distribution(self, obs: Any, n: int) -> Any:
        """That of the actions; a recurrent policy returns its state beside it."""
        found = self.policy.get_distribution(obs, *self.lstm_state(n))
        return found[0] if isinstance(found, tuple) else found

    def lstm_state(self, n: int) -> tuple[Any, ...]:
        lstm = getattr(self.policy, "lstm_actor", None)
        if lstm is None:
            return ()
        zeros = torch.zeros(lstm.num_layers, n, lstm.hidden_size, device=self.policy.device)
        return (zeros, zeros), torch.zeros(n, device=self.policy.device)

    def networks(self) -> Iterator[Network]:
        """A row per network, wherever it is found first."""
        named = self.named()
        flops = self.flops([net for net, _ in named.values()])
        for key, (net, (name, *shared)) in named.items():
            parameters = list(net.parameters()) if isinstance(net, nn.Module) else [net]
            owners = [o for p in parameters for o in self.owners.get(id(p), ())]
            trained = [p for p in parameters if p.requires_grad and id(p) in self.owners]
            if self.is_a("ARS") and parameters:  # searches without gradients
                owners, trained = (
                    [
                        (
                            "ARS",
                            float(self.model.lr_schedule(self.model._current_progress_remaining)),
                        )
                    ],
                    parameters,
                )
            yield Network(
                name,
                type(net).__name__,
                tuple(shared),
                sum(p.numel() for p in parameters),
                sum(p.numel() for p in trained),
                flops.get(key, 0),
                tuple(dict.fromkeys(owner for owner, _ in owners)),
                tuple(dict.fromkeys(rate for _, rate in owners)),
            )

    def named(self) -> dict[int, tuple[Any, list[str]]]:
        """The networks and all of their names."""
        found: dict[int, tuple[Any, list[str]]] = {}

        def enter(path: str, net: Any) -> None:
            # a module or parameter of a policy may be `None`
            if net is not None:
                found.setdefault(id(net), (net, []))[1].append(path)

        # an actor-critic policy has its first extractor under two names
        skipped = {*self.parts, *(["features_extractor"] if self.actor_critic else [])}
        for name, net in [*self.policy._modules.items(), *self.policy._parameters.items()]:
            if name == "mlp_extractor" and not net._parameters:
                for inner, trunk in net._modules.items():
                    enter(f"mlp_extractor.{inner}", trunk)
                if getattr(net, "share", False):  # `share_trunk=True`
                    enter("mlp_extractor.value_net", net.policy_net)
            elif name not in skipped:
                enter(name, net)
        for prefix, part in self.parts.items():
            for name, net in [*part._modules.items(), *part._parameters.items()]:
                enter(f"{prefix}.{name}", net)
        return {
            key: (net, names)
            for key, (net, names) in found.items()
            if "features_extractor" in names[0]
            or not isinstance(net, nn.Module)
            or any(True for _ in net.parameters())
        }

    def flops(self, networks: list[Any]) -> dict[int, int]:
        """FLOPs of each network for one observation, by its identity."""
        started: dict[int, int] = {}
        found: dict[int, int] = {}
        with FlopCounterMode(display=False) as counter:

            def before(module: nn.Module, _: Any) -> None:
                started[id(module)] = counter.get_total_flops()

            def after(module: nn.Module, _: Any, __: Any) -> None:
                flops = counter.get_total_flops() - started[id(module)]
                if isinstance(module, nn.RNNBase):  # runs as one operation, which is not counted
                    flops = 2 * sum(
                        p.numel() for n, p in module.named_parameters() if "weight" in n
                    )
                found.setdefault(id(module), flops)

            modules = [net for net in networks if isinstance(net, nn.Module)]
            handles = [m.register_forward_pre_hook(before) for m in modules]
            handles += [m.register_forward_hook(after) for m in modules]
            try:
                self.run()
            finally:
                for handle in handles:
                    handle.remove()
        return found

    def moving(self) -> list[str]:
        """The buffers that a step of training changes: running statistics."""
        buffers = {name: (b, b.clone()) for name, b in self.policy.named_buffers()}
        online = [part for name, part in self.parts.items() if not name.endswith("_target")]
        for part in online or [self.policy]:
            part.train(True)
        self.run(4)
        for part in online or [self.policy]:
            part.train(False)
        moved = [
            name
            for name, (now, value) in buffers.items()
            if now.is_floating_point() and not torch.equal(now, value)
        ]
        for now, value in buffers.values():
            now.copy_(value)
        return moved
