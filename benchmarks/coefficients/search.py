"""Can coefficients be searched for? `python -m benchmarks.coefficients_search search | tune`.

`search`: a small net with two star layers learns 2,000 images of Fashion-MNIST; its penalty,
initial distribution and rank are searched for on 2,000 others by TPE, a Gaussian process, CMA-ES
and at random, at equal trials, beside the defaults. `tune`: the factors of the products of trained
nets are tuned on the accuracy on 2,000 other images, without gradients and, for comparison, by
gradients of the log loss on the same images. The 10,000 test images choose nothing.

The runs are one JSON each, and a stopped study goes on where it was; `--smoke` takes seconds and
shows that it works, not a result.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.coefficients_search_runs import (
    DEFAULTS,
    METHODS,
    TUNED,
    search_jobs,
    search_one,
    tune_jobs,
    tune_one,
)
from benchmarks.common import RESULTS, markdown_table, mean_interval, run_study, write_json
from benchmarks.comparison import plot_differences, probability_of_improvement, shown, verdict

#: what is compared, and with whom
COMPARED = [*(("test", name) for name in DEFAULTS), ("validation", "random"), ("test", "random")]
NAMES = {"tpe": "TPE", "gp": "Gaussian process", "cma": "CMA-ES", "random": "at random"}

Records = dict[str, dict[str, Any]]
app = typer.Typer(help=__doc__, pretty_exceptions_enable=False)
Processes = Annotated[int, typer.Option(help="runs at a time, one thread each; 0 only tabulates")]
Smoke = Annotated[bool, typer.Option("--smoke", help="seconds instead of half an hour")]
Out = Annotated[Path, typer.Option(help="folder for results")]


def by_seed(records: Records, method: str, what: str) -> dict[int, float]:
    found = [r for r in records.values() if r["job"]["method"] == method]
    return {r["job"]["seed"]: r[what] for r in found}


def difference(records: Records, method: str, against: str, what: str) -> dict[str, Any]:
    """Paired by seed; better is positive."""
    ours, theirs = (by_seed(records, name, what) for name in (method, against))
    seeds = sorted(ours.keys() & theirs.keys())
    pairs = [[found[s] for s in seeds] for found in (ours, theirs)]
    return {
        "better by": mean_interval(a - b for a, b in zip(*pairs, strict=True)),
        "P(improvement)": probability_of_improvement(*pairs),
    }


def search_rows(records: Records) -> dict[str, dict[str, Any]]:
    rows = {}
    for method in (*DEFAULTS, *METHODS):
        found = [r for r in records.values() if r["job"]["method"] == method]
        if not found:
            continue
        rows[method] = {
            "seeds": len(found),
            **{
                what: mean_interval(r[what] for r in found)
                for what in ("validation", "test", "seconds")
            },
            "differences": {
                f"{what}, against {against}": difference(records, method, against, what)
                for what, against in COMPARED
                if against != method not in DEFAULTS
                and by_seed(records, method, what).keys() & by_seed(records, against, what).keys()
            },
        }
    return rows


def search_table(rows: dict[str, dict[str, Any]]) -> str:
    header = ["method", "seeds", "validation, %", "test, %"]
    header += [f"{what}, over {NAMES.get(name, name)}" for what, name in COMPARED] + ["CPU s/run"]
    body = []
    for method, row in rows.items():
        cells = [NAMES.get(method, method), str(row["seeds"])]
        cells += [shown(row[what], 2) for what in ("validation", "test")]
        for what, against in COMPARED:
            told = row["differences"].get(f"{what}, against {against}")
            cells.append(f"{shown(told['better by'], 2, '+')}, {verdict(told)}" if told else "-")
        body.append([*cells, f"{row['seconds'][0]:.1f}"])
    return markdown_table(header, body)


def tune_rows(records: Records) -> dict[str, dict[str, Any]]:
    rows = {}
    for arm in TUNED:
        found = [r for r in records.values() if r["job"]["arm"] == arm]
        if not found:
            continue
        gains = {s: [r[s][1] - r[s][0] for r in found] for s in ("train", "validation", "test")}
        rows[arm] = {
            "seeds": len(found),
            "before": {s: mean_interval(r[s][0] for r in found) for s in ("validation", "test")},
            "gain": {s: {"better by": mean_interval(gain)} for s, gain in gains.items()},
            # of the means: a ratio of single runs has a small gain below the line
            "share that holds": sum(gains["test"]) / (sum(gains["validation"]) or float("nan")),
            "seconds": mean_interval(r["seconds"] for r in found),
        }
    return rows


def tune_table(rows: dict[str, dict[str, Any]]) -> str:
    header = ["arm", "seeds", "test before, %", "validation gain", "test gain", ""]
    header += ["share that holds", "CPU s/run"]
    return markdown_table(
        header,
        [
            [
                arm,
                str(row["seeds"]),
                shown(row["before"]["test"], 2),
                *(shown(row["gain"][s]["better by"], 2, "+") for s in ("validation", "test")),
                verdict(row["gain"]["test"]),
                f"{row['share that holds']:.2f}",
                f"{row['seconds'][0]:.1f}",
            ]
            for arm, row in rows.items()
        ],
    )


def plot_search(records: Records, rows: dict[str, dict[str, Any]], file: Path) -> None:
    """The best validation accuracy over the trials, and what the best are worth on test."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, method in enumerate(METHODS):
        if method not in rows:
            continue
        curves = [r["curve"] for r in records.values() if r["job"]["method"] == method]
        points = [mean_interval(at) for at in zip(*curves)]
        x = range(1, len(points) + 1)
        left.plot(x, [m for m, _ in points], color=f"C{i}", label=NAMES[method])
        if len(curves) > 2:
            low, high = ([m + sign * half for m, half in points] for sign in (-1, 1))
            left.fill_between(x, low, high, color=f"C{i}", alpha=0.12, lw=0)
    if "defaults" in rows:
        level = rows["defaults"]["validation"][0]
        left.axhline(level, color="k", ls=":", lw=1, label="the defaults")
        left.set_ylim(level - 1, None)
    left.set(xlabel="trials", ylabel="best validation accuracy so far, %")
    left.legend(fontsize=8)
    for i, (method, row) in enumerate(rows.items()):
        colour = "k" if method in DEFAULTS else f"C{METHODS.index(method)}"
        for shift, what, marker in ((-0.12, "validation", "s"), (0.12, "test", "o")):
            mean, half = row[what]
            right.errorbar(
                i + shift, mean, half, fmt=marker, color=colour, capsize=3,
                mfc=colour if what == "test" else "w", label=what if i == 0 else None,
            )  # fmt: skip
    right.set_xticks(range(len(rows)), [NAMES.get(m, m) for m in rows], fontsize=8)
    right.set_ylabel("accuracy of the best trial, %")
    right.legend(fontsize=8)
    for ax in (left, right):
        ax.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


def finish(name: str, records: Records, rows: Any, table: str, smoke: bool, out: Path) -> Path:
    print(table)
    first = next(iter(records.values()))
    job = {k: v for k, v in first["job"].items() if k in ("recipe", "tuning")}
    file = out / "coefficients" / f"{name}{'-smoke' if smoke else ''}.json"
    write_json(file, {"arms": rows, **job, "environment": first["environment"]})
    file.with_suffix(".md").write_text(table)
    return file.with_suffix(".png")


def run(name: str, jobs: Any, work: Any, smoke: bool, out: Path, processes: int) -> Records:
    folder = out / "coefficients" / f"{name}{'-smoke' if smoke else ''}"
    return run_study(folder, jobs(smoke), work, processes=processes)


@app.command()
def search(processes: Processes = 2, smoke: Smoke = False, out: Out = RESULTS) -> None:
    """Search by every method at equal trials, beside the defaults."""
    records = run("search", search_jobs, search_one, smoke, out, processes)
    rows = search_rows(records)
    plot_search(records, rows, finish("search", records, rows, search_table(rows), smoke, out))


@app.command()
def tune(processes: Processes = 2, smoke: Smoke = False, out: Out = RESULTS) -> None:
    """Tune trained nets on a validation split, and see what of the gain is there on test."""
    records = run("tune", tune_jobs, tune_one, smoke, out, processes)
    rows = tune_rows(records)
    file = finish("tune", records, rows, tune_table(rows), smoke, out)
    panels = {
        f"{split} accuracy, points gained": {arm: row["gain"][split] for arm, row in rows.items()}
        for split in ("validation", "test")
    }
    plot_differences(panels, file, shared_names=True)


if __name__ == "__main__":
    app()
