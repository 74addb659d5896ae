"""Launches of the star MLP kernels: tiles, strides and partial sums."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from starlayers.kernels.registration import (
    MLPGradients,
    MLPWeights,
    ceil_div,
    launch,
    multiprocessors,
    pointer,
    precision,
    unit_stride,
)
from starlayers.kernels.statistics import Outputs, Upstream, empty_statistics, merged_statistics
from starlayers.kernels.tiles import (
    MLP_FORWARD,
    Tile,
    mlp_backward_tiles,
    mlp_tile,
    split_columns,
)

__all__ = ["ProgramSums", "backward", "forward", "star_mlp_backward_kernel", "star_mlp_kernel"]

#: most bytes of hidden gradients in memory at once. One part serves StarNet-S4 at batch 256 (154 MB
#: at 128 channels, 77 at 256), so that small layers are not launched in pieces
HIDDEN_BYTES = 256 * 2**20


def star_mlp_kernel(
    x: Tensor, weights: MLPWeights, residual: Tensor | None, act: str, offset: float, stats: bool
) -> Outputs:
    """Compute the op `star_mlp`; `starlayers.kernels.star_mlp` documents arguments and results."""
    y, parts = forward(x, weights, residual, act, offset, stats)
    if not stats:
        return y, *empty_statistics(x)
    return y, *merged_statistics(parts)


def forward(
    x: Tensor, weights: MLPWeights, residual: Tensor | None, act: str, offset: float, stats: bool
) -> tuple[Tensor, Tensor]:
    """Launch the forward; returns y and, with `stats`, statistics of its tiles."""
    w1, b1, w2, b2, w3, b3 = weights
    x, w1, w2, w3 = (unit_stride(t) for t in (x, w1, w2, w3))
    rows, (channels, hidden, out) = x.shape[0], weights.sizes
    y = x.new_empty(rows, out)
    c0, c1 = split_columns(channels)
    o0, o1 = split_columns(out)
    tile = mlp_tile(MLP_FORWARD, x.device, max(c0 + c1, o0 + o1), x.element_size())
    if tile is None:
        raise ValueError(f"no star MLP tile for {channels} -> {out} channels on {x.device}")
    programs = ceil_div(rows, tile.rows)
    parts = x.new_empty(programs if stats else 0, 3, out, dtype=torch.float32)
    residual = None if residual is None else unit_stride(residual)
    if rows:
        from starlayers.kernels.device.star_mlp_forward import mlp_forward

        launch(
            mlp_forward, (programs,),
            x, w1, pointer(b1, w1), w2, pointer(b2, w1), w3, pointer(b3, w1), pointer(residual, w1),
            y, parts, rows,
            stride_x=x.stride(0), stride_w1=w1.stride(0), stride_w2=w2.stride(0),
            stride_w3=w3.stride(0), stride_r=0 if residual is None else residual.stride(0),
            C=channels, H=hidden, OUT=out, ACT=act, OFFSET=offset,
            BIAS1=b1 is not None, BIAS2=b2 is not None, BIAS3=b3 is not None,
            RESIDUAL=residual is not None, STATS=stats,
            PRECISION=precision(x), BM=tile.rows, BH=tile.hidden, C0=c0, C1=c1, O0=o0, O1=o1,
            STAGES=tile.stages, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return y, parts


def star_mlp_backward_kernel(
    upstream: Upstream, x: Tensor, weights: MLPWeights, act: str, offset: float
) -> MLPGradients:
    """Launch the kernels of the backward; return the gradients of x and of all weights."""
    computed = backward(upstream, x, weights, act, offset)
    if not isinstance(computed, ProgramSums):
        return computed
    channels, _, out = weights.sizes
    dw1, dw2, dw3, db = computed.parts.sum(0).split((channels, channels, out, 2), 1)
    grads = (dw1, db[:, 0], dw2, db[:, 1], dw3.t(), computed.parts3.sum(0))
    # copies, because outputs of an op may not share memory and these are views of the same sums
    return computed.dx, *(_copied(t, weights.w1) for t in grads)  # type: ignore[return-value]


class ProgramSums(NamedTuple):
    """Gradient of x, and those of the weights to be summed over programs.

    `parts` is (programs, hidden, 2 in + out + 2): columns for dw1, dw2, the transposed dw3, db1 and
    db2. `parts3` is (programs, out), for db3.
    """

    dx: Tensor
    parts: Tensor
    parts3: Tensor


def backward(
    upstream: Upstream, x: Tensor, weights: MLPWeights, act: str, offset: float
) -> MLPGradients | ProgramSums:
    """Launch the kernels of the backward that `mlp_backward_tiles` chooses."""
    dy, z, mean, p, q = upstream
    w1, b1, w2, b2, w3, b3 = weights
    dy, x, w1, w2, w3 = (unit_stride(t) for t in (dy, x, w1, w2, w3))
    z = None if z is None else unit_stride(z)
    upstream, weights = Upstream(dy, z, mean, p, q), MLPWeights(w1, b1, w2, b2, w3, b3)
    channels, hidden, out = weights.sizes
    width = max(sum(split_columns(channels)), sum(split_columns(out)))
    tiles = mlp_backward_tiles(x.device, width, hidden, x.element_size())
    if not tiles:
        raise ValueError(f"no backward tile for {channels} -> {out} channels on {x.device}")
    options = {
        "stride_x": x.stride(0), "stride_w1": w1.stride(0), "stride_w2": w2.stride(0),
        "stride_w3": w3.stride(0), "C": channels, "H": hidden, "OUT": out, "ACT": act,
        "OFFSET": offset, "BIAS1": b1 is not None, "BIAS2": b2 is not None,
        "PRECISION": precision(x),
    }  # fmt: skip
    if "hidden" in tiles:
        return _by_products(upstream, x, weights, tiles["hidden"], options)
    return _on_chip(upstream, x, weights, tiles, options)


def _on_chip(
    upstream: Upstream,
    x: Tensor,
    weights: MLPWeights,
    tiles: dict[str, Tile],
    options: dict[str, Any],
) -> ProgramSums:
    """Compute all gradients in one pass ("all") or in two ("dx" and "dw")."""
    from starlayers.kernels.device.star_mlp_backward import mlp_dw, mlp_dx

    dy, z, w1 = upstream.dy, upstream.z, weights.w1
    rows, (channels, hidden, out) = x.shape[0], weights.sizes
    c0, c1 = split_columns(channels)
    o0, o1 = split_columns(out)
    options = options | _strides(upstream) | {"C0": c0, "C1": c1, "O0": o0, "O1": o1}
    inputs = (*_statistics(upstream, w1), x, *_branches(weights), weights.w3)
    dx = x.new_empty(rows, channels)
    if "dx" in tiles:
        g = dy if z is None else x.new_empty(rows, out)
        if rows:
            tile = tiles["dx"]
            launch(
                mlp_dx, (ceil_div(rows, tile.rows),), dy, *inputs, dx, g, rows,
                AFFINE=z is not None, **options, **_tile_options(tile),
            )  # fmt: skip
        dy, options["stride_dy"] = g, g.stride(0)
    tile = tiles["dw" if "dw" in tiles else "all"]
    chunks = max(1, ceil_div(hidden, tile.hidden))  # the first one sums dy too
    # no more than run at once, at 8 warps a multiprocessor: each writes a sum of its own
    resident = max(1, multiprocessors(x.device) * 8 // tile.warps // chunks)
    programs = min(resident, ceil_div(rows, tile.rows))
    parts = x.new_empty(programs, hidden, 2 * channels + out + 2, dtype=torch.float32)
    parts3 = x.new_empty(programs, out, dtype=torch.float32)
    if rows:
        whole = "all" in tiles
        launch(
            mlp_dw, (chunks, programs), dy, *inputs, dx, parts, parts3, rows, programs, DX=whole,
            AFFINE=whole and z is not None, **options, **_tile_options(tile),
        )  # fmt: skip
    return ProgramSums(dx, parts, parts3)


def _by_products(
    upstream: Upstream, x: Tensor, weights: MLPWeights, tile: Tile, options: dict[str, Any]
) -> MLPGradients:
    """Compute hidden gradients by a kernel, all others by matrix products of them.

    d1, d2 and s of as many rows as fit into HIDDEN_BYTES are in memory at once, but at least those
    of one row tile. Where that takes several parts, weight gradients are summed in float32.
    """
    from starlayers.kernels.device.star_mlp_backward import mlp_hidden, mlp_upstream

    dy, z, w1 = upstream.dy, upstream.z, weights.w1
    rows, (channels, hidden, out) = x.shape[0], weights.sizes
    step = max(1, HIDDEN_BYTES // (3 * hidden * x.element_size()) // tile.rows) * tile.rows
    tiles = ceil_div(rows, tile.rows)
    sums = x.new_empty(tiles, 2 * hidden + out, dtype=torch.float32)
    g = dy if z is None else x.new_empty(rows, out)
    dx = x.new_empty(rows, channels)
    d = x.new_empty(min(step, rows), 3 * hidden)
    o0, o1 = split_columns(out)
    if rows:
        launch(
            mlp_upstream, (tiles,), dy, *_statistics(upstream, w1), g, sums, rows, H=hidden,
            OUT=out, AFFINE=z is not None, BM=tile.rows, O0=o0, O1=o1, num_warps=tile.warps,
            **_strides(upstream),
        )  # fmt: skip
    both = torch.cat((w1, weights.w2))
    grads: tuple[Tensor, ...] = ()
    for first in range(0, max(rows, 1), step):
        xs, gs, dxs = (t[first : first + step] for t in (x, g, dx))
        part = d[: len(xs)]
        if rows:
            launch(
                mlp_hidden, (ceil_div(len(xs), tile.rows) * ceil_div(hidden, tile.hidden),),
                gs, xs, *_branches(weights), weights.w3, part, sums[first // tile.rows :], len(xs),
                stride_g=g.stride(0), BK=tile.depth, **options, **_tile_options(tile),
            )  # fmt: skip
        d1, d2, s = part.split(hidden, 1)
        torch.mm(part[:, : 2 * hidden], both, out=dxs)
        more = (d1.t() @ xs, d2.t() @ xs, gs.t() @ s)
        grads = tuple(a.float() + b for a, b in zip(grads, more, strict=True)) if first else more
    dw1, dw2, dw3 = (t.to(w1.dtype) for t in grads)
    db1, db2, db3 = (_copied(t, w1) for t in sums.sum(0).split((hidden, hidden, out)))
    return dx, dw1, db1, dw2, db2, dw3, db3


def _strides(upstream: Upstream) -> dict[str, int]:
    z = upstream.z
    return {"stride_dy": upstream.dy.stride(0), "stride_z": 0 if z is None else z.stride(0)}


def _statistics(upstream: Upstream, w: Tensor) -> tuple[Tensor, ...]:
    """Return pointers to all but the gradient itself."""
    return tuple(pointer(t, w) for t in upstream[1:])


def _branches(weights: MLPWeights) -> tuple[Tensor, ...]:
    """Return pointers to weights and biases of both branches."""
    w1, b1, w2, b2, *_ = weights
    return w1, pointer(b1, w1), w2, pointer(b2, w1)


def _tile_options(tile: Tile) -> dict[str, int]:
    return {
        "BM": tile.rows, "BH": tile.hidden, "STAGES": tile.stages,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


def _copied(t: Tensor, w: Tensor) -> Tensor:
    """Return a dense copy of `t` in the dtype of `w`."""
    return t.new_empty(t.shape, dtype=w.dtype).copy_(t)
