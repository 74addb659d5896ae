"""All rows, the most important first."""

from benchmarks.gpu.convolution import convolutions
from benchmarks.gpu.depthwise import depthwise
from benchmarks.gpu.host import host
from benchmarks.gpu.kernels import (
    autotuned,
    copy,
    product,
    star_mlps,
    star_mlps_fp32,
    wide,
)
from benchmarks.gpu.nets import block, compiled_starnet, rl, starnet
from benchmarks.gpu.tiles import tiles
from benchmarks.gpu.trial import Row


def rows(*, tune: bool = False) -> list[Row]:
    """Return all rows in the order in which they run; with `tune` those of candidate tiles."""
    if tune:
        return tiles()
    return [
        *host(),
        starnet("s4", 256, "training"),
        starnet("s4", 1, "inference"),
        starnet("s4", 256, "inference"),
        *depthwise("S4"),
        *convolutions("S4"),
        *reversed(star_mlps("mlp-backward", "S4")),
        wide(4096),
        # the rest
        *star_mlps("mlp-forward", "S4"),
        *copy(),
        *product(),
        *block(),
        starnet("s1", 256, "inference"),
        starnet("s1", 256, "training"),
        starnet("s1", 1, "inference"),
        *convolutions("S1"),
        *depthwise("S1", ["forward", "dx", "dw"]),
        *star_mlps("mlp-forward", "S1"),
        *star_mlps("mlp-backward", "S1"),
        *rl(),
        wide(8192),
        *star_mlps_fp32("mlp-forward"),
        *star_mlps_fp32("mlp-backward"),
        *compiled_starnet(),
        *autotuned(),
    ]
