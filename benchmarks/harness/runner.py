"""What every benchmark shares: environment, interleaved timing, intervals, resumable runs."""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """Hardware, versions, date and command: the conditions every figure is reported with."""
    versions = {}
    names = ("torch", "torchvision", "triton", "timm", "transformers", "peft", "optuna", "cmaes")
    names += ("starlayers",)
    for package in names:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    # results are committed: where a folder lies on this machine is nobody's business
    arguments = [Path(a).name if Path(a).is_absolute() else a for a in sys.argv]
    return {
        "date": date.today().isoformat(),
        "command": " ".join([Path(arguments[0]).stem, *arguments[1:]]),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": device,
        "python": platform.python_version(),
        **versions,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def host_clock(run: Callable[[], object]) -> float:
    """Seconds that `run()` takes on this machine's own clock."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def interleave(
    variants: dict[str, Callable[[], object]],
    *,
    baselines: list[str],
    repeats: int,
    warmup: int = 1,
    clock: Callable[[Callable[[], object]], float] = host_clock,
) -> dict[str, dict[str, float]]:
    """Time the variants in turn, A B C A B C ..., and report medians and paired ratios.

    Machines drift, so absolute times are noise: the ratio of a variant is the median over rounds
    of its ratio within the round to the baseline with the lowest median. `clock(run)` runs a
    variant once and returns the seconds it took.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(warmup + repeats):
        for name, run in variants.items():
            times[name].append(clock(run))
    kept = {name: t[warmup:] for name, t in times.items()}
    baseline = min(baselines, key=lambda name: statistics.median(kept[name]))
    return {
        name: {
            "median_ms": 1e3 * statistics.median(t),
            "min_ms": 1e3 * min(t),
            "max_ms": 1e3 * max(t),
            "ratio": statistics.median(a / b for a, b in zip(t, kept[baseline], strict=True)),
        }
        for name, t in kept.items()
    }


def mean_interval(values: Iterable[float], confidence: float = 0.95) -> tuple[float, float]:
    """Mean and half width of its Student-t confidence interval (infinite for a single value)."""
    from scipy import stats  # a development package, which not every benchmark needs

    data = list(values)
    mean = statistics.fmean(data)
    if len(data) < 2:
        return mean, float("inf")
    t = float(stats.t.ppf(0.5 + confidence / 2, len(data) - 1))
    return mean, t * statistics.stdev(data) / len(data) ** 0.5


def write_json(path: Path, content: Any) -> None:
    """Write beside the file, then rename, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    # JSON has no NaN or infinity: an interval nobody knows becomes null
    strict = json.loads(json.dumps(content), parse_constant=lambda _: None)
    partial.write_text(json.dumps(strict, indent=1) + "\n")
    partial.rename(path)


def run_study(
    folder: Path,
    jobs: dict[str, dict[str, Any]],
    work: Callable[[dict[str, Any]], dict[str, Any]],
    *,
    processes: int,
) -> dict[str, dict[str, Any]]:
    """Run `work(job)` for every job that has no JSON in `folder` yet; return all results by name.

    Each result is stored with its job, one file a run, so a stopped study goes on where it was;
    a file made for another job of that name is an error, not a result. With `processes=0` nothing
    is run and the results there are come back; it is an error if there are none.
    """
    from tqdm import tqdm

    done: dict[str, dict[str, Any]] = {}
    for name, job in jobs.items():
        file = folder / f"{name}.json"
        if file.is_file():
            record = json.loads(file.read_text())
            if record["job"] != job:
                raise ValueError(f"{file} is of another job ({record['job']}, now {job}): move it")
            done[name] = record
    todo = {name: job for name, job in jobs.items() if name not in done}
    if not processes and not done:
        raise FileNotFoundError(f"no runs in {folder} yet: give --processes, the runs at a time")
    if not todo or not processes:
        return done
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_one_thread)
    with pool, tqdm(total=len(jobs), initial=len(done), unit="run") as bar:
        futures = {pool.submit(work, job): name for name, job in todo.items()}
        failed: BaseException | None = None
        for future in as_completed(futures):
            name = futures[future]
            bar.update()
            if error := future.exception():  # the other runs are still worth keeping
                failed = failed or error
                continue
            done[name] = {"job": jobs[name], **future.result(), "environment": environment()}
            write_json(folder / f"{name}.json", done[name])
    if failed:
        raise failed
    return done


def _one_thread() -> None:
    torch.set_num_threads(1)
    # the workers take turns on the cores; a gentle priority keeps the machine usable
    os.nice(5)


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A GitHub table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
