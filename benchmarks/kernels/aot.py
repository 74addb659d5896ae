"""Ahead-of-time compilation of Triton kernels, no GPU needed: registers, spills, shared memory."""

import re
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@dataclass(frozen=True)
class Target:
    """GPU to compile for, with the limits of a program."""

    backend: str
    arch: int | str
    lanes: int  # of a warp
    shared_limit: int  # bytes one program may use
    shared_total: int  # bytes of a multiprocessor
    shared_reserved: int  # bytes the driver takes for each program
    warps_total: int  # of a multiprocessor

    @property
    def gpu(self) -> GPUTarget:
        return GPUTarget(self.backend, self.arch, self.lanes)


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 166912, 167936, 1024, 64),
    "sm_89": Target("cuda", 89, 32, 101376, 102400, 1024, 48),
    "sm_90": Target("cuda", 90, 32, 232448, 233472, 1024, 64),
    "gfx942": Target("hip", "gfx942", 64, 65536, 65536, 0, 32),
}


@dataclass(frozen=True)
class Stats:
    """Registers, memory and matrix instructions of a compiled kernel."""

    registers: int  # a thread; on AMD with the accumulators
    spill: int  # bytes a thread: stores and loads in the code; on AMD its scratch memory
    shared: int  # bytes a program
    matrix: int  # matrix instructions in the code: wgmma (HGMMA), mma or mfma
    programs: int  # that fit on a multiprocessor
    serialized: bool = False  # ptxas waits for each HGMMA, where they should overlap


def compile_kernel(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    *,
    target: str,
    warps: int,
    stages: int,
    small_products: bool = False,
    uneven: tuple[str, ...] = (),
) -> Stats:
    """Compile with every pointer and every size of `types` divisible by 16, as in ordinary use.

    Those named in `uneven` are not. `small_products` counts the matrix instructions that sm_90 has
    in common with older GPUs.
    """
    names = list(kernel.arg_names)
    signature = {n: types.get(n, "constexpr") for n in names}
    constexprs = {(names.index(n),): v for n, v in constants.items()}
    attrs = {
        (names.index(n),): [["tt.divisibility", 16]]
        for n, kind in types.items()
        if not kind.startswith("tensordesc") and n not in uneven
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    t = TARGETS[target]
    options = {"num_warps": warps, "num_stages": stages}
    with knobs.nvidia.scope(), knobs.compilation.scope(), redirect_stdout(StringIO()) as log:
        # Triton's own run of ptxas: its options, which differ by release, decide what spills
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        compiled = triton.compile(source, target=t.gpu, options=options)
    shared = compiled.metadata.shared
    if t.backend == "hip":
        return amd_stats(compiled.asm["amdgcn"], shared, t, warps)
    hopper = t.arch == 90 and not small_products
    matrix = len(
        re.findall(r"\bwgmma\.mma_async" if hopper else r"\bmma\.sync", compiled.asm["ptx"])
    )
    return _nvidia_stats(matrix, log.getvalue(), shared, t, warps)


def _nvidia_stats(matrix: int, log: str, shared: int, t: Target, warps: int) -> Stats:
    registers, spill = parse_ptxas(log)
    # registers are given out 8 a thread at a time
    fitting = (
        65536 // (-(-registers // 8) * 8 * t.lanes * warps),
        t.shared_total // (shared + t.shared_reserved),
        t.warps_total // warps,
    )
    return Stats(registers, spill, shared, matrix, min(fitting), "are serialized" in log)


def parse_ptxas(log: str) -> tuple[int, int]:
    """Read registers a thread of the entry function, and bytes spilled in all functions."""
    entry = re.search(
        r"Compiling entry function '(\S+)'.*?Function properties for \1\n.*?Used (\d+) registers",
        log, re.DOTALL,
    )  # fmt: skip
    if not entry:
        raise ValueError(f"no entry function in the log of ptxas:\n{log}")
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return int(entry[2]), sum(int(a) + int(b) for a, b in spills)


def amd_stats(asm: str, shared: int, t: Target, warps: int) -> Stats:
    """Read the metadata of AMD assembly."""

    def field(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", asm)
        assert match, name
        return int(match[1])

    # .vgpr_count holds the accumulators too (gfx90a and later share one file of 512 a lane);
    # each of the 4 SIMDs has its own file and room for 8 waves
    registers = field("vgpr_count")
    waves = min(t.warps_total // 4, 512 // (-(-max(1, registers) // 8) * 8))
    fitting = (4 * waves // warps, t.shared_total // max(1, shared))
    mfma = len(re.findall(r"\bv_mfma", asm))
    return Stats(registers, field("private_segment_fixed_size"), shared, mfma, min(fitting))
