"""Finding the MLPs of a model: what the recipes claim, and what a trial says of it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from starlayers.surgery.attention import gated_attentions
from starlayers.surgery.gated import GatedMLP
from starlayers.surgery.gates import name_of
from starlayers.surgery.install import installed
from starlayers.surgery.verify import verify
from starlayers.surgery.projection import StarProjection
from starlayers.surgery.recipes import RECIPES, is_sequence, runs
from starlayers.surgery.site import Site, attribute, join, parent_of

__all__ = ["Chosen", "Finding", "Patterns", "find_mlps"]

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
        ValueError: a pattern names no MLP.

    Example:
        >>> layer = nn.TransformerEncoderLayer(16, 2, 32, activation="gelu")
        >>> [f.path for f in find_mlps(layer)]
        ['linear1']
    """
    chosen = Chosen(include, exclude)
    found: dict[tuple[int, str], Finding] = {}
    claimed: list[str] = []
    for finding in _claims(model):
        claimed.append(finding.path)
        owner = model.get_submodule(finding.owner)
        parent, leaf = parent_of(owner, finding.site.inp)
        place = id(parent), leaf  # a layer that several modules share is one layer
        known = found.get(place)
        if (known is not None and known.reason is None) or finding.path not in chosen:
            continue
        verdict = verify(owner, finding.site, _caller(model, finding.owner))
        if known is None or verdict.reason is None:
            found[place] = Finding(
                finding.path, finding.owner, verdict.site, verdict.reason, verdict.between
            )
    claimed += [name_of(path, star) for path, _, star in installed(model)]
    claimed += [path for path, _ in gated_attentions(model)]
    chosen.check(claimed)
    return list(found.values())


def _claims(model: nn.Module) -> Iterator[Finding]:
    inside = {id(m) for m in model.modules() if isinstance(m, StarProjection) for m in m.modules()}
    for path, owner in model.named_modules():
        if isinstance(owner, GatedMLP) or id(owner) in inside or not runs(owner):
            continue
        for recipe in list(RECIPES):
            for site in recipe(owner):
                if not isinstance(attribute(owner, site.inp), StarProjection):
                    yield Finding(join(path, site.inp), path, site)


def _caller(model: nn.Module, path: str) -> tuple[nn.Module, str] | None:
    """The nearest module with a forward of its own above a row of layers, and the row's name."""
    if not path or not is_sequence(model.get_submodule(path)):
        return None
    parts = path.split(".")
    for i in reversed(range(len(parts))):
        above = model.get_submodule(".".join(parts[:i]))
        if not is_sequence(above) and runs(above):
            return above, ".".join(parts[i:])
    return None


class Chosen:
    """The MLPs that `include` and `exclude` leave, by name: `name in Chosen(include, exclude)`.

    Example:
        >>> chosen = Chosen(include=None, exclude="layers.[01]")
        >>> "layers.1.fc1" in chosen, "layers.2.fc1" in chosen
        (False, True)
    """

    def __init__(self, include: Patterns, exclude: Patterns) -> None:
        self.include = None if include is None else _listed(include)
        self.exclude = [] if exclude is None else _listed(exclude)

    def __contains__(self, name: str) -> bool:
        wanted = self.include is None or _matches(name, self.include)
        return wanted and not _matches(name, self.exclude)

    def check(self, names: list[str]) -> None:
        """Raise for a pattern that matches none of the names there are."""
        for kind, asked in (("include", self.include or []), ("exclude", self.exclude)):
            for pattern in asked:
                if not any(_matches(name, [pattern]) for name in names):
                    raise ValueError(
                        f"{kind} pattern {pattern!r} matches none of the {len(names)} MLPs found"
                        + (f", the first of which is {names[0]}" if names else "")
                    )


def _listed(given: str | Sequence[str]) -> list[str]:
    return [given] if isinstance(given, str) else list(given)


def _matches(name: str, asked: list[str]) -> bool:
    return any(fnmatchcase(name, p) or fnmatchcase(name, f"{p}.*") for p in asked)
