"""Putting star layers at a site, and taking them out again; nothing is tried or chosen here."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from starlayers.surgery.gated import GatedMLP, Role, adopt, grow, release
from starlayers.surgery.projection import AnnealedActivation, StarProjection, make_gate
from starlayers.surgery.recipes import recognise
from starlayers.surgery.site import Site, attribute, put

__all__ = ["install_gated", "install_plain", "installed", "take_out"]


def identity(x: Tensor) -> Tensor:
    """What stands where an activation function stood; the star projection applies it now."""
    return x


def install_plain(
    owner: nn.Module, site: Site, spec: str, *, fused: bool = False, recompute: bool = False
) -> StarProjection:
    """Put a star projection in the place of the projection and the activation of a plain site.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        >>> star = install_plain(mlp, Site("sequential", "plain", "0", "1", "2"), "scale")
        >>> type(mlp[0]).__name__, mlp[1]
        ('StarProjection', Identity())
    """
    inp, act = attribute(owner, site.inp), attribute(owner, site.act)
    star = StarProjection(
        inp,
        act,
        make_gate(spec, inp),
        site,
        spec=spec,
        row=recognise(act),
        fused=fused,
        recompute=recompute,
    )
    put(owner, site.inp, star)
    put(owner, site.act, nn.Identity() if isinstance(act, nn.Module) else identity)
    if isinstance(owner, nn.TransformerEncoderLayer):
        # its inference path reads the weights and never calls the layers
        star.undo["activation_relu_or_gelu"] = owner.activation_relu_or_gelu
        owner.activation_relu_or_gelu = 0
    return star


def install_gated(
    owner: nn.Module,
    site: Site,
    between: tuple[str, ...],
    *,
    fused: bool = True,
    recompute: bool = False,
    rank: int = 0,
) -> GatedMLP:
    """Make a gated MLP compute as the core does, or grow by `rank` products, in place."""
    row = recognise(attribute(owner, site.act))
    star = adopt(owner, Role(site, type(owner), row, between, fused, recompute))
    if rank:
        grow(star, rank)
    return star


def role_of(star: StarProjection | GatedMLP) -> StarProjection | Role:
    """What knows the site of a star layer, its row, and how it is to compute."""
    return star if isinstance(star, StarProjection) else star.star


def activation_of(star: StarProjection | GatedMLP) -> Any:
    """The activation of a star layer, as it is by now."""
    return star.act if isinstance(star, StarProjection) else attribute(star, star.star.site.act)


def anneal_activation(star: StarProjection | GatedMLP, t: float) -> None:
    """Set how far the activation of a star layer is from what it was; 0 takes the wrapper off."""
    act = activation_of(star)
    act = act.act if isinstance(act, AnnealedActivation) else act
    act = AnnealedActivation(act, t).train(star.training) if t else act
    if isinstance(star, StarProjection):
        if not isinstance(act, nn.Module):  # torch refuses a function in a module's place
            star._modules.pop("act", None)
        star.act = act
    else:
        put(star, star.star.site.act, act)
    # the kernels know both ends, and nothing between
    role_of(star).row = recognise(act) if t in (0.0, 1.0) else None


def annealed(star: StarProjection | GatedMLP) -> float:
    """How far the activation of a star layer is from what it was, from 0 to 1."""
    act = activation_of(star)
    return act.t if isinstance(act, AnnealedActivation) else 0.0


def installed(model: nn.Module) -> Iterator[tuple[str, nn.Module, StarProjection | GatedMLP]]:
    """Every star layer that surgery has put into a model: owner's name, owner, layer.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        >>> list(installed(mlp))
        []
    """
    seen: set[int] = set()
    for path, star in list(model.named_modules(remove_duplicate=False)):
        if id(star) in seen or not isinstance(star, (StarProjection, GatedMLP)):
            continue
        # the name of a projection's site, below its owner, ends its own name
        inp = "" if isinstance(star, GatedMLP) else star.site.inp
        if not inp or path == inp or path.endswith(f".{inp}"):
            seen.add(id(star))
            above = path.removesuffix(inp).removesuffix(".") if inp else path
            yield above, model.get_submodule(above), star


def take_out(owner: nn.Module, star: StarProjection | GatedMLP) -> None:
    """Put back what stood at the site of a star layer, whatever its gate has learned."""
    anneal_activation(star, 0.0)
    if isinstance(star, GatedMLP):
        release(star)
        return
    put(owner, star.site.inp, star.inp)
    put(owner, star.site.act, star.act)
    for name, value in star.undo.items():
        setattr(owner, name, value)


def settle_fast_paths(model: nn.Module) -> None:
    """Keep `nn.TransformerEncoder` from packing its input for an inference path it has lost."""
    for module in model.modules():
        if not isinstance(module, nn.TransformerEncoder):
            continue
        lost = any(not getattr(layer, "activation_relu_or_gelu", 1) for layer in module.layers)
        if lost and module.use_nested_tensor:
            module.use_nested_tensor = False
            vars(module)["star_use_nested_tensor"] = True
        elif not lost and hasattr(module, "star_use_nested_tensor"):
            module.use_nested_tensor = True
            del module.star_use_nested_tensor
