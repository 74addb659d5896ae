"""Language benchmarks: `python -m benchmarks.nlp quality | speed [--smoke]`.

The study keeps one JSON per run and goes on where it was stopped; `--smoke` is a form of each that
takes seconds and shows that it works, not a result.
"""

from pathlib import Path
from typing import Annotated

import typer

from benchmarks import nlp_quality, nlp_speed
from benchmarks.common import RESULTS

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False)
Processes = Annotated[int, typer.Option(help="runs at a time, one thread each; 0 only tabulates")]
Smoke = Annotated[bool, typer.Option("--smoke", help="seconds instead of an hour")]
Out = Annotated[Path, typer.Option(help="folder for results")]


@app.command()
def quality(processes: Processes = 2, smoke: Smoke = False, out: Out = RESULTS) -> None:
    """Star MLPs, gated attention and hybrids on sentiment, prose and translation."""
    nlp_quality.run(processes, smoke, out)


@app.command()
def speed(smoke: Smoke = False, out: Out = RESULTS) -> None:
    """Tokens per second and memory of the same variants, interleaved."""
    nlp_speed.run(smoke, out)


if __name__ == "__main__":
    app()
