"""What surgery did to a model, as plain data: written into its config, and done again from it."""

from dataclasses import asdict
from typing import Any

from torch import nn

from starlayers.surgery.gated import GatedMLP
from starlayers.surgery.install import (
    anneal_activation,
    annealed,
    install_gated,
    install_plain,
    installed,
    role_of,
    settle_fast_paths,
)
from starlayers.surgery.projection import StarProjection
from starlayers.surgery.site import Site

__all__ = ["GUARD", "apply_record", "note_in_config", "record_of"]

VERSION = 1

#: what the plain classes of transformers say when they are asked to load a starified model: they
#: look up every key of `config.fusion_config` and raise for one they do not know
GUARD = "starlayers (load this model with starlayers.from_pretrained, or its gates are lost)"


def record_of(model: nn.Module) -> dict[str, Any]:
    """What `starify` changed in a model, as data that JSON can hold.

    A model whose MLPs were only fused has no new parameters; they are recorded all the same.

    Example:
        >>> from starlayers.surgery import starify
        >>> model = starify(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)))
        >>> record_of(model)["layers"][0]["gate"]
        'full'
    """
    layers = [_entry(path, star) for path, _, star in installed(model)]
    return {"version": VERSION, "layers": layers} if layers else {}


def _entry(path: str, star: StarProjection | GatedMLP) -> dict[str, Any]:
    role = role_of(star)
    if isinstance(role, StarProjection):
        options: dict[str, Any] = {"gate": role.spec}
    else:
        options = {"grow": role.grown, "between": list(role.between)}
    flags = {"fused": role.fused, "recompute": role.recompute, "anneal": annealed(star)}
    return {"owner": path, "site": asdict(role.site), **options, **flags}


def apply_record(model: nn.Module, record: dict[str, Any], *, prefix: str = "") -> nn.Module:
    """Do to a plain model what a record tells, without trying anything: on any device, meta too.

    Args:
        model: a model of the same structure, its own layers not starified.
        record: from `record_of`.
        prefix: what the names in the record have before those in the model, or lack.

    Raises:
        ValueError: the record is of a newer version, or the model lacks a module it names.

    Example:
        >>> from starlayers.surgery import starify
        >>> make = lambda: nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        >>> starified = starify(make(), gate="scale")
        >>> again = apply_record(make(), record_of(starified))
        >>> again.load_state_dict(starified.state_dict())
        <All keys matched successfully>
    """
    if record.get("version") != VERSION:
        raise ValueError(
            f"this record of starify has version {record.get('version')!r}, and this starlayers "
            f"reads version {VERSION}: install the starlayers that wrote it, or a newer one"
        )
    names = {name for name, _ in model.named_modules(remove_duplicate=False)}
    for entry in record["layers"]:
        owner = model.get_submodule(_resolved(entry["owner"], names, prefix, type(model)))
        site = Site(**entry["site"])
        flags = {"fused": entry["fused"], "recompute": entry["recompute"]}
        star: StarProjection | GatedMLP
        if site.form == "plain":
            star = install_plain(owner, site, entry["gate"], **flags)
        else:
            between = tuple(entry["between"])
            star = install_gated(owner, site, between, rank=entry["grow"], **flags)
        anneal_activation(star, entry["anneal"])
    settle_fast_paths(model)
    return model


def _resolved(path: str, names: set[str], prefix: str, kind: type[nn.Module]) -> str:
    """A recorded name where the head is another: `bert.encoder` is `encoder` in the base model."""
    for name in (path, f"{prefix}.{path}", path.removeprefix(prefix + ".")):
        if name in names:
            return name
    raise ValueError(f"the record names {path!r}, which this {kind.__name__} does not have")


def note_in_config(model: nn.Module) -> None:
    """Write the record into a config of transformers, with what makes the plain classes refuse it.

    Parts that can be saved by themselves and have a config of their own get records of their own.
    Nothing that was only fused needs one: such a model is saved as what it was.
    """
    seen: set[int] = set()
    for part in model.modules():
        config = getattr(part, "config", None)
        savable = hasattr(part, "save_pretrained") or part is model
        if savable and hasattr(config, "save_pretrained") and id(config) not in seen:
            seen.add(id(config))
            _note(part, config)


def _note(model: nn.Module, config: Any) -> None:
    record = record_of(model)
    changed = any(e.get("gate") or e.get("grow") or e["anneal"] for e in record.get("layers", ()))
    fusions = dict(getattr(config, "fusion_config", None) or {})
    fusions.pop(GUARD, None)
    if changed:
        config.star_mlp = record
        fusions[GUARD] = True
    elif hasattr(config, "star_mlp"):
        del config.star_mlp
    if fusions:
        config.fusion_config = fusions
    elif hasattr(config, "fusion_config"):
        del config.fusion_config
