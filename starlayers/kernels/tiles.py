"""Tile sizes of the star MLP kernels, by channels and family of GPU.

Tiles of sm_90 for 16-bit types, but not those of "hidden", were chosen by time on an H100, where
some spilled registers. Their kernels were rearranged so that none does by more than 192 bytes a
thread, which was not timed since. All others were chosen by ahead-of-time compilation (`make
kernels`): the most rows without a register spill, because each tile reads all weights once.
"""

from dataclasses import dataclass

import torch

from starlayers.kernels.registration import INTERPRET

__all__ = [
    "FAMILIES",
    "MLP_BACKWARD",
    "MLP_FORWARD",
    "Tile",
    "family",
    "mlp_backward_tiles",
    "mlp_tile",
    "next_power_of_2",
    "split_columns",
]

#: families of GPUs by the shared memory of a program: 227 KiB, 163 KiB, 64 KiB (all others)
FAMILIES = ("sm_90", "sm_80", "small")


@dataclass(frozen=True)
class Tile:
    """Tile of a launch: rows, hidden channels at a time, warps, pipeline stages.

    `depth` is the channels at a time; 0 for a kernel that holds them all.
    """

    rows: int
    hidden: int
    warps: int
    stages: int
    depth: int = 0


Table = dict[str, dict[int, Tile]]

#: family -> channels -> tile, for 16-bit types; "<family> float32" for float32
MLP_FORWARD: Table = {
    "sm_90": {
        32: Tile(128, 32, 4, 3),
        64: Tile(128, 64, 4, 3),
        96: Tile(128, 64, 8, 3),
        128: Tile(128, 64, 8, 3),
        192: Tile(128, 32, 8, 3),
        256: Tile(128, 32, 8, 3),
        384: Tile(64, 16, 8, 2),
    },
    "sm_80": {
        32: Tile(128, 32, 4, 3),
        64: Tile(128, 64, 8, 2),
        96: Tile(128, 32, 8, 3),
        128: Tile(128, 32, 8, 3),
        192: Tile(128, 16, 8, 2),
        256: Tile(64, 32, 8, 3),
        384: Tile(64, 32, 8, 2),
    },
    "small": {
        32: Tile(128, 32, 4, 2),
        64: Tile(128, 32, 8, 2),
        96: Tile(128, 32, 8, 2),
        128: Tile(128, 32, 8, 2),
        192: Tile(64, 16, 8, 2),
        256: Tile(64, 16, 8, 2),
        384: Tile(32, 16, 8, 1),
    },
    "sm_90 float32": {
        32: Tile(128, 32, 4, 2),
        64: Tile(128, 32, 8, 2),
        96: Tile(128, 32, 8, 2),
        128: Tile(16, 16, 4, 2),
    },
    "sm_80 float32": {
        32: Tile(128, 32, 8, 2),
        64: Tile(128, 16, 8, 2),
        96: Tile(32, 16, 4, 2),
        128: Tile(32, 32, 8, 2),
    },
    "small float32": {32: Tile(128, 32, 8, 1), 64: Tile(64, 16, 8, 1), 128: Tile(16, 16, 4, 1)},
}

#: kernel -> such a table; `mlp_backward_tiles` says which kernels serve a layer
MLP_BACKWARD: dict[str, Table] = {
    "all": {
        "sm_90": {32: Tile(64, 128, 8, 3)},
        "sm_80": {32: Tile(32, 128, 8, 1)},
    },
    "dx": {
        "sm_90": {
            32: Tile(128, 32, 8, 3),
            64: Tile(128, 32, 8, 3),
            96: Tile(128, 32, 8, 2),
        },
        "sm_80": {32: Tile(64, 32, 4, 3), 64: Tile(128, 32, 8, 2)},
        "small": {32: Tile(64, 32, 4, 2), 64: Tile(64, 32, 4, 1)},
        "sm_90 float32": {32: Tile(128, 32, 8, 2)},
        "sm_80 float32": {32: Tile(64, 16, 8, 2)},
    },
    "dw": {
        "sm_90": {
            32: Tile(32, 128, 8, 2),
            64: Tile(64, 64, 4, 3),
            96: Tile(16, 128, 8, 2),
        },
        "sm_80": {32: Tile(32, 64, 4, 2), 64: Tile(16, 64, 8, 2)},
        "small": {32: Tile(32, 32, 4, 1), 64: Tile(16, 32, 4, 1)},
        "sm_90 float32": {32: Tile(16, 64, 4, 2)},
        "sm_80 float32": {32: Tile(16, 64, 4, 2)},
    },
    "hidden": {
        "sm_90": {256: Tile(128, 64, 8, 3, depth=64)},
        "sm_80": {256: Tile(128, 64, 8, 3, depth=32)},
        "small": {256: Tile(128, 64, 8, 2, depth=32)},
        "sm_90 float32": {64: Tile(64, 64, 8, 2, depth=32)},
        "sm_80 float32": {64: Tile(64, 32, 4, 2, depth=32)},
        "small float32": {64: Tile(64, 32, 4, 2, depth=32)},
    },
}


def mlp_backward_tiles(
    device: torch.device, width: int, hidden: int, element_size: int = 2
) -> dict[str, Tile]:
    """Return kernel -> tile of the star MLP's backward; empty if no kernel serves it.

    "all" yields every gradient in one pass, if one chunk holds the whole hidden axis. "dx" and "dw"
    are two passes, while a program can hold weight gradients. Wider layers take "hidden": it writes
    the hidden gradients to memory, and matrix products yield the others.
    """
    whole = mlp_tile(MLP_BACKWARD["all"], device, width, element_size)
    if whole is not None and hidden <= whole.hidden:
        return {"all": whole}
    dx, dw = (
        mlp_tile(MLP_BACKWARD[kernel], device, width, element_size) for kernel in ("dx", "dw")
    )
    if dx is not None and dw is not None:
        return {"dx": dx, "dw": dw}
    products = mlp_tile(MLP_BACKWARD["hidden"], device, width, element_size)
    return {} if products is None else {"hidden": products}


def mlp_tile(table: Table, device: torch.device, width: int, element_size: int = 2) -> Tile | None:
    """Return the tile for `width` channels, or None if the table has none so wide.

    `width` is the larger of input and output channels; `element_size` in bytes.
    """
    # the interpreter computes bfloat16 in float32, and has no registers to run out of
    dtype = " float32" if element_size == 4 and not INTERPRET else ""
    tiles = table.get(family(device) + dtype, {})
    fitting = [channels for channels in tiles if channels >= width]
    return tiles[min(fitting)] if fitting else None


def family(device: torch.device) -> str:
    """Return the family of `device`; an H100's without a GPU, as when tracing."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "sm_90"
    shared = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)
    if torch.version.hip is None and shared >= 227 * 1024:
        return "sm_90"
    return "sm_80" if torch.version.hip is None and shared >= 163 * 1024 else "small"


def next_power_of_2(n: int) -> int:
    """Return the least power of two that is at least `n`.

    Example:
        >>> next_power_of_2(24)
        32
    """
    return 1 << (n - 1).bit_length()


def split_columns(width: int) -> tuple[int, int]:
    """Return two powers of two, at least 16 or 0, that cover `width` channels.

    Of all such pairs, these pad least: 96 channels cost 64 + 32 instead of 128.

    Example:
        >>> split_columns(96), split_columns(24), split_columns(192), split_columns(100)
        ((64, 32), (32, 0), (128, 64), (128, 0))
    """
    whole = max(16, next_power_of_2(width))
    if whole == 16 or width == whole:
        return whole, 0
    rest = max(16, next_power_of_2(width - whole // 2))
    return (whole // 2, rest) if rest < whole // 2 else (whole, 0)
