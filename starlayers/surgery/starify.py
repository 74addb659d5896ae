"""Finding the MLPs of a model, making stars of them, and going back."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from starlayers.modules import positive_int
from starlayers.surgery.attention import (
    GatedAttention,
    fuse_gates,
    gated_attentions,
    release_gates,
)
from starlayers.surgery.gated import GatedMLP
from starlayers.surgery.install import (
    annealed,
    install_gated,
    install_plain,
    installed,
    meta,
    settle_fast_paths,
    take_out,
)
from starlayers.surgery.probe import verify
from starlayers.surgery.projection import StarProjection, parse_gate
from starlayers.surgery.recipes import RECIPES
from starlayers.surgery.record import note_in_config
from starlayers.surgery.site import Projection, Site, attribute, dtype_and_device, projection

__all__ = ["MODES", "Finding", "find_mlps", "gate_parameters", "reset_gates", "revert", "starify"]

MODES = ("star", "fuse")
Patterns = str | Sequence[str] | None


@dataclass
class Finding:
    """One MLP that a recipe claims: where, and whether a run bore it out.

    Args:
        path: the name of the MLP's first projection in the model.
        owner: the name of the module that the site is told from.
        site: its parts.
        reason: why it cannot be replaced, `None` where it can.
        between: what a gated MLP has between its product and its last projection.

    Example:
        >>> (finding,) = find_mlps(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)))
        >>> finding.path, finding.site.form, finding.reason
        ('0', 'plain', None)
    """

    path: str
    owner: str
    site: Site
    reason: str | None = None
    between: tuple[str, ...] = ()


def find_mlps(
    model: nn.Module, *, include: Patterns = None, exclude: Patterns = None
) -> list[Finding]:
    """The MLPs of a model that are no star layers of surgery yet, each tried on random input.

    Args:
        include, exclude: names, or patterns as in `fnmatch`, of MLPs or of modules above them.

    Raises:
        ValueError: a pattern of `include` names no MLP.

    Example:
        >>> layer = nn.TransformerEncoderLayer(16, 2, 32, activation="gelu")
        >>> [f.path for f in find_mlps(layer)]
        ['linear1']
    """
    wanted, unwanted = patterns(include), patterns(exclude)
    found: dict[str, Finding] = {}
    claimed: list[str] = []
    for finding in _claims(model):
        claimed.append(finding.path)
        known = found.get(finding.path)
        if known is not None and known.reason is None:
            continue
        if left_out(finding.path, wanted, unwanted):
            continue
        verdict = verify(model.get_submodule(finding.owner), finding.site)
        if known is None or verdict.reason is None:
            found[finding.path] = Finding(
                finding.path, finding.owner, verdict.site, verdict.reason, verdict.between
            )
    claimed += [name_of(path, star) for path, _, star in installed(model)]
    claimed += [path for path, _ in gated_attentions(model)]
    for pattern in wanted:
        if not any(_matches(path, [pattern]) for path in claimed):
            raise ValueError(
                f"include pattern {pattern!r} matches none of the {len(claimed)} MLPs found"
                + (f", the first of which is {claimed[0]}" if claimed else "")
            )
    return list(found.values())


def _claims(model: nn.Module) -> Iterator[Finding]:
    inside = {id(m) for m in model.modules() if isinstance(m, StarProjection) for m in m.modules()}
    for path, owner in model.named_modules():
        runs = type(owner).forward is not nn.Module.forward  # lists and dicts of modules do not
        if isinstance(owner, GatedMLP) or id(owner) in inside or not runs:
            continue
        for recipe in list(RECIPES):
            for site in recipe(owner):
                if not isinstance(attribute(owner, site.inp), StarProjection):
                    yield Finding(join(path, site.inp), path, site)


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
    already = list(installed(model))
    findings = find_mlps(model, include=include, exclude=exclude)
    chosen = [f for f in findings if f.reason is None and _wanted(f.site, mode, grow)]
    for finding in chosen:
        owner, site = model.get_submodule(finding.owner), finding.site
        if site.form == "plain":
            install_plain(owner, site, gate, recompute=recompute)
        else:
            fused = mode == "fuse"
            install_gated(owner, site, finding.between, fused=fused, recompute=recompute, grow=grow)
    gates = [
        module
        for path, module in gated_attentions(model)
        if mode == "fuse" and not left_out(path, patterns(include), patterns(exclude))
    ]
    for module in gates:
        fuse_gates(module)
    if not chosen and not already and not gates:
        raise ValueError(_nothing(model, mode, findings))
    for path, _, star in already:
        if not left_out(name_of(path, star), patterns(include), patterns(exclude)):
            _revisit(star, mode, recompute=recompute, grow=grow)
    settle_fast_paths(model)
    note_in_config(model)
    if mode == "star" and chosen and getattr(model, "peft_config", None):
        warnings.warn(
            "starify: this model saves its adapters only, and the gates are not among them; "
            "starify the base model first and name modules_to_save=['gate'] in the adapter's "
            "config, or save the state dict",
            stacklevel=2,
        )
    return model


def _check(model: nn.Module, mode: str, gate: str, grow: int) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"starify expects a torch.nn.Module, got {type(model).__name__}")
    if mode not in MODES:
        raise ValueError(f"starify: unknown mode {mode!r}, choose one of {', '.join(MODES)}")
    kind, _ = parse_gate(gate)
    if grow:
        positive_int("starify", "grow", grow)
    if mode == "fuse" and (grow or kind != "full"):
        raise ValueError(f"starify: gate={gate!r}, grow={grow} need mode='star', got mode='fuse'")


def _wanted(site: Site, mode: str, grow: int) -> bool:
    return mode == "star" if site.form == "plain" else mode == "fuse" or grow > 0


def _revisit(star: StarProjection | GatedMLP, mode: str, *, recompute: bool, grow: int) -> None:
    """What starify does to a star layer that it, or an earlier call, has made: never a new gate."""
    role = star if isinstance(star, StarProjection) else star.star
    role.fused = role.fused or mode == "fuse"
    role.recompute = role.recompute or recompute
    if isinstance(star, GatedMLP) and grow and not star.star.grown:
        star.grow(grow)


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


def gate_size(star: StarProjection | GatedMLP) -> float:
    """The mean absolute gate on standard normal input; 0 means that the layer is as it was made.

    Example:
        >>> model = starify(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)))
        >>> gate_size(model[0])
        0.0
    """
    gate = gate_of(star)
    if gate is None or meta(star):
        return 0.0
    inp = star.inp if isinstance(star, StarProjection) else attribute(star, star.star.site.inp)
    sizes = projection(inp) or Projection(1, 1)
    dtype, device = dtype_and_device(inp)
    generator = torch.Generator().manual_seed(0)
    n = sizes.in_features
    x = torch.randn((16, n, 1, 1) if sizes.channels_first else (16, n), generator=generator)
    with torch.no_grad():
        return float(gate(x.to(device, dtype)).abs().float().mean())


def gate_sizes(model: nn.Module) -> dict[str, float]:
    """`gate_size` of every star layer by name: healthy fine-tuning ends at 0.05 to 0.3.

    Example:
        >>> gate_sizes(starify(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))))
        {'0': 0.0}
    """
    return {name_of(path, star): gate_size(star) for path, _, star in installed(model)}


def gate_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that starify has added to a model, for an optimizer of their own.

    Example:
        >>> model = starify(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)))
        >>> [tuple(p.shape) for p in gate_parameters(model)]
        [(8, 4), (8,)]
    """
    gates = [gate for _, _, star in installed(model) if (gate := gate_of(star)) is not None]
    return list(dict.fromkeys(p for gate in gates for p in gate.parameters()))


def reset_gates(model: nn.Module) -> nn.Module:
    """Make every gate zero: after a model starified on the meta device was given real weights.

    Example:
        >>> with torch.device("meta"):
        ...     model = starify(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)))
        >>> model = reset_gates(model.to_empty(device="cpu"))
        >>> model[0].gate.weight.abs().max().item()
        0.0
    """
    for _, _, star in installed(model):
        if isinstance(star, StarProjection):
            star.reset_gate()
        elif star.star.grown:
            star.reset_grown()
    return model


def gate_of(star: StarProjection | GatedMLP) -> nn.Module | None:
    """What surgery has added to a star layer: its gate, its grown products, or nothing."""
    if isinstance(star, StarProjection):
        return star.gate
    return star.star_grown if star.star.grown else None  # type: ignore[return-value]


def name_of(path: str, star: StarProjection | GatedMLP) -> str:
    """The name of a star layer's first projection in the model."""
    site = star.site if isinstance(star, StarProjection) else star.star.site
    return join(path, site.inp)


def join(path: str, name: str) -> str:
    """A dotted name below a module, which is "" for the model itself."""
    return f"{path}.{name}" if path else name


def patterns(given: Patterns) -> list[str]:
    """`include` or `exclude` as a list."""
    if given is None or isinstance(given, str):
        return [given] if given else []
    return list(given)


def left_out(path: str, wanted: list[str], unwanted: list[str]) -> bool:
    """Whether `include` and `exclude` leave an MLP alone."""
    return (bool(wanted) and not _matches(path, wanted)) or _matches(path, unwanted)


def _matches(path: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(path, p) or fnmatchcase(path, f"{p}.*") for p in patterns)
