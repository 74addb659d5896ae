"""The test tiers as pytest commands: what `make test` and `make test-rest` run.

`python -m tests.tiers` runs all of them under branch coverage of `starlayers/` and prints the
coverage of the quick tier and of everything. The data stay in `runs/coverage/`, with the tests that
reached each line, from which `tests.mutants` chooses.
"""

import os
import subprocess
import sys
from pathlib import Path

INTERPRETED = ("tests/kernels", "tests/rl", "tests/surgery")
#: name -> (environment, arguments of pytest)
TIERS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "quick": ({}, ()),
    "quick-interpret": (
        {"TRITON_INTERPRET": "1"},
        ("-m", "interpret and not slow", *INTERPRETED),
    ),
    "rest": ({}, ("-m", "(slow or export or hf or studies) and not interpret")),
    "rest-interpret": ({"TRITON_INTERPRET": "1"}, ("-m", "interpret and slow", *INTERPRETED)),
}
FOLDER = Path("runs/coverage")


def run(tier: str, folder: Path) -> None:
    """Run a tier and leave its coverage in `folder`."""
    environment, arguments = TIERS[tier]
    data = {"COVERAGE_FILE": str(folder / f"{tier}.coverage"), "OMP_NUM_THREADS": "1"}
    coverage = ("--cov=starlayers", "--cov-branch", "--cov-context=test", "--cov-report=")
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "worksteal", *coverage]
    subprocess.run([*command, *arguments], env={**os.environ, **environment, **data}, check=True)


def report(name: str, tiers: tuple[str, ...], folder: Path) -> None:
    """Combine the coverage of some tiers under one name and print the total."""
    files = [str(folder / f"{tier}.coverage") for tier in tiers]
    combined = f"--data-file={folder / name}.coverage"
    coverage = [sys.executable, "-m", "coverage"]
    subprocess.run([*coverage, "combine", "-q", "--keep", combined, *files], check=True)
    print(f"{name}: branch coverage of starlayers/, per cent:", flush=True)
    total = [*coverage, "report", combined, "--format=total", "--precision=2"]
    subprocess.run(total, check=True)


def main() -> None:
    """Run all tiers with coverage."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for tier in TIERS:
        run(tier, FOLDER)
    report("quick-all", ("quick", "quick-interpret"), FOLDER)
    report("all", tuple(TIERS), FOLDER)


if __name__ == "__main__":
    main()
