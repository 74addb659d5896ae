"""Reinforcement learning: `python -m benchmarks.rl quality | speed [--smoke]`.

The study keeps one JSON per run and goes on where it was stopped; `--processes 0` only tabulates.
`--smoke` is a form of each that takes seconds and shows that it works, not a result.
"""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import rl_quality, rl_speed
from benchmarks.common import RESULTS
from benchmarks.rl_tasks import ARMS, TASKS

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False)
Smoke = Annotated[bool, typer.Option("--smoke", help="seconds instead of hours")]
Out = Annotated[Path, typer.Option(help="folder for results")]


class Match(str, Enum):
    """What arms have in common."""

    parameters = "parameters"
    time = "time"


def chosen(given: str, known: list[str], what: str) -> list[str]:
    names = given.replace(",", " ").split() or known
    if unknown := [name for name in names if name not in known]:
        raise typer.BadParameter(f"unknown {what} {unknown}, choose from {', '.join(known)}")
    return names


@app.command()
def quality(
    tier: Annotated[str, typer.Option(help="a: minutes a run at most; b: MuJoCo")] = "a",
    tasks: Annotated[str, typer.Option(help="names, spaces between [all of the tier]")] = "",
    nets: Annotated[str, typer.Option(help="names, spaces between [all]")] = "",
    seeds: int = 5,
    match: Annotated[Match, typer.Option(help="what arms have in common")] = Match.parameters,
    processes: Annotated[int, typer.Option(help="runs at a time, one thread each")] = 2,
    smoke: Smoke = False,
    out: Out = RESULTS,
) -> None:
    """Train every net on every task, and compare returns, areas under curves and speed."""
    if smoke:  # one run of each kind
        seeds, tasks, nets = 1, tasks or "ppo-cartpole sac-pendulum", nets or "mlp star product"
    of_tier = [task for task, spec in TASKS.items() if spec["tier"] in tier]
    tasks_ = chosen(tasks, list(TASKS), "tasks") if tasks else of_tier
    arms = chosen(nets, list(ARMS), "nets")
    folder = "rl" + ("-time" if match is Match.time else "") + ("-smoke" if smoke else "")
    runs = rl_quality.jobs(tasks_, arms, seeds, match.value, smoke, out)
    rl_quality.run(runs, out / folder, out / f"{folder}-{tier}", processes)


@app.command()
def speed(smoke: Smoke = False, out: Out = RESULTS) -> None:
    """Star policies against SB3's own at matched parameters, interleaved on one thread."""
    rl_speed.run(smoke, out)


if __name__ == "__main__":
    app()
