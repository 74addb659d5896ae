"""How a comparison on a GPU is made: a gate, then programs timed in turn, and their memory."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import torch
import torch._functorch.config
from torch import Tensor

from benchmarks.harness.timing import interleave

GRAPH = ", CUDA graph"
#: whose errors are reported, not judged
OTHERS = ("eager", "torch.compile", "timm", "cuDNN", "Liger", "copy")
FLUSH_BYTES = 256 * 2**20  # several times the L2 cache of any GPU
AHEAD_CYCLES = 4_000_000  # about two milliseconds, to queue a program's launches in
SECONDS = 0.5  # of timing for each comparison
REPEATS = (5, 50)  # least and most rounds

Run = Callable[[], object]
Tensors = Sequence[Tensor]


@dataclass(frozen=True)
class Lab:
    """Where the programs run: a GPU, or for a dry run the CPU with tiny shapes and no timing."""

    device: torch.device
    dry: bool

    def size(self, full: Any, tiny: Any) -> Any:
        return tiny if self.dry else full

    def randn(
        self,
        *shape: int,
        dtype: torch.dtype = torch.bfloat16,
        grad: bool = False,
        scale: float = 1,
        seed: int = 0,
    ) -> Tensor:
        """Numbers that depend on the arguments alone, not on what was drawn before."""
        generator = torch.Generator(self.device).manual_seed(crc32(repr((shape, seed)).encode()))
        x = torch.randn(shape, generator=generator, device=self.device) * scale
        return x.to(dtype).requires_grad_(grad)

    def compiled(self, f: Callable[..., Any], mode: str | None = None) -> Callable[..., Any]:
        """`torch.compile` for exactly these shapes; a dry run only traces."""
        if self.dry:
            return torch.compile(f, dynamic=False, backend="eager")
        return torch.compile(f, dynamic=False, mode=mode)

    def captured(self, run: Run) -> Run:
        """`run` as a CUDA graph, captured on the first call; itself in a dry run."""
        if self.dry:
            return run
        graph: torch.cuda.CUDAGraph | None = None

        def replay() -> None:
            nonlocal graph
            if graph is None:
                graph = _capture(run)
            graph.replay()

        return replay

    def clock(self, *, ahead: bool) -> Callable[[Run], float]:
        """Seconds by CUDA events, with a cold L2 cache.

        `ahead`: the GPU is kept busy until all launches are queued, so that its own time counts;
        otherwise the time includes waiting for the host, as a caller would.
        """
        flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self.device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def clock(run: Run) -> float:
            flush.zero_()
            if ahead:
                torch.cuda._sleep(AHEAD_CYCLES)
            else:
                torch.cuda.synchronize()
            start.record()
            run()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3

        return clock


def _capture(run: Run) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


@dataclass
class Trial:
    """Programs that compute the same thing, by name.

    Args:
        programs: what is timed.
        checks: what a program computes, for the gate; a program under a CUDA graph is let through
            with the one it is made of, a baseline without a check as it is.
        exact: the definition in float64 (or float32 where that is too large).
        baselines: the fastest of these is what ratios are to.
        yardstick: the program whose error, in the same dtype, is the measure of the others'.
        ahead: as for `Lab.clock`.
        held: forward passes whose result keeps what the backward needs; that memory is reported.
        work: of a run: "bytes", "flops", "images", or "floor_us", the least time on an H100.
    """

    programs: dict[str, Run]
    checks: dict[str, Callable[[], Tensors]]
    exact: Callable[[], Tensors]
    baselines: list[str]
    yardstick: str = "eager"
    ahead: bool = True
    held: dict[str, Run] = field(default_factory=dict)
    work: dict[str, float] = field(default_factory=dict)


def gate(trial: Trial) -> dict[str, dict[str, Any]]:
    """Relative RMS error of every checked program, and why it failed if it did.

    A program of ours passes if no tensor is further from the exact one than twice the yardstick's,
    with a sixteenth of a rounding step to spare for tensors that the yardstick happens to hit.
    """
    exact = [t.detach() for t in trial.exact()]
    norms = [float(t.norm()) for t in exact]
    allowed: list[float] | None = None
    found: dict[str, dict[str, Any]] = {}
    for name in sorted(trial.checks, key=lambda n: n != trial.yardstick):
        try:
            tensors = list(trial.checks[name]())
            errors = [
                float((t.detach().to(e.dtype) - e).norm())
                for t, e in zip(tensors, exact, strict=True)
            ]
        except Exception as error:  # whatever a kernel raises is a finding of this program
            found[name] = {"failed": reason(error)}
            continue
        if allowed is None and name == trial.yardstick:
            spare = torch.finfo(tensors[0].dtype).eps / 16
            allowed = [2 * e + spare * n for e, n in zip(errors, norms, strict=True)]
        relative = max(e / n if n else e for e, n in zip(errors, norms, strict=True))
        found[name] = {"error": relative}
        if allowed is None:
            found[name]["failed"] = f"{trial.yardstick} failed, so there is nothing to hold it to"
        elif not name.startswith(OTHERS) and not all(
            e <= a  # which NaN is not
            for e, a in zip(errors, allowed, strict=True)
        ):
            found[name]["failed"] = f"more than twice the error of {trial.yardstick}"
    return found


def measure(lab: Lab, trial: Trial) -> dict[str, Any]:
    """Gate the programs, time those that pass, and report both."""
    programs = gate(trial)
    trial.exact = list  # it may hold most of the memory
    running: dict[str, Run] = {}
    for name, run in trial.programs.items():
        entry = programs.setdefault(name, {})
        made_of = programs.get(name.removesuffix(GRAPH), {})
        if "failed" in made_of:
            entry["failed"] = made_of["failed"]
            continue
        try:
            run()
            if not lab.dry:
                run()
                if not name.endswith(GRAPH):  # a graph has its memory from the capture on
                    entry |= _memory(run, trial.held.get(name))
        except Exception as error:
            entry["failed"] = reason(error)
            continue
        running[name] = run
    failures = [f"{n}: {p['failed']}" for n, p in programs.items() if "failed" in p]
    row: dict[str, Any] = {"programs": programs, "work": trial.work, "failures": failures}
    baselines = [n for n in trial.baselines if n in running] or [trial.yardstick]
    if baselines[0] not in running:
        return row | {"status": "failed"}
    if lab.dry:
        return row | {"status": "not measured"}
    clock = lab.clock(ahead=trial.ahead)
    once = sum(clock(run) for run in running.values())
    repeats = max(REPEATS[0], min(REPEATS[1], int(SECONDS / once)))
    timings = interleave(running, baselines=baselines, repeats=repeats, clock=clock)
    for name, timing in timings.items():
        programs[name] |= timing
    fastest = min(baselines, key=lambda n: timings[n]["median_ms"])
    return row | {"status": "measured", "baseline": fastest, "repeats": repeats}


def _memory(run: Run, forward: Run | None) -> dict[str, float]:
    """Most memory in use during a run, and what a forward keeps for its backward, in MB."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    found = {"peak_mb": (torch.cuda.max_memory_allocated() - before) / 1e6}
    if forward is not None:
        before = torch.cuda.memory_allocated()
        kept = forward()
        found["held_mb"] = (torch.cuda.memory_allocated() - before) / 1e6
        del kept
    return found


def reason(error: BaseException) -> str:
    """The first line of what went wrong."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]


def clean() -> None:
    """Leave nothing of one comparison for the next: memory, compiled code, shapes seen before.

    Raises:
        RuntimeError: the GPU does not answer this process any more, after an access out of bounds.
    """
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Comparison:
    """One row of the results; `seconds` is a guess at its cost, compilation included."""

    case: str
    label: str
    run: Callable[[Lab], dict[str, Any]]
    seconds: float = 5
    rank: int = 1  # 0 comes first, whatever the case


def trial(
    case: str, label: str, build: Callable[[Lab], Trial], seconds: float = 5, rank: int = 1
) -> Comparison:
    """A comparison that is one trial, built when its turn comes."""
    return Comparison(case, label, lambda lab: measure(lab, build(lab)), seconds, rank)


@dataclass(frozen=True)
class Subject:
    """A program as a call, and the tensors whose gradients it is asked for."""

    call: Callable[[], Tensor]
    wanted: Tensors = ()

    def runner(self, direction: str) -> Callable[[], Tensors]:
        """What to run for "forward", "backward" alone, or "step", which is both."""
        return {"forward": self._forward, "backward": self._backward(), "step": self._step()}[
            direction
        ]

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
    """Gradients of y in its layout, the same numbers whatever its type."""
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
    ahead: bool = True,
    work: dict[str, float] | None = None,
) -> Trial:
    """A trial of subjects in one direction: "forward", "backward" or "step" (both).

    `graphs` adds each one under a CUDA graph; `grouped` gates the gradients of all parameters as
    one vector, for those that are zero but for rounding (a bias in front of a BatchNorm).
    """

    def check(run: Callable[[], Tensors]) -> Callable[[], Tensors]:
        def tensors() -> Tensors:
            first, *rest = run()
            return [first, torch.cat([t.flatten() for t in rest])] if rest else [first]

        return tensors if grouped else run

    runs = {name: s.runner(direction) for name, s in subjects.items()}
    checks = {name: check(run) for name, run in runs.items()}
    programs: dict[str, Run] = dict(runs)
    if graphs:
        programs |= {name + GRAPH: lab.captured(run) for name, run in runs.items()}
    held = {n: s.call for n, s in subjects.items()} if direction == "step" else {}
    return Trial(
        programs,
        checks,
        check(exact.runner(direction)),
        baselines,
        ahead=ahead,
        held=held,
        work=work or {},
    )
