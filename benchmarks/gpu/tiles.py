"""Candidate tiles of the star MLP and the depthwise convolution beside those that ship."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.depthwise import images
from benchmarks.gpu.kernels import BASES, BATCH, mlp_inputs, stage_label, stages
from benchmarks.gpu.lab import Lab
from benchmarks.gpu.trial import Row, Subject, Trial, compare
from starlayers.functional import star_mlp_reference
from starlayers.kernels import dwconv as depthwise
from starlayers.kernels import star_mlp_launch
from starlayers.kernels import tiles as kernel_tiles
from starlayers.kernels.star_mlp import star_mlp
from starlayers.kernels.tiles import MLP_BACKWARD, MLP_FORWARD, Tile

SHIPPED = "shipped"
#: what each table is tried with: rows, hidden channels, warps, stages
CANDIDATES = {
    "mlp-forward": [Tile(*t) for t in product((64, 128), (32, 64), (4, 8), (2, 3))],
    "mlp-backward all": [
        *(Tile(*t) for t in product((32, 64), (128,), (4, 8), (1, 2))),
        Tile(32, 128, 8, 3),  # spills nothing, and with Triton 3.6 neither
    ],
    "mlp-backward dx": [Tile(*t) for t in product((32, 64, 128), (32, 64), (4, 8), (2,))],
    "mlp-backward dw": [
        *(Tile(*t) for t in product((32, 64), (32, 64), (4, 8), (2,))),
        Tile(64, 128, 8, 3),  # reads x and the gradient half as often
    ],
    "mlp-backward hidden": [
        Tile(*t) for t in product((64, 128), (32, 64), (4, 8), (2, 3), (32, 64))
    ],
}
TABLES = {
    "mlp-forward": MLP_FORWARD,
    **{f"mlp-backward {name}": table for name, table in MLP_BACKWARD.items()},
}
# of the depthwise convolution on tensor cores: rows of a strip, channels, warps
DW_CANDIDATES = [(7, 8, 8), (14, 8, 8), (28, 8, 8), (7, 8, 4), (14, 8, 4), (28, 8, 4), (14, 16, 8)]


def tiles() -> list[Row]:
    rows = []
    for net, base in BASES.items():
        for stage, side, channels in stages(base):
            label = stage_label(net, stage)
            for kernel in _kernels(channels):
                build = partial(_mlp, kernel=kernel, rows=BATCH * side * side, channels=channels)
                rows.append(Row("tiles", f"{kernel}, {label}", build, 40))
            for direction in ("forward", "step"):
                build = partial(_dwconv, side=side, channels=channels, direction=direction)
                rows.append(Row("tiles", f"depthwise, {label}, {direction}", build, 40))
    return rows


def _kernels(channels: int) -> Iterator[str]:
    """Yield the tables that serve a stage: the narrowest layers take all gradients at once."""
    yield "mlp-forward"
    widest = {name: max(table["sm_90"]) for name, table in MLP_BACKWARD.items()}
    if channels <= widest["all"]:
        yield "mlp-backward all"
    elif channels <= widest["dw"]:
        yield "mlp-backward dx"
        yield "mlp-backward dw"
    else:
        yield "mlp-backward hidden"


def swapped(kernel: str, tile: Tile, run: Callable[[], Any]) -> Callable[[], Any]:
    """Return `run` with one tile of one table replaced."""
    original = kernel_tiles.mlp_tile

    def mlp_tile(table: Any, *rest: Any) -> Tile | None:
        return tile if table is TABLES[kernel] else original(table, *rest)

    def call() -> Any:
        with ExitStack() as patches:
            for module in (star_mlp_launch, kernel_tiles):
                patches.enter_context(mock.patch.object(module, "mlp_tile", mlp_tile))
            return run()

    return call


def tile_name(tile: Tile) -> str:
    deep = f", {tile.depth} channels deep" if tile.depth else ""
    return f"{tile.rows} x {tile.hidden}, {tile.warps} warps, {tile.stages} stages{deep}"


def _mlp(lab: Lab, kernel: str, rows: int, channels: int) -> Trial:
    inputs = mlp_inputs(lab, lab.size(rows, 20), channels, torch.bfloat16)
    direction = "forward" if kernel == "mlp-forward" else "backward"

    def fused() -> torch.Tensor:
        return star_mlp(*inputs, None, "relu6", 0.0, False)[0]  # type: ignore[no-any-return]

    subjects = {
        "eager": Subject(partial(star_mlp_reference, *inputs), inputs),
        SHIPPED: Subject(fused, inputs),
    }
    wide = [t.detach().double().requires_grad_() for t in inputs]
    exact = Subject(partial(star_mlp_reference, *wide), wide)
    made = compare(lab, subjects, exact, direction, baselines=[SHIPPED])
    shipped = made.programs[SHIPPED]
    for tile in lab.size(CANDIDATES[kernel], CANDIDATES[kernel][:1]):
        run = swapped(kernel, tile, shipped)
        made.programs[tile_name(tile)] = made.checks[tile_name(tile)] = run
    return made


def _dwconv(lab: Lab, side: int, channels: int, direction: str) -> Trial:
    x, k, b = (t.requires_grad_() for t in images(lab, side, channels))

    def definition(*tensors: torch.Tensor) -> torch.Tensor:
        return depthwise.dwconv.plain(*tensors, None, None, None, False)[0]  # type: ignore[no-any-return]

    def fused() -> torch.Tensor:
        return depthwise.dwconv(x, k, b, None, None, None, False)[0]  # type: ignore[no-any-return]

    inputs = [x, k, b]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    subjects = {
        "eager": Subject(partial(definition, *inputs), inputs),
        SHIPPED: Subject(fused, inputs),
    }
    exact = Subject(partial(definition, *wide), wide)
    made = compare(lab, subjects, exact, direction, baselines=[SHIPPED])
    shipped = made.programs[SHIPPED]
    for rows, width, warps in lab.size(DW_CANDIDATES, DW_CANDIDATES[:1]):
        name = f"{rows} rows, {width} channels, {warps} warps"
        made.programs[name] = made.checks[name] = _reshaped(rows, width, warps, shipped)
    return made


def _reshaped(rows: int, width: int, warps: int, run: Callable[[], Any]) -> Callable[[], Any]:
    band = depthwise.BANDS["cuda"] | {"BC": width, "num_warps": warps}

    def call() -> Any:
        with (
            mock.patch.dict(depthwise.BANDS, cuda=band),
            mock.patch.object(depthwise, "strip_rows", return_value=rows),
        ):
            return run()

    return call
