"""Vision benchmarks: `python -m benchmarks.vision demonet | peers | speed [--smoke] [--page]`.

Every run of a study is a line of its record file, and a stopped study goes on where it was.
`--smoke` takes seconds and shows that a study works, not a result.
"""

import typer

from benchmarks.harness.records import RESULTS
from benchmarks.harness.runner import current
from benchmarks.harness.study import Out, Processes, Smoke, WritePage
from benchmarks.vision import demonet as demonet_study
from benchmarks.vision import pages
from benchmarks.vision import peers as peers_study
from benchmarks.vision import speed as speed_study

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False)


@app.command()
def demonet(
    seeds: int = 3,
    processes: Processes = 2,
    smoke: Smoke = False,
    page: WritePage = False,
    out: Out = RESULTS,
) -> None:
    """Compare star and sum in DemoNets, with and without activation."""
    jobs = demonet_study.jobs(1 if smoke else seeds, smoke)
    pages.DEMONET.run(jobs, processes=processes, page=page, smoke=smoke, out=out)


@app.command()
def peers(
    seeds: int = 3,
    processes: Processes = 2,
    smoke: Smoke = False,
    page: WritePage = False,
    out: Out = RESULTS,
) -> None:
    """Compare StarNets with MobileNetV3, LCNet, EfficientNet-lite and ShuffleNet, one recipe."""
    jobs = peers_study.jobs(1 if smoke else seeds, smoke)
    pages.PEERS.run(jobs, processes=processes, page=page, smoke=smoke, out=out)
    if processes and not page:
        name = f"{pages.PEERS.name}-smoke" if smoke else pages.PEERS.name
        models = list(peers_study.summarise(current(name, jobs, out)))
        pages.PEERS_COST.measure(peers_study.cost_job(models, smoke), smoke=smoke, out=out)


@app.command()
def speed(
    model: str = "starnet_s4", smoke: Smoke = False, page: WritePage = False, out: Out = RESULTS
) -> None:
    """Compare our StarNet with timm's: forward and training step on the CPU."""
    pages.SPEED.measure(speed_study.job(model, smoke), page=page, smoke=smoke, out=out)


if __name__ == "__main__":
    app()
