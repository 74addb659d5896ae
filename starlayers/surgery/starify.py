"""`starify` turns the MLPs of a model into star MLPs, `revert` turns them back."""

import warnings
from typing import Any

from torch import nn

from starlayers.checks import positive_int
from starlayers.surgery.adapters import settle_adapter_hooks
from starlayers.surgery.adopted import Adopted, release, released_class
from starlayers.surgery.experts import experts_message, installed_experts, update_experts
from starlayers.surgery.find import Finding, NameFilter, Patterns, find_mlps
from starlayers.surgery.forwards import check_forwards, liger_mlps
from starlayers.surgery.gated import GatedMLP
from starlayers.surgery.gates import gate_size, name_of
from starlayers.surgery.grown import grow as grow_mlp
from starlayers.surgery.install import (
    StarLayer,
    install,
    installed,
    role_of,
    settle_fast_paths,
    uninstall,
)
from starlayers.surgery.linear_layers import gate_blocker, recompute_blocker
from starlayers.surgery.overlooked import overlooked
from starlayers.surgery.projection import StarProjection, parse_gate
from starlayers.surgery.saving import note_in_config
from starlayers.surgery.sharding import settle_tp_plans
from starlayers.surgery.site import attribute

__all__ = ["revert", "starify"]

MODES = ("star", "fuse")


def starify(
    model: nn.Module,
    mode: str = "star",
    gate: str = "full",
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    grow: int = 0,
    recompute: bool = False,
) -> nn.Module:
    """Turn the MLPs of a model into star MLPs that compute the same at first.

    The model is changed in place.

    `mode="star"`: a plain MLP `out(act(inp(x)))` becomes `out(act(inp(x)) * (1 + gate(x)))` with a
    zero gate: the same output to the bit, and a gate that can learn. MLPs that already are stars
    are left, or with `grow=r` gain r more products per channel, the second factors zero.

    `mode="fuse"`: MLPs that already are stars (SwiGLU, GEGLU, and those `mode="star"` made) take
    the core's fused forward, and mixtures of such experts its product (`StarExperts`). Parameters
    and names stay; results agree to rounding.

    Args:
        model: any module; its own parameters stay the same objects.
        mode: "star" or "fuse".
        gate: for plain MLPs, "full" (a matrix like that of the first layer), "low_rank=r" (two
            thin ones) or "scale" (one number per channel).
        include, exclude: names, or patterns as in `fnmatch`, of MLPs or of modules above them.
        grow: number of products to add to MLPs that already are stars.
        recompute: save only the input of each replaced layer for the backward pass.

    Returns:
        `model` itself. MLPs that a recipe claims but that do not compute its formula are left
        alone; `surgery.report(model)` gives the reasons.

    Raises:
        TypeError: `model` is no module, or an argument has the wrong type.
        ValueError: an unknown mode or gate, a pattern that matches nothing, an option of the
            other mode, or a model with no MLP to replace.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        >>> x = torch.randn(2, 4)
        >>> before = model(x)
        >>> torch.equal(starify(model)(x), before)
        True
        >>> model[0]
        StarProjection(
          gate='full'
          (inp): Linear(in_features=4, out_features=8, bias=True)
          (act): GELU(approximate='none')
          (gate): Linear(in_features=4, out_features=8, bias=True)
        )
    """
    _check(model, mode, gate, grow)
    selected = NameFilter(include, exclude)
    check_forwards(model)
    existing = list(installed(model))
    findings = find_mlps(model, include=include, exclude=exclude)
    for f in findings:
        f.reason = f.reason or _obstacle(model, f, mode, grow=grow, recompute=recompute)
    for path, _, star in existing:
        _require_options(path, star, grow=grow, recompute=recompute)
    verified = [f for f in findings if f.reason is None]
    plain, gated = mode == "star", mode == "fuse" or grow > 0  # the forms that the options change
    ready = [f for f in verified if (plain if f.site.form == "plain" else gated)]
    experts = update_experts(model, selected, mode, recompute=recompute)
    if not ready and not existing and not experts:
        reasons = experts_message(model, selected)
        raise ValueError(_no_mlp_message(model, mode, findings, reasons))
    for f in ready:
        owner, fused = model.get_submodule(f.owner), mode == "fuse"
        options: dict[str, Any] = {"gate": gate, "recompute": recompute, "rank": grow}
        options |= {name: getattr(f, name) for name in ("between", "after", "up_first", "casts")}
        install(owner, f.site, f.act_name, fused=fused, **options)
    for path, _, star in existing:
        if name_of(path, star) in selected:
            _update(star, mode, recompute=recompute, rank=grow)
    settle_fast_paths(model)
    settle_tp_plans(model)
    settle_adapter_hooks(model)
    note_in_config(model)
    if mode == "star" and ready and getattr(model, "peft_config", None):
        warnings.warn(
            "starify: this model saves its adapters only, and the gates are not among them; "
            "starify the base model first and give modules_to_save=gate_names(model) to the "
            "adapter's config, or save the state dict",
            stacklevel=2,
        )
    return model


def _check(model: nn.Module, mode: str, gate: str, grow: int) -> None:
    if not isinstance(model, nn.Module):
        agent = isinstance(getattr(model, "policy", None), nn.Module)
        hint = "; it has a policy: use starlayers.rl.starify(model)" if agent else ""
        raise TypeError(f"starify expects a torch.nn.Module, got {type(model).__name__}{hint}")
    if isinstance(model, nn.parallel.DistributedDataParallel) and mode != "fuse":
        raise ValueError(
            "starify: DistributedDataParallel knows no new parameters; wrap afterwards, or use "
            "mode='fuse', which adds none"
        )
    if mode not in MODES:
        raise ValueError(f"starify: unknown mode {mode!r}, choose one of {', '.join(MODES)}")
    kind, _ = parse_gate(gate)
    if grow:
        positive_int("starify", "grow", grow)
    if mode == "fuse" and (grow or kind != "full"):
        option = f"grow={grow}" if grow else f"gate={gate!r}"
        raise ValueError(
            f"starify: {option} adds parameters and needs mode='star', got mode='fuse'"
        )


def _obstacle(model: nn.Module, f: Finding, mode: str, *, grow: int, recompute: bool) -> str | None:
    """Return why the options do not serve an MLP, `None` if they do."""
    if recompute and (blocker := _recompute_blocker(model, f)):
        return f"{blocker}; leave recompute out"
    if f.site.form == "plain":
        return None
    if grow:
        blocker = gate_blocker(model.get_submodule(f.path))
        if blocker is not None:
            return f"it cannot grow: {blocker}; mode='fuse' adds no parameter and serves it"
    if mode == "fuse" and f.act_name is None and not recompute:
        return (
            f"its activation is {f.act}, which no row of ACTIVATIONS equals; recompute=True saves "
            "memory all the same, and register_activation adds a row"
        )
    return None


def _recompute_blocker(model: nn.Module, f: Finding) -> str | None:
    """Return why an MLP must not run twice in one training step, `None` if it may."""
    if f.site.form != "plain":
        return recompute_blocker(model.get_submodule(f.owner))
    act = None if f.site.act is None else attribute(model.get_submodule(f.owner), f.site.act)
    if isinstance(act, nn.Module) and next(act.buffers(), None) is not None:
        return f"{f.site.act!r} has buffers, which recompute may change twice"
    return recompute_blocker(model.get_submodule(f.path))


def _require_options(path: str, star: StarLayer, *, grow: int, recompute: bool) -> None:
    """Raise an error if options do not serve a star layer of an earlier call."""
    name = name_of(path, star)
    if grow and isinstance(star, GatedMLP) and not star.star.grown:
        blocker = gate_blocker(attribute(star, star.star.site.inp))
        if blocker is not None:
            raise ValueError(f"starify: {name} cannot grow: {blocker}; it stays fused as it is")
    if recompute and not role_of(star).recompute:
        blocker = recompute_blocker(star.inp if isinstance(star, StarProjection) else star)
        if blocker is not None:
            raise ValueError(f"starify: {name}: {blocker}; it stays as it is")


def _update(star: StarLayer, mode: str, *, recompute: bool, rank: int) -> None:
    """Add options to a star layer of an earlier call, which grows only once."""
    role = role_of(star)
    role.fused = role.fused or mode == "fuse"
    role.recompute = role.recompute or recompute
    if isinstance(star, GatedMLP) and rank and not star.star.grown:
        grow_mlp(star, rank)


def _no_mlp_message(model: nn.Module, mode: str, findings: list[Finding], experts: str = "") -> str:
    start = f"starify(mode={mode!r}) found no MLP to replace in this {type(model).__name__}"
    verified = [f for f in findings if f.reason is None]
    if verified and mode == "star":
        return (
            f"{start}: its {len(verified)} MLPs already are stars; grow=1 adds a product to each, "
            "mode='fuse' makes them faster"
        )
    if verified:
        return f"{start}: its {len(verified)} MLPs are plain; mode='star' gives them gates"
    if experts:
        return f"{start}: {experts}"
    if mode == "fuse" and findings and all(f.site.form == "plain" for f in findings):
        return f"{start}: its {len(findings)} MLPs are plain, without a second branch to fuse"
    if findings:
        reasons = "; ".join(dict.fromkeys(f"{f.path}: {f.reason}" for f in findings[:3]))
        return f"{start}: {len(findings)} looked like one, but {reasons}"
    for name, reason in liger_mlps(model).items():
        return f"{start}: {name}: {reason}"
    for name, (_, reason) in overlooked(model, ()).items():
        return f"{start}: {name}: {reason}"
    return f"{start}: no module has the structure of a recipe (see docs/starify.md)"


def revert(model: nn.Module) -> nn.Module:
    """Take the star layers of `starify` out of a model, in place.

    The model's own parameters keep their present values. Where a gate is no longer zero, a warning
    says how many are lost and how large they are.

    Returns:
        `model` itself.

    Raises:
        ValueError: the model has no star layer of `starify`, or another library has changed the
            class of one since; the model is as it was then.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        >>> revert(starify(model))
        Sequential(
          (0): Linear(in_features=4, out_features=8, bias=True)
          (1): GELU(approximate='none')
          (2): Linear(in_features=8, out_features=4, bias=True)
        )
    """
    stars = list(installed(model))
    experts = [module for _, module in installed_experts(model)]
    if not experts and not stars:
        raise ValueError(f"revert: this {type(model).__name__} has no star layer of starify's")
    sizes = {name_of(path, star): gate_size(star) for path, _, star in stars}
    nonzero = {name: size for name, size in sizes.items() if size > 0}
    for star_module in [star for _, _, star in stars] + experts:
        if isinstance(star_module, Adopted):
            released_class(star_module)
    for module in experts:
        release(module)
    for _, owner, star in stars:
        uninstall(owner, star)
    settle_fast_paths(model)
    settle_tp_plans(model)
    settle_adapter_hooks(model)
    note_in_config(model)
    if nonzero:
        largest = max(nonzero, key=nonzero.__getitem__)
        warnings.warn(
            f"revert: {len(nonzero)} of {len(stars)} gates were not zero and are lost; mean |gate| "
            f"up to {nonzero[largest]:.3g} ({largest})",
            stacklevel=2,
        )
    return model
