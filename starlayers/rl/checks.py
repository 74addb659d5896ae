"""Checks of a model of SB3 for faults that raise no error."""

import inspect
import math
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from starlayers.modules import StarOp
from starlayers.rl.inspect import Inspector

#: gains of SB3's orthogonal initialisation
ORTHO_GAINS = (math.sqrt(2), 1.0, 0.01)


def first_three(names: list[str]) -> str:
    """Join the first three names of a list and say how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def without_optimizer(model: Inspector) -> Iterator[str]:
    """Find parameters that no optimizer holds."""
    missing = [
        name
        for name, p in model.policy.named_parameters()
        if p.requires_grad
        and id(p) not in model.optimizers_of
        and not name.split(".")[0].endswith("_target")
    ]
    if missing and not model.is_algorithm("ARS"):
        yield f"no optimizer has {first_three(missing)}, so that training does not change it"


def removed_tensors(model: Inspector) -> Iterator[str]:
    """Find tensors in optimizers that are no longer in the policy."""
    parameters = {id(p) for p in model.policy.parameters()}
    for name, optimizer in model.optimizers.items():
        held = [p for group in optimizer.param_groups for p in group["params"]]
        shapes = [str(tuple(p.shape)) for p in held if id(p) not in parameters]
        if shapes:
            tensors = "a tensor that is" if len(shapes) == 1 else f"{len(shapes)} tensors that are"
            yield (
                f"{name} has {tensors} no longer in the policy, of shape {first_three(shapes)}: "
                "make a new one over the parameters that there are"
            )


def stale_references(model: Inspector) -> Iterator[str]:
    """Find references of the algorithm to what the policy no longer has."""
    for name, part in model.policy.named_children():
        alias = vars(model.model).get(name)
        if isinstance(alias, nn.Module) and alias is not part:
            yield (
                f"model.{name} is no longer policy.{name}, and training uses it: "
                "model._create_aliases() renews it"
            )
    present = {t.data_ptr() for t in model.policy.state_dict().values()}
    for name, tensors in vars(model.model).items():
        if "batch_norm_stats" in name and any(t.data_ptr() not in present for t in tensors):
            yield f"model.{name} holds statistics that are no longer in the policy"


def different_targets(model: Inspector) -> Iterator[str]:
    """Find target networks whose parameters are not those of their online networks."""
    for name, part in model.parts.items():
        target = model.parts.get(f"{name}_target")
        if target is None:
            continue
        online, copied = (
            [f"{k} {tuple(p.shape)}" for k, p in net.named_parameters()] for net in (part, target)
        )
        pairs = zip_longest(online, copied, fillvalue="nothing")
        if different := [f"{a} against {b}" for a, b in pairs if a != b]:
            yield (
                f"{name} and {name}_target differ, and target updates go by position: "
                f"{first_three(different)}"
            )


def trpo_skips(model: Inspector) -> Iterator[str]:
    """Find parameters that TRPO leaves out, by their names or because actor and critic share them.

    The gradients of a log-probability and of a value tell which parameters the two depend on.
    """
    if not model.is_algorithm("TRPO"):
        return
    observations = model.observations(2)
    distribution = model.distribution(observations, 2)
    density = distribution.log_prob(distribution.get_actions(deterministic=True)).sum()
    acting = used(model, density)
    judging = used(model, model.policy.predict_values(observations).sum())
    if skipped := [name for name in acting if "value" in name]:
        yield (
            f"the policy update of TRPO skips {first_three(skipped)}: it takes every parameter "
            "with 'value' in its name for the critic's; rename it"
        )
    # a shared features extractor is what SB3's own policies have
    both = [name for name in acting if name in judging and name.startswith("mlp_extractor.")]
    if both:
        yield (
            f"the value updates of TRPO skip {first_three(both)}, which the actor uses too: give "
            "the critic separate tensors, as StarActorCriticPolicy does"
        )


def used(model: Inspector, y: Tensor) -> list[str]:
    """Return the names of the parameters that a sum depends on and training could change."""
    named = {name: p for name, p in model.policy.named_parameters() if p.requires_grad}
    if not y.requires_grad:
        return []
    grads = torch.autograd.grad(y, list(named.values()), allow_unused=True)
    return [name for name, grad in zip(named, grads) if grad is not None]


def unsaved_options(model: Inspector) -> Iterator[str]:
    """Find options that `policy.save` does not save."""
    option = "share_features_extractor"
    value = getattr(model.policy, option, None)
    if value is None or option in model.policy._get_constructor_parameters():
        return
    mro: tuple[Any, ...] = type(model.policy).__mro__
    signatures = [inspect.signature(cls.__init__).parameters for cls in mro]
    default = next((p[option].default for p in signatures if option in p), value)
    if default != value:
        yield (
            f"policy.save and policy.load forget {option}={value}, and "
            f"{type(model.policy).__name__} comes back with {default}: use model.save, or a star "
            "policy"
        )


def reinitialised_stars(model: Inspector) -> Iterator[str]:
    """Find star layers whose initialisation `ortho_init` has replaced."""
    if not getattr(model.policy, "ortho_init", False):
        return
    names = [
        name
        for name, m in model.policy.named_modules()
        if isinstance(m, StarOp) and m.offset == 1 and is_orthogonal(m.branch_layers()[1][0])
    ]
    if names:
        yield (
            f"ortho_init=True re-initialised the branches of {first_three(names)}, the second as "
            "large as the first: pass ortho_init=False, or use a star policy or extractor"
        )


def is_orthogonal(weight: Tensor) -> bool:
    """Return True if a matrix is orthogonal up to one of SB3's gains."""
    w = weight if weight.shape[0] <= weight.shape[1] else weight.T
    gram, eye = w @ w.T, torch.eye(len(w), device=w.device, dtype=w.dtype)
    return any(torch.allclose(gram, g * g * eye, rtol=0, atol=1e-3 * g * g) for g in ORTHO_GAINS)


def train_eval_differences(model: Inspector) -> Iterator[str]:
    """Find layers that compute differently when acting and when learning."""
    changed = {name.rpartition(".")[0] for name in model.running_statistics()}
    algorithm = type(model.model).__name__
    for name, module in model.policy.named_modules():
        kind = type(module).__name__
        dropout = getattr(module, "p", 0) and "Dropout" in kind
        if model.actor_critic and (name in changed or dropout):
            yield (
                f"{name} ({kind}) differs between evaluation mode, in which {algorithm} collects, "
                "and training mode, in which it updates: it updates another policy than the one "
                "that acted; use LayerNorm, or VecNormalize for observations"
            )
        elif model.is_algorithm("CrossQ") and name in changed and kind != "BatchRenorm1d":
            yield (
                f"{name} ({kind}) always uses the statistics of the batch while CrossQ trains: it "
                "switches only BatchRenorm1d of sb3-contrib"
            )


def uncopied_statistics(model: Inspector) -> Iterator[str]:
    """Find running statistics that the target networks never get."""
    uncopied = [
        name
        for name in model.running_statistics()
        if f"{name.split('.')[0]}_target" in model.parts and "running_" not in name
    ]
    if uncopied:
        yield (
            f"the target never gets {first_three(uncopied)}: a statistic is copied where its name "
            "has 'running_' in it"
        )


CHECKS: tuple[Callable[[Inspector], Iterator[str]], ...] = (
    without_optimizer,
    removed_tensors,
    stale_references,
    different_targets,
    trpo_skips,
    unsaved_options,
    reinitialised_stars,
    train_eval_differences,
    uncopied_statistics,
)
