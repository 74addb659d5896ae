"""Measured dispatch: time equivalent programs once per shape, keep the fastest.

Off unless `STARLAYERS_TUNE=1`: the first use of a shape then times every candidate, outside of
CUDA graph capture, and the fastest is used for the rest of the process.
"""

import os
from collections.abc import Callable, Hashable, Mapping

import torch

__all__ = ["choose", "tuning", "winner"]

ENV_VAR = "STARLAYERS_TUNE"
WARM_UPS, REPEATS = 2, 20

#: name -> program to time
Candidates = Mapping[str, Callable[[], object]]

_winners: dict[Hashable, str] = {}


def tuning() -> bool:
    """Return True if `STARLAYERS_TUNE=1` is set; read at every call.

    Example:
        >>> tuning()
        False
    """
    return os.environ.get(ENV_VAR, "0") == "1"


def winner(key: Hashable) -> str | None:
    """Return the name that `choose` measured to be fastest for `key`, or None.

    Example:
        >>> winner("a shape that was not timed") is None
        True
    """
    return _winners.get(key)


def choose(
    key: Hashable,
    candidates: Candidates,
    *,
    timer: Callable[[Candidates], dict[str, float]] | None = None,
) -> str:
    """Return the name of the fastest candidate for `key`; the first one if tied.

    Candidates are timed on the first call for a key. Later calls return the same name.

    Args:
        key: everything that the times depend on: device, dtype, shapes.
        candidates: name -> program, all of the same result.
        timer: candidates -> name -> milliseconds; CUDA events by default.

    Example:
        >>> times = {"library": 2.0, "triton": 1.0}
        >>> choose("doctest", {name: int for name in times}, timer=lambda _: times)
        'triton'
    """
    if key not in _winners:
        times = (timer or _interleaved)(candidates)
        _winners[key] = min(candidates, key=lambda name: times[name])
    return _winners[key]


def _interleaved(candidates: Candidates) -> dict[str, float]:
    """Return the median milliseconds of each candidate, timed in turn by CUDA events.

    Interleaving (A B A B) gives each the same clocks; the first rounds warm up and do not count.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(WARM_UPS + REPEATS):
        for name, run in candidates.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: float(torch.tensor(t[WARM_UPS:]).median()) for name, t in times.items()}
