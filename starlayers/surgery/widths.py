"""Find the fields of a config that hold the widths of a model's MLPs."""

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Size, nn

from starlayers.surgery.site import join

#: names under which configs hold the width of an MLP; fields of other names are tried after these
WIDTH_NAME = re.compile(r"interm|ff|inner|mlp|hidden_dim")

#: values that a module may copy from its config
PLAIN = (int, float, str, bool, type(None))


@dataclass
class Change:
    """New value for a field of a config: `path` leads to it from the outermost config."""

    path: tuple[str, ...]
    name: str
    old: Any
    new: Any

    def apply(self, config: Any) -> None:
        """Set the field in a config, or in the part of it that has the field."""
        for name in self.path:
            config = getattr(config, name)
        setattr(config, self.name, self.new)


@dataclass
class Widths:
    """Changes that make configs and modules describe wider MLPs."""

    #: by the name of a model with a config
    changes: dict[str, list[Change]] = field(default_factory=dict)
    #: by the name of a module, its attributes that were copied from a config
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def apply(self, model: nn.Module) -> None:
        """Change all configs in a model, in place, those its parts copied among them."""
        for name, changes in self.changes.items():
            part = model.get_submodule(name)
            configs = {id(c): c for m in part.modules() if is_config(c := getattr(m, "config", 0))}
            for change in changes:
                owner = type(attribute_path(part.config, change.path))
                copies = [c for c in configs.values() if type(c) is owner]
                change.apply(part.config)
                for config in copies:
                    if getattr(config, change.name, None) == change.old:
                        setattr(config, change.name, change.new)
        for name, values in self.attributes.items():
            vars(model.get_submodule(name)).update(values)


def is_config(value: Any) -> bool:
    """Return True for a config of transformers."""
    return hasattr(value, "save_pretrained") and hasattr(value, "to_dict")


def attribute_path(config: Any, path: tuple[str, ...]) -> Any:
    """Return the part of a config that `path` leads to."""
    for name in path:
        config = getattr(config, name)
    return config


def describe_widths(model: nn.Module, shapes: dict[str, Size], widths: dict[int, int]) -> Widths:
    """Return the changes with which the model's own classes build it in other shapes.

    The classes are run on the meta device, with one field after the other changed, until every
    parameter has the shape that it should have.

    Args:
        model: a model, or modules some of which have configs of transformers.
        shapes: by name, the shapes of the parameters that will differ from what they are.
        widths: new width of an MLP, by the present one.

    Raises:
        ValueError: no values of the config's fields give all shapes.
    """
    found = Widths()
    for root, part in _configured(model):
        inner = {n[len(root) and len(root) + 1 :]: s for n, s in shapes.items() if _in(n, root)}
        if not inner:
            continue
        if not is_config(part.config):
            raise ValueError(
                f"merge: the config of {type(part).__name__} is a {type(part.config).__name__} and "
                "none of transformers: it cannot be given new widths"
            )
        if not hasattr(part, "save_pretrained"):
            raise ValueError(
                f"merge: the width of this {type(part).__name__} is in the "
                f"{type(part.config).__name__} of the model that it is a part of: merge that model"
            )
        changes, attributes = _search(part, inner, widths)
        found.changes[root] = changes
        found.attributes |= {join(root, name): values for name, values in attributes.items()}
    return found


def _in(name: str, root: str) -> bool:
    return not root or name.startswith(f"{root}.")


def _configured(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the outermost modules that have a config of transformers, with their names."""
    roots: list[str] = []
    for name, part in model.named_modules():
        config = getattr(part, "config", None)
        has_config = is_config(config) or (config is not None and hasattr(part, "save_pretrained"))
        if has_config and not any(_in(name, r) for r in roots):
            roots.append(name)
            yield name, part


def _search(
    part: Any, shapes: dict[str, Size], widths: dict[int, int]
) -> tuple[list[Change], dict[str, dict[str, Any]]]:
    config = copy.deepcopy(part.config)
    kind, config_name = type(part).__name__, type(config).__name__
    try:
        plain = _built(part, config)
    except Exception as error:  # a foreign class may raise anything
        raise ValueError(
            f"merge: {kind} cannot be built from its {config_name} ({error}), so that no width of "
            "it can be found"
        ) from error
    goal = _shapes(plain) | shapes
    accepted: list[Change] = []
    best, wrong = plain, _differing(plain, goal)
    for change in sorted(_candidates(config, widths), key=lambda c: not WIDTH_NAME.search(c.name)):
        if not wrong:
            break
        trial = copy.deepcopy(config)
        change.apply(trial)
        try:
            twin = _built(part, trial)
        except Exception:  # not a field to change
            continue
        if (left := _differing(twin, goal)) < wrong:
            config, best, wrong = trial, twin, left
            accepted.append(change)
    if wrong:
        name = sorted(wrong)[0]
        raise ValueError(
            f"merge: no {config_name} describes the merged model: {name} would be "
            f"{tuple(goal.get(name, ()))}, which a {kind} has for no value of one field. All MLPs "
            "that take their width from the same field have to be grown, by the same number of "
            "products; experts cannot be"
        )
    return accepted, _changed_attributes(part, plain, best, set(shapes))


def _built(part: nn.Module, config: Any) -> nn.Module:
    """Build a model of the same class from a config, on the meta device."""
    config = copy.deepcopy(config)
    for name in ("star_mlp", "fusion_config"):
        if hasattr(config, name):
            delattr(config, name)
    with torch.device("meta"):
        return type(part)(config)


def _shapes(model: nn.Module) -> dict[str, Size]:
    return {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}


def _differing(model: nn.Module, goal: dict[str, Size]) -> set[str]:
    shapes = _shapes(model)
    return {name for name in shapes.keys() | goal.keys() if shapes.get(name) != goal.get(name)}


def _candidates(
    config: Any, widths: dict[int, int], path: tuple[str, ...] = ()
) -> Iterator[Change]:
    """Yield changes of the fields that hold one of the widths, or a list of them."""
    for name, value in vars(config).items():
        if is_config(value):
            yield from _candidates(value, widths, (*path, name))
        elif type(value) is int and value in widths:
            yield Change(path, name, value, widths[value])
        elif isinstance(value, (list, tuple)) and any(
            type(v) is int and v in widths for v in value
        ):
            yield Change(path, name, value, type(value)(widths.get(v, v) for v in value))


def _changed_attributes(
    part: nn.Module, before: nn.Module, after: nn.Module, names: set[str]
) -> dict[str, dict[str, Any]]:
    """Return the attributes that follow the width, by the name of their module.

    Raises:
        ValueError: a module beside the MLPs follows it too.
    """
    linears = {name.rpartition(".")[0] for name in names}
    changed: dict[str, dict[str, Any]] = {}
    for name, module in after.named_modules():
        if name in linears:
            continue
        was = vars(before.get_submodule(name))
        new = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, PLAIN) and isinstance(was.get(key, 0), PLAIN)
            and value != was.get(key)
        }  # fmt: skip
        if new and not any(_in(linear, name) for linear in linears):
            raise ValueError(
                f"merge: {name} of {type(part).__name__} has {next(iter(new))}="
                f"{next(iter(new.values()))} once the MLPs are wider, and it is no MLP"
            )
        if new:
            changed[name] = new
    return changed
