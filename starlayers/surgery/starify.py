"""Making stars of the MLPs of a model, and going back."""

import warnings

from torch import nn

from starlayers.modules import positive_int
from starlayers.surgery.attention import (
    GatedAttention,
    fuse_gates,
    gated_attentions,
    release_gates,
)
from starlayers.surgery.find import Chosen, Finding, Patterns, find_mlps
from starlayers.surgery.gated import GatedMLP
from starlayers.surgery.gated import grow as grow_mlp
from starlayers.surgery.gates import gate_size, name_of
from starlayers.surgery.install import (
    annealed,
    install_gated,
    install_plain,
    installed,
    role_of,
    settle_fast_paths,
    take_out,
)
from starlayers.surgery.projection import StarProjection, parse_gate
from starlayers.surgery.saving import note_in_config
from starlayers.surgery.site import Site

__all__ = ["MODES", "revert", "starify"]

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
    """Turn the MLPs of a model into star MLPs, in place, without changing what it computes.

    `mode="star"`: a plain MLP `out(act(inp(x)))` becomes `out(act(inp(x)) * (1 + gate(x)))` with a
    zero gate: the same output to the bit, and a gate that can learn. MLPs that already are stars
    are left, or with `grow=r` gain r more products per channel, the second factors zero.

    `mode="fuse"`: MLPs that already are stars (SwiGLU, GEGLU, and those `mode="star"` made) take
    the core's fused forward, and so do the sigmoid gates of attentions. Parameters and names stay;
    results agree to rounding.

    Args:
        model: any module; its own parameters stay the same objects.
        mode: "star" or "fuse".
        gate: for plain MLPs, "full" (a matrix like the first projection's), "low_rank=r" (two
            thin ones) or "scale" (one number per channel).
        include, exclude: names, or patterns as in `fnmatch`, of MLPs or of modules above them.
        grow: products to add to MLPs that already are stars.
        recompute: save only the input of each replaced layer for the backward.

    Returns:
        `model` itself. MLPs that are claimed by a recipe but do not compute its formula are left
        alone; `surgery.report(model)` tells the reasons.

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
    """
    _check(model, mode, gate, grow)
    chosen = Chosen(include, exclude)
    already = list(installed(model))
    findings = find_mlps(model, include=include, exclude=exclude)
    ready = [f for f in findings if f.reason is None and _wanted(f.site, mode, grow)]
    fusing = mode == "fuse"
    gates = [m for path, m in gated_attentions(model) if fusing and path in chosen]
    if not ready and not already and not gates:
        raise ValueError(_nothing(model, mode, findings))
    for finding in ready:
        owner, site = model.get_submodule(finding.owner), finding.site
        if site.form == "plain":
            install_plain(owner, site, gate, recompute=recompute)
        else:
            between = finding.between
            install_gated(owner, site, between, fused=fusing, recompute=recompute, rank=grow)
    for module in gates:
        fuse_gates(module)
    for path, _, star in already:
        if name_of(path, star) in chosen:
            _revisit(star, mode, recompute=recompute, rank=grow)
    settle_fast_paths(model)
    note_in_config(model)
    if mode == "star" and ready and getattr(model, "peft_config", None):
        warnings.warn(
            "starify: this model saves its adapters only, and the gates are not among them; "
            "starify the base model first and name modules_to_save=['gate'] in the adapter's "
            "config, or save the state dict",
            stacklevel=2,
        )
    return model


def _check(model: nn.Module, mode: str, gate: str, grow: int) -> None:
    if not isinstance(model, nn.Module):
        agent = isinstance(getattr(model, "policy", None), nn.Module)
        hint = "; it has a policy: use starlayers.rl.starify(model)" if agent else ""
        raise TypeError(f"starify expects a torch.nn.Module, got {type(model).__name__}{hint}")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "starify: DistributedDataParallel knows no new parameters; wrap afterwards"
        )
    if mode not in MODES:
        raise ValueError(f"starify: unknown mode {mode!r}, choose one of {', '.join(MODES)}")
    kind, _ = parse_gate(gate)
    if grow:
        positive_int("starify", "grow", grow)
    if mode == "fuse" and (grow or kind != "full"):
        raise ValueError(f"starify: gate={gate!r}, grow={grow} need mode='star', got mode='fuse'")


def _wanted(site: Site, mode: str, grow: int) -> bool:
    return mode == "star" if site.form == "plain" else mode == "fuse" or grow > 0


def _revisit(star: StarProjection | GatedMLP, mode: str, *, recompute: bool, rank: int) -> None:
    """What starify does to a star layer that it, or an earlier call, has made: never a new gate."""
    role = role_of(star)
    role.fused = role.fused or mode == "fuse"
    role.recompute = role.recompute or recompute
    if isinstance(star, GatedMLP) and rank and not star.star.grown:
        grow_mlp(star, rank)


def _nothing(model: nn.Module, mode: str, findings: list[Finding]) -> str:
    found = f"starify(mode={mode!r}) found no MLP to replace in this {type(model).__name__}"
    ready = [f for f in findings if f.reason is None]
    if ready and mode == "star":
        return (
            f"{found}: its {len(ready)} MLPs already are stars; grow=1 adds a product to each, "
            "mode='fuse' makes them faster"
        )
    if ready:
        return f"{found}: its {len(ready)} MLPs are plain; mode='star' gives them gates"
    if findings:
        reasons = "; ".join(dict.fromkeys(f"{f.path}: {f.reason}" for f in findings[:3]))
        return f"{found}: {len(findings)} looked like one, but {reasons}"
    return f"{found}: no module has the structure of a recipe (see docs/starify.md)"


def revert(model: nn.Module) -> nn.Module:
    """Take every star layer of surgery out of a model, in place, and put back what was there.

    The model's own parameters stay as they are by now. Where a gate has moved away from zero, a
    warning says how many have and how large they are, because what they learned is lost.

    Returns:
        `model` itself.

    Raises:
        ValueError: there is nothing to take out.

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
    gates = [module for _, module in gated_attentions(model) if isinstance(module, GatedAttention)]
    if not stars and not gates:
        raise ValueError(f"revert: this {type(model).__name__} has no star layer of starify's")
    moved = {name_of(path, star): size for path, _, star in stars if (size := gate_size(star)) > 0}
    bent = sum(annealed(star) > 0 for _, _, star in stars)
    for _, owner, star in stars:
        take_out(owner, star)
    for module in gates:
        release_gates(module)
    settle_fast_paths(model)
    note_in_config(model)
    if moved:
        warnings.warn(
            f"revert: {len(moved)} of {len(stars)} gates were not zero and are lost; mean |gate| "
            f"up to {max(moved.values()):.3g} ({max(moved, key=moved.__getitem__)})",
            stacklevel=2,
        )
    if bent:
        warnings.warn(
            f"revert: {bent} activations were annealed and are back; what the model learned to do "
            "without them is not",
            stacklevel=2,
        )
    return model
