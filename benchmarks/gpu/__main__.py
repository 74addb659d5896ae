"""Everything there is to measure on a GPU, the most important first: `python -m benchmarks.gpu`.

Compiles on all cores, then measures row by row until `--budget` seconds are over. Each row is one
line of gpu-<device>.jsonl in `--out`; the next call goes on with the rows that were not reached,
then with those that failed. `--tables` makes kernels-measured.md beside the results there are;
`--dry-run` runs every row on tiny shapes on a CPU and checks that each one has all columns.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness.environment import conditions
from benchmarks.harness.records import RESULTS

if TYPE_CHECKING:
    from benchmarks.gpu.session import Session
    from benchmarks.gpu.trial import Row

ROOT = Path(__file__).parents[2]
WARM = 0.4  # share of the budget, at most, in which to compile
DRY_WARM = 2  # rows that a dry run compiles for: nothing is kept, only the way is the same


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks.gpu", description=__doc__)
    add = parser.add_argument
    add("--dry-run", action="store_true", help="every row on tiny shapes, without a GPU")
    add("--only", nargs="+", metavar="CASE", help="some cases alone")
    add("--tune", action="store_true", help="candidate tiles beside those that ship")
    add("--again", action="store_true", help="measure finished rows again")
    add("--budget", type=float, default=480, help="seconds of the whole call (default: 480)")
    add("--out", type=Path, help="folder of the records (a dry run's: temporary)")
    add("--commit", help="commit of the code, where git cannot tell")
    add("--tables", action="store_true", help="only make benchmarks/results/kernels-measured.md")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    began = time.monotonic()
    args = arguments(argv)
    if args.dry_run:
        # Triton reads it when a kernel is imported, here and in the workers
        os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    import torch

    from benchmarks.gpu.rows import rows
    from benchmarks.gpu.session import Session
    from benchmarks.gpu.tables import PAGE, devices, page

    if args.tables:
        PAGE.write_text(page(devices(args.out or RESULTS)))
        return 0
    if not args.dry_run and not torch.cuda.is_available():
        print("no GPU: --dry-run runs all but the timing, --tables makes the page of results")
        return 2
    chosen = rows(tune=args.tune)
    if args.only:
        cases = dict.fromkeys(row.case for row in chosen)
        if unknown := [case for case in args.only if case not in cases]:
            print(f"unknown case {', '.join(unknown)}; choose from {', '.join(cases)}")
            return 2
        chosen = [row for row in chosen if row.case in args.only]
    with tempfile.TemporaryDirectory() as folder:
        out = args.out or (Path(folder) if args.dry_run else RESULTS)
        device = "dry run" if args.dry_run else torch.cuda.get_device_name()
        commit = args.commit or commit_of_code()
        session = Session(
            device, out, began, args.budget, args.dry_run, commit, measured_under(commit)
        )
        measure(session, session.todo(chosen, again=args.again))
    return report(session, chosen, goals=not (args.only or args.tune))


def measure(session: "Session", todo: list["Row"]) -> None:
    """Compile for all rows, then measure them one by one."""
    from benchmarks.gpu.workers import compile_first

    print(f"{len(todo)} rows to measure, records in {session.out}", flush=True)
    done = compile_first(
        todo[:DRY_WARM] if session.dry else todo,
        processes=1 if session.dry else os.cpu_count() or 1,
        deadline=session.began + WARM * session.budget,
        dry=session.dry,
    )
    print(f"{done} jobs compiled, {session.left:.0f} s left", flush=True)
    session.run(todo)


def report(session: "Session", rows: list["Row"], *, goals: bool) -> int:
    """Print the goals and what is missing; return 1 if anything failed.

    The numbers of a dry run say nothing; it fails if a row, or the number for a goal, is missing.
    """
    from benchmarks.gpu.goals import GOALS, goal_table
    from benchmarks.gpu.session import finished, untried

    latest = session.latest
    waiting = [r.name for r in rows if untried(latest.get(r.name))]
    failed = [r.name for r in rows if r.name not in waiting and not finished(latest[r.name])]
    if not session.dry:
        print(f"\n{goal_table(latest)}")
    elif goals:
        failed += [f"goal: {g.name}" for g in GOALS if g.value(latest) is None]
    for name in failed:
        print(f"failed {name}")
    took = session.budget - session.left
    print(f"{len(rows)} rows, {len(failed)} failed, {len(waiting)} not run, {took:.0f} s")
    return bool(failed or (session.dry and waiting))


def measured_under(commit: str | None) -> dict[str, Any]:
    """Return hardware with the driver, versions, command and date as fields of records."""
    import torch

    found = conditions()
    driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    found["hardware"]["driver"] = driver.splitlines()[0] if driver else None
    found["versions"] |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return found | {"marks": {} if commit else {"commit_unknown": "no git where it was measured"}}


def commit_of_code() -> str | None:
    """Return the commit of the code that is measured, and whether it was changed since."""
    git = ("git", "-C", str(ROOT))
    head = output(*git, "rev-parse", "HEAD")
    code = ("starlayers", "benchmarks", ":!benchmarks/results")
    changed = output(*git, "diff", "--name-only", "HEAD", "--", *code)
    return f"{head} and changes" if head and changed else head


def output(*command: str) -> str | None:
    """Return what a command prints, None if it fails or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
