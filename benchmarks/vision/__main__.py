"""Vision benchmarks: `python -m benchmarks.vision demonet | peers | speed [--smoke]`.

Studies keep one JSON per run and go on where they were stopped; `--smoke` is a form of each that
takes seconds and shows that it works, not a result.
"""

from pathlib import Path
from typing import Annotated

import typer

from benchmarks import vision_demonet, vision_peers, vision_speed
from benchmarks.common import RESULTS

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False)
Seeds = Annotated[int, typer.Option(help="runs of each configuration")]
Processes = Annotated[int, typer.Option(help="runs at a time, one thread each; 0 only tabulates")]
Smoke = Annotated[bool, typer.Option("--smoke", help="seconds instead of an hour")]
Out = Annotated[Path, typer.Option(help="folder for results")]


@app.command()
def demonet(
    seeds: Seeds = 3, processes: Processes = 2, smoke: Smoke = False, out: Out = RESULTS
) -> None:
    """Star against sum in DemoNets, with and without activation."""
    vision_demonet.run(1 if smoke else seeds, processes, smoke, out)


@app.command()
def peers(
    seeds: Seeds = 3, processes: Processes = 2, smoke: Smoke = False, out: Out = RESULTS
) -> None:
    """StarNets against MobileNetV3, LCNet, EfficientNet-lite and ShuffleNet, one recipe."""
    vision_peers.run(1 if smoke else seeds, processes, smoke, out)


@app.command()
def speed(model: str = "starnet_s4", smoke: Smoke = False, out: Out = RESULTS) -> None:
    """Our StarNet against timm's: forward and training step on the CPU."""
    vision_speed.run(model, smoke, out)


if __name__ == "__main__":
    app()
