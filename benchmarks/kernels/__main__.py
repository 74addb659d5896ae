"""Command line of the compiled kernels: `python -m benchmarks.kernels`."""

import typer

from benchmarks.kernels.compiled import main

typer.run(main)
