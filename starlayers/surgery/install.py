"""Put star layers into a model, list them, and take them out."""

from collections.abc import Iterator

from torch import Tensor, nn

from starlayers.surgery.gated import GatedMLP, Role, adopt, grow, release
from starlayers.surgery.projection import StarProjection, make_gate
from starlayers.surgery.recipes import recognise
from starlayers.surgery.site import Site, attribute, put


def identity(x: Tensor) -> Tensor:
    """Return `x`; placeholder for a function that moved into `StarProjection`."""
    return x


def install_plain(
    owner: nn.Module, site: Site, spec: str, *, fused: bool = False, recompute: bool = False
) -> StarProjection:
    """Replace first layer and activation of a plain MLP by a star projection.

    Args:
        owner: the module that contains the MLP.
        site: names of its parts.
        spec: the gate, as in `parse_gate`.
        fused, recompute: as for `StarProjection`.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        >>> star = install_plain(mlp, Site("sequential", "plain", "0", "1", "2"), "scale")
        >>> mlp[0] is star, mlp[1]
        (True, Identity())
    """
    inp, act = attribute(owner, site.inp), attribute(owner, site.act)
    star = StarProjection(
        inp,
        act,
        make_gate(spec, inp),
        site,
        spec=spec,
        act_name=recognise(act),
        fused=fused,
        recompute=recompute,
    )
    put(owner, site.inp, star)
    put(owner, site.act, nn.Identity() if isinstance(act, nn.Module) else identity)
    if isinstance(owner, nn.TransformerEncoderLayer):
        # its inference path reads the weights and never calls the layers: 0 switches it off
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
    """Change the class of a gated MLP to `GatedMLP`, and let it grow.

    Args:
        owner: the MLP.
        site: names of its parts.
        between: names of the modules between the product and the last layer, in order.
        fused, recompute: as for `Role`.
        rank: number of products to add, 0 for none.
    """
    act_name = recognise(attribute(owner, site.act))
    star = adopt(owner, Role(site, type(owner), act_name, between, fused, recompute))
    if rank:
        grow(star, rank)
    return star


def role_of(star: StarProjection | GatedMLP) -> StarProjection | Role:
    """Return the object with `site`, `fused` and `recompute` of a star layer."""
    return star if isinstance(star, StarProjection) else star.star


def installed(model: nn.Module) -> Iterator[tuple[str, nn.Module, StarProjection | GatedMLP]]:
    """Yield every star layer that starify has put into a model.

    Yields:
        Name of the owner, owner, star layer; a layer shared by several owners once.

    Example:
        >>> from starlayers.surgery import starify
        >>> mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        >>> model = starify(nn.Sequential(nn.LayerNorm(4), mlp))
        >>> [(path, owner is mlp, star is mlp[0]) for path, owner, star in installed(model)]
        [('1', True, True)]
    """
    seen: set[int] = set()
    for path, star in list(model.named_modules(remove_duplicate=False)):
        if id(star) in seen or not isinstance(star, (StarProjection, GatedMLP)):
            continue
        # a projection's own name ends with its site's name for it, which may have several parts
        inp = "" if isinstance(star, GatedMLP) else star.site.inp
        if not inp or path == inp or path.endswith(f".{inp}"):
            seen.add(id(star))
            owner = path.removesuffix(inp).removesuffix(".") if inp else path
            yield owner, model.get_submodule(owner), star


def uninstall(owner: nn.Module, star: StarProjection | GatedMLP) -> None:
    """Put the original modules of a star layer back, and drop its gate."""
    if isinstance(star, GatedMLP):
        release(star)
        return
    put(owner, star.site.inp, star.inp)
    put(owner, star.site.act, star.act)
    for name, value in star.undo.items():
        setattr(owner, name, value)


def settle_fast_paths(model: nn.Module) -> None:
    """Match the nested-tensor option of every `nn.TransformerEncoder` to its layers.

    The encoder packs padded input into a nested tensor for the inference path of its layers. The
    option is off while a layer has a star projection, and back afterwards.
    """
    for module in model.modules():
        if not isinstance(module, nn.TransformerEncoder):
            continue
        changed = any(not getattr(layer, "activation_relu_or_gelu", 1) for layer in module.layers)
        if changed and module.use_nested_tensor:
            module.use_nested_tensor = False
            vars(module)["star_use_nested_tensor"] = True
        elif not changed and hasattr(module, "star_use_nested_tensor"):
            module.use_nested_tensor = True
            del module.star_use_nested_tensor
