"""Goals of the GPU path, and what was measured of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.depthwise import CUDNN
from benchmarks.gpu.host import host_label
from benchmarks.gpu.kernels import stage_label, wide_label
from benchmarks.gpu.nets import FOLDED, FUSED, GRAPHED, STEPS, TIMM, starnet_label
from benchmarks.gpu.trial import GRAPH
from benchmarks.harness.report import markdown_table

UNKNOWN = "not measured"

#: metrics of rows by their names
Results = Mapping[str, Mapping[str, Any]]
Value = Callable[[Results], float | None]


@dataclass(frozen=True)
class Goal:
    """What is to be reached; `value` computes it from the results, or returns None."""

    name: str
    limit: float
    value: Value
    least: bool = False
    unit: str = "x"

    def cells(self, results: Results) -> list[str]:
        """Return the goal's line of the table."""
        measured = self.value(results)
        wanted = f"at {'least' if self.least else 'most'} {self.limit:g} {self.unit}"
        if measured is None:
            return [self.name, wanted, UNKNOWN, UNKNOWN]
        met = measured >= self.limit if self.least else measured <= self.limit
        return [self.name, wanted, f"{measured:.3g}", "met" if met else "missed"]


def goal_table(results: Results) -> str:
    header = ["goal", "wanted", "measured", "met or missed"]
    return markdown_table(header, [goal.cells(results) for goal in GOALS])


def cell(results: Results, row: str, program: str, column: str) -> float | None:
    entry = results.get(row, {}).get("programs", {}).get(program, {})
    return None if "failed" in entry else entry.get(column)


def best(row: str, programs: Sequence[str], column: str) -> Value:
    """Return the least value of some programs, of those that have one."""

    def value(results: Results) -> float | None:
        cells = [cell(results, row, program, column) for program in programs]
        return min((c for c in cells if c is not None), default=None)

    return value


def quotient(row: str, ours: Sequence[str], theirs: Sequence[str], column: str) -> Value:
    """Return the best of ours by the best of theirs."""

    def value(results: Results) -> float | None:
        a, b = (best(row, programs, column)(results) for programs in (ours, theirs))
        return None if a is None or not b else a / b

    return value


def speed(rows: Sequence[str], ours: Sequence[str], theirs: Sequence[str], column: str) -> Value:
    """Return how many times as fast the best of ours is, in the row in which it is least so."""

    def value(results: Results) -> float | None:
        times = [quotient(row, ours, theirs, column)(results) for row in rows]
        known = [t for t in times if t is not None]
        return 1 / max(known) if len(known) == len(times) else None

    return value


def _goals() -> list[Goal]:
    inference, single, training = (
        f"starnet: {starnet_label('s4', batch, task)}"
        for batch, task in ((256, "inference"), (1, "inference"), (256, "training"))
    )
    stages = [stage_label("S4", stage) for stage in range(1, 5)]
    timm, graphed = [TIMM, TIMM + GRAPH], [GRAPHED, FOLDED + GRAPH]
    llama = f"wide: {wide_label(4096)}"
    compiled = ["torch.compile"]
    s4 = "StarNet-S4, batch 256"
    return [
        Goal(f"{s4}, inference from Python: time to that of timm + compile", 1,
             quotient(inference, [FUSED], [TIMM], "call_ms")),
        Goal(f"{s4}, inference, fuse() in a graph: ms", 3.3,
             best(inference, graphed, "call_ms"), unit="ms"),
        Goal(f"{s4}, inference, fuse() in a graph: speed over timm + compile + graph", 3,
             speed([inference], graphed, [TIMM + GRAPH], "call_ms"), least=True),
        Goal(f"{s4}, training step: speed over timm + compile", 2,
             speed([training], [FUSED, STEPS, FUSED + GRAPH], timm, "call_ms"), least=True),
        Goal(f"{s4}, training step: peak memory to that of timm + compile", 0.5,
             quotient(training, [FUSED], [TIMM], "peak_mb")),
        Goal("StarNet-S4, batch 1, inference: time to that of timm + compile", 0.6,
             quotient(single, [FUSED, FOLDED, FUSED + GRAPH, *graphed], timm, "call_ms")),
        *(
            Goal(f"StarNet-S4, batch {batch}, inference, {what}: time to that of the definition", 1,
                 quotient(row, [ours], ["eager"], "call_ms"))
            for batch, row in ((1, single), (256, inference))
            for what, ours in (("from Python", FUSED), ("fuse() in a graph", GRAPHED))
        ),
        *(
            Goal(f"depthwise 7x7, {direction}: speed over the better cuDNN layout, worst S4 stage",
                 limit, speed([f"depthwise: {stage}, {direction}" for stage in stages],
                              [FUSED], CUDNN, "gpu_ms"), least=True)
            for direction, limit in (("forward", 3), ("dx", 3), ("dw", 1.5))
        ),
        *(
            Goal(f"star MLP backward, {stages[i]}: time to that of torch.compile", limit,
                 quotient(f"mlp-backward: {stages[i]}", [FUSED], compiled, "gpu_ms"))
            for i, limit in ((2, 0.7), (3, 0.8))
        ),
        Goal("Llama-like MLP, forward and backward: time to that of torch.compile", 1,
             quotient(llama, ["library", "triton"], compiled, "gpu_ms")),
        Goal("Llama-like MLP, forward and backward: peak memory to that of eager", 1,
             quotient(llama, ["library"], ["eager"], "peak_mb")),
        Goal("Llama-like MLP, recompute: held for the backward", 34,
             best(llama, ["library, recompute"], "held_mb"), unit="MB"),
        *(
            Goal(f"host time of a StarBlock2d, {what}: to that of the definition", 1,
                 quotient(f"host: {host_label('StarBlock2d', direction)}", [FUSED], ["eager"],
                          "host_us"))
            for direction, what in (("forward", "inference"), ("step", "training"))
        ),
        *(
            Goal(f"star MLP forward, {stage}: speed over torch.compile", limit,
                 speed([f"mlp-forward: {stage}"], [FUSED], compiled, "gpu_ms"), least=True)
            for stage, limit in zip(stages, (4, 3, 2, 1.1), strict=True)
        ),
    ]  # fmt: skip


GOALS = _goals()
