"""Save and load starified models, by a record of the changes."""

from dataclasses import asdict
from os import PathLike
from typing import Any

from torch import nn

from starlayers.surgery.adapters import settle_adapter_hooks
from starlayers.surgery.experts import apply_experts_record, experts_record
from starlayers.surgery.gates import gate_of, gate_parameters
from starlayers.surgery.grown import Grown
from starlayers.surgery.hidden import HiddenRole
from starlayers.surgery.install import StarLayer, install, installed, role_of, settle_fast_paths
from starlayers.surgery.projection import StarProjection
from starlayers.surgery.sharding import settle_tp_plans
from starlayers.surgery.site import Site
from starlayers.surgery.verify import Verdict, named, verify

__all__ = ["apply_record", "record_of"]

#: version of the records that this module writes; it reads all of `READABLE`
VERSION = 3
#: version 1 has one field more, "anneal", which is 0 for everything that can still be computed;
#: up to version 2 the rows of grown products had another order, see `Grown`
READABLE = (1, 2, 3)
#: first version whose grown products have the rows of a channel side by side
BY_CHANNEL = 3

#: key in `config.fusion_config` of a starified model: plain classes of transformers raise an error
#: with the name of every key that they do not know, so loading with them does not lose the gates
GUARD = "starlayers (load this model with starlayers.from_pretrained, or its gates are lost)"

#: module that `save_with_code` writes into a folder, without its ending
CODE_MODULE = "modeling_starlayers"


def record_of(model: nn.Module) -> dict[str, Any]:
    """Return what `starify` changed in a model, as data that JSON can hold.

    The record names every star layer with its options, layers that were only fused among them. It
    holds no weights: save the state dict beside it. Empty if nothing was changed.

    Example:
        >>> from starlayers.surgery import starify
        >>> model = starify(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)))
        >>> record = record_of(model)
        >>> [(layer["site"]["inp"], layer["gate"]) for layer in record["layers"]]
        [('0', 'full')]
    """
    layers = [_layer_record(path, star) for path, _, star in installed(model)]
    experts = experts_record(model)
    more = {"experts": experts} if experts else {}
    return {"version": VERSION, "layers": layers, **more} if layers or experts else {}


def _layer_record(path: str, star: StarLayer) -> dict[str, Any]:
    role = role_of(star)
    if isinstance(role, (StarProjection, HiddenRole)):
        options: dict[str, Any] = {"gate": role.spec}
    else:
        options = {"grow": role.grown, "between": list(role.between)}
    flags = {"fused": role.fused, "recompute": role.recompute}
    return {"owner": path, "site": asdict(role.site), **options, **flags}


def apply_record(model: nn.Module, record: dict[str, Any], *, prefix: str = "") -> nn.Module:
    """Repeat the changes of a record on a plain model, without trial runs.

    Args:
        model: a model of the same structure, not starified, on any device, meta among them.
        record: the result of `record_of`. After one of version 1 or 2, `load_state_dict` takes the
            rows of grown products to be in the order of that time, and rearranges them once.
        prefix: name of the base model, where one of the two models has a head and the other has
            none: recorded names are tried as they are, with the prefix added, and with it removed.

    Returns:
        `model` itself.

    Raises:
        ValueError: the record has an unknown version or an annealed activation, or the model lacks
            a module that it names.

    Example:
        >>> from starlayers.surgery import starify
        >>> make = lambda: nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        >>> starified = starify(make(), gate="scale")
        >>> again = apply_record(make(), record_of(starified))
        >>> again.load_state_dict(starified.state_dict())
        <All keys matched successfully>
    """
    if record.get("version") not in READABLE:
        raise ValueError(
            f"this record of starify has version {record.get('version')!r}, and this starlayers "
            f"reads versions {', '.join(map(str, READABLE))}: install the starlayers that wrote "
            "it, or a newer one"
        )
    if annealed := [layer for layer in record["layers"] if layer.get("anneal")]:
        raise ValueError(
            f"{len(annealed)} activations of this record are annealed, that of "
            f"{annealed[0]['owner']!r} to t={annealed[0]['anneal']:g}; this starlayers does not "
            "compute (1 - t) * act(x) + t * x any more: load the model with the starlayers that "
            "wrote it"
        )
    names = {name for name, _ in model.named_modules(remove_duplicate=False)}
    for layer in record["layers"]:
        owner = model.get_submodule(_resolved(layer["owner"], names, prefix, type(model)))
        site = Site(**layer["site"])
        options = {name: layer[name] for name in ("fused", "recompute", "gate") if name in layer}
        verdict, rank = _repeated(owner, site), layer.get("grow", 0)
        options |= {"between": verdict.between, "after": verdict.after, "rank": rank}
        options |= {"up_first": verdict.up_first, "casts": verdict.casts}
        star = install(owner, verdict.site, verdict.act_name, **options)
        if rank and record["version"] < BY_CHANNEL:
            gate_of(star).expect_old_rows()  # type: ignore[union-attr, operator]
    for entry in record.get("experts", ()):
        name = _resolved(entry["owner"], names, prefix, type(model))
        apply_experts_record(model.get_submodule(name), entry)
    settle_fast_paths(model)
    settle_tp_plans(model)
    settle_adapter_hooks(model)
    return model


def _repeated(owner: nn.Module, site: Site) -> Verdict:
    """Verify a recorded MLP again: its class or config may have changed since.

    A gate beside a model's own activation rests on names alone, and is not tried again.
    """
    if site.form == "plain" and site.act is not None:
        return named(owner, site)
    verdict = verify(owner, site)
    if verdict.reason is not None:
        raise ValueError(
            f"the record holds {site.inp!r} of a {type(owner).__name__} as a star, which it is "
            f"not in this model: {verdict.reason}"
        )
    return verdict


def _resolved(path: str, names: set[str], prefix: str, kind: type[nn.Module]) -> str:
    """Return the name of a recorded module in a model with another head.

    `bert.encoder` of a classifier is `encoder` of the base model.
    """
    for name in (path, f"{prefix}.{path}", path.removeprefix(prefix + ".")):
        if name in names:
            return name
    raise ValueError(f"the record names {path!r}, which this {kind.__name__} does not have")


def note_in_config(model: nn.Module) -> None:
    """Write the record of a model into its config, if transformers made it.

    Parts that can be saved by themselves get records of their own. Without gates there is no
    record: the weights of a model whose MLPs were only fused are those of the plain model.
    """
    seen: set[int] = set()
    for part in model.modules():
        config = getattr(part, "config", None)
        savable = hasattr(part, "save_pretrained") or part is model
        if savable and hasattr(config, "save_pretrained") and id(config) not in seen:
            seen.add(id(config))
            _write_record(part, config)


def _write_record(model: nn.Module, config: Any) -> None:
    record = record_of(model)
    has_gates = any(layer.get("gate") or layer.get("grow") for layer in record.get("layers", ()))
    fusions = _other_fusions(config) | ({GUARD: True} if has_gates else {})
    for name, value in (("star_mlp", has_gates and record), ("fusion_config", fusions)):
        if value:
            setattr(config, name, value)
        elif hasattr(config, name):
            delattr(config, name)


def _other_fusions(config: Any) -> dict[str, Any]:
    """Return the `fusion_config` of a config without the key of a starified model."""
    fusions = getattr(config, "fusion_config", None) or {}
    return {key: value for key, value in fusions.items() if key != GUARD}


def load_starified(auto_class: Any, path: str | PathLike[str], config: Any, **kwargs: Any) -> Any:
    """Load the model at `path` with the gates that the record in its config tells of.

    Arguments, result and errors are those of `from_pretrained`; `config` is the model's.
    """
    record = config.star_mlp
    config.fusion_config = _other_fusions(config) or None
    model_class = _model_class(auto_class, config)
    with_info = kwargs.pop("output_loading_info", False)
    builder = _builder(model_class, record)
    model, info = builder.from_pretrained(path, config=config, output_loading_info=True, **kwargs)
    model.__class__ = model_class
    _check_gates_loaded(model, info["missing_keys"], path)
    for grown in model.modules():
        if isinstance(grown, Grown):
            grown.rearrange_old_rows()
    note_in_config(model)
    if f"{CODE_MODULE}." in str(getattr(model.config, "auto_map", "")):
        del model.config.auto_map  # the next folder has the code if `save_with_code` makes it
    return (model, info) if with_info else model


def _builder(model_class: Any, record: dict[str, Any]) -> Any:
    """Return a subclass of a model class whose constructor adds the gates of a record.

    transformers constructs the model itself, on the meta device, and then loads its weights: so
    the gates have to be there once the constructor is done.
    """

    def __init__(self: nn.Module, config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        model_class.__init__(self, config, *args, **kwargs)
        apply_record(self, record, prefix=model_class.base_model_prefix)

    identity = {name: getattr(model_class, name) for name in ("__module__", "__qualname__")}
    return type(model_class.__name__, (model_class,), {"__init__": __init__, **identity})


def _check_gates_loaded(model: nn.Module, missing: Any, path: str | PathLike[str]) -> None:
    """Raise a ValueError if the saved weights lacked some of the gates."""
    gates = {id(p) for p in gate_parameters(model)}
    names = {name for name, p in model.named_parameters() if id(p) in gates}
    if lost := sorted(names & set(missing)):
        raise ValueError(
            f"{path} lacks {len(lost)} weights of the gates that its config tells of, {lost[0]} "
            "first: a plain model was saved with a starified one's config, or a part was reverted"
        )


def _model_class(auto_class: Any, config: Any) -> Any:
    """Return the model class that an auto class picks for a config."""
    mapping = getattr(auto_class, "_model_mapping", None)
    if mapping is None:
        if not hasattr(auto_class, "base_model_prefix"):
            raise TypeError(f"{auto_class!r} is no auto class or model class of transformers")
        return auto_class
    if type(config) not in mapping:
        raise TypeError(f"{auto_class.__name__} has no model for {type(config).__name__}")
    classes = mapping[type(config)]
    if not isinstance(classes, (tuple, list)):
        return classes
    saved = set(config.architectures or ())
    return next((c for c in classes if c.__name__ in saved), classes[0])
