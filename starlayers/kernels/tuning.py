"""Measured dispatch: which of several equal programs is fastest for a shape, on this GPU.

Off unless `STARLAYERS_TUNE=1`: the first use of a shape then times every candidate once, outside
of CUDA graph capture, and the winner serves for the rest of the process.
"""

import os
import statistics
from collections.abc import Callable, Hashable, Mapping

import torch

__all__ = ["choose", "tuning", "winner"]

ENV_VAR = "STARLAYERS_TUNE"
REPEATS = 20

Candidates = Mapping[str, Callable[[], object]]

_winners: dict[Hashable, str] = {}


def tuning() -> bool:
    """Whether the user asked for measured dispatch (env `STARLAYERS_TUNE=1`, read at every call).

    Example:
        >>> tuning()
        False
    """
    return os.environ.get(ENV_VAR, "0") == "1"


def winner(key: Hashable) -> str | None:
    """What `choose` found for `key`, or None where it was not asked yet.

    Example:
        >>> winner("never asked")
    """
    return _winners.get(key)


def choose(
    key: Hashable,
    candidates: Candidates,
    *,
    timer: Callable[[Candidates], dict[str, float]] | None = None,
) -> str:
    """The name of the fastest candidate for `key`, measured on its first use; ties to the first.

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
    """Median milliseconds of each candidate by CUDA events, A B A B, after two warm-up rounds."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(2 + REPEATS):
        for name, run in candidates.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: statistics.median(t[2:]) for name, t in times.items()}
