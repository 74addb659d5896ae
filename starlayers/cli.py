"""The `starlayers` command."""

import platform
from importlib.metadata import PackageNotFoundError, version

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ImportError as error:
    raise ImportError(
        "the starlayers command needs typer: pip install 'starlayers[vision]'"
    ) from error

import torch

from starlayers.backend import backend_name

__all__ = ["app"]

app = typer.Typer(help="Star layers for PyTorch.", no_args_is_help=True)

PACKAGES = ("starlayers", "torch", "triton", "torchvision", "timm", "transformers", "accelerate")


@app.callback()
def main() -> None:
    """Star layers for PyTorch."""


@app.command()
def info() -> None:
    """Versions, devices, the backend "auto" takes, and the models with their sizes."""
    console = Console()
    console.print(_versions())
    console.print(f"backend: {backend_name()!r}; 'auto' takes {_auto_takes()}")
    console.print(_models())


def _versions() -> Table:
    table = Table("package", "version")
    table.add_row("python", platform.python_version())
    for name in PACKAGES:
        try:
            table.add_row(name, version(name))
        except PackageNotFoundError:
            table.add_row(name, "not installed")
    table.add_row("cpu threads", str(torch.get_num_threads()))
    for i in range(torch.cuda.device_count()):
        table.add_row(f"cuda:{i}", torch.cuda.get_device_name(i))
    return table


def _auto_takes() -> str:
    cpu = "the fused CPU star MLP for large float32 inputs, else PyTorch"
    if not torch.cuda.is_available():
        return cpu
    from starlayers.kernels._tiles import family

    tiles = family(torch.device("cuda", torch.cuda.current_device()))
    return f"the Triton kernels ({tiles} tiles) on the GPU, {cpu} on the CPU"


def _models() -> Table:
    from starlayers.vision.cost import multiply_adds
    from starlayers.vision.models import MODELS, STARNETS

    table = Table("model", "parameters M", "MACs M at 224x224", "pretrained weights")
    for name, build in MODELS.items():
        model = build(device="meta")
        parameters = sum(p.numel() for p in model.parameters())
        macs = multiply_adds(model)
        hub_id = STARNETS[name].hub_id or "-"
        table.add_row(name, f"{parameters / 1e6:.2f}", f"{macs / 1e6:.0f}", hub_id)
    return table
