"""Every kernel configuration the library ships with, and the options that change what it needs."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from benchmarks.kernels.aot import TARGETS
from starlayers.kernels import conv, dwconv, fold, star, star_linear
from starlayers.kernels import statistics as kernel_statistics
from starlayers.kernels.tiles import MLP_BACKWARD, MLP_FORWARD, Tile, next_power_of_2, split_columns

#: the GPUs each family of tiles is compiled for
GPUS = {"sm_90": ("sm_90",), "sm_80": ("sm_80",), "small": ("sm_89", "gfx942")}
#: channels of StarNets at four stages (S1, S4, S100) and of policies, and one wider. Without the 20
#: of S100: their rows are not whole 16 bytes, and the backward in one pass spills up to 48 bytes
#: on sm_80
WIDTHS = (24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256, 384)
#: cheap, with one exponential, and the one with most registers in flight
ACTIVATIONS = ("relu6", "silu", "gelu")
#: (height = width, channels) of StarNet stages: every tile shape, with and without idle channels
STAGES = ((56, 16), (56, 24), (28, 64), (14, 96), (7, 256))
#: channels of StarNets that a block folds norms into
FOLDED_WIDTHS = (24, 32, 64, 96, 128, 192, 256)
#: (channels, channels of the result, height = width of images): a StarNet's stem at 224 x 224, and
#: the convolutions that begin the stages of S4 and of S1
STRIDED = (
    (3, 32, 224), (32, 32, 112), (32, 64, 56), (64, 128, 28), (128, 256, 14),
    (32, 24, 112), (24, 48, 56), (48, 96, 28), (96, 192, 14),
)  # fmt: skip
#: addresses of the gradients that `mlp_dw` leaves: rows are two elements longer than a multiple
UNEVEN_SUMS = ("dc2", "stride_dv", "stride_dc")
KINDS = {2: "bf16", 4: "fp32"}


@dataclass(frozen=True, eq=False)
class Variant:
    """One compilation: a kernel at a configuration of the library, with some of its options."""

    kernel: str  # as in the table
    row: str  # the configuration, as in the table
    options: str
    function: str  # module.function in starlayers.kernels.device
    constants: dict[str, Any]
    target: str
    size: int  # bytes of an element
    warps: int
    stages: int = 3
    types: dict[str, str] | None = None  # of arguments, where they are not as usual
    uneven: tuple[str, ...] = ()  # arguments that are not divisible by 16
    products: bool = False  # whether it multiplies matrices
    small_products: bool = False  # too small for Hopper's own matrix instructions


def variants() -> Iterator[Variant]:
    """Everything that ships."""
    for target, size in product(TARGETS, KINDS):
        yield from element_wise(target, size)
        yield from depthwise(target, size)
        yield from strided(target, size)
    for target in TARGETS:
        yield from depthwise_toeplitz(target)
        yield from statistics(target)
        yield from folds(target)
    for key, rows in MLP_FORWARD.items():
        for target, size, row, channels, tile in _placed(key, rows):
            yield from forward(target, size, row, channels, tile)
    for kernel, table in MLP_BACKWARD.items():
        for key, rows in table.items():
            # the products serve what is too wide for "dw"
            above = max(MLP_BACKWARD["dw"].get(key, {}), default=0) if kernel == "hidden" else 0
            for target, size, row, channels, tile in _placed(key, rows, above):
                if kernel == "hidden":
                    yield from backward_by_products(target, size, row, channels, tile)
                else:
                    yield from backward(kernel, target, size, row, channels, tile)
    yield from wide()


def _placed(
    key: str, rows: dict[int, Tile], above: int = 0
) -> Iterator[tuple[str, int, int, int, Tile]]:
    """Yield target, element size, row, real channels and tile of a family's table."""
    family, _, kind = key.partition(" ")
    for row, tile in rows.items():
        below = max((r for r in rows if r < row), default=above)
        for target, channels in product(GPUS[family], WIDTHS):
            if below < sum(split_columns(channels)) <= row:
                yield target, 4 if kind else 2, row, channels, tile


def element_wise(target: str, size: int) -> Iterator[Variant]:
    """Element-wise star: one long row, and rows of 128 and 16 columns."""
    for (rows, cols), act in product(((1, 4096), (4096, 128), (4096, 16)), ACTIVATIONS):
        br, bc = star.tile_shape(rows, cols)
        clamp = act == "silu"
        constants = {
            "ACT": act, "OFFSET": 0.0, "BR": br, "BC": bc,
            "CLAMP1": 3 * clamp, "LOW1": -7.0, "HIGH1": 7.0,
            "CLAMP2": 3 * clamp, "LOW2": -7.0, "HIGH2": 7.0,
        }  # fmt: skip
        directions = {"forward": ("star_forward", {}), "backward": ("star_grad", {"PRODUCT": True})}
        for name, (function, more) in directions.items():
            yield Variant(
                f"star {name}", f"{br} x {bc}, {star.WARPS} warps", act + ", clamps" * clamp,
                f"star.{function}", constants | more, target, size, star.WARPS,
            )  # fmt: skip


CONVOLUTION_FLAGS = ("FLIP", "SCALE", "SHIFT", "Z", "BIAS", "FACTOR", "RESIDUAL")
#: options of both convolutions of a StarNet block and their input gradients: flags, sums
CONVOLUTIONS: dict[str, tuple[set[str], str]] = {
    "forward, statistics": ({"BIAS"}, "statistics"),
    "forward, scale, shift, residual": ({"BIAS", "SCALE", "SHIFT", "RESIDUAL"}, ""),
    "dx, z": ({"FLIP", "SHIFT", "Z"}, ""),
    "dx, z, residual": ({"FLIP", "SHIFT", "Z", "RESIDUAL"}, ""),
    "dx, factor, dot": ({"FLIP", "FACTOR"}, "dot"),
}
#: and of their kernel gradients
KERNEL_GRADIENTS = {
    "dw, z": {"Z": True, "AFFINE": False},
    "dw, affine": {"Z": False, "AFFINE": True},
}


def _convolution(options: str) -> dict[str, Any]:
    """Return the options of a convolution as constants of its kernel."""
    flags, reduce = CONVOLUTIONS[options]
    return {**{f: f in flags for f in CONVOLUTION_FLAGS}, "REDUCE": reduce}


def depthwise(target: str, size: int) -> Iterator[Variant]:
    """Yield depthwise convolution on CUDA cores; of float32 the heaviest options."""
    convolutions = CONVOLUTIONS if size == 2 else ("forward, statistics", "dx, z")
    taps = 5 if size == 2 else 7  # 16-bit types have other kernels for 7 rows of taps
    for height, channels in STAGES:
        for kernel, among in (("convolution", dwconv.ROWS), ("weights", dwconv.ROWS_WEIGHTS)):
            th, bp, bc = dwconv.tile_shape(height, channels, among)
            tile = f"{th} x {bp} x {bc}, {dwconv.WARPS} warps"
            row = f"{height}x{height}, {channels} channels: {tile}"
            shape = {"HEIGHT": height, "WIDTH": height, "C": channels, "K": taps}
            shape |= {"TH": th, "BP": bp, "BC": bc}
            if kernel == "weights":
                function, more = "dwconv.dw_weights", KERNEL_GRADIENTS
            else:
                function = "dwconv.dw_convolve"
                more = {options: _convolution(options) for options in convolutions}
            for options, constants in more.items():
                yield Variant(
                    function.split(".")[1], row, options, function, shape | constants, target, size,
                    dwconv.WARPS,
                )  # fmt: skip


def depthwise_toeplitz(target: str) -> Iterator[Variant]:
    """Yield depthwise convolution on tensor cores, for large and small images."""
    band = dict(dwconv.BANDS["hip" if TARGETS[target].backend == "hip" else "cuda"])
    warps, stages = band.pop("num_warps"), band.pop("num_stages")
    more = {"dw_weights_toeplitz": KERNEL_GRADIENTS}
    more["dw_convolve_toeplitz"] = {options: _convolution(options) for options in CONVOLUTIONS}
    for taps, (height, channels), kernel in product(dwconv.BAND_SIZES, ((56, 24), (7, 256)), more):
        rows = 4 * taps if height > 7 else taps
        tile = " x ".join(str(n) for n in (band["BS"], rows, band["BW"], band["BC"]))
        row = f"{taps} rows of taps: {tile}, {warps} warps, {stages} stage"
        shape = {"HEIGHT": height, "WIDTH": height, "C": channels, "K": taps, "TH": rows, **band}
        for options, constants in more[kernel].items():
            yield Variant(
                kernel, row, options, f"dwconv_toeplitz.{kernel}", shape | constants, target, 2,
                warps, stages, products=True, small_products=True,
            )  # fmt: skip


def strided(target: str, size: int) -> Iterator[Variant]:
    """Yield the strided convolutions of StarNets; the stem reads images as they are."""
    of = _family(target)
    for channels, out, side in STRIDED:
        tile = conv.tile_of(conv.Convolution(channels, out, 3, 2), of, size)
        patch, plane = channels <= conv.PATCH_CHANNELS, side * side
        strides = (plane, side, 1) if patch else (1, side * channels, channels)
        names = ("STRIDE_C", "STRIDE_H", "STRIDE_W")
        for act in ACTIVATIONS if patch else ("identity",):
            constants = {
                "STRIDE_N": channels * plane, **dict(zip(names, strides)), "C": channels,
                "HEIGHT": side, "WIDTH": side, "OUT": out, "K": 3, "STRIDE": 2, "ACT": act,
                "PRECISION": _precision(target, size), "PATCH": patch, "BM": tile.rows,
                "BN": tile.columns, "BK": tile.depth,
            }  # fmt: skip
            yield Variant(
                "convolve",
                f"{channels} -> {out}: {tile.rows} x {tile.columns} x {tile.depth}, "
                f"{tile.warps} warps, {tile.stages} stages",
                f"{side}x{side}, {act}", "conv.convolve", constants, target, size, tile.warps,
                tile.stages, products=True,
            )  # fmt: skip


def _family(target: str) -> str:
    return next(family for family, gpus in GPUS.items() if target in gpus)


def statistics(target: str) -> Iterator[Variant]:
    """Yield the kernels that merge the statistics of tiles, at their widest."""
    constants = {"C": 32, "BT": kernel_statistics.TILES, "BC": kernel_statistics.CHANNELS}
    row = (
        f"{kernel_statistics.TILES} x {kernel_statistics.CHANNELS}, {kernel_statistics.WARPS} warps"
    )
    yield Variant(
        "statistics",
        row,
        "",
        "tile.merge_statistics",
        constants,
        target,
        4,
        kernel_statistics.WARPS,
    )


def folds(target: str) -> Iterator[Variant]:
    """Yield the launches between the large kernels of a block in training, as `fold` has them."""
    family = _family(target)
    for size, channels in product(KINDS, FOLDED_WIDTHS):
        key = f"{family} float32" if size == 4 else family
        width = sum(split_columns(channels))
        on_chip, served = (
            width <= max(MLP_BACKWARD[kernel].get(key, {}), default=0)
            for kernel in ("dw", "hidden")
        )
        if on_chip or served:
            yield from _folds(target, size, channels, on_chip)


def _folds(target: str, size: int, channels: int, on_chip: bool) -> Iterator[Variant]:
    """Yield the launches at `channels`; `on_chip` if programs of the star MLP sum gradients."""
    hidden, columns, tall = 4 * channels, max(16, next_power_of_2(channels)), fold.ELEMENTS
    norm = {"C": channels, "EPS": 1e-5, "MOMENTUM": 0.1}
    branches = {"stride_w1": channels, "stride_w2": channels, "BIAS1": True, "BIAS2": True}
    last = {"H": hidden, "C": channels, "OUT": channels}
    options = "summed over programs" if on_chip else "by products"
    # Triton compiles a size of 1 as a constant
    sums: dict[str, Any] = {} if on_chip else {"PROGRAMS": 1, "stride_dc": 1}

    def launched(
        name: str, options: str, constants: dict[str, Any], tile: tuple[str, ...], warps: int = 8
    ) -> Variant:
        row = f"{' x '.join(str(constants[side]) for side in tile)}, {warps} warps"
        options = f"{channels} channels{options and ', '}{options}"
        types = dict.fromkeys(("dv1", "dc1", "dv2", "dc2", "dv3"), f"*{KINDS[size]}")
        return Variant(
            name, row, options, f"fold.{name}", constants, target, size, warps,
            types=None if on_chip else types, uneven=UNEVEN_SUMS if on_chip else (),
        )  # fmt: skip

    yield launched(
        "fold_branches", "",
        norm | branches | {"BT": max(1, tall // columns), "BH": 16, "BC": columns},
        ("BT", "BH", "BC"),
    )  # fmt: skip
    yield launched(
        "unfold_branches", options,
        branches | last | sums
        | {"LAST": on_chip, "BT": 64 if on_chip else 1, "BC": columns, "BO": columns},
        ("BT", "BC", "BO"), 4,
    )  # fmt: skip
    if channels not in (FOLDED_WIDTHS[0], FOLDED_WIDTHS[-1]):
        return  # the tiles of the others are the same at every width
    yield launched("affine_norm", "", norm | {"BT": tall // 8, "BC": 8}, ("BT", "BC"))
    for with_norm in (False, True):
        shape = {"C": channels, "TAPS": 49, "NORM": with_norm, "BT": tall // 32, "BC": 32}
        shape |= {} if with_norm else {"COUNT": 1}
        yield launched("finish_depthwise", "norm" * with_norm, shape, ("BT", "BC"))
    shape = last | {"OUT": channels * on_chip, "BIAS3": on_chip, "BT": tall // 8, "BC": 8}
    yield launched("finish_norm", options, shape, ("BT", "BC"))
    shape = {"C": channels, "TAPS": 49, "CAST": size == 2, "BLOCK": 1024}
    yield launched("prepare_weights", "", shape, ("BLOCK",), 4)


def _matrix(
    target: str, size: int, channels: int, tile: Tile, act: str, ratio: int
) -> dict[str, Any]:
    """Return the options that both directions of the star MLP have in common."""
    c0, c1 = split_columns(channels)
    hidden = ratio * channels
    return {
        "stride_x": channels, "stride_w1": channels, "stride_w2": channels, "stride_w3": hidden,
        "C": channels, "H": hidden, "OUT": channels, "ACT": act, "OFFSET": 0.0,
        "BIAS1": True, "BIAS2": True, "PRECISION": _precision(target, size), "BM": tile.rows,
        "BH": tile.hidden, "C0": c0, "C1": c1, "O0": c0, "O1": c1, "STAGES": tile.stages,
    }  # fmt: skip


def _precision(target: str, size: int) -> str:
    return "ieee" if size == 2 or TARGETS[target].backend == "hip" else "tf32x3"


def _row(channels: int, tile: Tile) -> str:
    return (
        f"up to {channels}: {tile.rows} x {tile.hidden}, {tile.warps} warps, {tile.stages} stages"
    )


def forward(target: str, size: int, row: int, channels: int, tile: Tile) -> Iterator[Variant]:
    """Star MLP forward, with what surrounds it."""
    options = [(act, "statistics", 4) for act in ACTIVATIONS] + [("gelu", "residual", 3)]
    for act, extra, ratio in options:
        constants = _matrix(target, size, channels, tile, act, ratio) | {
            "stride_r": channels, "BIAS3": True, "RESIDUAL": extra == "residual",
            "STATS": extra == "statistics",
        }  # fmt: skip
        yield Variant(
            "mlp_forward", _row(row, tile), f"{channels} channels, {act}, {extra}",
            "star_mlp_forward.mlp_forward", constants, target, size, tile.warps, tile.stages,
            products=True,
        )  # fmt: skip


def backward(
    kernel: str, target: str, size: int, row: int, channels: int, tile: Tile
) -> Iterator[Variant]:
    """Star MLP backward; `affine` is the gradient that statistics of the output send back."""
    # `mlp_dw` alone reads what `mlp_dx` has already added
    options = [(act, kernel != "dw", 4) for act in ACTIVATIONS] + [("gelu", False, 3)]
    for act, affine, ratio in options:
        constants = _matrix(target, size, channels, tile, act, ratio) | {
            "stride_dy": channels, "stride_z": channels, "AFFINE": affine,
            **({} if kernel == "dx" else {"DX": kernel == "all"}),
        }  # fmt: skip
        yield Variant(
            f"mlp_backward {kernel}", _row(row, tile),
            f"{channels} channels, {act}{', affine' * affine}",
            f"star_mlp_backward.mlp_{'dx' if kernel == 'dx' else 'dw'}", constants, target, size,
            tile.warps, tile.stages, products=True,
        )  # fmt: skip


def backward_by_products(
    target: str, size: int, row: int, channels: int, tile: Tile
) -> Iterator[Variant]:
    """Yield both kernels of the backward whose other gradients are matrix products."""
    name = f"{_row(row, tile)}, {tile.depth} channels deep"
    for act, ratio in [(act, 4) for act in ACTIVATIONS] + [("gelu", 3)]:
        constants = _matrix(target, size, channels, tile, act, ratio)
        for part in ("C0", "C1", "O0", "O1"):
            del constants[part]
        yield Variant(
            "mlp_hidden", name, f"{channels} channels, {act}", "star_mlp_backward.mlp_hidden",
            constants | {"stride_g": channels, "BK": tile.depth}, target, size, tile.warps,
            tile.stages, products=True,
        )  # fmt: skip
    o0, o1 = split_columns(channels)
    constants = {
        "stride_dy": channels, "stride_z": channels, "H": 4 * channels, "OUT": channels,
        "AFFINE": True, "BM": tile.rows, "O0": o0, "O1": o1,
    }  # fmt: skip
    yield Variant(
        "mlp_upstream", f"up to {row}: {tile.rows} rows, {tile.warps} warps",
        f"{channels} channels, affine", "star_mlp_backward.mlp_upstream", constants, target, size,
        tile.warps,
    )  # fmt: skip


def wide() -> Iterator[Variant]:
    """`star_linear` and `dgated`, over tensor descriptors: Hopper only, and 16-bit types."""
    bm, bn, bk = star_linear.BM, star_linear.BN, star_linear.BK
    shape = {"OFFSET": 0.0, "BM": bm, "BN": bn, "BK": bk, "GROUP": star_linear.GROUP}
    inputs = {"x": (bm, bk), "w1": (bn, bk), "w2": (bn, bk)}
    branches = dict.fromkeys(("y", "h1", "h2"), (bm, bn))
    halves = dict.fromkeys(("h1", "h2", "d1", "d2", "s"), (bm, bn // 2))
    for act, save in product(ACTIVATIONS, (False, True)):
        constants = {**shape, "ACT": act, "BIAS1": True, "BIAS2": True, "SAVE": save}
        options = f"{act}{', branches saved' * save}"
        yield _described("star_linear", "star_linear", options, constants, inputs | branches)
    for act in ACTIVATIONS:
        constants = {**shape, "ACT": act}
        blocks = {"dy": (bm, bk), "w3": (bk, bn)} | halves
        yield _described("dgated", "dgated", act, constants, blocks)


def _described(
    kernel: str,
    function: str,
    options: str,
    constants: dict[str, Any],
    blocks: dict[str, tuple[int, int]],
) -> Variant:
    stages, warps = star_linear.STAGES[function], star_linear.WARPS
    row = f"{star_linear.BM} x {star_linear.BN} x {star_linear.BK}, {warps} warps, {stages} stages"
    types = {n: f"tensordesc<bf16[{a},{b}]>" for n, (a, b) in blocks.items()}
    return Variant(
        kernel, row, options, f"star_linear.{function}", constants, "sm_90", 2, warps, stages,
        types, products=True,
    )  # fmt: skip
