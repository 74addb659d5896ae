"""Put star layers into a model, list them, and take them out."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from starlayers.surgery.adopted import Adopted, adopt, input_name, release
from starlayers.surgery.gated import GatedMLP, Role
from starlayers.surgery.grown import grow
from starlayers.surgery.hidden import GatedHidden, HiddenRole, install_hidden
from starlayers.surgery.place import Place
from starlayers.surgery.projection import StarProjection, make_gate
from starlayers.surgery.site import Site, attribute, parent_of, put
from starlayers.surgery.snapshot import Snapshot

#: what `starify` puts into a model
StarLayer = StarProjection | GatedMLP | GatedHidden


def identity(x: Tensor) -> Tensor:
    """Return `x`; pickles of earlier versions name it as the placeholder of a function."""
    return x


def install_plain(owner: nn.Module, site: Site, spec: str, **options: Any) -> StarProjection:
    """Replace first layer and activation of a plain MLP by a star projection.

    `options` are those of `StarProjection`.
    """
    inp, act = attribute(owner, site.inp), attribute(owner, site.act or "")
    star = StarProjection(inp, act, make_gate(spec, inp), site, spec=spec, **options)
    put_projection(owner, star)
    if isinstance(owner, nn.TransformerEncoderLayer):
        # its inference path reads the weights and never calls the layers: 0 switches it off
        star.undo["activation_relu_or_gelu"] = owner.activation_relu_or_gelu
        owner.activation_relu_or_gelu = 0
    return star


def put_projection(owner: nn.Module, star: StarProjection) -> None:
    """Put a star projection at the first layer of its MLP, and its place at the activation."""
    site, is_module = star.site, isinstance(star.act, nn.Module)
    act_at = site.act or ""
    star.place = Place(parent_of(owner, act_at), site.inp, is_module=is_module, star=star)
    put(owner, site.inp, star)
    put(owner, act_at, star.place.placeholder)


def install(
    owner: nn.Module,
    site: Site,
    act_name: str | None,
    *,
    gate: str = "full",
    between: tuple[str, ...] = (),
    after: tuple[str, ...] = (),
    up_first: bool = False,
    casts: bool = True,
    fused: bool = False,
    recompute: bool = False,
    rank: int = 0,
) -> StarLayer:
    """Put a star layer in the place of an MLP that was verified: a projection, or a `GatedMLP`.

    A plain MLP gets a `gate`, a gated one `rank` products per channel; `act_name`, `between`,
    `after`, `up_first`, `casts`, `fused` and `recompute` are as for `Role`.
    """
    options: dict[str, Any] = {"act_name": act_name, "fused": fused, "recompute": recompute}
    if site.form == "plain" and site.act is None:
        return install_hidden(owner, site, gate, recompute=recompute)
    if site.form == "plain":
        return install_plain(owner, site, gate, **options)
    kind = type(owner)
    snapshot, name = Snapshot(owner, kind.forward, site.layers), input_name(owner)
    options |= {"between": between, "after": after, "up_first": up_first, "casts": casts}
    role = Role(site, kind, input_name=name, snapshot=snapshot, **options)
    star: GatedMLP = adopt(owner, GatedMLP, role)
    if rank:
        grow(star, rank)
    return star


def role_of(star: StarLayer) -> StarProjection | Role | HiddenRole:
    """Return the object with `site`, `fused` and `recompute` of a star layer."""
    return star if isinstance(star, StarProjection) else star.star


def installed(model: nn.Module) -> Iterator[tuple[str, nn.Module, StarLayer]]:
    """Yield name of the owner, owner and star layer, for each star layer once."""
    seen: set[int] = set()
    for path, star in list(model.named_modules(remove_duplicate=False)):
        if id(star) in seen or not isinstance(star, StarLayer):
            continue
        # a projection's own name ends with its site's name for it, which may have several parts
        inp = star.site.inp if isinstance(star, StarProjection) else ""
        if not inp or f".{path}".endswith(f".{inp}"):
            seen.add(id(star))
            owner = path.removesuffix(inp).removesuffix(".")
            yield owner, model.get_submodule(owner), star


def uninstall(owner: nn.Module, star: StarLayer) -> None:
    """Put the original modules of a star layer back, and drop its gate."""
    if isinstance(star, Adopted):
        release(star)
        return
    put(owner, star.site.inp, star.inp)
    put(owner, star.site.act or "", star.act)
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
