"""Rank of the outputs of star layers against the number of monomials."""

import time
from math import factorial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.harness.report import conditions, markdown_table
from benchmarks.harness.runner import Job, Records
from benchmarks.harness.study import Study
from starlayers import StarOp
from starlayers.coefficients import empirical_rank, implicit_dimension
from starlayers.coefficients.modules import SumOp

ONE = range(2, 25)
#: the matrix of two layers has C(d + 4, 4) columns: 3060 at 14 inputs, and 20475 at 24
TWO = range(2, 15)
SMOKE = range(2, 5)
#: outputs in multiples of the expected rank, so that a larger rank would show
MORE = 1.1
#: layers -> name in the names of runs
KINDS = {"star": "star", "star, two layers": "star-two-layers", "sum": "sum"}
TEXT = """\
## Study: how many dimensions?

**The question.** A star layer is said to work in about `(d / sqrt 2)^2` dimensions, and L of
them in `(d / sqrt 2)^(2^L)`. Is that so?

**What was done.** Activation-free stars of random weights with a tenth more outputs than there
should be dimensions, and the rank of the matrix of their outputs on random inputs, in float64.
One layer for d = {one_low} to {one_high}, two layers for d = {two_low} to {two_high} (at
{one_high} inputs the matrix would have {too_many:,} columns), the sum of two branches for
comparison; {seeds} seeds each, {ranks} ranks.

**The answer.** {right} of {ranks} ranks are exactly the number of monomials, `C(d + 2^L, 2^L)`
for L layers and d + 1 for a sum.

![Ranks on the lines of the counts](../figures/coefficients-dimension.png)

{table}
So the paper's formula is right about how one layer grows and a little low, since it leaves out
the squares' other half, the linear terms and the constant. For two layers it is too high, by up
to {factor:.1f} times at d = {two_high}: it takes `(x1 x2)(x3 x4)` and `(x1 x3)(x2 x4)` for
different. With more inputs the factor grows to `(2^L)! / 2^(2^(L - 1))`: {limit2:,.0f} times for
two layers, {limit3:,.0f} for three and {limit4:.1e} for four.

**What it does not say.** That is the space all channels together can fill. One channel is a
matrix of rank two in it, and a layer with fewer channels than dimensions fills no more than it
has channels. Nothing here says that a large space helps; the other studies ask that.

**Conditions**

{conditions}
"""


def jobs(seeds: int = 5, smoke: bool = False) -> dict[str, Job]:
    """Make a job for every d and seed: one layer, two layers, and the sum of two branches."""
    sizes = {"star": ONE, "star, two layers": TWO, "sum": ONE}
    return {
        f"{KINDS[kind]}-{d}-seed{seed}": {
            "arm": kind,
            "seed": seed,
            "d": d,
            "outputs": outputs(kind, d),
            "act": None,
        }
        for seed in range(seeds)
        for kind, inputs in sizes.items()
        for d in (SMOKE if smoke else inputs)
    }


def count(kind: str, d: int) -> int:
    """Return the number of monomials, the expected rank."""
    if kind == "sum":
        return d + 1
    return int(implicit_dimension(d, 2 if kind == "star, two layers" else 1))


def outputs(kind: str, d: int) -> int:
    """Return a number of outputs above the expected rank."""
    return int(MORE * count(kind, d)) + 1


def network(kind: str, d: int) -> nn.Module:
    """Make activation-free stars (or a sum) with more outputs than dimensions."""
    if kind == "star, two layers":
        # the first layer spans all quadratics, so that the second can make every quartic
        hidden = outputs("star", d)
        return nn.Sequential(
            StarOp(d, hidden, act=None), StarOp(hidden, outputs(kind, d), act=None)
        )
    return (SumOp if kind == "sum" else StarOp)(d, outputs(kind, d), act=None)


def measure(job: Job) -> dict[str, Any]:
    """Measure the rank of the job's network."""
    torch.manual_seed(job["seed"])
    began = time.perf_counter()
    rank = empirical_rank(network(job["arm"], job["d"]), seed=job["seed"])
    return {
        "rank": rank,
        "count": count(job["arm"], job["d"]),
        "seconds": time.perf_counter() - began,
    }


def summarise(records: Records) -> dict[str, dict[int, dict[str, Any]]]:
    """Return for each kind and d the measured ranks, their count, and the paper's formula."""
    summary: dict[str, dict[int, dict[str, Any]]] = {}
    for record in records.values():
        assert record.definition is not None
        assert record.arm is not None
        kind, d, metrics = record.arm, record.definition["d"], record.metrics
        row = summary.setdefault(kind, {}).setdefault(d, {"ranks": [], "count": metrics["count"]})
        row["ranks"].append(metrics["rank"])
        if kind != "sum":
            layers = 2 if kind == "star, two layers" else 1
            row["paper"] = implicit_dimension(d, layers, exact=False)
    return summary


def wrong(records: Records) -> list[str]:
    """Return the names of the runs whose rank is not the number of monomials."""
    return [n for n, r in records.items() if r.metrics["rank"] != r.metrics["count"]]


def tables(records: Records) -> str:
    """Return ranks by layers and d, and the number of ranks that differ from the count."""
    lines = []
    for kind, by_d in summarise(records).items():
        for d, row in sorted(by_d.items()):
            ranks = sorted(set(row["ranks"]))
            paper = f"{row['paper']:.0f}" if "paper" in row else ""
            lines.append([kind, str(d), ", ".join(map(str, ranks)), str(row["count"]), paper])
    table = markdown_table(["layers", "d", "rank", "monomials", "paper's formula"], lines)
    differ = wrong(records)
    return f"{table}\n{len(records)} ranks, {len(differ)} differ from the count {' '.join(differ)}"


def plot(records: Records, file: Path) -> None:
    """Draw ranks as points on the lines of the counts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    for i, (kind, by_d) in enumerate(summarise(records).items()):
        d = sorted(by_d)
        ax.plot(d, [by_d[n]["count"] for n in d], color=f"C{i}", lw=1, label=f"{kind}: monomials")
        points = [(n, rank) for n in d for rank in by_d[n]["ranks"]]
        ax.plot(*zip(*points), "o", color=f"C{i}", ms=4, label=f"{kind}: rank")
        if "paper" in by_d[d[0]]:
            ax.plot(d, [by_d[n]["paper"] for n in d], ":", color=f"C{i}", lw=1)
    ax.set(xlabel="inputs d", ylabel="dimensions", yscale="log")
    ax.set_title("dotted: the paper's approximation", fontsize=9)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7)
    figure.savefig(file, dpi=120)


def text(records: Records) -> str:
    """Make the page of the study of dimensions."""
    summary = summarise(records)
    one, two, both = (summary[kind] for kind in ("star", "star, two layers", "sum"))
    lines = []
    for d in [n for n in sorted(one) if n in (2, 4, 8, max(two), max(one))]:
        cells = [_ranks(one[d]), f"{one[d]['paper']:,.0f}"]
        cells += [_ranks(two[d]), f"{two[d]['paper']:,.0f}"] if d in two else ["", ""]
        lines.append([str(d), *cells, _ranks(both[d])])
    header = ["d", "star: rank", "paper", "two layers: rank", "paper", "sum: rank"]
    return TEXT.format(
        one_low=min(one),
        one_high=max(one),
        two_low=min(two),
        two_high=max(two),
        too_many=int(implicit_dimension(max(one), 2)),
        seeds=len({r.seed for r in records.values()}),
        ranks=len(records),
        right=len(records) - len(wrong(records)),
        table=markdown_table(header, lines),
        **{f"limit{n}": factorial(2**n) / 2 ** (2 ** (n - 1)) for n in (2, 3, 4)},
        factor=max(row["paper"] / row["count"] for row in two.values()),
        conditions=conditions(records.values()),
    )


def _ranks(row: dict[str, Any]) -> str:
    return ", ".join(f"{rank:,}" for rank in sorted(set(row["ranks"])))


STUDY = Study(
    "coefficients-dimension",
    "python -m benchmarks.coefficients dimension",
    jobs,
    measure,
    tables,
    text,
    lambda records: {
        "coefficients-dimension.png": lambda file: plot(records, file),
    },
)
