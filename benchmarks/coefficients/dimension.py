"""Study 1: the rank of what star layers compute, against the count of monomials."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import markdown_table, run_study, write_json
from starlayers import StarOp
from starlayers.coefficients import empirical_rank, implicit_dimension

ONE = range(2, 25)
#: the matrix of two layers has C(d + 4, 4) columns: 3060 at 14 inputs, and 20475 at 24
TWO = range(2, 15)
SMOKE = range(2, 5)
#: outputs beyond the count, so that a larger rank would show
MORE = 1.1


def jobs(seeds: int, smoke: bool) -> dict[str, dict[str, Any]]:
    """Every d and seed: one layer, two layers, and the sum of two branches."""
    sizes = {"star": SMOKE if smoke else ONE, "star, two layers": SMOKE if smoke else TWO}
    sizes["sum"] = sizes["star"]
    return {
        f"{kind.replace(', ', '-').replace(' ', '-')}-{d}-seed{seed}": {
            "kind": kind, "d": d, "seed": seed,
        }
        for seed in range(seeds)
        for kind, range_ in sizes.items()
        for d in range_
    }  # fmt: skip


def count(kind: str, d: int) -> int:
    """What the rank should be."""
    if kind == "sum":
        return d + 1
    return int(implicit_dimension(d, 2 if kind == "star, two layers" else 1))


def network(kind: str, d: int) -> nn.Module:
    """Activation-free stars (or a sum) with more outputs than dimensions."""
    outputs = int(MORE * count(kind, d)) + 1
    if kind == "star, two layers":
        # the first layer spans all quadratics, so that the second can make every quartic
        hidden = int(MORE * count("star", d)) + 1
        return nn.Sequential(StarOp(d, hidden, act=None), StarOp(hidden, outputs, act=None))
    return StarOp(d, outputs, act=None, combine="sum" if kind == "sum" else "mul")


def measure(job: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(job["seed"])
    began = time.perf_counter()
    found = empirical_rank(network(job["kind"], job["d"]), seed=job["seed"])
    return {
        "rank": found,
        "count": count(job["kind"], job["d"]),
        "seconds": time.perf_counter() - began,
    }


def summarise(records: dict[str, dict[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    """Of each kind and d: the ranks found, the count, and the paper's approximation."""
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    for record in records.values():
        kind, d = record["job"]["kind"], record["job"]["d"]
        row = rows.setdefault(kind, {}).setdefault(d, {"ranks": [], "count": record["count"]})
        row["ranks"].append(record["rank"])
        if kind != "sum":
            layers = 2 if kind == "star, two layers" else 1
            row["paper"] = implicit_dimension(d, layers, exact=False)
    return rows


def table(rows: dict[str, dict[int, dict[str, Any]]]) -> str:
    lines = []
    for kind, by_d in rows.items():
        for d, row in sorted(by_d.items()):
            ranks = sorted(set(row["ranks"]))
            paper = f"{row['paper']:.0f}" if "paper" in row else ""
            lines.append([kind, str(d), ", ".join(map(str, ranks)), str(row["count"]), paper])
    return markdown_table(["layers", "d", "rank found", "monomials", "paper's formula"], lines)


def plot(rows: dict[str, dict[int, dict[str, Any]]], file: Path) -> None:
    """Ranks as points on the lines of the counts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    for i, (kind, by_d) in enumerate(rows.items()):
        d = sorted(by_d)
        ax.plot(d, [by_d[n]["count"] for n in d], color=f"C{i}", lw=1, label=f"{kind}: monomials")
        found = [(n, rank) for n in d for rank in by_d[n]["ranks"]]
        ax.plot(*zip(*found), "o", color=f"C{i}", ms=4, label=f"{kind}: rank")
        if "paper" in by_d[d[0]]:
            ax.plot(d, [by_d[n]["paper"] for n in d], ":", color=f"C{i}", lw=1)
    ax.set(xlabel="inputs d", ylabel="dimensions", yscale="log")
    ax.set_title("dotted: the paper's approximation", fontsize=9)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7)
    figure.savefig(file, dpi=120)


def run(folder: Path, *, seeds: int, processes: int, smoke: bool) -> None:
    """Measure what is missing, and write table and figure beside the runs."""
    records = run_study(folder / "dimension", jobs(seeds, smoke), measure, processes=processes)
    rows = summarise(records)
    text = table(rows)
    print(text)
    report = folder / "dimension"
    wrong = [name for name, r in records.items() if r["rank"] != r["count"]]
    print(f"{len(records)} ranks, {len(wrong)} differ from the count", *wrong)
    environment = next(iter(records.values()))["environment"]
    write_json(
        report.with_suffix(".json"), {"rows": rows, "wrong": wrong} | {"environment": environment}
    )
    report.with_suffix(".md").write_text(text)
    plot(rows, report.with_suffix(".png"))
