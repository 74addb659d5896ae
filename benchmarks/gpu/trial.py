"""Rows of the benchmark: programs that compute the same thing, checked, then timed in turn."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from benchmarks.gpu.lab import Lab, Run, Tensors
from benchmarks.harness.timing import host_clock, paired

GRAPH = ", CUDA graph"
AUTOTUNED = "max-autotune"
#: baselines: their errors are reported, not judged
OTHERS = ("eager", "torch.compile", "timm", "cuDNN", "Liger", "copy")
#: what a row says of each of its programs; null where it does not apply
COLUMNS = (
    "ratio", "call_ms", "gpu_ms", "host_us", "sleep_us", "launches", "kernels", "peak_mb",
    "held_mb", "error",
)  # fmt: skip
#: columns without which a row is not finished
TIMED = ("ratio", "call_ms", "gpu_ms", "host_us", "sleep_us", "launches", "kernels")
CLOCKS = {"call": ("call_ms", 1e3), "gpu": ("gpu_ms", 1e3), "host": ("host_us", 1e6)}
SECONDS = 0.5  # of timing for each row
REPEATS = (5, 50)  # least and most rounds


@dataclass
class Trial:
    """Programs that compute the same thing, by name.

    Args:
        programs: what is timed.
        checks: what a program computes, for the gate; a program under a CUDA graph is let through
            with the one it is made of, a baseline without a check as it is.
        exact: the definition in float64.
        baselines: the fastest of these is what ratios are to.
        yardstick: the program whose error, in the same dtype, is the measure of the others'.
        clock: what ratios are of: "gpu", the GPU's own time; "call", what a caller waits for;
            "host", the time to queue the launches.
        held: forward passes whose result keeps what the backward needs; that memory is reported.
        work: of a run: "bytes", "flops", "images", or "floor_us", the least time on an H100.
    """

    programs: dict[str, Run]
    checks: dict[str, Callable[[], Tensors]]
    exact: Callable[[], Tensors]
    baselines: list[str]
    yardstick: str = "eager"
    clock: str = "gpu"
    held: dict[str, Run] = field(default_factory=dict)
    work: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One row of the results.

    Args:
        case: group of rows, for `--only` and the page.
        label: name within the case.
        build: function that makes the trial when its turn comes.
        seconds: guess at its cost, without compilation.
        warm: programs to compile in a process each; without, one process compiles all of the row.
    """

    case: str
    label: str
    build: Callable[[Lab], Trial]
    seconds: float = 5
    warm: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.case}: {self.label}"


def measure(lab: Lab, trial: Trial) -> dict[str, Any]:
    """Gate the programs, time those that pass, and report both."""
    checked = gate(trial)
    trial.exact = list  # it may hold most of the memory
    programs: dict[str, dict[str, Any]] = {
        name: dict.fromkeys(COLUMNS) | checked.get(name, {}) for name in trial.programs
    }
    running: dict[str, Run] = {}
    for name, run in trial.programs.items():
        made_of = programs.get(name.removesuffix(GRAPH), {})
        if "failed" in made_of:
            programs[name]["failed"] = made_of["failed"]
            continue
        try:
            if not lab.dry or name not in checked:  # the interpreter is slow: once is enough
                run()  # captures a graph, and compiles what the gate did not
            if not name.endswith(GRAPH):  # a graph has its memory from the capture on
                programs[name]["peak_mb"] = lab.peak(run)
            if name in trial.held:
                programs[name]["held_mb"] = lab.held(trial.held[name])
        except Exception as error:
            programs[name]["failed"] = reason(error)
            continue
        running[name] = run
    failures = [f"{n}: {p['failed']}" for n, p in programs.items() if "failed" in p]
    row = {"programs": programs, "work": trial.work, "failures": failures, "clock": trial.clock}
    baselines = [n for n in trial.baselines if n in running] or [trial.yardstick]
    if baselines[0] not in running:
        return row | {"status": "failed", "reason": "no baseline ran"}
    sleeps = {n: enqueue(lab, run) for n, run in running.items()}
    times, repeats = rounds(lab, running, sleeps)
    for name, sleep in sleeps.items():
        # counted last: a profiler could slow the host down
        programs[name] |= {"sleep_us": 1e6 * sleep} | lab.count(running[name])
        for clock, (column, unit) in CLOCKS.items():
            programs[name][column] = unit * statistics.median(times[clock][name])
    fastest, ratios = paired(times[trial.clock], baselines)
    for name, ratio in ratios.items():
        programs[name]["ratio"] = ratio
    return row | {"status": "measured", "baseline": fastest, "repeats": repeats}


def enqueue(lab: Lab, run: Run) -> float:
    """Return the seconds that the GPU has to sleep until a run is queued: 1.5 times what it takes.

    0 if the queue is too short for the run: then the host waits for the GPU to wake up, so that
    queueing takes the longer, the longer the GPU sleeps.
    """

    def host(sleep: float) -> float:
        return statistics.median(lab.clock(run, sleep)[0] for _ in range(3))

    awake = host(0)
    asleep = host(1.5 * awake)
    if asleep > 1.4 * awake and host(4.5 * awake) > 2 * asleep:
        return 0.0
    return 1.5 * asleep


def rounds(
    lab: Lab, programs: dict[str, Run], sleeps: dict[str, float]
) -> tuple[dict[str, dict[str, list[float]]], int]:
    """Time the programs in turn, and return the seconds by clock and program, and the rounds."""
    times: dict[str, dict[str, list[float]]] = {c: {n: [] for n in programs} for c in CLOCKS}

    def one_round() -> None:
        for name, run in programs.items():
            host, gpu = lab.clock(run, sleeps[name])
            call = lab.clock(run, 0)[1]
            for clock, seconds in (("host", host), ("gpu", gpu), ("call", call)):
                times[clock][name].append(seconds)

    took = host_clock(one_round)
    repeats = 1 if lab.dry else max(REPEATS[0], min(REPEATS[1], int(SECONDS / took)))
    for _ in range(repeats - 1):
        one_round()
    return times, repeats


def warm(trial: Trial, names: tuple[str, ...] = ()) -> None:
    """Run the programs of these names, or all that have something to compile, and their checks.

    The caches on disk then have it for the process that times. Left out is the compiler's search
    by timing: it needs a GPU for itself.
    """
    for name, run in trial.programs.items():
        compiles = "compile" in name or not name.startswith(OTHERS)
        if (name in names if names else compiles and AUTOTUNED not in name) and GRAPH not in name:
            run()
            trial.checks.get(name, run)()  # of other shapes, in a whole network


def gate(trial: Trial) -> dict[str, dict[str, Any]]:
    """Return the relative RMS error of every checked program, and why it failed if it did.

    A program of ours passes if no tensor is further from the exact one than twice the yardstick's,
    with a sixteenth of a rounding step to spare for tensors that the yardstick happens to hit.
    """
    exact = [t.detach() for t in trial.exact()]
    norms = [float(t.norm()) for t in exact]
    allowed: list[float] | None = None
    checked: dict[str, dict[str, Any]] = {}
    for name in sorted(trial.checks, key=lambda n: n != trial.yardstick):
        try:
            tensors = list(trial.checks[name]())
            errors = [
                float((t.detach().to(e.dtype) - e).norm())
                for t, e in zip(tensors, exact, strict=True)
            ]
        except Exception as error:  # whatever a kernel raises is a finding of this program
            checked[name] = {"failed": reason(error)}
            continue
        if allowed is None and name == trial.yardstick:
            spare = torch.finfo(tensors[0].dtype).eps / 16
            allowed = [2 * e + spare * n for e, n in zip(errors, norms, strict=True)]
        relative = max(e / n if n else e for e, n in zip(errors, norms, strict=True))
        checked[name] = {"error": relative}
        if allowed is None:
            checked[name]["failed"] = f"{trial.yardstick} failed, so there is nothing to compare to"
        elif not name.startswith(OTHERS) and not all(
            e <= a  # which NaN is not
            for e, a in zip(errors, allowed, strict=True)
        ):
            checked[name]["failed"] = f"more than twice the error of {trial.yardstick}"
    return checked


def reason(error: BaseException) -> str:
    """Return the first line of what went wrong."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]


@dataclass(frozen=True)
class Subject:
    """A program as a call, and the tensors whose gradients it is asked for."""

    call: Callable[[], Tensor]
    wanted: Tensors = ()

    def runner(self, direction: str) -> Callable[[], Tensors]:
        """Return what to run for "forward", "backward" alone, or "step", which is both."""
        runs = {"forward": self._forward, "backward": self._backward(), "step": self._step()}
        return runs[direction]

    def _forward(self) -> Tensors:
        with torch.no_grad():
            return [self.call()]

    def _step(self) -> Callable[[], Tensors]:
        seed: list[Tensor] = []

        def run() -> Tensors:
            y = self.call()
            if not seed:
                seed.append(_seed(y))
            return torch.autograd.grad(y, self.wanted, seed)

        return run

    def _backward(self) -> Callable[[], Tensors]:
        made: list[Tensor] = []

        def run() -> Tensors:
            if not made:
                # a compiled backward takes over what was saved for it, which forbids a second run
                with torch._functorch.config.patch(donated_buffer=False):
                    y = self.call()
                    made.extend((y, _seed(y)))
                    return torch.autograd.grad(y, self.wanted, made[1], retain_graph=True)
            return torch.autograd.grad(made[0], self.wanted, made[1], retain_graph=True)

        return run


def _seed(y: Tensor) -> Tensor:
    """Return gradients of y in its layout, the same numbers whatever its type."""
    generator = torch.Generator(y.device).manual_seed(1)
    noise = torch.randn(y.shape, generator=generator, device=y.device).bfloat16()
    return torch.empty_like(y).copy_(noise).detach()


def compare(
    lab: Lab,
    subjects: dict[str, Subject],
    exact: Subject,
    direction: str,
    *,
    baselines: list[str],
    graphs: bool = False,
    grouped: bool = False,
    clock: str = "gpu",
    work: dict[str, float] | None = None,
) -> Trial:
    """Return a trial of subjects in one direction: "forward", "backward" or "step" (both).

    `graphs` adds each one under a CUDA graph; `grouped` gates the gradients of all parameters as
    one vector, for those that are zero but for rounding (a bias in front of a BatchNorm).
    """

    def check(run: Callable[[], Tensors]) -> Callable[[], Tensors]:
        def tensors() -> Tensors:
            first, *rest = run()
            return [first, torch.cat([t.flatten() for t in rest])] if rest else [first]

        return tensors if grouped else run

    runs = {name: s.runner(direction) for name, s in subjects.items()}
    programs: dict[str, Run] = dict(runs)
    if graphs:
        programs |= {name + GRAPH: lab.captured(run) for name, run in runs.items()}
    return Trial(
        programs,
        {name: check(run) for name, run in runs.items()},
        check(exact.runner(direction)),
        baselines,
        clock=clock,
        held={n: s.call for n, s in subjects.items()} if direction == "step" else {},
        work=work or {},
    )
