"""Every tile the kernels ship with, compiled ahead of time: `python -m benchmarks.kernels`.

Needs no GPU. Writes a table of registers, spills and shared memory, and fails where a kernel spills
registers to memory, does not fit its GPU, does not use Hopper's matrix instructions, or does not
compile. `--floor` prints instead the least time memory and arithmetic allow each kernel on an H100.
"""

import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from benchmarks.harness.report import markdown_table
from benchmarks.kernels.aot import TARGETS, Stats, compile_kernel
from benchmarks.kernels.floor import floor_table
from benchmarks.kernels.variants import KINDS, Variant, variants
from starlayers.kernels.dwconv import BAND_SIZES

PAGE = Path(__file__).parents[2] / "benchmarks/results/kernels-compiled.md"
PROCESSES = 2

#: bytes a thread that a kernel may spill: two dozen registers, stored and loaded
MAX_SPILL = 192

#: arguments that are numbers, and vectors that are float32 whatever the type of the matrices
SIZES = {"M", "N", "K", "COLUMNS", "STRIPS", "TILES", "PROGRAMS", "rows", "cols"}
SIZES |= {"stride1", "stride2", "stride_dy", "stride_d", "stride_program", "stride_dv", "stride_dc"}
SIZES |= {"COUNT", "H", "N3"}
VECTORS = {"b", "factor", "k", "mean", "p", "parts", "parts3", "q", "scale", "shift"}
VECTORS |= {"sums", "var", "x_scale", "x_shift", "zmean", "zscale"}

TEXT = """\
# Kernels as compiled

Written by `python -m benchmarks.kernels` (`make kernels`) with Triton {triton}; do not edit. It
compiles {configurations} configurations in {compiled} variants ahead of time, without a GPU: no
figure here is a measurement of speed.

Each row is one tile configuration on one GPU, shown with the options that need most; `compiled`
counts the variants behind it. `registers` and `spill` are per thread: bytes stored and loaded on
NVIDIA, where none may spill more than {spill}, and scratch memory on AMD. `KiB` is shared memory
per program, `matrix` the matrix instructions (HGMMA on sm_90, HMMA on sm_80 and sm_89, MFMA on
gfx942; "in turn" where ptxas says that it waits for each) and `programs` how many fit on a
multiprocessor. Tiles of the star MLP are rows x hidden channels, for so many channels at most; of
`dw_` kernels, rows x columns x channels of an image; of `convolve`, output pixels x output channels
x depth of a product, after the channels of images and result. The Toeplitz kernels convolve 16-bit
images with {sizes} rows of taps; their tiles are strips x rows x columns x channels, and their
matrix instructions are HMMA on sm_90 too.

`fold_branches`, `affine_norm`, `finish_depthwise`, `unfold_branches`, `finish_norm` and
`prepare_weights` fold the norms of a StarBlock2d in training and take their gradients apart. Their
parameters are float32, `type` is that of the images. Tiles are what is summed at a time x channels,
with hidden channels (`fold_branches`) or output channels (`unfold_branches`) between or behind.

{table}"""


def compile_variant(v: Variant) -> Stats | str:
    """Compile a variant; return what the kernel needs, or the error."""
    module, name = v.function.split(".")
    kernel = getattr(import_module(f"starlayers.kernels.device.{module}"), name)
    types = {n: _type(n, v) for n in kernel.arg_names if n not in v.constants}
    try:
        return compile_kernel(
            kernel, types, v.constants, target=v.target, warps=v.warps, stages=v.stages,
            small_products=v.small_products, uneven=v.uneven,
        )  # fmt: skip
    except Exception as error:  # whatever the compiler raises is a finding of this program
        return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def _type(name: str, v: Variant) -> str:
    if v.types and name in v.types:
        return v.types[name]
    if name == "tracked":
        return "*i64"
    if v.function.startswith("fold.") and name not in SIZES:  # parameters of a network under AMP
        return f"*{KINDS[v.size]}" if name in {"v1", "v2", "cast3"} else "*fp32"
    if name in SIZES:
        return "i32"
    return "*fp32" if name in VECTORS else f"*{KINDS[v.size]}"


def offences(v: Variant, stats: Stats | str) -> list[str]:
    """Return the reasons why a variant must not ship; scratch memory on AMD is no reason."""
    if isinstance(stats, str):
        return [f"does not compile: {stats}"]
    target = TARGETS[v.target]
    reasons = []
    if stats.spill > MAX_SPILL and target.backend == "cuda":
        reasons.append(f"spills {stats.spill} bytes a thread")
    if stats.shared > target.shared_limit:
        reasons.append(f"{stats.shared} bytes of shared memory, {target.shared_limit} there are")
    if v.products and v.target == "sm_90" and v.size == 2 and not stats.matrix:
        reasons.append("no HMMA" if v.small_products else "no HGMMA")
    return reasons


@dataclass(frozen=True)
class Row:
    """Worst variant of a configuration on one GPU."""

    variant: Variant
    stats: Stats
    compiled: int

    def cells(self) -> list[str]:
        v, s = self.variant, self.stats
        shared = f"{s.shared / 1024:.0f}"
        matrix = f"{s.matrix}{' in turn' * s.serialized}" if v.products else ""
        numbers = [str(s.registers), str(s.spill), shared, matrix, str(s.programs)]
        return [
            v.kernel, v.row, KINDS[v.size], v.target, v.options, *numbers, str(self.compiled)
        ]  # fmt: skip


def table_rows(stats: dict[Variant, Stats]) -> list[Row]:
    """One row for each configuration and GPU, by kernel and otherwise in the order given."""
    groups: dict[tuple[object, ...], list[Variant]] = defaultdict(list)
    for v in stats:
        groups[v.kernel, v.row, v.size, v.target].append(v)

    def badness(v: Variant) -> tuple[int, bool, int, int]:
        s = stats[v]
        return s.spill, s.serialized, s.registers, s.shared

    worst = (max(group, key=badness) for group in groups.values())
    rows = [Row(v, stats[v], len(g)) for v, g in zip(worst, groups.values(), strict=True)]
    return sorted(rows, key=lambda row: row.variant.kernel)


def page(rows: list[Row]) -> str:
    """Make the page: the table, and how to read it."""
    header = ["kernel", "tile", "type", "GPU", "worst with", "registers", "spill", "KiB"]
    header += ["matrix", "programs", "compiled"]
    return TEXT.format(
        configurations=len({(r.variant.kernel, r.variant.row, r.variant.size) for r in rows}),
        compiled=sum(r.compiled for r in rows),
        triton=version("triton"),
        spill=MAX_SPILL,
        sizes=" or ".join(str(n) for n in BAND_SIZES),
        table=markdown_table(header, [r.cells() for r in rows]),
    )


def compile_all(todo: list[Variant]) -> list[Stats | str]:
    """Compile all variants, and return what each needs, in order."""
    # spawned: a fork of a process with threads may hang
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:
        return list(
            tqdm(pool.map(compile_variant, todo, chunksize=4), total=len(todo), unit="kernel")
        )


def main(
    floor: Annotated[bool, typer.Option("--floor", help="print floors on an H100 instead")] = False,
    out: Annotated[Path, typer.Option(help="the page to write")] = PAGE,
) -> None:
    """Compile every shipped tile ahead of time; fail where one spills, does not fit or is slow."""
    if floor:
        print(floor_table())
        return
    todo = list(variants())
    results = compile_all(todo)
    failures = [(v, reason) for v, s in zip(todo, results) for reason in offences(v, s)]
    for v, reason in failures:
        where = f"{v.kernel} ({v.row}; {v.options}) in {KINDS[v.size]} on {v.target}"
        print(f"{where}: {reason}", file=sys.stderr)
    stats = {v: s for v, s in zip(todo, results) if isinstance(s, Stats)}
    out.write_text(page(table_rows(stats)))
    print(f"{len(todo)} variants compiled, {len(failures)} offences; table in {out.name}")
    if failures:
        raise typer.Exit(1)
