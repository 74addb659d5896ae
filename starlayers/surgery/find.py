"""Find the MLPs of a model: recipes claim them, a trial run verifies each claim."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import nn

from starlayers.surgery.adopted import Adopted
from starlayers.surgery.callers import other_caller
from starlayers.surgery.experts import experts_names
from starlayers.surgery.gates import name_of
from starlayers.surgery.install import installed
from starlayers.surgery.progress import shown
from starlayers.surgery.projection import StarProjection
from starlayers.surgery.recipes import RECIPES, TENTATIVE, is_sequence, runs
from starlayers.surgery.site import Site, attribute, join, parent_of
from starlayers.surgery.verify import Cache, verify

__all__ = ["find_mlps"]

#: a name or `fnmatch` pattern, several of them, or `None` for no condition
Patterns = str | Sequence[str] | None


@dataclass
class Finding:
    """MLP that a recipe claims, and the result of its verification.

    Args:
        path: name of the MLP's first linear layer in the model.
        owner: name of the module that contains the MLP; names in `site` are relative to it.
        site: names of the MLP's parts.
        reason: why the MLP cannot be replaced, `None` if it can.
        between: names of the modules between the product of a gated MLP and its last layer.
        after: names of the modules after that layer.
        act_name: name of the activation in `ACTIVATIONS`, `None` if it is not one of them.
        act: the activation of a gated MLP in words.
        up_first: the second branch of a gated MLP is computed first.
        casts: its product is converted to the dtype of the last layer's weight.

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
    after: tuple[str, ...] = ()
    act_name: str | None = None
    act: str = ""
    up_first: bool = False
    casts: bool = True


def find_mlps(
    model: nn.Module, *, include: Patterns = None, exclude: Patterns = None
) -> list[Finding]:
    """Return the MLPs of a model that are not star layers yet.

    Each is verified by the graph of its forward or by trial runs on random input; equal MLPs are
    verified once. What takes longer than two seconds shows a progress bar; TQDM_DISABLE=1 in the
    environment and the `disable_progress_bar` of transformers switch it off.

    Args:
        model: any module; it is not changed.
        include, exclude: names, or patterns as in `fnmatch`, of MLPs or of modules above them.

    Returns:
        One finding per MLP; `reason` is `None` for those that `starify` can replace.

    Raises:
        ValueError: a pattern matches no MLP.

    Example:
        >>> layer = nn.TransformerEncoderLayer(16, 2, 32, activation="gelu")
        >>> [(f.path, f.site.recipe, f.reason) for f in find_mlps(layer)]
        [('linear1', 'chain', None)]
    """
    selected = NameFilter(include, exclude)
    findings: dict[tuple[int, str], Finding] = {}
    names: list[str] = []
    cache: Cache = {}
    for claim in shown(list(_claims(model))):
        tentative = claim.site.recipe in TENTATIVE
        if not tentative:
            names.append(claim.path)
        owner = model.get_submodule(claim.owner)
        parent, leaf = parent_of(owner, claim.site.inp)
        key = id(parent), leaf  # the same for a layer that several modules share
        known = findings.get(key)
        settled = known is not None and known.reason is None
        if settled or claim.path not in selected:
            continue
        above = _caller(model, claim.owner)
        caller = None if above is None else (model.get_submodule(above[0]), above[1])
        verdict = verify(owner, claim.site, caller, cache)
        if verdict.reason is None and claim.site.form == "plain" and claim.site.act is not None:
            other = other_caller(model, claim.owner, claim.site, above and above[0])
            reason = f"{other} calls it past its activation" if other else None
            verdict = verdict._replace(reason=reason)
        if tentative:
            if verdict.reason is not None:
                continue
            names.append(claim.path)
        if known is None or verdict.reason is None:
            findings[key] = replace(claim, **verdict._asdict())
    names += [name_of(path, star) for path, _, star in installed(model)]
    selected.check([*names, *experts_names(model)])
    return list(findings.values())


def _claims(model: nn.Module) -> Iterator[Finding]:
    """Yield the claims of all recipes, without those inside star layers."""
    inside = {id(m) for s in model.modules() if isinstance(s, StarProjection) for m in s.modules()}
    for path, owner in model.named_modules():
        if isinstance(owner, Adopted) or id(owner) in inside or not runs(owner):
            continue
        for recipe in list(RECIPES):
            for site in recipe(owner):
                parent = parent_of(owner, site.inp)[0]
                in_star = isinstance(parent, Adopted) or id(parent) in inside
                if not in_star and not isinstance(attribute(owner, site.inp), StarProjection):
                    yield Finding(join(path, site.inp), path, site)


def _caller(model: nn.Module, path: str) -> tuple[str, str] | None:
    """Return the name of the module that calls a sequence, and its name for the sequence.

    This is the nearest module above with a forward of its own. `None` if `path` is no sequence.
    """
    if not path or not is_sequence(model.get_submodule(path)):
        return None
    parts = path.split(".")
    for i in reversed(range(len(parts))):
        name = ".".join(parts[:i])
        above = model.get_submodule(name)
        if not is_sequence(above) and runs(above):
            return name, ".".join(parts[i:])
    return None


class NameFilter:
    """Selection of MLPs by name: `name in NameFilter(include, exclude)`."""

    def __init__(self, include: Patterns, exclude: Patterns) -> None:
        self.include = None if include is None else _as_list(include)
        self.exclude = [] if exclude is None else _as_list(exclude)

    def __contains__(self, name: str) -> bool:
        included = self.include is None or matches(name, self.include)
        return included and not matches(name, self.exclude)

    def check(self, names: list[str]) -> None:
        """Raise a ValueError for a pattern that matches none of `names`."""
        for kind, patterns in (("include", self.include or []), ("exclude", self.exclude)):
            for pattern in patterns:
                if not any(matches(name, [pattern]) for name in names):
                    raise ValueError(
                        f"{kind} pattern {pattern!r} matches none of the {len(names)} MLPs found"
                        + (f", the first of which is {names[0]}" if names else "")
                    )


def _as_list(patterns: str | Sequence[str]) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)


def matches(name: str, patterns: list[str]) -> bool:
    """Return True if a pattern matches a name or that of a module above it."""
    return any(fnmatchcase(name, p) or fnmatchcase(name, f"{p}.*") for p in patterns)
