"""A random sample of mutants of the library, each run against the tests that reach its line.

`python -m tests.mutants --sample 100 --seed 0` draws places in `starlayers/` at which an operator
of cosmic-ray changes something, makes one change at each, and prints which tests noticed. The tests
are chosen from the coverage data of `python -m tests.tiers`; those that mirror the module come
first. One JSON line a mutant goes to `runs/mutants-SEED.jsonl`, from which a second call goes on.
"""

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

from cosmic_ray.ast import ast_nodes, get_ast_from_path
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator
from coverage import CoverageData

from tests.tiers import FOLDER, TIERS

#: changes that a reader could make by mistake; those that only raise a TypeError are left out
OPERATORS = tuple(
    f"core/{name}"
    for name in (
        *(f"ReplaceBinaryOperator_{pair}" for pair in
          ("Add_Sub", "Sub_Add", "Mul_Div", "Mul_Add", "Div_Mul", "FloorDiv_Mul", "Mod_FloorDiv",
           "Pow_Mul")),
        *(f"ReplaceComparisonOperator_{pair}" for pair in
          ("Eq_NotEq", "NotEq_Eq", "Lt_LtE", "Lt_GtE", "LtE_Lt", "LtE_Gt", "Gt_GtE", "Gt_LtE",
           "GtE_Gt", "GtE_Lt", "Is_IsNot", "IsNot_Is")),
        "ReplaceUnaryOperator_USub_UAdd",
        "ReplaceUnaryOperator_Delete_Not",
        "AddNot",
        "ReplaceTrueWithFalse",
        "ReplaceFalseWithTrue",
        "ReplaceAndWithOr",
        "ReplaceOrWithAnd",
        "ReplaceBreakWithContinue",
        "ReplaceContinueWithBreak",
        "ExceptionReplacer",
        "NumberReplacer",
        "ZeroIterationForLoop",
    )
)  # fmt: skip
#: test that reads the defaults of all public arguments
SIGNATURES = "tests/test_public.py::test_signatures_are_pinned"
#: tests of one mutant are given up after so many seconds, and the mutant counts as survived
LIMIT_S = 900


class Mutant(NamedTuple):
    """One change of one place in one file."""

    file: str
    line: int
    operator: str
    occurrence: int

    def code(self) -> str | None:
        """The file with the change, or `None` where the operator changes nothing."""
        return mutate_code(
            Path(self.file).read_text(), get_operator(self.operator)(), self.occurrence
        )


#: arguments that change no result: checks of lengths that agree, speed, and the looks of a figure
WITHOUT_RESULT = {
    "strict", "usedforsecurity", "num_warps", "num_stages", "STAGES",
    "fontsize", "figsize", "linewidth", "lw", "alpha", "dpi", "pad", "color", "rotation",
}  # fmt: skip


def without_result(file: Path) -> set[tuple[int, int]]:
    """Positions (line, column) at which no change can change a result.

    These are annotations, the arguments above, and warps and stages of a `Tile`.
    """
    parts: list[ast.AST] = []
    for node in ast.walk(ast.parse(file.read_text())):
        parts += [getattr(node, name, None) or ast.Pass() for name in ("annotation", "returns")]
        if isinstance(node, ast.keyword) and node.arg in WITHOUT_RESULT:
            parts.append(node.value)
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "Tile":
            parts += node.args[2:]
    return {
        (n.lineno, n.col_offset) for part in parts for n in ast.walk(part) if hasattr(n, "lineno")
    }


def draw(sample: int, seed: int) -> list[Mutant]:
    """Draw `sample` places at random, then one operator for each."""
    files = sorted(Path("starlayers").rglob("*.py"))
    ignored = {str(file): without_result(file) for file in files}
    places: dict[tuple[str, tuple[int, int]], list[Mutant]] = defaultdict(list)
    for file in files:
        nodes = list(ast_nodes(get_ast_from_path(file)))
        for name in OPERATORS:
            operator = get_operator(name)()
            spans = (span for node in nodes for span in operator.mutation_positions(node))
            for occurrence, (start, _) in enumerate(spans):
                if start not in ignored[str(file)]:
                    mutant = Mutant(str(file), start[0], name, occurrence)
                    places[mutant.file, start].append(mutant)
    rng = random.Random(seed)
    keys = sorted(places)
    rng.shuffle(keys)
    print(f"{len(keys)} places in {len(files)} files")
    return [rng.choice(sorted(places[key])) for key in keys[:sample]]


def tests_of(mutant: Mutant, data: dict[str, CoverageData]) -> dict[str, list[str]]:
    """Tests that reach the line, by tier; those of the mirrored file first.

    A line that runs at import is reached by no test in particular; then those of the file count, or
    if it has none, as an `__init__.py`, those of its room, and the pinned signatures.
    """
    mirrored = mutant.file.removeprefix("starlayers/").removesuffix(".py").split("/")
    chosen = {}
    for tier, measured in data.items():
        file = next((f for f in measured.measured_files() if f.endswith("/" + mutant.file)), None)
        if file is None:
            continue
        by_line = measured.contexts_by_lineno(file)
        contexts = set(by_line.get(mutant.line, ())) - {""}
        at_import = not contexts
        if at_import:
            contexts = set().union(*by_line.values()) - {""}
        tests = {context.partition("|")[0] for context in contexts}
        if not tests:
            every = {test.partition("|")[0] for test in measured.measured_contexts()}
            tests = {test for test in every if test.startswith(f"tests/{mirrored[0]}/")}
        if at_import and tier == "quick":
            tests.add(SIGNATURES)

        def distance(test: str) -> tuple[bool, bool, str]:
            words = test.partition("::")[0]
            return (mirrored[-1] not in words, mirrored[0] not in words, test)

        if tests:
            chosen[tier] = sorted(tests, key=distance)
    return chosen


def judge(mutant: Mutant, tree: Path, data: dict[str, CoverageData]) -> dict[str, Any]:
    """Run the tests of a mutant in a copy of the project; the record says what happened."""
    record: dict[str, Any] = {**mutant._asdict(), "verdict": "survived", "tests": 0, "by": None}
    code = mutant.code()
    if code is None or code == Path(mutant.file).read_text():
        return {**record, "verdict": "no change"}
    lines = zip(Path(mutant.file).read_text().splitlines(), code.splitlines())
    record["change"] = next(([a.strip(), b.strip()] for a, b in lines if a != b), None)
    target, start = tree / mutant.file, time.monotonic()
    original = target.read_text()
    target.write_text(code)
    try:
        for tier, tests in tests_of(mutant, data).items():
            record["tests"] += len(tests)
            left = LIMIT_S - (time.monotonic() - start)
            failed = failing(tier, tests, tree, left)
            if failed:
                return {**record, "verdict": "killed", "by": failed}
    finally:
        target.write_text(original)
        record["seconds"] = round(time.monotonic() - start)
    return record


def failing(tier: str, tests: list[str], tree: Path, limit: float) -> str | None:
    """The first failing test, or `None` when all pass or the time is over."""
    environment = {**TIERS[tier][0], "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    listed = tree / "tests-of-a-mutant"
    listed.write_text("\n".join(tests))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no"]
    command += ["-m", "", f"@{listed}"]
    try:
        done = subprocess.run(
            command,
            cwd=tree,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=max(limit, 1),
        )
    except subprocess.TimeoutExpired:
        return None  # given up: it counts as survived
    if done.returncode in (0, 5):
        return None
    failures = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failures[0][:200] if failures else f"exit status {done.returncode}"


def copies(count: int) -> Iterator[Path]:
    """Copies of the tracked files, each to change at will."""
    files = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True)
    for _ in range(count):
        tree = Path(tempfile.mkdtemp(prefix="mutants-"))
        for name in files.stdout.splitlines():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(name, tree / name)
        yield tree


def main() -> None:
    """Draw, judge and count."""
    parser = argparse.ArgumentParser(description="Run a sample of mutants against the tests.")
    parser.add_argument("--sample", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    data = {}
    for tier in TIERS:
        data[tier] = CoverageData(str(FOLDER / f"{tier}.coverage"))
        data[tier].read()
    out = Path(f"runs/mutants-{options.seed}.jsonl")
    records = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    known = {tuple(r[k] for k in Mutant._fields) for r in records}
    trees: SimpleQueue[Path] = SimpleQueue()
    for tree in copies(options.workers):
        trees.put(tree)

    def one(mutant: Mutant) -> None:
        tree = trees.get()
        record = judge(mutant, tree, data)
        trees.put(tree)
        records.append(record)
        with out.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(record["verdict"], f"{mutant.file}:{mutant.line}", record.get("change"), flush=True)

    todo = [m for m in draw(options.sample, options.seed) if tuple(m) not in known]
    with ThreadPoolExecutor(options.workers) as pool:
        list(pool.map(one, todo))
    while not trees.empty():
        shutil.rmtree(trees.get())
    judged = [r for r in records if r["verdict"] in ("killed", "survived")]
    killed = sum(r["verdict"] == "killed" for r in judged)
    print(f"{killed} of {len(judged)} mutants killed")


if __name__ == "__main__":
    main()
