"""Star gates in agents of stable-baselines3 that are trained already, and the way back."""

import warnings
from functools import cache
from typing import Any, TypeVar

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.optim import Optimizer

from starlayers.modules import positive_int
from starlayers.rl.critics import ProductTerm
from starlayers.surgery.find import Patterns, find_mlps
from starlayers.surgery.gates import name_of
from starlayers.surgery.install import install_plain, installed, settle_fast_paths
from starlayers.surgery.projection import StarProjection, parse_gate
from starlayers.surgery.saving import apply_record, record_of
from starlayers.surgery.site import join
from starlayers.surgery.starify import revert as revert_module

__all__ = ["Starified", "revert", "starified", "starify"]

Algorithm = TypeVar("Algorithm", bound=BaseAlgorithm)

#: name of the parameter group that holds what surgery has added
GROUP = "star_gates"


def starify(
    model: Algorithm,
    gate: str = "full",
    *,
    product: int = 0,
    include: Patterns = None,
    exclude: Patterns = None,
) -> Algorithm:
    """Turn the MLPs of an agent into star MLPs, in place, without changing what it computes.

    Each `act(inp(x))` of the policy becomes `act(inp(x)) * (1 + gate(x))` with a zero gate, in
    online and target networks alike: actions, values and log-probabilities stay the same to the
    bit. The moments of the optimizers stay, and the gates join the optimizers of their layers as
    a group of their own. `model.save`, `Algorithm.load` and `model.learn` go on as before.

    Args:
        model: an algorithm of stable-baselines3 or sb3-contrib, new, trained or just loaded.
        gate: "full", "low_rank=r" or "scale", as in `starlayers.starify`.
        product: width of a `ProductTerm` for each critic of states and actions (SAC, TD3, DDPG,
            TQC, CrossQ); 0 for none.
        include, exclude: names, or patterns as in `fnmatch`, of MLPs below the policy or of
            modules above them. Target networks follow their online networks.

    Returns:
        `model` itself. What is a star already stays as it is, gates and product terms too.

    Raises:
        TypeError: `model` is no algorithm, or an argument has the wrong type.
        ValueError: an unknown gate, a pattern that matches nothing, a product without critics of
            states and actions, a compiled policy, or nothing to replace.

    Example:
        >>> from stable_baselines3 import PPO
        >>> model = PPO("MlpPolicy", "CartPole-v1", device="cpu")
        >>> x = torch.randn(5, 4)
        >>> before = model.policy.predict_values(x)
        >>> torch.equal(starify(model).policy.predict_values(x), before)
        True
        >>> [len(group["params"]) for group in model.policy.optimizer.param_groups]
        [12, 8]
    """
    policy = _policy_of(model, "starify")
    parse_gate(gate)
    product = product and positive_int("starify", "product", product)
    if product and not _critics(policy):
        raise ValueError(
            f"starify: product={product} needs critics of states and actions, as SAC, TD3, DDPG, "
            f"TQC and CrossQ have; the {type(policy).__name__} of {type(model).__name__} has none"
        )
    targets = {name for name, _, _ in _pairs(policy)}
    found = find_mlps(policy, include=include, exclude=exclude)
    found = [f for f in found if f.path.split(".")[0] not in targets]
    plain = [f for f in found if f.reason is None and f.site.form == "plain"]
    if not (plain or product or _layers(policy)):
        reasons = dict.fromkeys(f"{f.path}: {f.reason}" for f in found[:3] if f.reason)
        raise ValueError(
            f"starify found no plain MLP in this {type(policy).__name__}: "
            + ("; ".join(reasons) or "no activation is directly between two of its linear layers")
            + ("; product=64 gives its critics a product term" if _critics(policy) else "")
        )
    before = set(_layers(policy))
    for f in plain:
        install_plain(policy.get_submodule(f.owner), f.site, gate)
    for _, online, target in _pairs(policy):
        _mirror(online, target)
    _add_products(policy, product)
    _settle(policy, before)
    if not isinstance(policy, Starified):
        policy.__class__ = starified(type(policy))
        vars(policy)["made_with"] = model.policy_kwargs
    width = model.policy_kwargs.get("surgery", {}).get("product") or product
    surgery = {"gates": record_of(policy), "product": width}
    model.policy_class = type(policy)
    model.policy_kwargs = {**model.policy_kwargs, "surgery": surgery}
    vars(policy)["made_with"] = {**vars(policy)["made_with"], "surgery": surgery}
    _refresh_vector(model)
    return model


def revert(model: Algorithm) -> Algorithm:
    """Take out of an agent and its optimizers what `starify` put into them, in place.

    The policy's own parameters and their moments stay as they are by now. Where a gate or a
    product term has moved away from zero, a warning says so, because what it learned is lost.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` is no algorithm.
        ValueError: there is nothing to take out.

    Example:
        >>> from stable_baselines3 import PPO
        >>> model = PPO("MlpPolicy", "CartPole-v1", device="cpu")
        >>> type(revert(starify(model)).policy).__name__
        'ActorCriticPolicy'
    """
    policy = _policy_of(model, "revert")
    if not isinstance(policy, Starified):
        raise ValueError(
            f"revert: rl.starify has changed nothing in this {type(policy).__name__} of "
            f"{type(model).__name__}"
        )
    if any(True for _ in installed(policy)):
        revert_module(policy)
    size = 0.0
    for critic in _critics(policy):
        for i, q in enumerate(critic.q_networks):
            if isinstance(q, ProductTerm):
                size = max(size, q.head.weight.detach().abs().max().item())
                _replace(critic, i, q.q)
    if size > 0:
        warnings.warn(
            f"revert: the product terms of the critics were not zero and are lost; largest weight "
            f"{size:.3g}",
            stacklevel=2,
        )
    _settle(policy, set())
    policy.__class__ = type(policy).__bases__[1]
    del policy.made_with
    model.policy_class = type(policy)
    model.policy_kwargs = {k: v for k, v in model.policy_kwargs.items() if k != "surgery"}
    _refresh_vector(model)
    return model


class Starified(BasePolicy):
    """What a policy class gains by `starify`: it is built with the record of what was done to it.

    Use `starified(base)` for the class over a policy class, or `type(model.policy)`.

    Args:
        surgery: what `starify` keeps in `model.policy_kwargs`.
        args, kwargs: those of the policy class below.
    """

    def __init__(self, *args: Any, surgery: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _add_products(self, surgery["product"])
        if surgery["gates"]:
            apply_record(self, surgery["gates"])
        _settle(self, set())
        self.made_with = {**kwargs, "surgery": surgery}

    def _get_constructor_parameters(self) -> dict[str, Any]:
        # SB3 leaves out some of its own: an unshared features extractor would come back shared
        made_with = {k: v for k, v in self.made_with.items() if k not in ("width", "depth")}
        return {**made_with, **super()._get_constructor_parameters()}

    def __reduce__(self) -> tuple[Any, ...]:
        # pickle finds no class that was made at run time, but it finds what it was made from
        return _blank, (type(self).__bases__[1],), vars(self)


StarLayer = StarProjection | ProductTerm


@cache
def starified(base: type[BasePolicy]) -> type[Starified]:
    """The class of the policies of class `base` once they are starified.

    Needed to load what `policy.save` wrote: `starified(MlpPolicy).load(path)`.

    Example:
        >>> from stable_baselines3.sac.policies import SACPolicy
        >>> starified(SACPolicy).__name__, issubclass(starified(SACPolicy), SACPolicy)
        ('StarifiedSACPolicy', True)
    """
    return type(f"Starified{base.__name__}", (Starified, base), {"__module__": __name__})


def _blank(base: type[BasePolicy]) -> Starified:
    return starified(base).__new__(starified(base))


def _policy_of(model: BaseAlgorithm, verb: str) -> BasePolicy:
    if not isinstance(model, BaseAlgorithm):
        raise TypeError(
            f"starlayers.rl.{verb} expects an algorithm of stable-baselines3, got "
            f"{type(model).__name__}"
            + (f"; starlayers.surgery.{verb} takes modules" if isinstance(model, nn.Module) else "")
        )
    policy = getattr(model, "policy", None)
    if not isinstance(policy, BasePolicy):
        raise ValueError(
            f"{verb}: the policy of this {type(model).__name__} is a {type(policy).__name__}, no "
            f"policy of stable-baselines3; {verb} after it is set up, and before it is compiled"
        )
    return policy


def _pairs(policy: BasePolicy) -> list[tuple[str, nn.Module, nn.Module]]:
    """Every target network of a policy: its name, the online network, itself."""
    children = dict(policy.named_children())
    return [
        (name, children[name.removesuffix("_target")], target)
        for name, target in children.items()
        if name.endswith("_target") and name.removesuffix("_target") in children
    ]


def _critics(policy: BasePolicy) -> list[Any]:
    """The critics, and their targets, that take states and actions."""
    return [child for child in policy.children() if getattr(child, "q_networks", None)]


def _layers(module: nn.Module) -> list[StarLayer]:
    return [m for m in module.modules() if isinstance(m, (StarProjection, ProductTerm))]


def _parameters(layer: StarLayer) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters of a layer that were there before, and those that surgery added."""
    if isinstance(layer, StarProjection):
        return list(layer.inp.parameters()), list(layer.gate.parameters())
    new = [layer.state, layer.action, layer.head]
    return list(layer.q.parameters()), [p for m in new for p in m.parameters()]


def _add_products(policy: BasePolicy, width: int) -> None:
    for critic in _critics(policy) if width else ():
        states = critic.features_extractor.features_dim
        actions, outputs = get_action_dim(critic.action_space), getattr(critic, "n_quantiles", 1)
        for i, q in enumerate(critic.q_networks):
            if not isinstance(q, ProductTerm):
                _replace(critic, i, ProductTerm(q, states, actions, outputs, width))


def _replace(critic: Any, i: int, network: nn.Module) -> None:
    """Put a network in the place of a critic's i-th, in its list and among its children."""
    (name,) = (name for name, m in critic.named_children() if m is critic.q_networks[i])
    setattr(critic, name, network)
    critic.q_networks[i] = network


def _mirror(online: nn.Module, target: nn.Module) -> None:
    """Give a target network the gates that its online network has and it has not."""
    there = {name_of(path, star) for path, _, star in installed(target)}
    record = record_of(online)
    wanted = [
        entry
        for entry in record.get("layers", ())
        if join(entry["owner"], entry["site"]["inp"]) not in there
    ]
    if wanted:
        apply_record(target, {**record, "layers": wanted})


def _settle(policy: BasePolicy, before: set[StarLayer]) -> None:
    """Make targets and optimizers agree with the star layers there are.

    New layers of targets get the parameters of their online networks; every optimizer gets the
    added parameters of the layers whose own parameters it has, as its last group.
    """
    settle_fast_paths(policy)
    for _, online, target in _pairs(policy):
        for mine, theirs in zip(_layers(online), _layers(target), strict=True):
            if theirs not in before:
                for p, q in zip(_parameters(mine)[1], _parameters(theirs)[1], strict=True):
                    q.data.copy_(p.data)
    for module in policy.modules():
        optimizer = vars(module).get("optimizer")
        if isinstance(optimizer, Optimizer):
            _regroup(optimizer, _layers(policy))


def _regroup(optimizer: Optimizer, layers: list[StarLayer]) -> None:
    groups = [group for group in optimizer.param_groups if group.get("name") != GROUP]
    owned = {id(p) for group in groups for p in group["params"]}
    split = [_parameters(layer) for layer in layers]
    added = [p for old, new in split if any(id(p) in owned for p in old) for p in new]
    # one group in the order of the layers, as a rebuilt policy has it, whatever came first
    optimizer.param_groups[:] = groups
    if added:
        optimizer.add_param_group({**groups[0], "params": added, "name": GROUP})
    kept = owned | {id(p) for p in added}
    for p in [p for p in optimizer.state if id(p) not in kept]:
        del optimizer.state[p]


def _refresh_vector(model: Any) -> None:
    """ARS keeps all parameters of its policy in one vector as well."""
    if hasattr(model, "n_params"):
        model.weights = parameters_to_vector(model.policy.parameters()).detach()
        model.n_params = len(model.weights)
