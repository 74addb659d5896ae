"""Vision benchmarks: `python -m benchmarks.vision STUDY [--smoke | --page]`.

The studies are demonet, peers, speed and engines.

Every run of a study is a line of its record file, and a stopped study goes on where it was.
`--smoke` takes seconds and shows that a study works, not a result; `--page` writes the page of
evidence from the records and runs nothing.
"""

import typer

from benchmarks.harness.records import RESULTS
from benchmarks.harness.study import Out, Page, Processes, Smoke, WritePage
from benchmarks.vision import demonet as demonet_study
from benchmarks.vision import engines as engines_study
from benchmarks.vision import peers as peers_study
from benchmarks.vision import speed as speed_study

STUDIES = (demonet_study.STUDY, peers_study.STUDY, speed_study.STUDY, engines_study.STUDY)
PAGE = Page("vision", "Evidence: vision", STUDIES)
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
    if page:
        return PAGE.write()
    jobs = demonet_study.jobs(1 if smoke else seeds, smoke)
    demonet_study.STUDY.run(jobs, processes=processes, smoke=smoke, out=out)


@app.command()
def peers(
    seeds: int = 3,
    processes: Processes = 2,
    smoke: Smoke = False,
    page: WritePage = False,
    out: Out = RESULTS,
) -> None:
    """Compare StarNets with MobileNetV3, LCNet, EfficientNet-lite and ShuffleNet, one recipe."""
    if page:
        return PAGE.write()
    jobs = peers_study.jobs(1 if smoke else seeds, smoke)
    records = peers_study.STUDY.run(jobs, processes=processes, smoke=smoke, out=out)
    if processes:
        job = peers_study.cost_job(list(peers_study.summarise(records)), smoke)
        peers_study.COSTS.measure(job, smoke=smoke, out=out)


@app.command()
def speed(
    model: str = "starnet_s4", smoke: Smoke = False, page: WritePage = False, out: Out = RESULTS
) -> None:
    """Compare our StarNet with timm's: forward and training step on the CPU."""
    if page:
        return PAGE.write()
    speed_study.STUDY.measure(speed_study.job(model, smoke), smoke=smoke, out=out)


@app.command()
def engines(smoke: Smoke = False, page: WritePage = False, out: Out = RESULTS) -> None:
    """Compare engines on our exported graph and timm's, and int8 with float32."""
    if page:
        return PAGE.write()
    engines_study.STUDY.measure(engines_study.job(smoke), smoke=smoke, out=out)
    engines_study.ACCURACY.measure(engines_study.accuracy_job(smoke), smoke=smoke, out=out)


if __name__ == "__main__":
    app()
