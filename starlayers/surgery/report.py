"""Table of the MLPs of a model: replaced, ready, or skipped and why."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from starlayers.backend import use_backend
from starlayers.dispatch import Plan
from starlayers.surgery.experts import experts_rows
from starlayers.surgery.find import NameFilter, Patterns, find_mlps
from starlayers.surgery.forwards import bypassed, liger_mlps
from starlayers.surgery.gated import GatedMLP
from starlayers.surgery.gates import first_layer, gate_of, name_of
from starlayers.surgery.hidden import HiddenRole
from starlayers.surgery.install import StarLayer, installed, role_of
from starlayers.surgery.linear_layers import Projection, projection, weight_of
from starlayers.surgery.overlooked import overlooked
from starlayers.surgery.projection import ScaleGate, StarProjection

__all__ = ["Report", "report"]

#: rows of a call that is large enough for every fused path
LARGE = 2**20


@dataclass(frozen=True)
class Row:
    """Row of a `Report`: one MLP.

    Args:
        name: name of the MLP's first linear layer in the model, or of the module of experts.
        recipe: name of the recipe that claimed it, or "experts".
        form: "plain", "gated" or "packed", as in `Site`, or "experts".
        state: "star" (has a gate or grown products), "fused" (computed by the core where a call is
            large enough), "eager" (replaced, but no call is fused as things are), "ready" (plain,
            can get a gate), "is a star" (can be fused or grown), or "skipped".
        detail: the gate, the activation, or the reason for "eager" and "skipped".
        parameters: number of parameters that `starify` added.
        flops: FLOPs that `starify` added per position (token or pixel), two per multiply-add.
    """

    name: str
    recipe: str
    form: str
    state: str
    detail: str = ""
    parameters: int = 0
    flops: int = 0


@dataclass(repr=False, eq=False)
class Report:
    """Table of the MLPs of a model, one row each; made by `report(model)`.

    Args:
        rows: the MLPs, in the order of the model's modules.
        parameters: number of the model's parameters without those that `starify` added.

    Example:
        >>> from starlayers.surgery import starify
        >>> model = starify(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)))
        >>> print(report(model))
        MLP  recipe      form   state  detail  parameters  FLOPs
        0    sequential  plain  star   full           +40    +88
        1 replaced, 0 ready, 0 skipped; +40 parameters (53 %), +88 FLOPs per position
    """

    rows: list[Row]
    parameters: int

    @property
    def replaced(self) -> list[Row]:
        """Rows of the MLPs that `starify` has made star layers."""
        return [row for row in self.rows if row.state in ("star", "fused", "eager")]

    @property
    def ready(self) -> list[Row]:
        """Rows of the MLPs that `starify` could replace, fuse or grow."""
        return [row for row in self.rows if row.state in ("ready", "is a star")]

    @property
    def skipped(self) -> list[Row]:
        """Rows of the MLPs that are left alone, with the reasons in `detail`."""
        return [row for row in self.rows if row.state == "skipped"]

    @property
    def parameters_added(self) -> int:
        """Number of parameters in all gates and grown products."""
        return sum(row.parameters for row in self.rows)

    @property
    def flops_added(self) -> int:
        """FLOPs per position of all gates and grown products, two per multiply-add."""
        return sum(row.flops for row in self.rows)

    def __str__(self) -> str:
        head = ("MLP", "recipe", "form", "state", "detail", "parameters", "FLOPs")
        rows = [[v if isinstance(v, str) else _signed(v) for v in astuple(r)] for r in self.rows]
        table = aligned([head, *rows], right=(5, 6))
        share = 100 * self.parameters_added / max(1, self.parameters)
        total = (
            f"{len(self.replaced)} replaced, {len(self.ready)} ready, {len(self.skipped)} skipped; "
            f"+{self.parameters_added:,} parameters ({share:.0f} %), "
            f"+{self.flops_added:,} FLOPs per position"
        )
        return "\n".join([*table, total])

    __repr__ = __str__


def _signed(n: int) -> str:
    return f"+{n:,}" if n else ""


def report(model: nn.Module, *, include: Patterns = None, exclude: Patterns = None) -> Report:
    """Return a table of the MLPs that `starify` has changed or could change.

    Args:
        model: any module, before or after `starify`; it is not changed.
        include, exclude: names or patterns of MLPs, as for `starify`.

    Raises:
        ValueError: a pattern matches no MLP.

    Example:
        >>> class Doubled(nn.Module):  # calls its activation twice, so no gate fits
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc1, self.act, self.fc2 = nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)
        ...     def forward(self, x):
        ...         return self.fc2(self.act(self.act(self.fc1(x))))
        >>> [(row.name, row.state, row.detail) for row in report(Doubled()).rows]
        [('fc1', 'skipped', "one run calls 'act' 2 times, not once")]
    """
    selected, rows = NameFilter(include, exclude), {}
    for path, _, star in installed(model):
        name = name_of(path, star)
        if name in selected:
            rows[name] = _installed_row(name, star, gathered=_is_gathered(model, path))
    for f in find_mlps(model, include=include, exclude=exclude):
        state = "ready" if f.site.form == "plain" else "is a star"
        state = state if f.reason is None else "skipped"
        own = f.act if f.act_name is None else ""  # an activation that no row equals
        rows[f.path] = Row(f.path, f.site.recipe, f.site.form, state, f.reason or own)
    for path, (state, detail) in experts_rows(model, selected).items():
        rows[path] = Row(path, "experts", "experts", state, detail)
    for path, reason in liger_mlps(model).items():
        if path in selected:
            rows[path] = Row(path, "", "gated", "skipped", reason)
    for path, (form, reason) in overlooked(model, rows).items():
        if path in selected:
            rows[path] = Row(path, "", form, "skipped", reason)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    ordered = sorted(rows.values(), key=lambda row: order.get(row.name, 0))
    total = sum(p.numel() for p in model.parameters() if not is_lazy(p))
    return Report(ordered, total - sum(row.parameters for row in ordered))


def _is_gathered(model: nn.Module, path: str) -> bool:
    """Return True if FSDP2 gathers the weights of a module during a call of it or one above."""
    names = path.split(".") if path else []
    above = (model.get_submodule(".".join(names[:n])) for n in range(len(names) + 1))
    return any(k.__name__ == "FSDPModule" for module in above for k in type(module).__mro__)


@contextmanager
def _gathered(star: Any) -> Iterator[None]:
    """Give a star layer plain weights in the place of divided ones, as during a call of it."""
    tables = [layer._parameters for layer in star._modules.values() if layer is not None]
    before = [dict(table) for table in tables]
    try:
        for table in tables:
            table.update({name: _whole(weight) for name, weight in table.items()})
        yield
    finally:
        for table, weights in zip(tables, before, strict=True):
            table.update(weights)


def _whole(weight: Any) -> Any:
    """Return a parameter of the shape, dtype and device of a divided one; it holds one number."""
    if not hasattr(weight, "device_mesh"):
        return weight
    one = torch.empty(1, dtype=weight.dtype, device=weight.device).expand(weight.shape)
    return nn.Parameter(one, weight.requires_grad)


def _installed_row(name: str, star: StarLayer, *, gathered: bool) -> Row:
    gate = gate_of(star)
    count = 0 if gate is None else sum(p.numel() for p in gate.parameters())
    role = role_of(star)
    if isinstance(role, (StarProjection, HiddenRole)):
        words = [role.spec]
    else:
        words = [role.act_name or "", f"grown by {role.grown}" if role.grown else ""]
    plan = None
    if role.fused:
        with _gathered(star) if gathered else nullcontext():
            plan = _plan_of_large(star)
    if plan is not None:
        words.append(plan.reason if plan.reason else "fused" if gate is not None else "")
    state = "star" if gate is not None else "fused" if plan is None or plan.fused else "eager"
    detail = ", ".join(filter(None, words))
    if (replaced := bypassed(star)) is not None:
        detail = f"does not run: {replaced}"
    return Row(name, role.site.recipe, role.site.form, state, detail, count, _flops(star))


def _plan_of_large(star: StarLayer) -> Plan:
    """Return the plan for a call that is large enough for every fused path."""
    inp = first_layer(star)
    n, _, channels_first = projection(inp) or Projection(1, 1)
    weight = weight_of(inp)
    usual = isinstance(weight, Tensor) and weight.is_floating_point() and weight.itemsize > 1
    dtype = weight.dtype if usual else torch.get_default_dtype()
    device = weight.device if isinstance(weight, Tensor) else torch.device("cpu")
    shape = (1, n, LARGE, 1) if channels_first else (LARGE, n)
    x = torch.empty(1, dtype=dtype, device=device).expand(shape)  # of one element of memory
    with use_backend("auto"):
        return star.plan(x) if isinstance(star, StarProjection) else star.star_plan(x)


def _flops(star: StarLayer) -> int:
    """Return the FLOPs per position that starify added: matrices, biases and products."""
    gate = gate_of(star)
    if gate is None:
        return 0
    layers = [sizes for m in gate.modules() if (sizes := projection(m)) is not None]
    matrices = sum(2 * sizes.in_features * sizes.out_features for sizes in layers)
    if not isinstance(star, GatedMLP):
        sizes = projection(first_layer(star)) or Projection(0, 0)
        # a multiply-add per hidden channel, and the bias that a scale gate does not have
        return matrices + (2 if isinstance(gate, ScaleGate) else 3) * sizes.out_features
    # per grown hidden channel: activation, two biases or the product and the sum
    return matrices + 4 * star.star.grown * star.star_sizes()[1]


def aligned(rows: Iterable[Iterable[object]], right: Collection[int] = ()) -> list[str]:
    """Return the lines of a table; columns numbered in `right` are aligned to the right."""
    table = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip_longest(*table, fillvalue="")]
    form = [f"{'>' if i in right else '<'}{width}" for i, width in enumerate(widths)]
    return ["  ".join(map(format, row, form)).rstrip() for row in table]
