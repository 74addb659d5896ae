"""What the coefficients of star layers are: `python -m benchmarks.coefficients COMMAND [--smoke]`.

Four studies, one JSON per run, which go on where they were stopped; `--processes 0` only tabulates.
`--smoke` is a form of each that takes seconds and shows that it works, not a result.
"""

from pathlib import Path
from typing import Annotated

import typer

from benchmarks import (
    coefficients_cost,
    coefficients_dimension,
    coefficients_eigen,
    coefficients_penalties,
    coefficients_search,
)
from benchmarks.common import RESULTS

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False)
Processes = Annotated[int, typer.Option(help="runs at a time, one thread each")]
Smoke = Annotated[bool, typer.Option("--smoke", help="seconds instead of minutes")]
Out = Annotated[Path, typer.Option(help="folder for results")]


def folder(out: Path, smoke: bool) -> Path:
    return out / ("coefficients-smoke" if smoke else "coefficients")


@app.command()
def dimension(
    seeds: int = 5, processes: Processes = 2, smoke: Smoke = False, out: Out = RESULTS
) -> None:
    """1: the rank of what star layers compute, against the count of monomials."""
    seeds = 1 if smoke else seeds
    coefficients_dimension.run(folder(out, smoke), seeds=seeds, processes=processes, smoke=smoke)


@app.command()
def penalties(
    tasks: Annotated[str, typer.Option(help="names, spaces between [all]")] = "",
    seeds: int = 5,
    processes: Processes = 2,
    tuning: Annotated[bool, typer.Option("--tune", help="strengths instead")] = False,
    smoke: Smoke = False,
    out: Out = RESULTS,
) -> None:
    """2: penalties, and coefficients that are learned."""
    known = list(coefficients_penalties.TASKS)
    names = tasks.split() or known
    if unknown := [name for name in names if name not in known]:
        raise typer.BadParameter(f"unknown tasks {unknown}, choose from {', '.join(known)}")
    where = folder(out, smoke)
    if tuning:
        coefficients_penalties.tune(where, tasks=names, processes=processes, smoke=smoke)
        return
    seeds = 1 if smoke else seeds
    coefficients_penalties.run(where, seeds=seeds, tasks=names, processes=processes, smoke=smoke)


app.add_typer(coefficients_search.app, name="searches", help="3: search and tune.")
app.command("eigen", help="4: eigenfeatures of classifiers.")(coefficients_eigen.main)


@app.command()
def cost(smoke: Smoke = False, out: Out = RESULTS) -> None:
    """What the penalty adds to a training step of StarNet-S4."""
    coefficients_cost.run(smoke, out)


if __name__ == "__main__":
    app()
