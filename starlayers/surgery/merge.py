"""Merge gates and grown products into plain layers, to leave starlayers."""

import warnings
from collections import Counter, OrderedDict
from dataclasses import replace
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.utils._pytree import tree_leaves

from starlayers.surgery.adapters import settle_adapter_hooks
from starlayers.surgery.gated import GatedMLP
from starlayers.surgery.gates import first_layer, gate_of, name_of
from starlayers.surgery.grown import Grown
from starlayers.surgery.hidden import GatedHidden
from starlayers.surgery.install import (
    StarLayer,
    installed,
    put_projection,
    role_of,
    settle_fast_paths,
    uninstall,
)
from starlayers.surgery.linear_layers import Projection, dtype_and_device, projection
from starlayers.surgery.projection import LowRankGate, ScaleGate, StarProjection
from starlayers.surgery.recipes import is_sequence
from starlayers.surgery.sandbox import default_state, sandbox_copy, seed_generators
from starlayers.surgery.saving import note_in_config
from starlayers.surgery.sharding import settle_tp_plans
from starlayers.surgery.site import attribute, join
from starlayers.surgery.trial_run import MismatchError, run
from starlayers.surgery.widths import PLAIN, Widths, describe_widths

__all__ = ["merge"]

#: largest error of a merged copy beside its original, relative to the largest output, in float32:
#: the order of the sums differs, so it is rounding alone
TOLERANCE = 1e-4

#: name of the owner, owner and star layer, as `installed` yields them
Star = tuple[str, nn.Module, StarLayer]


def merge(model: nn.Module) -> nn.Module:
    """Turn a starified model into a plain one that computes the same, in place.

    A gated MLP of f channels with r grown products becomes a gated MLP of (1 + r) f channels:
    `f1` is appended to the rows of `gate`, `f2` to those of `up`, and the columns of `out` are
    repeated. The model's config gets the new width, so that `save_pretrained` writes a folder that
    needs no starlayers: `AutoModel` classes, vLLM and GGUF converters take it. A plain MLP with
    `gate="scale"` gets the factors `1 + gate` in the columns of its last layer. MLPs that were only
    fused, and gates that are exactly zero, are taken out. Results agree to rounding.

    Everything is checked before anything is changed: a copy of every different MLP is merged and
    compared with the original, and the model's class is built from the new config, on the meta
    device, and has to have every parameter in the merged shape. Parameters stay the same objects,
    larger ones without their `.grad`; an optimizer that has taken steps has to be made anew.

    Returns:
        `model` itself, without star layers.

    Raises:
        ValueError: the model has no star layers; a gate depends on the input, so that no plain
            layer computes it; layers are quantised, sharded, shared or wrapped by an adapter; or
            no config describes the merged model, as with layers of different widths. The message
            names the layer, and the model is as it was.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from starlayers.surgery import starify
        >>> sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=16, vocab_size=9))
        >>> model = merge(starify(model, grow=1))
        >>> type(model.model.layers[0].mlp).__name__, model.config.intermediate_size
        ('LlamaMLP', 32)
    """
    stars = list(installed(model))
    if not stars:
        raise ValueError(f"merge: this {type(model).__name__} has no star layer of starify's")
    adapted = [n for n, m in model.named_modules() if type(m).__module__.split(".")[0] == "peft"]
    if adapted:
        raise ValueError(
            f"merge: this {type(model).__name__} has adapters, {adapted[0] or 'itself'} the first: "
            "call its merge_and_unload, and merge what that returns"
        )
    for path, owner, star in stars:
        if (reason := _blocker(owner, star)) is not None:
            raise ValueError(f"merge: {name_of(path, star)} {reason}")
    _check_unshared(model, stars)
    widths = describe_widths(model, *_wider(model, stars))
    _check_values(stars, widths)
    _warn_of_losses(stars)
    with torch.inference_mode(False):  # or its tensors could not be trained afterwards
        for _, owner, star in stars:
            _merge_one(owner, star)
    widths.apply(model)
    settle_fast_paths(model)
    settle_tp_plans(model)
    settle_adapter_hooks(model)
    note_in_config(model)
    return model


# what can be merged


def _blocker(owner: nn.Module, star: StarLayer) -> str | None:
    """Return the reason why a star layer cannot be merged, or `None` if it can."""
    gate = gate_of(star)
    if gate is None or not _has_effect(star):
        return None
    if isinstance(star, GatedHidden):
        return (
            f"has gate={star.star.spec!r} behind an activation that is written into the forward of "
            f"{star.star.original.__name__}: share the model with its gates (docs/starify.md), or "
            "take them out with revert(model)"
        )
    if isinstance(star, StarProjection) and not isinstance(gate, ScaleGate):
        return (
            f"has gate={star.spec!r}, which depends on the input, so no plain layer computes it: "
            "share the model with its gates (docs/starify.md), or take them out with revert(model)"
        )
    if isinstance(star, GatedMLP) and type(gate) is not Grown:
        return f"has its grown products in a {type(gate).__name__}: merge its adapter before"
    if isinstance(star, StarProjection) and star.site.out is None:
        return "has no last layer in the module that holds it, which could take the factors"
    for name, layer in _changed_layers(owner, star).items():
        if not _is_plain(layer, linear_only=isinstance(star, GatedMLP)):
            return (
                f"cannot be merged: its {name} is a {type(layer).__name__}, no plain linear layer"
            )
        weight: Any = layer.weight
        if type(weight) is not nn.Parameter or not weight.is_floating_point():
            return (
                f"cannot be merged: the weight of its {name} is a {type(weight).__name__} of "
                f"{weight.dtype}; merge before quantising or sharding"
            )
        if weight.is_meta and hasattr(layer, "_hf_hook"):
            return f"cannot be merged: the weight of its {name} is offloaded"
    if isinstance(star, GatedMLP) and star.star.site.up is not None:
        up = attribute(owner, star.star.site.up)
        if up.bias is None and gate.f2.bias is not None:  # type: ignore[union-attr]
            return f"cannot be merged: {star.star.site.up} has no bias, and its grown products have"
    return None


def _is_plain(layer: nn.Module, *, linear_only: bool) -> bool:
    """Return True for a layer whose output is that of its weight and bias, and no more."""
    is_other = type(layer) is nn.Conv2d or type(layer).__name__ == "Conv1D"
    return type(layer) is nn.Linear or (is_other and not linear_only)


def _has_effect(star: StarLayer) -> bool:
    """Return False if a gate is exactly zero; grown products count as they are."""
    gate = gate_of(star)
    if isinstance(star, GatedMLP):
        return gate is not None
    last = gate.up if isinstance(gate, LowRankGate) else gate
    return any(p.is_meta or bool(p.any()) for p in last.parameters())  # type: ignore[union-attr]


def _changed_layers(owner: nn.Module, star: StarLayer) -> dict[str, nn.Module]:
    """Return the layers whose weights `merge` changes or reads, by name in the owner."""
    site = role_of(star).site
    names = site.layers if isinstance(star, GatedMLP) else filter(None, [site.out])
    layers = {name: attribute(owner, name) for name in names}
    grown = star.star_grown if isinstance(star, GatedMLP) else None
    return layers | {f"star_grown.{name}": f for name, f in getattr(grown, "_modules", {}).items()}


def _check_unshared(model: nn.Module, stars: list[Star]) -> None:
    """Raise a ValueError if a weight that changes belongs to something else as well."""
    uses = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    changing = [
        (name_of(path, star), name, layer)
        for path, owner, star in stars
        if _has_effect(star)
        for name, layer in _changed_layers(owner, star).items()
    ]
    times = Counter(id(layer) for _, _, layer in changing)
    for mlp, name, layer in changing:
        if times[id(layer)] > 1 or any(uses[id(p)] > 1 for p in layer.parameters()):
            raise ValueError(
                f"merge: {mlp} shares the weights of {name} with another layer, which would change"
            )


def _wider(model: nn.Module, stars: list[Star]) -> tuple[dict[str, Size], dict[int, int]]:
    """Return the shapes of the parameters that grow, and the widths of their MLPs."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    shapes: dict[str, Size] = {}
    widths: dict[int, int] = {}
    for _, owner, star in stars:
        if not isinstance(star, GatedMLP) or not _has_effect(star):
            continue
        times, site = 1 + star.star.grown, star.star.site
        hidden = star.star_sizes()[1]
        widths[hidden] = times * hidden
        for leaf in site.layers:
            for name, p in attribute(owner, leaf).named_parameters():
                dimension = 1 if leaf == site.out else 0
                shape = list(p.shape)
                if dimension < len(shape):
                    shape[dimension] *= times
                for path in names[id(owner)]:
                    shapes[join(path, f"{leaf}.{name}")] = Size(shape)
    return shapes, widths


# the change


def _merge_one(owner: nn.Module, star: StarLayer) -> None:
    """Merge one star layer into plain layers, in place."""
    if isinstance(star, GatedMLP):
        if star.star.grown:
            _widen(star)
    elif isinstance(star, StarProjection) and _has_effect(star):
        _scale(attribute(owner, star.site.out or ""), star.gate.weight)  # type: ignore[arg-type]
    uninstall(owner, star)


def _widen(mlp: GatedMLP) -> None:
    """Append the grown products of a gated MLP to its own layers."""
    site, times = mlp.star.site, 1 + mlp.star.grown
    grown: Any = mlp.star_grown
    inp, out = attribute(mlp, site.inp), attribute(mlp, site.out or "")
    for name in ("weight", "bias"):
        own = [getattr(inp, name)]
        if site.up is None:
            own = [None, None] if own[0] is None else list(own[0].chunk(2))
            own = own[::-1] if site.gate_last else own
        else:
            own.append(getattr(attribute(mlp, site.up), name))
        pairs = zip(own, (getattr(grown.f1, name), getattr(grown.f2, name)))
        wide = [_appended(rows, more, mlp.star.grown) for rows, more in pairs]
        if site.up is not None:
            _set(inp, name, wide[0])
            _set(attribute(mlp, site.up), name, wide[1])
        else:
            halves = [half for half in wide if half is not None]
            _set(
                inp, name, torch.cat(halves[::-1] if site.gate_last else halves) if halves else None
            )
    _set(out, "weight", out.weight.repeat(1, times))


def _appended(rows: Tensor | None, more: Tensor | None, rank: int) -> Tensor | None:
    """Return rows of a branch with those of its grown products, one product after the other."""
    if rows is None:
        return None
    if more is None:
        return torch.cat([rows, rows.new_zeros(rank * len(rows), *rows.shape[1:])])
    by_product = more.unflatten(0, (-1, rank)).transpose(0, 1).flatten(0, 1)
    return torch.cat([rows, by_product.to(rows)])


def _set(layer: nn.Linear, name: str, value: Tensor | None) -> None:
    """Give a parameter of a linear layer another size; it stays the same object."""
    if value is None:
        return
    parameter = getattr(layer, name)
    parameter.data, parameter.grad = value.detach(), None
    if name == "weight":
        layer.out_features, layer.in_features = value.shape


@torch.no_grad()
def _scale(out: nn.Module, gate: Tensor) -> None:
    """Multiply the columns of a linear layer by `1 + gate`."""
    weight: Any = out.weight
    shape = (-1, 1) if type(out).__name__ == "Conv1D" else (1, -1) + (1,) * (weight.ndim - 2)
    # one rounding in low precision, not two
    factor = 1 + gate.flatten().to(torch.promote_types(gate.dtype, torch.float32))
    weight.copy_(weight * factor.reshape(shape).to(weight.device))


# what is checked by its values


def _check_values(stars: list[Star], widths: Widths) -> None:
    """Merge a copy of every different MLP and compare it with the original.

    Raises:
        ValueError: their outputs differ by more than rounding, or the MLP does not run by itself.
    """
    checked: set[str] = set()
    for path, owner, star in stars:
        if not _has_effect(star):
            continue
        attributes = widths.attributes.get(path, {})
        settings = {k: v for k, v in vars(owner).items() if isinstance(v, PLAIN) or callable(v)}
        key = f"{type(owner)} {owner!r} {role_of(star).site} {attributes} {settings}"
        if key in checked:
            continue
        checked.add(key)
        try:
            error = _error(owner, star, attributes)
        except MismatchError as reason:
            raise ValueError(
                f"merge: {name_of(path, star)} cannot be compared with its merged form: {reason}"
            ) from reason
        if not error <= TOLERANCE:
            raise ValueError(
                f"merge: {name_of(path, star)} would compute something else, off by {error:.2g} of "
                "its largest output: between its product and its last layer is more than a sum "
                "over channels"
            )


def _error(owner: nn.Module, star: StarLayer, attributes: dict[str, Any]) -> float:
    """Return the error of a merged copy of an MLP, relative to the largest output."""
    site = role_of(star).site
    body: Any = owner
    if is_sequence(owner) and isinstance(star, StarProjection):
        names = list(owner._modules)
        part = names[names.index(site.inp) : names.index(site.out or "") + 1]
        body = nn.Sequential(OrderedDict((name, owner.get_submodule(name)) for name in part))
    device = dtype_and_device(attribute(owner, site.inp))[1]
    device = torch.device("cpu") if device.type == "meta" else device
    with default_state(device):
        copy = sandbox_copy(body).float()
        copied: Any = copy if isinstance(star, GatedMLP) else attribute(copy, site.inp)
        if isinstance(copied, GatedMLP):  # its snapshot has the objects of the original
            copied.star = replace(copied.star, snapshot=None)
        elif isinstance(copied, StarProjection):  # and its place the parts of the original
            put_projection(copy, copied)
        seed_generators(device)
        n = _inputs(star)
        for layer in _changed_layers(copy, copied).values():  # one that is zero would hide errors
            nn.init.normal_(layer.weight, std=n**-0.5)  # type: ignore[arg-type]
        if isinstance(star, StarProjection):
            nn.init.normal_(copied.gate.weight)
        x = _input_that_runs(copy, [(2, 3, n), (2, n, 3, 3)], device)
        modes = (False, True) if isinstance(star, StarProjection) else (False,)
        before = [_tensors(run(copy, x, train=train)) for train in modes]
        _merge_one(copy, copied)
        vars(copy).update(attributes)
        after = [_tensors(run(copy, x, train=train)) for train in modes]
    pairs = [pair for old, new in zip(before, after) for pair in zip(old, new)]
    scale = max(float(a.abs().max()) for a, _ in pairs)
    return max(float((a - b).abs().max()) for a, b in pairs) / max(scale, 1e-30)


def _inputs(star: StarLayer) -> int:
    return (projection(first_layer(star)) or Projection(1, 1)).in_features


def _input_that_runs(body: nn.Module, shapes: list[tuple[int, ...]], device: Any) -> Tensor:
    """Return random input of the first shape with which a module runs."""
    problem: MismatchError | None = None
    for shape in shapes:
        x = torch.randn(shape).to(device)
        try:
            run(body, x)
        except MismatchError as error:
            problem = problem or error
        else:
            return x
    raise problem or MismatchError("it takes no input")


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, Tensor) and t.is_floating_point()]


# what a plain layer cannot keep


def _warn_of_losses(stars: list[Star]) -> None:
    """Warn of hooks, settings and dropouts that the merged layers do not have."""
    lost: dict[str, list[str]] = {}
    for path, owner, star in stars:
        gate = gate_of(star)
        if gate is None:
            continue
        name = name_of(path, star)
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        if any(getattr(m, kind) for m in gate.modules() for kind in hooks):
            lost.setdefault("hooks on their gates are gone", []).append(name)
        own = [p for layer in _changed_layers(owner, star).values() for p in layer.parameters()]
        if len({p.requires_grad for p in (*own, *gate.parameters())}) > 1:
            lost.setdefault("requires_grad is that of their own layers now", []).append(name)
        between = star.star.between if isinstance(star, GatedMLP) and star.star.grown else ()
        if any(getattr(attribute(owner, part), "p", 0) > 0 for part in between):
            lost.setdefault("dropout drops every product by itself now", []).append(name)
    for what, names in lost.items():
        warnings.warn(f"merge: {len(names)} MLPs, {names[0]} first: {what}", stacklevel=3)
