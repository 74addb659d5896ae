"""Star gates in trained agents of stable-baselines3."""

import warnings
from functools import cache
from typing import Any, TypeVar

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.optim import Optimizer

from starlayers.checks import positive_int
from starlayers.rl.critics import ProductTerm
from starlayers.surgery.find import Patterns, find_mlps
from starlayers.surgery.gates import name_of
from starlayers.surgery.install import install_plain, installed, settle_fast_paths
from starlayers.surgery.projection import StarProjection, parse_gate
from starlayers.surgery.saving import apply_record, record_of
from starlayers.surgery.site import join
from starlayers.surgery.starify import revert as revert_module

Algorithm = TypeVar("Algorithm", bound=BaseAlgorithm)

#: name of the parameter group of the optimizers that holds the added parameters
GROUP = "star_gates"


def starify(
    model: Algorithm,
    gate: str = "full",
    *,
    product: int = 0,
    include: Patterns = None,
    exclude: Patterns = None,
) -> Algorithm:
    """Turn the MLPs of an agent into star MLPs in place, with unchanged outputs.

    Each `act(inp(x))` of the policy becomes `act(inp(x)) * (1 + gate(x))` with a zero gate, in
    online and target networks alike: actions, values and log-probabilities stay the same to the
    bit. The moments of the optimizers stay, and the gates join the optimizers of their layers as
    a group of their own. `model.save`, `Algorithm.load` and `model.learn` go on as before.

    Args:
        model: an algorithm of stable-baselines3 or sb3-contrib, new, trained or just loaded.
        gate: "full", "low_rank=r" or "scale", as in `starlayers.starify`.
        product: width of a `ProductTerm` for each critic of states and actions (SAC, TD3, DDPG,
            TQC, CrossQ); 0 for none.
        include: names, or patterns as in `fnmatch`, of MLPs below the policy or of modules that
            contain them; `None` for all. Target networks follow their online networks.
        exclude: names or patterns of those to leave out.

    Returns:
        `model` itself. MLPs that are stars already stay as they are, and so do product terms.

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
    mlps = [
        mlp
        for mlp in find_mlps(policy, include=include, exclude=exclude)
        if not mlp.path.split(".")[0].endswith("_target")
    ]
    plain = [mlp for mlp in mlps if mlp.reason is None and mlp.site.form == "plain"]
    if not (plain or product or _layers(policy)):
        reasons = dict.fromkeys(f"{mlp.path}: {mlp.reason}" for mlp in mlps[:3] if mlp.reason)
        raise ValueError(
            f"starify found no plain MLP in this {type(policy).__name__}: "
            + ("; ".join(reasons) or "no activation is directly between two of its linear layers")
            + ("; product=64 gives its critics a product term" if _critics(policy) else "")
        )
    existing = set(_layers(policy))
    for mlp in plain:
        install_plain(policy.get_submodule(mlp.owner), mlp.site, gate)
    for online, target in _target_pairs(policy):
        _copy_gates(online, target)
    _add_products(policy, product)
    _update_targets_and_optimizers(policy, existing)
    if not isinstance(policy, Starified):
        policy.__class__ = starified(type(policy))
    width = model.policy_kwargs.get("surgery", {}).get("product") or product
    surgery = {"surgery": {"gates": record_of(policy), "product": width}}
    vars(policy)["made_with"] = vars(policy).get("made_with", model.policy_kwargs) | surgery
    return _with_kwargs(model, model.policy_kwargs | surgery)


def revert(model: Algorithm) -> Algorithm:
    """Remove from an agent and its optimizers, in place, what `starify` added.

    The policy's own parameters and their moments stay as they are now. Where a gate or a product
    term is no longer zero, a warning says so, because what it learned is lost.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` is no algorithm.
        ValueError: the agent is not starified.

    Example:
        >>> from stable_baselines3 import PPO
        >>> model = PPO("MlpPolicy", "CartPole-v1", device="cpu")
        >>> before = list(model.policy.state_dict())
        >>> list(revert(starify(model)).policy.state_dict()) == before
        True
    """
    policy = _policy_of(model, "revert")
    if not isinstance(policy, Starified):
        raise ValueError(
            f"revert: rl.starify has changed nothing in this {type(policy).__name__} of "
            f"{type(model).__name__}"
        )
    if any(True for _ in installed(policy)):
        revert_module(policy)
    largest = 0.0
    for critic in _critics(policy):
        for i, q in enumerate(critic.q_networks):
            if isinstance(q, ProductTerm):
                largest = max(largest, q.head.weight.detach().abs().max().item())
                _replace_network(critic, i, q.q)
    if largest > 0:
        warnings.warn(
            f"revert: the product terms of the critics were not zero and are lost; largest weight "
            f"{largest:.3g}",
            stacklevel=2,
        )
    _update_targets_and_optimizers(policy, set())
    policy.__class__ = type(policy).__bases__[1]
    del policy.made_with
    return _with_kwargs(model, {k: v for k, v in model.policy_kwargs.items() if k != "surgery"})


class Starified(BasePolicy):
    """Policy that rebuilds its gates and product terms when it is constructed.

    Base of the classes that `starified(base)` makes; `type(model.policy)` is one after `starify`,
    which writes the argument `surgery` into `model.policy_kwargs`.
    """

    def __init__(self, *args: Any, surgery: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _add_products(self, surgery["product"])
        if surgery["gates"]:
            apply_record(self, surgery["gates"])
        _update_targets_and_optimizers(self, set())
        self.made_with = {**kwargs, "surgery": surgery}

    def _get_constructor_parameters(self) -> dict[str, Any]:
        # SB3 leaves out some of its own: an unshared features extractor would come back shared
        made_with = {k: v for k, v in self.made_with.items() if k not in ("width", "depth")}
        return {**made_with, **super()._get_constructor_parameters()}

    def __reduce__(self) -> tuple[Any, ...]:
        # the class is made at run time, so that pickle cannot import it: refer to its base
        return _blank, (type(self).__bases__[1],), vars(self)


StarLayer = StarProjection | ProductTerm


@cache
def starified(base: type[BasePolicy]) -> type[Starified]:
    """Return the class that policies of class `base` have after `starify`.

    Needed to load what `policy.save` wrote: `starified(MlpPolicy).load(path)`.

    Example:
        >>> import tempfile
        >>> from stable_baselines3 import SAC
        >>> from stable_baselines3.sac import MlpPolicy
        >>> model = starify(SAC("MlpPolicy", "Pendulum-v1", device="cpu"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.policy.save(f"{folder}/policy.pth")
        ...     policy = starified(MlpPolicy).load(f"{folder}/policy.pth", device="cpu")
        >>> list(policy.state_dict()) == list(model.policy.state_dict())
        True
    """
    return type(f"Starified{base.__name__}", (Starified, base), {"__module__": __name__})


def _blank(base: type[BasePolicy]) -> Starified:
    """Make a starified policy without its state; pickled policies refer to this name."""
    return starified(base).__new__(starified(base))


def _policy_of(model: BaseAlgorithm, verb: str) -> BasePolicy:
    """Return the policy of a model, or raise an error that names the function `verb`."""
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


def _target_pairs(policy: BasePolicy) -> list[tuple[nn.Module, nn.Module]]:
    """Return online network and target network of every target."""
    children = dict(policy.named_children())
    return [(m, children[f"{n}_target"]) for n, m in children.items() if f"{n}_target" in children]


def _critics(policy: BasePolicy) -> list[Any]:
    """Return the critics of states and actions, targets among them."""
    return [child for child in policy.children() if getattr(child, "q_networks", None)]


def _layers(module: nn.Module) -> list[StarLayer]:
    """Return the layers that surgery added below a module."""
    return [m for m in module.modules() if isinstance(m, (StarProjection, ProductTerm))]


def _parameters(layer: StarLayer) -> tuple[list[Tensor], list[Tensor]]:
    """Return the parameters a layer had before surgery, and the added ones."""
    if isinstance(layer, StarProjection):
        return list(layer.inp.parameters()), list(layer.gate.parameters())
    added = [layer.state, layer.action, layer.head]
    return list(layer.q.parameters()), [p for m in added for p in m.parameters()]


def _add_products(policy: BasePolicy, width: int) -> None:
    """Put a `ProductTerm` around every critic network without one; 0 for none."""
    for critic in _critics(policy) if width else ():
        states = critic.features_extractor.features_dim
        actions, outputs = get_action_dim(critic.action_space), getattr(critic, "n_quantiles", 1)
        for i, q in enumerate(critic.q_networks):
            if not isinstance(q, ProductTerm):
                _replace_network(critic, i, ProductTerm(q, states, actions, outputs, width))


def _replace_network(critic: Any, i: int, network: nn.Module) -> None:
    """Replace the i-th network of a critic, in its list and among its children."""
    (name,) = (name for name, m in critic.named_children() if m is critic.q_networks[i])
    setattr(critic, name, network)
    critic.q_networks[i] = network


def _copy_gates(online: nn.Module, target: nn.Module) -> None:
    """Install in a target network the gates that only its online network has."""
    record, present = record_of(online), {name_of(path, m) for path, _, m in installed(target)}
    layers = record.get("layers", [])
    missing = [e for e in layers if join(e["owner"], e["site"]["inp"]) not in present]
    if missing:
        apply_record(target, {**record, "layers": missing})


def _update_targets_and_optimizers(policy: BasePolicy, existing: set[StarLayer]) -> None:
    """Make targets and optimizers agree with the star layers of a policy.

    Layers of targets that are not in `existing` get the added parameters of their online networks.
    Every optimizer gets, as its last group, the added parameters of the layers whose own parameters
    it holds.
    """
    settle_fast_paths(policy)
    for online, target in _target_pairs(policy):
        for source, copied in zip(_layers(online), _layers(target), strict=True):
            if copied not in existing:
                for p, q in zip(_parameters(source)[1], _parameters(copied)[1], strict=True):
                    q.data.copy_(p.data)
    for module in policy.modules():
        optimizer = vars(module).get("optimizer")
        if isinstance(optimizer, Optimizer):
            _regroup(optimizer, _layers(policy))


def _regroup(optimizer: Optimizer, layers: list[StarLayer]) -> None:
    """Renew an optimizer's group of added parameters; drop unused states."""
    groups = [group for group in optimizer.param_groups if group.get("name") != GROUP]
    held = {id(p) for group in groups for p in group["params"]}
    split = map(_parameters, layers)
    added = [p for own, new in split if any(id(p) in held for p in own) for p in new]
    # one group in the order of the layers, as a policy has it that is built from its record
    optimizer.param_groups[:] = groups
    if added:
        optimizer.add_param_group({**groups[0], "params": added, "name": GROUP})
    kept = held | {id(p) for p in added}
    for p in [p for p in optimizer.state if id(p) not in kept]:
        del optimizer.state[p]


def _with_kwargs(model: Algorithm, policy_kwargs: dict[str, Any]) -> Algorithm:
    """Match class, arguments and (in ARS) vector of parameters of a model to its policy."""
    model.policy_class, model.policy_kwargs = type(model.policy), policy_kwargs
    if hasattr(model, "n_params"):
        model.weights = parameters_to_vector(model.policy.parameters()).detach()  # type: ignore
        model.n_params = len(model.weights)  # type: ignore
    return model
