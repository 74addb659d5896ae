"""Everything there is to measure on a GPU, in one command: `python -m benchmarks.gpu`.

Writes benchmarks/results/gpu-<device>.json after every comparison, the most important ones first;
what does not fit into `--budget` seconds is listed there as skipped. `--tables` makes
docs/kernels-measured.md of the results there are; `--dry-run` needs no GPU and times nothing.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.gpu.lab import Comparison, Lab

CASES = (
    "copy", "K1", "K3", "K6", "K4", "wide", "StarNet", "block", "training", "RL",
    "max-autotune", "tiles",
)  # fmt: skip
LOST = "the process did not come back from it"
GONE = 75  # exit code of a worker whose GPU no longer answers
RESTARTS = 20


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks.gpu", description=__doc__)
    add = parser.add_argument
    add("--dry-run", action="store_true", help="tiny shapes on the CPU, everything but the timing")
    add("--only", nargs="+", choices=CASES, metavar="CASE", help=f"of {', '.join(CASES)}")
    add("--tune", action="store_true", help="candidate tiles beside those that ship")
    add("--budget", type=float, default=540, help="seconds (default: 540)")
    add("--out", type=Path, help="the JSON (default: in benchmarks/results, none in a dry run)")
    add("--resume", action="store_true", help="keep the comparisons that the JSON has")
    add("--data", type=Path, help="folder with Fashion-MNIST, for the training run")
    add("--tables", action="store_true", help="only make docs/kernels-measured.md")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.tune:
        args.only = ["tiles"]
    return args


def comparisons(data: Path | None = None) -> list["Comparison"]:
    """All there are: by rank, and within a rank by case."""
    from benchmarks.gpu import depthwise, kernels, nets, tiles, training

    made = {
        "copy": kernels.copy(),
        "K1": kernels.k1(),
        "K3": kernels.k3(),
        "K6": depthwise.k6(),
        "K4": kernels.k4(),
        "block": nets.block(),
        "StarNet": nets.starnet(),
        "wide": kernels.wide(),
        "training": training.training(data),
        "RL": nets.rl(),
        "max-autotune": [*kernels.autotuned(), *nets.autotuned()],
        "tiles": tiles.tiles(),
    }
    return sorted((c for case in CASES for c in made[case]), key=lambda c: c.rank)


class Record:
    """The results of a run, written after every comparison."""

    def __init__(self, path: Path | None, device: str, budget: float, *, resume: bool) -> None:
        from benchmarks.harness.environment import environment

        self.path, self.budget = path, budget
        self.began = time.perf_counter()
        self.content: dict[str, Any] = {
            "device": device, "rows": [], "skipped": [], "environment": environment(),
        }  # fmt: skip
        self.before = 0.0
        if resume and path and path.is_file():
            there = json.loads(path.read_text())
            self.content["rows"], self.before = there["rows"], there["elapsed_s"]

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.began

    def has(self, c: "Comparison") -> bool:
        return any((r["case"], r["label"]) == (c.case, c.label) for r in self.content["rows"])

    def put(self, c: "Comparison", row: dict[str, Any]) -> None:
        self.remove(c)
        self.content["rows"].append({"case": c.case, "label": c.label, **row})
        self.write()

    def remove(self, c: "Comparison") -> None:
        self.content["rows"] = [
            r for r in self.content["rows"] if (r["case"], r["label"]) != (c.case, c.label)
        ]

    def skip(self, c: "Comparison") -> None:
        left = max(0, self.budget - self.elapsed)
        why = f"{left:.0f} s left of {self.budget:.0f}, needs about {c.seconds:.0f}"
        self.content["skipped"].append({"case": c.case, "label": c.label, "why": why})

    def write(self) -> None:
        from benchmarks.gpu.tables import index, targets
        from benchmarks.harness.records import write_json

        rows = index(self.content["rows"])
        self.content["targets"] = [t.row(rows) for t in targets()]
        self.content["elapsed_s"] = self.before + self.elapsed
        if self.path:
            write_json(self.path, self.content)


def run(lab: "Lab", record: Record, todo: Sequence["Comparison"]) -> bool:
    """Run what fits into the budget; False once the GPU no longer answers."""
    from benchmarks.gpu.lab import clean, reason

    for c in todo:
        if record.has(c):
            continue
        if record.elapsed + c.seconds > record.budget and not lab.dry:
            record.skip(c)
            continue
        record.put(c, {"status": "failed", "reason": LOST, "programs": {}, "failures": [LOST]})
        before = time.perf_counter()
        try:
            row = c.run(lab)
        except KeyboardInterrupt:
            record.remove(c)
            record.write()
            raise
        except Exception as error:
            why = reason(error)
            row = {"status": "failed", "reason": why, "programs": {}, "failures": [why]}
        row["took_s"] = time.perf_counter() - before
        record.put(c, row)
        print(f"{c.case}, {c.label}: {row['status']}, {row['took_s']:.1f} s", flush=True)
        for failure in row["failures"]:
            print(f"  FAILED {failure}", flush=True)
        try:
            clean()
        except RuntimeError:  # a kernel went out of bounds: nothing runs in this process any more
            return False
    record.write()
    return True


def report(record: Record, todo: Sequence["Comparison"]) -> int:
    """Print the tables; 1 if anything failed."""
    from benchmarks.gpu.tables import case_table, index, target_table

    rows = index(record.content["rows"])
    labels: dict[str, list[str]] = {}
    for c in todo:
        labels.setdefault(c.case, []).append(c.label)
    for case, names in labels.items():
        print(f"\n{case}\n\n{case_table(case, names, rows)}")
    print(f"\n{target_table(rows)}")
    for skipped in record.content["skipped"]:
        print(f"skipped {skipped['case']}, {skipped['label']}: {skipped['why']}")
    failed = [r for r in record.content["rows"] if r["failures"]]
    print(f"{len(rows)} comparisons in {record.elapsed:.0f} s, {len(failed)} with failures")
    return bool(failed)


def main(argv: Sequence[str]) -> int:
    args = arguments(argv)
    if args.tables:
        from benchmarks.gpu.tables import PAGE, load, page

        PAGE.write_text(page(load(), comparisons()))
        return 0
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported
        return work(args)
    import torch

    if not torch.cuda.is_available():
        print("no GPU: --dry-run does everything but the timing, --tables the page of results")
        return 2
    if not args.worker:
        return supervise(argv, args.budget)
    del sys.argv[sys.argv.index("--worker") :]  # not of the command that results are reported with
    return work(args)


def supervise(argv: Sequence[str], budget: float) -> int:
    """Work in another process, and in a new one whenever a kernel takes its process down."""
    began = time.perf_counter()
    more: list[str] = []
    for _ in range(RESTARTS):
        left = str(budget - (time.perf_counter() - began))
        command = [sys.executable, "-m", "benchmarks.gpu", *argv, "--worker", "--budget", left]
        code = subprocess.call(command + more)
        if code in (0, 1, 2):
            break
        more = ["--resume"]
    return code


def work(args: argparse.Namespace) -> int:
    import torch

    from benchmarks.gpu.lab import Lab
    from benchmarks.harness.records import RESULTS

    default = [c for c in CASES if c != "tiles"]
    todo = [c for c in comparisons(args.data) if c.case in (args.only or default)]
    lab = Lab(torch.device("cpu" if args.dry_run else "cuda"), args.dry_run)
    device = "none (dry run)" if args.dry_run else torch.cuda.get_device_name()
    path = args.out
    if path is None and not args.dry_run:
        name = re.sub(r"[^a-z0-9]+", "-", "-".join(["gpu", device, *(args.only or [])]).lower())
        path = RESULTS / f"{name}.json"
    prepare(lab)
    record = Record(path, device, args.budget, resume=args.resume)
    return report(record, todo) if run(lab, record, todo) else GONE


def prepare(lab: "Lab") -> None:
    """What holds for every program, so that baselines run as well as they can."""
    import torch

    torch.backends.cudnn.benchmark = True
    # the definitions in float32 have to be float32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if lab.dry:
        torch.set_num_threads(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
