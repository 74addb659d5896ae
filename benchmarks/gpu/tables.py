"""Targets against what was measured, and docs/kernels-measured.md out of the results."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.kernels import k1_label, stage_label, wide_label
from benchmarks.gpu.lab import GRAPH, Comparison
from benchmarks.gpu.nets import OURS_COMPILED, TIMM, starnet_label
from benchmarks.harness.records import RESULTS
from benchmarks.harness.report import markdown_table

PAGE = Path(__file__).parents[2] / "docs/kernels-measured.md"
UNKNOWN = "not measured"
COMPILED = ("torch.compile",)
CUDNN = ("cuDNN NCHW", "cuDNN channels_last")

INTRO = """# Kernels measured on a GPU

Made by `python -m benchmarks.gpu --tables` from `benchmarks/results/gpu-*.json`; change nothing
here by hand. "{unknown}" stands wherever nobody with a GPU has run it yet:

```
make bench-gpu                                 # under ten minutes on an H100; commit the JSON
python -m benchmarks.gpu --resume              # go on with what did not fit into the time
python -m benchmarks.gpu --only K3 StarNet     # some cases alone
python -m benchmarks.gpu --tune --budget 1800  # candidate tiles beside those that ship
python -m benchmarks.gpu --dry-run             # no GPU: everything but the timing, on tiny shapes
```

Needed are torch, triton, timm (with torchvision), numpy and einops. Nothing is timed before it is
right: a program whose error against the definition in float64 is more than twice that of eager in
the same dtype is reported as failed. Times are medians of CUDA events over interleaved rounds with
a cold L2 cache; "ratio" is the median over rounds of the ratio to the fastest baseline, below 1
where faster. Targets compare the best of our programs with the better of timm's, each with and
without a CUDA graph where there are both. "Held" is what a forward keeps for its backward. The
floor is the least time that memory and arithmetic of an H100 allow
(`python -m benchmarks.kernels --floor`).
"""

Rows = dict[tuple[str, str], dict[str, Any]]


@dataclass(frozen=True)
class Target:
    """What the kernels are made to reach; `value` finds it in the results, or None."""

    name: str
    goal: float
    value: Callable[[Rows], float | None]
    least: bool = True  # whether the goal is a least value, or a greatest
    unit: str = "x"

    def row(self, rows: Rows) -> dict[str, Any]:
        found = self.value(rows)
        reached = None
        if found is not None:
            reached = found >= self.goal if self.least else found <= self.goal
        sign = "at least" if self.least else "at most"
        goal = f"{sign} {self.goal:g} {self.unit}"
        return {"target": self.name, "goal": goal, "measured": found, "reached": reached}


def field(rows: Rows, case: str, label: str, program: str, name: str) -> float | None:
    entry = rows.get((case, label), {}).get("programs", {}).get(program, {})
    return None if "failed" in entry else entry.get(name)


def faster(
    rows: Rows, case: str, label: str, programs: Sequence[str], baselines: Sequence[str]
) -> float | None:
    """How many times as fast as the baseline the fastest of `programs` is, by paired ratios."""
    if rows.get((case, label), {}).get("baseline") not in baselines:
        return None
    ratios = [field(rows, case, label, p, "ratio") for p in programs]
    known = [r for r in ratios if r is not None]
    return 1 / min(known) if known else None


def worst(values: Iterable[float | None]) -> float | None:
    """The least, unknown as long as one of them is."""
    found = list(values)
    known = [v for v in found if v is not None]
    return min(known) if found and len(known) == len(found) else None


def _of_copy(direction: str) -> Callable[[Rows], float | None]:
    def value(rows: Rows) -> float | None:
        copied = _rate(rows, "copy", "1 GiB", "copy")
        labels = [k1_label(a, t, direction) for a in ("silu", "relu6") for t in ("two", "packed")]
        rate = worst(_rate(rows, "K1", label, "fused") for label in labels)
        return None if copied is None or rate is None else 100 * rate / copied

    return value


def _rate(rows: Rows, case: str, label: str, program: str) -> float | None:
    """Bytes a second."""
    ms = field(rows, case, label, program, "median_ms")
    return None if ms is None else 1e3 * rows[case, label]["work"]["bytes"] / ms


def _quotient(
    case: str, label: str, ours: str, theirs: str, name: str
) -> Callable[[Rows], float | None]:
    def value(rows: Rows) -> float | None:
        a, b = (field(rows, case, label, program, name) for program in (ours, theirs))
        return None if a is None or not b else a / b

    return value


def targets() -> list[Target]:
    def speed(
        case: str, label: str, programs: Sequence[str], baselines: Sequence[str]
    ) -> Callable[[Rows], float | None]:
        return lambda rows: faster(rows, case, label, programs, baselines)

    def depthwise(direction: str) -> Callable[[Rows], float | None]:
        labels = [f"{stage_label('S4', stage)}, {direction}" for stage in range(1, 5)]
        return lambda rows: worst(faster(rows, "K6", label, ["fused"], CUDNN) for label in labels)

    def slower(f: Callable[[Rows], float | None]) -> Callable[[Rows], float | None]:
        def value(rows: Rows) -> float | None:
            found = f(rows)
            return None if found is None else 1 / found

        return value

    def saved(rows: Rows) -> float | None:
        theirs, ours = (
            field(rows, "wide", wide_label(4096), p, "held_mb")
            for p in ("torch.compile", "library, recompute")
        )
        return None if ours is None or theirs is None else theirs - ours

    inference, training, single = (
        starnet_label("s4", batch, task)
        for batch, task in ((256, "inference"), (256, "training"), (1, "inference"))
    )
    ways = ["fused", OURS_COMPILED, "fused, fuse()"]
    ways += [way + GRAPH for way in ways]
    theirs = [TIMM, TIMM + GRAPH]
    latency = speed("StarNet", single, ways, theirs)
    llama = speed("wide", wide_label(4096), ["library", "triton"], COMPILED)
    return [
        *(
            Target(f"K1 {d}, of the bandwidth of a copy, worst layout", 90, _of_copy(d), unit="%")
            for d in ("forward", "backward")
        ),
        *(
            Target(
                f"K3 over torch.compile, {stage_label('S4', stage)}", goal,
                speed("K3", stage_label("S4", stage), ["fused"], COMPILED),
            )
            for stage, goal in enumerate((4, 3, 2, 1.1), 1)
        ),
        *(
            Target(f"K6 over the better cuDNN layout, {d}, worst S4 stage", 3, depthwise(d))
            for d in ("forward", "dx", "dw")
        ),
        Target("StarNet-S4 inference, batch 256, over timm + torch.compile", 3,
               speed("StarNet", inference, ways, theirs)),
        Target("StarNet-S4 training step, batch 256, over timm + torch.compile", 1.7,
               speed("StarNet", training, ways, theirs)),
        Target("StarNet-S4 training step, peak memory to that of timm + torch.compile", 0.5,
               _quotient("StarNet", training, "fused", TIMM, "peak_mb"), least=False),
        Target("StarNet-S4 latency, batch 1, to that of timm + torch.compile", 0.6,
               slower(latency), least=False),
        Target("Llama-like MLP, forward and backward, to the time of torch.compile", 1.0,
               slower(llama), least=False),
        Target("Llama-like MLP, recompute: held for the backward, less than torch.compile", 350,
               saved, unit="MB"),
    ]  # fmt: skip


def index(rows: Iterable[dict[str, Any]]) -> Rows:
    return {(row["case"], row["label"]): row for row in rows}


def target_table(rows: Rows) -> str:
    def cell(found: dict[str, Any]) -> list[str]:
        measured, reached = found["measured"], found["reached"]
        return [
            found["target"],
            found["goal"],
            UNKNOWN if measured is None else f"{measured:.3g}",
            "" if reached is None else "yes" if reached else "no",
        ]

    header = ["target", "goal", "measured", "reached"]
    return markdown_table(header, [cell(t.row(rows)) for t in targets()])


COLUMNS = {
    "median ms": ("median_ms", ".4g"),
    "ratio": ("ratio", ".3f"),
    "peak MB": ("peak_mb", ".0f"),
    "held MB": ("held_mb", ".0f"),
    "error": ("error", ".1e"),
}


def case_table(case: str, labels: Sequence[str], rows: Rows) -> str:
    """Every program of every comparison of a case; of many candidate tiles only the best."""
    body: list[list[str]] = []
    for label in labels:
        row = rows.get((case, label), {})
        if not row:
            body.append([label, "", UNKNOWN, *[""] * len(COLUMNS)])
        elif case == "tiles":
            body += _best_tile(label, row)
        else:
            body += [_cells(label, name, row) for name in row["programs"]]
            if not row["programs"]:
                body.append([label, "", f"failed: {row.get('reason', '')}", *[""] * len(COLUMNS)])
    return markdown_table(["what", "program", *COLUMNS, "also"], body)


def _cells(label: str, name: str, row: dict[str, Any]) -> list[str]:
    entry = row["programs"][name]
    if "failed" in entry:
        return [label, name, f"failed: {entry['failed']}", *[""] * len(COLUMNS)]
    cells = [f"{entry[key]:{form}}" if key in entry else "" for key, form in COLUMNS.values()]
    cells[0] = cells[0] or UNKNOWN
    also = [*_also(entry, row.get("work", {}))]
    if "max_loss_difference" in row:
        also += [row["data"], f"losses at most {row['max_loss_difference']:.2g} apart"]
    return [label, name, *cells, ", ".join(also)]


def _also(entry: dict[str, Any], work: dict[str, float]) -> Iterable[str]:
    ms = entry.get("median_ms")
    if ms is None:
        return
    if "bytes" in work:
        yield f"{work['bytes'] / ms / 1e6:.0f} GB/s"
    if "flops" in work:
        yield f"{work['flops'] / ms / 1e9:.0f} TFLOP/s"
    if "images" in work:
        yield f"{1e3 * work['images'] / ms:.0f} images/s"
    if "images_s" in entry:
        yield f"{entry['images_s']:.0f} images/s, last loss {entry['last_loss']:.3f}"
    if "floor_us" in work:
        yield f"floor {work['floor_us']:.1f} us"


def _best_tile(label: str, row: dict[str, Any]) -> list[list[str]]:
    timed = {n: p["ratio"] for n, p in row["programs"].items() if "ratio" in p and n != "eager"}
    best = min(timed, key=timed.__getitem__, default="shipped")
    names = dict.fromkeys(("shipped", best))
    return [_cells(label, n, row) for n in names if n in row["programs"]]


def load(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """All results there are, the older ones first."""
    found = [json.loads(f.read_text()) for f in sorted(folder.glob("gpu-*.json"))]
    return sorted(found, key=lambda r: r["environment"]["date"])


def page(records: list[dict[str, Any]], comparisons: Sequence[Comparison]) -> str:
    """One part for each GPU, in which a later result replaces an earlier one of its name."""
    labels: dict[str, list[str]] = {}
    for c in comparisons:
        labels.setdefault(c.case, []).append(c.label)
    devices: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        devices.setdefault(record["device"], []).append(record)
    parts = [INTRO.format(unknown=UNKNOWN)]
    for device, found in (devices or {"No GPU yet": []}).items():
        rows = index(row for record in found for row in record["rows"])
        parts.append(f"## {device}\n")
        parts += [f"{_conditions(record)}\n" for record in found]
        parts.append(f"### Targets\n\n{target_table(rows)}")
        for case, names in labels.items():
            parts.append(f"### {case}\n\n{case_table(case, names, rows)}")
    return "\n".join(parts)


def _conditions(record: dict[str, Any]) -> str:
    e = record["environment"]
    skipped = f"; {len(record['skipped'])} comparisons skipped" if record["skipped"] else ""
    return (
        f"{e['date']}, `{e['command']}`: torch {e['torch']}, triton {e['triton']}, "
        f"timm {e['timm']}, {e['cpu']}, {e['cores']} cores, {record['elapsed_s']:.0f} s{skipped}."
    )
