"""What surgery did to a model, what it could do, and what it leaves alone: as a table."""

from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from starlayers.surgery.attention import GatedAttention, gated_attentions
from starlayers.surgery.find import Chosen, Patterns, find_mlps
from starlayers.surgery.gated import GatedMLP
from starlayers.surgery.gates import gate_of, name_of
from starlayers.surgery.install import installed, role_of
from starlayers.surgery.projection import ScaleGate, StarProjection
from starlayers.surgery.site import Projection, projection

__all__ = ["Report", "Row", "report"]


@dataclass(frozen=True)
class Row:
    """One MLP, or one attention gate, of a report.

    Args:
        name: of its first projection in the model.
        recipe, form: the structure that was found, as in `Site`; "attention" for its gates.
        state: "star" (has a gate or grown products), "fused" (the core's forward), "ready"
            (plain, can get a gate), "is a star" (can be fused or grown), or "skipped".
        detail: the gate, or the reason.
        parameters: that were added.
        flops: that were added per position (token or pixel), two per multiply-add.

    Example:
        >>> Row("fc1", "chain", "plain", "ready").parameters
        0
    """

    name: str
    recipe: str
    form: str
    state: str
    detail: str = ""
    parameters: int = 0
    flops: int = 0


class Report:
    """The MLPs of a model, one row each; `print(report)` gives the table.

    Example:
        >>> from starlayers.surgery import starify
        >>> model = starify(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)))
        >>> print(report(model))
        MLP  recipe      form   state  detail  parameters  FLOPs
        0    sequential  plain  star   full           +40    +88
        1 replaced, 0 ready, 0 skipped; +40 parameters (53 %), +88 FLOPs per position
    """

    def __init__(self, rows: list[Row], parameters: int) -> None:
        self.rows = rows
        #: of the model without what was added
        self.parameters = parameters

    @property
    def replaced(self) -> list[Row]:
        """The MLPs that are star layers of surgery."""
        return [row for row in self.rows if row.state in ("star", "fused")]

    @property
    def ready(self) -> list[Row]:
        """The MLPs that `starify` could replace, in one mode or the other."""
        return [row for row in self.rows if row.state in ("ready", "is a star")]

    @property
    def skipped(self) -> list[Row]:
        """What looked like an MLP and is left alone, with the reasons."""
        return [row for row in self.rows if row.state == "skipped"]

    @property
    def parameters_added(self) -> int:
        """The parameters of all gates and grown products."""
        return sum(row.parameters for row in self.rows)

    @property
    def flops_added(self) -> int:
        """The FLOPs per position of all gates and grown products, two per multiply-add."""
        return sum(row.flops for row in self.rows)

    def __str__(self) -> str:
        head = ("MLP", "recipe", "form", "state", "detail", "parameters", "FLOPs")
        lines = [
            (r.name, r.recipe, r.form, r.state, r.detail, _added(r.parameters), _added(r.flops))
            for r in self.rows
        ]
        widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
        table = [
            "  ".join(
                cell.rjust(width) if i > 4 else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths))
            ).rstrip()
            for line in [head, *lines]
        ]
        share = 100 * self.parameters_added / max(1, self.parameters)
        total = (
            f"{len(self.replaced)} replaced, {len(self.ready)} ready, {len(self.skipped)} skipped; "
            f"+{self.parameters_added:,} parameters ({share:.0f} %), "
            f"+{self.flops_added:,} FLOPs per position"
        )
        return "\n".join([*table, total])

    __repr__ = __str__


def _added(n: int) -> str:
    return f"+{n:,}" if n else ""


def report(model: nn.Module, *, include: Patterns = None, exclude: Patterns = None) -> Report:
    """What `starify` did to a model and what it would do, MLP by MLP; it changes nothing.

    Args:
        model: any module, before or after `starify`.
        include, exclude: as for `starify`.

    Raises:
        ValueError: a pattern names no MLP.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        >>> [row.state for row in report(model).rows]
        ['ready']
    """
    chosen, rows = Chosen(include, exclude), {}
    for path, _, star in installed(model):
        name = name_of(path, star)
        if name in chosen:
            rows[name] = _installed_row(name, star)
    for f in find_mlps(model, include=include, exclude=exclude):
        state = "ready" if f.site.form == "plain" else "is a star"
        state = state if f.reason is None else "skipped"
        rows[f.path] = Row(f.path, f.site.recipe, f.site.form, state, f.reason or "")
    for path, module in gated_attentions(model):
        if path in chosen:
            state = "fused" if isinstance(module, GatedAttention) else "is a star"
            rows[path] = Row(path, "attention", "gate", state, "sigmoid")
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    ordered = sorted(rows.values(), key=lambda row: order.get(row.name, 0))
    total = sum(p.numel() for p in model.parameters() if not is_lazy(p))
    return Report(ordered, total - sum(row.parameters for row in ordered))


def _installed_row(name: str, star: StarProjection | GatedMLP) -> Row:
    gate = gate_of(star)
    count = 0 if gate is None else sum(p.numel() for p in gate.parameters())
    role = role_of(star)
    if isinstance(role, StarProjection):
        detail = role.spec + (", fused" if role.fused else "")
    else:
        detail = (role.row or "") + (f", grown by {role.grown}" if role.grown else "")
    site = role.site
    state = "star" if gate is not None else "fused"
    return Row(name, site.recipe, site.form, state, detail, count, _flops(star))


def _flops(star: StarProjection | GatedMLP) -> int:
    """Two per multiply-add of the gate's matrices, one per bias, and the product's own."""
    gate = gate_of(star)
    if gate is None:
        return 0
    maps = [s for m in gate.modules() if (s := projection(m)) is not None]
    matrices = sum(2 * s.in_features * s.out_features for s in maps)
    if isinstance(star, StarProjection):
        sizes = projection(star.inp) or Projection(0, 0)
        return matrices + (2 if isinstance(gate, ScaleGate) else 3) * sizes.out_features
    hidden = star.star_sizes()[1]
    return matrices + 4 * star.star.grown * hidden
