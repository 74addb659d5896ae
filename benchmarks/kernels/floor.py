"""Least time that memory and arithmetic allow each kernel on an H100; no kernel is run.

Bytes are those that cross the memory bus: what programs share through the cache counts once. A
multiply-add counts as two operations.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks.harness.report import markdown_table
from starlayers.kernels.dwconv import BANDS
from starlayers.kernels.tiles import Tile, mlp_backward_tiles, split_columns
from starlayers.vision.models import STARNETS
from starlayers.vision.starnet import STEM_CHANNELS

BANDWIDTH = 3.0e12  # bytes a second that an H100 reaches
MATRIX = 790e12  # operations a second in dense bfloat16 products
MULTIPROCESSORS = 132
SIZE = 2  # bytes of an element
PARTIAL = 4  # of an element of a partial sum

BATCH, IMAGE = 256, 224
LLAMA = (4096, 4096, 14336)  # tokens, channels, hidden
POLICIES = [(batch, width) for batch in (64, 4096) for width in (64, 256)]


@dataclass(frozen=True)
class Work:
    """Bytes and operations of a kernel, and the bytes that it would move unfused."""

    kernel: str
    bytes: int
    flops: int = 0  # in the matrix units
    eager: int = 0  # bytes of the same work, one kernel for each operation
    inductor: int = 0  # bytes with element-wise operations fused, but no matrix product

    @property
    def micros(self) -> tuple[float, float]:
        """Microseconds that bytes and matrix operations take, each alone."""
        return 1e6 * self.bytes / BANDWIDTH, 1e6 * self.flops / MATRIX

    @property
    def floor(self) -> float:
        return max(self.micros)


def star_forward(elements: int) -> Work:
    """Element-wise star: both branches in, the product out."""
    n = SIZE * elements
    return Work("star forward", 3 * n, eager=(2 + 3) * n, inductor=3 * n)


def star_backward(elements: int) -> Work:
    """Gradient and branches of the star in, two gradients out; eager by three kernels."""
    n = SIZE * elements
    return Work("star backward", 5 * n, eager=9 * n, inductor=5 * n)


def mlp_forward(rows: int, width: int, hidden: int) -> Work:
    """Star MLP: x and the weights in, y out; three products of rows x width x hidden."""
    x, h, w = (SIZE * n for n in (rows * width, rows * hidden, 3 * width * hidden))
    products = 3 * x + w + 3 * h  # unfused: x read twice, y written; h1, h2 written, s read
    return Work(
        "star_mlp", 2 * x + w, flops=6 * rows * width * hidden,
        eager=products + (2 + 3) * h, inductor=products + 3 * h,
    )  # fmt: skip


def mlp_backward_ideal(rows: int, width: int, hidden: int) -> Work:
    """Star MLP backward in one pass: x, dy and weights in, dx and weight gradients out.

    Eight products: both branches again, ds, two for dx, three for the weights. Unfused, the
    branches are kept instead (six products); eager keeps the activation and the product too.
    """
    x, h, w = (SIZE * n for n in (rows * width, rows * hidden, 3 * width * hidden))
    # dy and x read twice, dx written, read and written; ds written; d1, d2 read twice, s once
    products = 7 * x + 2 * w + 6 * h
    return Work(
        "star_mlp_backward ideal, one pass", 3 * x + 2 * w, flops=16 * rows * width * hidden,
        eager=products + 9 * h, inductor=products + 6 * h,
    )  # fmt: skip


def mlp_backward(rows: int, width: int, hidden: int) -> Work:
    """Star MLP backward as it is launched on an H100 for this shape (`star_mlp_launch.py`)."""
    ideal = mlp_backward_ideal(rows, width, hidden)
    x, h, w = (SIZE * n for n in (rows * width, rows * hidden, 3 * width * hidden))
    product = 2 * rows * width * hidden
    # without a GPU, the tiles are those of an H100
    tiles = mlp_backward_tiles(torch.device("cpu"), sum(split_columns(width)), hidden, SIZE)

    def partial_sums(tile: Tile) -> int:
        chunks = -(-hidden // tile.hidden)
        programs = min(2 * MULTIPROCESSORS // chunks, -(-rows // tile.rows))
        return 2 * PARTIAL * programs * hidden * (3 * width + 2)  # written, then read

    if "all" in tiles:
        name, moved, products = "all", 3 * x + 2 * w + partial_sums(tiles["all"]), 8
    elif "dw" in tiles:
        # dx: 5 products; weights: both branches and ds again, then 3
        name, moved, products = "dx + dw", 5 * x + 3 * w + partial_sums(tiles["dw"]), 5 + 6
    elif "hidden" in tiles:
        # d1, d2, s written; d1, d2 read for dx and for a weight each, s for one; dy for its sum,
        # the hidden gradients and a weight, x for them and for two weights, dx written
        name, moved, products = "hidden + products", 7 * x + 2 * w + 8 * h, 3 + 5
    else:
        raise ValueError(f"no star_mlp_backward tile for {width} channels")
    return Work(
        f"star_mlp_backward {name}",
        moved,
        flops=products * product,
        eager=ideal.eager,
        inductor=ideal.inductor,
    )


def banded(rows: int, width: int, kernel: int) -> int:
    """Operations of a depthwise convolution as products with banded matrices, zeros included."""
    return 2 * kernel * BANDS["cuda"]["BI"] * rows * width


def depthwise_forward(rows: int, width: int, kernel: int = 7) -> Work:
    """Depthwise convolution with statistics of y, for which an unfused program reads y again."""
    x = SIZE * rows * width
    return Work(
        "dwconv forward", 2 * x, flops=banded(rows, width, kernel), eager=3 * x, inductor=3 * x
    )


def depthwise_dx(rows: int, width: int, kernel: int = 7) -> Work:
    """Depthwise input gradient of dy + q + p z, which an unfused program writes and reads."""
    x = SIZE * rows * width
    return Work(
        "dwconv dx", 3 * x, flops=banded(rows, width, kernel), eager=(2 + 2 + 3 + 2) * x,
        inductor=(3 + 2) * x,
    )  # fmt: skip


def depthwise_weights(rows: int, width: int, kernel: int = 7) -> Work:
    """Depthwise weight gradient, from the same dy + q + p z; unfused, it is there already."""
    x = SIZE * rows * width
    return Work("dwconv dw", 3 * x, flops=banded(rows, width, kernel), eager=2 * x, inductor=2 * x)


def convolution(side: int, channels: int, out: int, act: bool, batch: int = BATCH) -> Work:
    """3x3 convolution of stride 2 with bias, norm and activation: images and weights in, y out.

    Unfused, convolution, bias, norm and activation each read and write y; Inductor fuses the last
    three.
    """
    pixels, weights = batch * (-(-side // 2)) ** 2, 9 * channels * out
    x, y, w = (SIZE * n for n in (batch * side**2 * channels, pixels * out, weights))
    return Work(
        "convolve", x + w + y, flops=2 * pixels * weights,
        eager=x + w + (5 + 2 * act) * y, inductor=x + w + 3 * y,
    )  # fmt: skip


def convolutions(base: int) -> Iterator[tuple[int, int, int]]:
    """Height (and width), channels and output channels of a StarNet's strided convolutions."""
    channels, side = 3, IMAGE
    for out in (STEM_CHANNELS, *(base << i for i in range(4))):
        yield side, channels, out
        channels, side = out, side // 2


def workloads() -> Iterator[tuple[str, list[Work]]]:
    """StarNet stages, a Llama MLP and policies, each with the kernels that serve it."""
    for name in ("starnet_s1", "starnet_s4"):
        variant = STARNETS[name]
        for side, channels, out in convolutions(variant.base_dim):
            work = convolution(side, channels, out, act=channels == 3)
            yield f"{name}, {side}x{side}, {channels} -> {out}, stride 2", [work]
        for stage in range(4):
            side, width = IMAGE // 4 >> stage, variant.base_dim << stage
            rows, hidden = BATCH * side**2, variant.mlp_ratio * width
            works = [mlp_forward, mlp_backward, mlp_backward_ideal]
            yield (
                f"{name}, {side}x{side}, {width} -> {hidden}",
                [w(rows, width, hidden) for w in works]
                + [w(rows, width) for w in (depthwise_forward, depthwise_dx, depthwise_weights)],
            )
    tokens, width, hidden = LLAMA
    elements = tokens * hidden
    yield (
        f"Llama, {tokens} tokens, {width} -> {hidden}",
        [star_forward(elements), star_backward(elements)],
    )
    for batch, width in POLICIES:
        works = [mlp_forward, mlp_backward, mlp_backward_ideal]
        yield (
            f"policy, batch {batch}, {width} -> {4 * width}",
            [w(batch, width, 4 * width) for w in works],
        )


def floor_table() -> str:
    """Every workload and kernel, in Markdown."""
    header = ["workload", "kernel", "MB", "GFLOP", "bytes us", "FLOP us", "floor us"]
    header += ["eager MB", "Inductor MB"]
    rows = [
        [
            name, w.kernel, f"{w.bytes / 1e6:.1f}", f"{w.flops / 1e9:.2f}",
            *(f"{t:.1f}" for t in w.micros), f"{w.floor:.1f}",
            f"{w.eager / 1e6:.1f}", f"{w.inductor / 1e6:.1f}",
        ]
        for name, works in workloads()
        for w in works
    ]  # fmt: skip
    return markdown_table(header, rows)
