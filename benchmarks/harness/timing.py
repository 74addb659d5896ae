"""Times of variants measured in turn, and memory kept for a backward pass."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def host_clock(run: Callable[[], object]) -> float:
    """Return the wall-clock seconds that `run()` takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def cpu_clock(run: Callable[[], object]) -> float:
    """Return the CPU seconds that `run()` takes; other work on the machine does not count."""
    began = time.process_time()
    run()
    return time.process_time() - began


def interleave(
    variants: dict[str, Callable[[], object]],
    *,
    baselines: list[str],
    repeats: int,
    warmup: int = 1,
    clock: Callable[[Callable[[], object]], float] = host_clock,
) -> dict[str, dict[str, float]]:
    """Time the variants in turn, A B C A B C ..., and return medians and paired ratios.

    The speed of a shared machine drifts, so that absolute times are noisy. The ratio of a variant
    is therefore the median over rounds of its ratio within the round to the baseline with the
    lowest median. `clock(run)` runs a variant once and returns the seconds it took.
    """
    timed = in_turn(variants, repeats=repeats, warmup=warmup, clock=clock)
    _, ratios = paired(timed, baselines)
    return {
        name: {
            "median_ms": 1e3 * statistics.median(t),
            "min_ms": 1e3 * min(t),
            "max_ms": 1e3 * max(t),
            "ratio": ratios[name],
        }
        for name, t in timed.items()
    }


def in_turn(
    variants: dict[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 1,
    clock: Callable[[Callable[[], object]], float] = host_clock,
) -> dict[str, list[float]]:
    """Return the seconds of every variant in each round, A B C A B C ..., after `warmup` rounds."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(warmup + repeats):
        for name, run in variants.items():
            times[name].append(clock(run))
    return {name: t[warmup:] for name, t in times.items()}


def paired(times: dict[str, list[float]], baselines: list[str]) -> tuple[str, dict[str, float]]:
    """Return the baseline with the lowest median, and the ratio of every variant to it.

    `times` has the same rounds for every variant; a ratio is the median of those within the rounds.
    """
    baseline = min(baselines, key=lambda name: statistics.median(times[name]))
    return baseline, {
        name: statistics.median(a / b for a, b in zip(t, times[baseline], strict=True))
        for name, t in times.items()
    }


def kept_bytes(model: torch.nn.Module, run: Callable[[], Any]) -> int:
    """Return the bytes that a forward keeps for its backward.

    Every storage counts once; parameters do not count.
    """
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(storages.values())
