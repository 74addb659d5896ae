"""Launches of the star MLP kernels K3 and K4: tiles, strides and partial sums."""

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
from starlayers.kernels.tiles import MLP_BACKWARD, MLP_FORWARD, Tile, mlp_tile, split_columns

__all__ = ["star_mlp_backward_kernel", "star_mlp_kernel"]


def star_mlp_kernel(
    x: Tensor, weights: MLPWeights, residual: Tensor | None, act: str, offset: float, stats: bool
) -> Outputs:
    """Launch K3; `starlayers.kernels.star_mlp` documents arguments and results."""
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
    if not stats:
        return y, *empty_statistics(x)
    return y, *merged_statistics(parts)


def star_mlp_backward_kernel(
    upstream: Upstream, x: Tensor, weights: MLPWeights, act: str, offset: float
) -> MLPGradients:
    """Launch K4; returns the gradients of x and of all weights.

    Narrow layers take one pass ("all"), wider ones two ("dx" and "dw"). If no tile holds the weight
    gradients, the first pass stores d1, d2 and s, and matrix products compute them.
    """
    from starlayers.kernels.device.star_mlp_backward import mlp_dw, mlp_dx

    dy, z, mean, p, q = upstream
    w1, b1, w2, b2, w3, _ = weights
    dy, x, w1, w2, w3 = (unit_stride(t) for t in (dy, x, w1, w2, w3))
    z = None if z is None else unit_stride(z)
    rows, (channels, hidden, out) = x.shape[0], weights.sizes
    c0, c1 = split_columns(channels)
    o0, o1 = split_columns(out)
    width = max(c0 + c1, o0 + o1)
    options = {
        "stride_z": 0 if z is None else z.stride(0),
        "stride_x": x.stride(0), "stride_w1": w1.stride(0), "stride_w2": w2.stride(0),
        "stride_w3": w3.stride(0), "C": channels, "H": hidden, "OUT": out, "ACT": act,
        "OFFSET": offset, "BIAS1": b1 is not None, "BIAS2": b2 is not None,
        "PRECISION": precision(x), "C0": c0, "C1": c1, "O0": o0, "O1": o1,
    }  # fmt: skip
    inputs = (
        pointer(z, w1), pointer(mean, w1), pointer(p, w1), pointer(q, w1), x,
        w1, pointer(b1, w1), w2, pointer(b2, w1), w3,
    )  # fmt: skip
    dx = x.new_empty(rows, channels)

    def tile_options(tile: Tile) -> dict[str, int]:
        return {
            "BM": tile.rows, "BH": tile.hidden, "STAGES": tile.stages,
            "num_warps": tile.warps, "num_stages": tile.stages,
        }  # fmt: skip

    def weight_gradients(tile: Tile, dy: Tensor, *, with_dx: bool) -> tuple[Tensor, ...]:
        chunks = max(1, ceil_div(hidden, tile.hidden))  # the first one sums dy too
        # no more than run at once, at 8 warps a multiprocessor: each writes a sum of its own
        resident = max(1, multiprocessors(x.device) * 8 // tile.warps // chunks)
        programs = min(resident, ceil_div(rows, tile.rows))
        parts = x.new_empty(programs, hidden, 2 * channels + out + 2, dtype=torch.float32)
        parts3 = x.new_empty(programs, out, dtype=torch.float32)
        if rows:
            launch(
                mlp_dw, (chunks, programs), dy, *inputs, dx, parts, parts3, rows, programs,
                DX=with_dx, AFFINE=with_dx and z is not None, stride_dy=dy.stride(0),
                **options, **tile_options(tile),
            )  # fmt: skip
        dw1, dw2, dw3, db = parts.sum(0).split((channels, channels, out, 2), 1)
        return dw1, db[:, 0], dw2, db[:, 1], dw3.t(), parts3.sum(0)

    whole = mlp_tile(MLP_BACKWARD["all"], x.device, width, x.element_size())
    if whole is not None and hidden <= whole.hidden:
        return _typed(dx, weight_gradients(whole, dy, with_dx=True), w1)
    tile = mlp_tile(MLP_BACKWARD["dx"], x.device, width, x.element_size())
    if tile is None:
        raise ValueError(f"no backward tile for {channels} -> {out} channels on {x.device}")
    separate = mlp_tile(MLP_BACKWARD["dw"], x.device, width, x.element_size())
    spill = separate is None
    d1, d2, s = (x.new_empty(rows if spill else 0, hidden) for _ in range(3))
    tiles = ceil_div(rows, tile.rows)
    sums = x.new_empty(tiles if spill else 0, 2 * hidden + out, dtype=torch.float32)
    g = dy if z is None else x.new_empty(rows, out)
    if rows:
        launch(
            mlp_dx, (tiles,), dy, *inputs, dx, g, d1, d2, s, sums, rows,
            SPILL=spill, AFFINE=z is not None, stride_dy=dy.stride(0),
            **options, **tile_options(tile),
        )  # fmt: skip
    if separate is not None:
        return _typed(dx, weight_gradients(separate, g, with_dx=False), w1)
    db1, db2, db3 = sums.sum(0).split((hidden, hidden, out))
    return _typed(dx, (d1.t() @ x, db1, d2.t() @ x, db2, g.t() @ s, db3), w1)


def _typed(dx: Tensor, grads: tuple[Tensor, ...], w: Tensor) -> MLPGradients:
    # copies, because outputs of an op may not share memory and these are views of the same sums
    dw1, db1, dw2, db2, dw3, db3 = (g.new_empty(g.shape, dtype=w.dtype).copy_(g) for g in grads)
    return dx, dw1, db1, dw2, db2, dw3, db3
