"""benchmarks/results/kernels-measured.md: goals, then every row, out of the records of each GPU."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.goals import UNKNOWN, Results, goal_table
from benchmarks.gpu.rows import rows as all_rows
from benchmarks.gpu.trial import Row
from benchmarks.harness.records import RESULTS, Record, load
from benchmarks.harness.report import markdown_table

PAGE = Path(__file__).parents[2] / "benchmarks/results/kernels-measured.md"

INTRO = """# Kernels measured on a GPU

Made by `python -m benchmarks.gpu --tables` from `benchmarks/results/gpu-*.jsonl`; change nothing
here by hand. "{unknown}" stands wherever nobody with a GPU has run it yet:

```
make bench-gpu                                 # eight minutes at most; commit the records
python -m benchmarks.gpu                       # go on with what was not reached or failed
python -m benchmarks.gpu --only host starnet   # some cases alone; --again: finished rows too
python -m benchmarks.gpu --tune --budget 1800  # candidate tiles beside those that ship
python -m benchmarks.gpu --dry-run             # no GPU: every row on tiny shapes
```

Needed are torch, triton, timm (with torchvision), numpy and einops. Nothing is timed before it is
right: a program whose error against the definition in float64 is more than twice that of eager in
the same dtype is reported as failed. "eager" is the definition in PyTorch.

Times are medians over rounds in which the programs take turns, with a cold L2 cache.

* "call": what a caller waits for, from a GPU with nothing to do.
* "GPU": its own time. It sleeps until all launches are queued; "sleep" is how long, 1.5 times what
  queueing takes; 0 for a run with more launches than its queue holds, whose time is the caller's.
* "host": the time to queue the launches while the GPU sleeps.
* "launches" are the host's (one for a CUDA graph), "kernels" the GPU's, copies and fills included.
* "ratio": median over rounds of the ratio to the fastest baseline, below 1 where faster: of the
  host's time in "host", of the caller's in whole networks and "rl", else of the GPU's.
* "held": what a forward keeps for its backward.
* The floor is the least time that memory and arithmetic of an H100 allow
  (`python -m benchmarks.kernels --floor`).
"""

CELLS = {
    "ratio": ("ratio", ".3f"),
    "call ms": ("call_ms", ".4g"),
    "GPU ms": ("gpu_ms", ".4g"),
    "host us": ("host_us", ".0f"),
    "sleep us": ("sleep_us", ".0f"),
    "launches": ("launches", "d"),
    "kernels": ("kernels", "d"),
    "peak MB": ("peak_mb", ".0f"),
    "held MB": ("held_mb", ".0f"),
    "error": ("error", ".1e"),
}


def devices(folder: Path = RESULTS) -> dict[str, list[Record]]:
    """Return the records of every GPU by its name."""
    files = sorted(folder.glob("gpu-*.jsonl"))
    studies = [load(file.stem, folder) for file in files]
    return {records[0].hardware["gpu"]: records for records in studies if records}


def results(records: Iterable[Record]) -> dict[str, dict[str, Any]]:
    """Return the last measurement of every row; of a row without one its last record."""
    last: dict[str, dict[str, Any]] = {}
    for record in records:
        measured = record.metrics["status"] == "measured"
        if measured or last.get(record.run, {}).get("status") != "measured":
            last[record.run] = record.metrics
    return last


def page(records: Mapping[str, Sequence[Record]]) -> str:
    """Return the page with a part for each GPU."""
    parts = [INTRO.format(unknown=UNKNOWN)]
    for device, found in (records or {"No GPU yet": []}).items():
        measured = results(found)
        parts += [f"## {device}\n", *_conditions(found)]
        parts.append(f"### Goals\n\n{goal_table(measured)}")
        tuned = [row for row in all_rows(tune=True) if row.name in measured]
        cases: dict[str, list[Row]] = {}
        for row in [*all_rows(), *tuned]:
            cases.setdefault(row.case, []).append(row)
        parts += [f"### {case}\n\n{case_table(rows, measured)}" for case, rows in cases.items()]
    return "\n".join(parts)


def case_table(rows: Sequence[Row], measured: Results) -> str:
    """Return every program of every row of a case; of many candidate tiles only the best."""
    body: list[list[str]] = []
    empty = [""] * len(CELLS)
    for row in rows:
        metrics = measured.get(row.name)
        if metrics is None or "programs" not in metrics:
            why = f"{metrics['status']}: {metrics['reason']}" if metrics else ""
            body.append([row.label, "", *empty, f"{UNKNOWN} ({why})" if why else UNKNOWN])
            continue
        programs = metrics["programs"]
        if row.case == "tiles":
            known = {n: p for n, p in programs.items() if p.get("ratio") and n != "eager"}
            fastest = min(known, key=lambda n: known[n]["ratio"], default="shipped")
            programs = {
                n: programs[n] for n in dict.fromkeys(("shipped", fastest)) if n in programs
            }
        for name, entry in programs.items():
            if "failed" in entry:
                body.append([row.label, name, *empty, f"failed: {entry['failed']}"])
                continue
            cells = [
                "" if entry.get(key) is None else f"{entry[key]:{form}}"
                for key, form in CELLS.values()
            ]
            body.append([row.label, name, *cells, ", ".join(_also(entry, metrics["work"]))])
    return markdown_table(["what", "program", *CELLS, "also"], body)


def _also(entry: Mapping[str, Any], work: Mapping[str, float]) -> Iterable[str]:
    gpu, call = entry.get("gpu_ms"), entry.get("call_ms")
    if gpu and "bytes" in work:
        yield f"{work['bytes'] / gpu / 1e6:.0f} GB/s"
    if gpu and "flops" in work:
        yield f"{work['flops'] / gpu / 1e9:.0f} TFLOP/s"
    if call and "images" in work:
        yield f"{1e3 * work['images'] / call:.0f} images/s"
    if gpu and "floor_us" in work:
        yield f"floor {work['floor_us']:.1f} us"


def _conditions(records: Iterable[Record]) -> list[str]:
    """Return a paragraph for each set of conditions."""
    found: dict[str, int] = {}
    notes: dict[str, None] = {}
    for r in records:
        v, h = r.versions, r.hardware
        commit = (r.definition or {}).get("commit") or "unknown"
        line = (
            f"{r.date}, `{r.command}`, commit {commit}: torch "
            f"{v['torch']}, triton {v['triton']}, timm {v['timm']}, driver "
            f"{h.get('driver') or 'unknown'}, {h['cpu']}, {h['cores']} cores"
        )
        found[line] = found.get(line, 0) + (r.metrics["status"] == "measured")
        notes |= dict.fromkeys(r.marks.get("notes", ()))
    lines = [f"{line}; {count} rows measured.\n" for line, count in found.items()]
    return [*lines, *(f"{note}\n" for note in notes)]
