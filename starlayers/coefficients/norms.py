"""Norms of quadratic forms and other sums over their entries, from their factors.

In all functions `w1`, `w2` are (channels, rank, D), and channel k has the matrix
`Q = sum_r (w1 w2' + w2 w1') / 2`. It is made only for sums that need it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from starlayers.coefficients.form import CHUNK_BYTES, check_bytes, dense, no_autocast
from starlayers.kernels.registration import needs_gradients
from starlayers.recompute import recomputed


def squares(w1: Tensor, w2: Tensor) -> Tensor:
    """Return `|Q|_F^2`, (channels,).

    For rank 1 this is `(|w1|^2 |w2|^2 + (w1 . w2)^2) / 2`.
    """
    if w1.shape[1] == 1:
        a, b = w1[:, 0], w2[:, 0]
        return ((a * a).sum(1) * (b * b).sum(1) + (a * b).sum(1).square()) / 2
    with no_autocast(w1):
        first, second, across = w1 @ w1.mT, w2 @ w2.mT, w1 @ w2.mT
    return (first * second + across * across.mT).sum((1, 2)) / 2


def fourth_powers(w1: Tensor, w2: Tensor) -> Tensor:
    """Return the sum of `Q_ij^4`, (channels,), in `D (2 rank)^4` operations."""
    rank, width = w1.shape[1:]
    return in_chunks(_fourth_powers, w1, w2, 3 * (2 * rank) ** 2 * width * w1.element_size())


def _fourth_powers(w1: Tensor, w2: Tensor) -> Tensor:
    if w1.shape[1] == 1:
        a, b = w1[:, 0], w2[:, 0]
        aa, bb, ab = a * a, b * b, a * b
        ends, odd = (aa * aa).sum(1) * (bb * bb).sum(1), (aa * ab).sum(1) * (bb * ab).sum(1)
        return (ends + 4 * odd + 3 * (ab * ab).sum(1).square()) / 8
    u = torch.cat([w1, w2], 1)
    # 2 Q_ij = sum_m u_mi v_mj, where v is u with its halves exchanged; so the fourth power is a
    # sum over m, n, p, q of (u_m u_n u_p u_q)_i (v_m v_n v_p v_q)_j
    pairs = u[:, :, None] * u[:, None]
    with no_autocast(w1):
        moments = pairs.flatten(1, 2) @ pairs.flatten(1, 2).mT
    moments = moments.unflatten(2, pairs.shape[1:3]).unflatten(1, pairs.shape[1:3])
    exchanged = moments.roll([w1.shape[1]] * 4, (1, 2, 3, 4))
    total: Tensor = (moments * exchanged).sum((1, 2, 3, 4))
    return total / 16


def absolutes(w1: Tensor, w2: Tensor) -> Tensor:
    """Return the sum of `|Q_ij|`, (channels,).

    This takes `D log D` operations for rank 1, and `D^2` for others.
    """
    if w1.shape[1] == 1:
        return in_chunks(_sorted_absolutes, w1, w2, 16 * w1.shape[2] * w1.element_size())
    return in_chunks(lambda *w: dense(*w).abs().sum((1, 2)), w1, w2, matrix_bytes(w1))


def absolutes_bound(w1: Tensor, w2: Tensor) -> Tensor:
    """Return `sum_r |w1|_1 |w2|_1`, (channels,), an upper bound of `absolutes`."""
    return (w1.abs().sum(2) * w2.abs().sum(2)).sum(1)


def _sorted_absolutes(w1: Tensor, w2: Tensor) -> Tensor:
    a, b = w1[:, 0], w2[:, 0]
    with torch.no_grad():  # turn (a_i, b_i) to the upper half plane; the sign does not matter
        sign = torch.where((a < 0) | ((a == 0) & (b < 0)), -1.0, 1.0).to(a)
        sign = sign.masked_fill((a == 0) & (b == 0), 0.0)
        # in the order of their angles t, by the cotangents: -infinity at 0, 0 at a right angle.
        # Rounded angles would not show that t_i = pi - t_j
        cotangent, order = (-b / a.abs() * sign).nan_to_num_(0.0, torch.inf, -torch.inf).sort(1)
        # |a_i b_j + b_i a_j| = r_i r_j |sin(t_i + t_j)|, in which the sine is positive for all j
        # with t_j < pi - t_i; where it is zero the derivative is zero too, between both signs
        below = torch.searchsorted(cotangent, -cotangent)
        upto = torch.searchsorted(cotangent, -cotangent, right=True)
    a, b = (sign * a).gather(1, order), (sign * b).gather(1, order)
    signed_a, signed_b = _signed(a, below, upto), _signed(b, below, upto)
    total = (a * signed_b + b * signed_a).sum(1)
    # t = 0 is a zero of the sine as well: all of these pairs are zero, and so are their derivatives
    at_zero = (a == 0).to(a)
    return (total - 2 * (a * at_zero).sum(1) * (b * at_zero).sum(1)) / 2


def _signed(v: Tensor, below: Tensor, upto: Tensor) -> Tensor:
    """Return `sum_j s_ij v_j`: s = 1 before `below[i]`, -1 from `upto[i]` on, else 0."""
    sums = torch.nn.functional.pad(v.cumsum(1), (1, 0))
    signed: Tensor = sums.gather(1, below) + sums.gather(1, upto) - sums[:, -1:]
    return signed


def entropies(w1: Tensor, w2: Tensor) -> Tensor:
    """Return `-sum p log p`, `p = Q_ij^2 / |Q|_F^2`, (channels,), in `D^2` operations."""
    return in_chunks(_entropies, w1, w2, matrix_bytes(w1))


def _entropies(w1: Tensor, w2: Tensor) -> Tensor:
    q = dense(w1, w2).square()
    terms: Tensor = torch.special.entr(q / positive(q.sum((1, 2), keepdim=True)))
    return terms.sum((1, 2))


def eigenvalues(w1: Tensor, w2: Tensor) -> Tensor:
    """Return the eigenvalues of Q that are not always zero, ascending.

    These are (channels, min(2 rank, D)). For rank 1 they are `(w1 . w2 -+ |w1| |w2|) / 2`.
    Otherwise they are those of the small matrix `R [[0, 1], [1, 0]] R' / 2`, where R is the
    triangle of a QR decomposition of all vectors.
    """
    rank = w1.shape[1]
    if rank == 1:
        dot, size = (w1 * w2).sum(2), w1.norm(dim=2) * w2.norm(dim=2)
        return torch.cat([dot - size, dot + size], 1) / 2
    r = torch.linalg.qr(torch.cat([w1, w2], 1).mT, mode="r").R
    values: Tensor = torch.linalg.eigvalsh(r @ r.roll(rank, -1).mT / 2)
    return values


def diagonals(w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
    """Return the diagonal of Q (channels, D), and its last column without the corner."""
    last1, last2 = w1[:, :, -1:], w2[:, :, -1:]
    edge = (w1[:, :, :-1] * last2 + w2[:, :, :-1] * last1).sum(1) / 2
    return (w1 * w2).sum(1), edge


def matrix_bytes(w: Tensor) -> int:
    """Return the bytes needed to sum over the matrix of a channel, if not too many."""
    side = w.shape[2]
    needed = side * side * w.element_size()
    remedy = "leave out what needs it: bound=True for a penalty, entropy=False for a spectrum"
    check_bytes(needed, f"a single matrix of {side} x {side} takes", remedy)
    return 4 * needed


def in_chunks(
    call: Callable[[Tensor, Tensor], Tensor], w1: Tensor, w2: Tensor, channel_bytes: int
) -> Tensor:
    """Apply `call` to a few channels at a time, recomputed in the backward."""
    size = max(1, CHUNK_BYTES // channel_bytes)
    if len(w1) <= size:
        return call(w1, w2)
    parts = zip(w1.split(size), w2.split(size))
    if needs_gradients(w1, w2):
        return torch.cat([recomputed(call, *part) for part in parts])
    return torch.cat([call(*part) for part in parts])


def positive(x: Tensor) -> Tensor:
    """Clamp `x` to positive numbers, for divisions and logarithms."""
    return x.clamp(min=torch.finfo(x.dtype).tiny)
