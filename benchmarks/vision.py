"""Vision benchmarks: `python -m benchmarks.vision demonet | peers | speed [--smoke]`."""

from pathlib import Path

import typer

from benchmarks.common import RESULTS

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False)


@app.command()
def demonet(seeds: int = 3, processes: int = 2, smoke: bool = False, out: Path = RESULTS) -> None:
    """Star against sum in DemoNets, with and without activation."""
    from benchmarks.vision_demonet import run

    run(1 if smoke else seeds, processes, smoke, out)


if __name__ == "__main__":
    app()
