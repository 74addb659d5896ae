"""What silently does not work in a model of stable-baselines3, one check each."""

import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from starlayers.modules import StarOp
from starlayers.rl.inspect import Subject

__all__ = ["CHECKS"]

#: gains of SB3's orthogonal initialisation
ORTHO_GAINS = (math.sqrt(2), 1.0, 0.01)


def some(names: list[str]) -> str:
    """The first names of a list."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def unowned(s: Subject) -> Iterator[str]:
    """Parameters that nothing trains."""
    lost = [
        name
        for name, p in s.policy.named_parameters()
        if p.requires_grad and id(p) not in s.owners and not name.split(".")[0].endswith("_target")
    ]
    if lost and not s.is_a("ARS"):
        yield f"no optimizer owns {some(lost)}, so that training leaves it as it is"


def foreign(s: Subject) -> Iterator[str]:
    """Tensors of optimizers that the policy has no more."""
    own = {id(p) for p in s.policy.parameters()}
    for name, optimizer in s.optimizers.items():
        groups = [p for group in optimizer.param_groups for p in group["params"]]
        shapes = [str(tuple(p.shape)) for p in groups if id(p) not in own]
        if shapes:
            yield (
                f"{name} owns {len(shapes)} tensors that are no longer in the policy, of shape "
                f"{some(shapes)}: make a new one over the parameters that there are"
            )


def stale(s: Subject) -> Iterator[str]:
    """What the algorithm remembers of the policy, and is no longer in it."""
    for name, part in s.policy.named_children():
        alias = vars(s.model).get(name)
        if isinstance(alias, nn.Module) and alias is not part:
            yield (
                f"model.{name} is no longer policy.{name}, and training uses it: "
                "model._create_aliases() renews it"
            )
    kept = {t.data_ptr() for t in s.policy.state_dict().values()}
    for name, tensors in vars(s.model).items():
        if "batch_norm_stats" in name and any(t.data_ptr() not in kept for t in tensors):
            yield f"model.{name} holds statistics that are no longer in the policy"


def targets(s: Subject) -> Iterator[str]:
    """Targets that are no copies of their networks."""
    for name, part in s.parts.items():
        target = s.parts.get(f"{name}_target")
        if target is None:
            continue
        online, copied = (
            [f"{k} {tuple(p.shape)}" for k, p in net.named_parameters()] for net in (part, target)
        )
        longest = max(len(online), len(copied))
        pairs = zip(*(x + ["nothing"] * (longest - len(x)) for x in (online, copied)))
        different = [f"{a} beside {b}" for a, b in pairs if a != b]
        if different:
            yield (
                f"{name} and {name}_target differ, and target updates go by position: "
                f"{some(different)}"
            )


def log_density(s: Subject) -> Tensor:
    """Of the likeliest actions on two observations, by which actors are told from critics."""
    distribution = s.distribution(s.observations(2), 2)
    density: Tensor = distribution.log_prob(distribution.get_actions(deterministic=True)).sum()
    return density


def frozen_by_trpo(s: Subject) -> Iterator[str]:
    """Parameters of the actor that TRPO takes for the critic's, by their names."""
    if not s.is_a("TRPO"):
        return
    named = {n: p for n, p in s.policy.named_parameters() if p.requires_grad and "value" in n}
    density = log_density(s)
    if not named or not density.requires_grad:
        return
    grads = torch.autograd.grad(density, list(named.values()), allow_unused=True)
    frozen = [name for name, grad in zip(named, grads) if grad is not None]
    if frozen:
        yield (
            f"the policy update of TRPO skips {some(frozen)}: it takes every parameter with "
            "'value' in its name for the critic's; rename it"
        )


def spared_by_trpo(s: Subject) -> Iterator[str]:
    """Trunks that TRPO takes for the actor's alone, because the actor uses them too."""
    if not s.is_a("TRPO"):
        return
    named = {n: p for n, p in s.policy.mlp_extractor.named_parameters() if p.requires_grad}
    density, value = log_density(s), s.policy.predict_values(s.observations(2)).sum()
    if not (named and density.requires_grad and value.requires_grad):
        return
    grads = [
        torch.autograd.grad(y, list(named.values()), allow_unused=True) for y in (density, value)
    ]
    both = [n for n, a, b in zip(named, *grads) if a is not None and b is not None]
    if both:
        yield (
            f"the value updates of TRPO spare {some([f'mlp_extractor.{n}' for n in both])}, which "
            "the actor uses too: give the critic tensors of its own, as StarActorCriticPolicy does"
        )


def forgotten(s: Subject) -> Iterator[str]:
    """Options that do not survive `policy.save`."""
    option = "share_features_extractor"
    value = getattr(s.policy, option, None)
    if value is None or option in s.policy._get_constructor_parameters():
        return
    mro: tuple[Any, ...] = type(s.policy).__mro__
    inits = [inspect.signature(cls.__init__).parameters for cls in mro]
    default = next((p[option].default for p in inits if option in p), value)
    if default != value:
        yield (
            f"policy.save and policy.load forget {option}={value}, and {type(s.policy).__name__} "
            f"comes back with {default}: use model.save, or a star policy"
        )


def overwritten(s: Subject) -> Iterator[str]:
    """Star layers that began as plain layers until SB3 initialised them anew."""
    if not getattr(s.policy, "ortho_init", False):
        return
    names = [
        name
        for name, m in s.policy.named_modules()
        if isinstance(m, StarOp) and m.offset == 1 and orthogonal(m.f2.weight.detach())
    ]
    if names:
        yield (
            f"ortho_init=True initialised the branches of {some(names)} anew, the second as large "
            "as the first: pass ortho_init=False, or use a star policy or extractor"
        )


def orthogonal(weight: Tensor) -> bool:
    """Whether a matrix is what SB3's orthogonal initialisation leaves."""
    w = weight if weight.shape[0] <= weight.shape[1] else weight.T
    gram, eye = w @ w.T, torch.eye(len(w), device=w.device, dtype=w.dtype)
    return any(torch.allclose(gram, g * g * eye, rtol=0, atol=1e-3 * g * g) for g in ORTHO_GAINS)


def statistics(s: Subject) -> Iterator[str]:
    """Batch statistics and dropout where an algorithm does not keep them right."""
    moving = s.moving()
    modules = dict(s.policy.named_modules())
    norms = {name.rpartition(".")[0] for name in moving}
    if s.actor_critic:
        norms |= {
            k for k, m in modules.items() if getattr(m, "p", 0) and "Dropout" in type(m).__name__
        }
    kinds = {k: type(modules[k]).__name__ for k in modules if k in norms}
    algorithm = type(s.model).__name__
    for name, kind in kinds.items():
        if s.actor_critic:
            yield (
                f"{name} ({kind}) differs between evaluation mode, in which {algorithm} collects, "
                "and training mode, in which it updates: it updates another policy than the one "
                "that acted; use LayerNorm, or VecNormalize for observations"
            )
        elif s.is_a("CrossQ") and kind != "BatchRenorm1d":
            yield (
                f"{name} ({kind}) always uses the statistics of the batch while CrossQ trains: it "
                "switches only BatchRenorm1d of sb3-contrib"
            )
    lost = [k for k in moving if f"{k.split('.')[0]}_target" in s.parts and "running_" not in k]
    if lost:
        yield (
            f"the target never gets {some(lost)}: a statistic is copied where its name has "
            "'running_' in it"
        )


CHECKS = (
    unowned,
    foreign,
    stale,
    targets,
    frozen_by_trpo,
    spared_by_trpo,
    forgotten,
    overwritten,
    statistics,
)
