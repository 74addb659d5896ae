"""Reinforcement learning: `python -m benchmarks.rl quality | speed [--smoke | --page]`.

Every run of a study is a line of its record file, and a stopped study goes on where it was.
`--smoke` takes seconds and shows that a study works, not a result; `--page` writes the page of
evidence from the records and runs nothing.
"""

from enum import Enum
from typing import Annotated

import typer

from benchmarks.harness.records import RESULTS
from benchmarks.harness.study import Out, Page, Processes, Smoke, WritePage, chosen_names
from benchmarks.rl import quality as quality_study
from benchmarks.rl import report
from benchmarks.rl import speed as speed_study
from benchmarks.rl.tasks import ARMS, TASKS

PAGE = Page("rl", "Evidence: reinforcement learning", (report.STUDY, speed_study.STUDY))
app = typer.Typer(help=__doc__, pretty_exceptions_enable=False)


class Match(str, Enum):
    """Quantity that all arms have in common."""

    parameters = "parameters"
    time = "time"


@app.command()
def quality(
    tier: Annotated[str, typer.Option(help="a: minutes a run at most; b: MuJoCo")] = "a",
    tasks: Annotated[str, typer.Option(help="names, spaces between [all of the tier]")] = "",
    nets: Annotated[str, typer.Option(help="names, spaces between [all]")] = "",
    seeds: int = 5,
    match: Annotated[Match, typer.Option(help="quantity arms have in common")] = Match.parameters,
    processes: Processes = 2,
    smoke: Smoke = False,
    page: WritePage = False,
    out: Out = RESULTS,
) -> None:
    """Train every net on every task, and compare returns, areas under curves and speed."""
    if page:
        return PAGE.write()
    if smoke:  # one run of each kind
        seeds, tasks, nets = 1, tasks or "ppo-cartpole sac-pendulum", nets or "mlp star product"
    of_tier = [task for task, spec in TASKS.items() if spec["tier"] in tier]
    names = chosen_names(tasks, list(TASKS), "tasks") if tasks else of_tier
    arms = chosen_names(nets, list(ARMS), "nets")
    jobs = quality_study.jobs(names, arms, seeds, match.value, smoke, out)
    report.STUDY.run(jobs, processes=processes, smoke=smoke, out=out)


@app.command()
def speed(smoke: Smoke = False, page: WritePage = False, out: Out = RESULTS) -> None:
    """Compare star policies with SB3's own at matched parameters, in turn on one thread."""
    if page:
        return PAGE.write()
    speed_study.STUDY.measure(speed_study.job(smoke), smoke=smoke, out=out)


if __name__ == "__main__":
    app()
