"""Compiled kernels: what is compiled, what fails, and the floors their speed is held against."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.kernels import floor as floors

triton = pytest.importorskip("triton")

from benchmarks.kernels import compiled as kernels  # noqa: E402
from benchmarks.kernels.aot import TARGETS, Stats, amd_stats, parse_ptxas  # noqa: E402
from benchmarks.kernels.variants import FOLDED_WIDTHS, STRIDED, WIDTHS, variants  # noqa: E402
from starlayers.kernels import block, conv, dwconv, fold, star_mlp_launch, tiles  # noqa: E402
from starlayers.kernels.registration import MLPWeights  # noqa: E402
from starlayers.kernels.tiles import MLP_BACKWARD, MLP_FORWARD, split_columns  # noqa: E402

FINE = Stats(registers=168, spill=0, shared=65536, matrix=12, programs=2)


@pytest.fixture(scope="module")
def everything():
    return list(variants())


def first(everything, kernel, target, size=2):
    return next(v for v in everything if (v.kernel, v.target, v.size) == (kernel, target, size))


def test_every_row_of_every_table_is_compiled(everything):
    of_tables = (
        "mlp_forward",
        "mlp_backward all",
        "mlp_backward dx",
        "mlp_backward dw",
        "mlp_hidden",
    )
    rows = {(v.kernel, v.row, v.target, v.size) for v in everything if v.kernel in of_tables}
    tables = [MLP_FORWARD, *MLP_BACKWARD.values()]
    # a row of the small family is compiled for two GPUs
    count = sum(
        len(rows) * (1 + family.startswith("small"))
        for table in tables
        for family, rows in table.items()
    )
    assert len(rows) == count
    assert {v.target for v in everything} == set(TARGETS)


def test_every_row_has_a_hidden_axis_that_is_no_power_of_two(everything):
    for v in everything:
        if v.kernel == "mlp_forward":
            same = [
                u for u in everything if (u.kernel, u.row, u.size) == ("mlp_forward", v.row, v.size)
            ]
            assert any(u.constants["H"] & (u.constants["H"] - 1) for u in same)


def test_variants_are_what_the_library_would_launch(everything, monkeypatch):
    for v in everything:
        kernel = v.kernel.removeprefix("mlp_backward ").removeprefix("mlp_")
        if kernel in MLP_BACKWARD:
            family = {"sm_90": "sm_90", "sm_80": "sm_80"}.get(v.target, "small")
            monkeypatch.setattr(tiles, "family", lambda device, family=family: family)
            monkeypatch.setattr(tiles, "INTERPRET", False)
            channels, hidden = v.constants["C"], v.constants["H"] if kernel == "all" else 10**6
            width = sum(split_columns(channels))
            chosen = tiles.mlp_backward_tiles(tiles.torch.device("cuda"), width, hidden, v.size)
            tile = chosen[kernel]
            assert (tile.rows, tile.hidden) == (v.constants["BM"], v.constants["BH"])
            assert tile.depth == v.constants.get("BK", 0)
    assert {v.constants["C"] for v in everything if v.kernel == "mlp_forward"} == set(WIDTHS)
    assert {v.constants["C"] for v in everything if v.kernel == "mlp_hidden"} == set(WIDTHS) - {384}


def recorded_step(monkeypatch, channels, dtype):
    """Return (kernel, arguments, warps) of every launch of a training step, on "meta" tensors."""
    launches = []

    def record(kernel, grid, *args, num_warps=4, num_stages=3, **options):
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | options
        launches.append((kernel.__name__, arguments, num_warps))

    for module in (dwconv, fold, star_mlp_launch):
        monkeypatch.setattr(module, "launch", record)
    monkeypatch.setattr(tiles, "INTERPRET", False)
    hidden = 4 * channels
    shapes = (hidden, channels), (hidden,), (hidden, channels), (hidden,), (channels, hidden)
    mlp = MLPWeights(*(torch.empty(s, device="meta") for s in (*shapes, (channels,))))
    norms = [fold.Norm.of(nn.BatchNorm2d(channels, device="meta")) for _ in range(2)]
    kernel, bias = torch.empty(channels, 1, 7, 7, device="meta"), mlp.b3
    weights = block.BlockWeights(kernel, bias, norms[0], mlp, norms[1], kernel, bias)
    x = torch.empty(256, 14, 14, channels, dtype=dtype, device="meta")
    out, kept = block._forward(x, weights, "relu6", 0.0)
    block._backward(out, kept, weights, "relu6", 0.0)
    return launches


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("channels", "out", "side"), STRIDED)
def test_strided_convolutions_are_compiled_as_they_are_launched(
    everything, monkeypatch, channels, out, side, dtype
):
    launches = []
    monkeypatch.setattr(conv, "launch", lambda *args, **options: launches.append((args, options)))
    x = torch.empty(256, channels, side, side, dtype=dtype, device="meta")
    if channels > conv.PATCH_CHANNELS:
        x = x.to(memory_format=torch.channels_last)
    w, scale = torch.empty(out, channels, 3, 3, device="meta"), torch.empty(out, device="meta")
    act = "relu6" if channels == 3 else "identity"
    y = conv.convolve(x, w, scale, scale, stride=2, act=act)
    assert y.shape == (256, side // 2, side // 2, out)
    (((kernel, _, *args), options),) = launches
    compiled = [
        v.constants | {"num_warps": v.warps, "num_stages": v.stages}
        for v in everything
        if (v.kernel, v.target, v.size) == ("convolve", "sm_90", dtype.itemsize)
    ]
    assert options in compiled
    assert [*kernel.arg_names[: len(args)], *options] == [
        *kernel.arg_names, "num_warps", "num_stages",
    ]  # fmt: skip
    v = first(everything, "convolve", "sm_90", dtype.itemsize)
    for name, argument in zip(kernel.arg_names, args, strict=False):
        kind = POINTERS[argument.dtype] if isinstance(argument, torch.Tensor) else "i32"
        assert kernels._type(name, v) == kind


FOLDS = {"prepare_weights", "fold_branches", "affine_norm", "finish_depthwise", "unfold_branches"}
FOLDS |= {"finish_norm"}
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64"}


#: (channels, bytes of an element) that a backward on sm_90 serves
FOLDED = [(c, 2) for c in FOLDED_WIDTHS] + [(c, 4) for c in (24, 32, 64)]


@pytest.mark.parametrize(("channels", "size"), FOLDED)
def test_folds_are_compiled_as_a_training_step_launches_them(
    everything, monkeypatch, channels, size
):
    of_width = [
        v
        for v in everything
        if v.kernel in FOLDS and (v.target, v.size) == ("sm_90", size)
        and v.constants.get("C") == channels
    ]  # fmt: skip
    dtype = torch.bfloat16 if size == 2 else torch.float32
    step = recorded_step(monkeypatch, channels, dtype)
    assert {name for name, *_ in step} > FOLDS
    compiled = set()
    for name, arguments, warps in step:
        same = [
            v
            for v in of_width
            if v.kernel == name and v.constants.get("NORM") == arguments.get("NORM")
        ]
        if not same:  # of another width is the same tile
            assert name not in FOLDS or channels not in (FOLDED_WIDTHS[0], FOLDED_WIDTHS[-1])
            continue
        (v,) = same
        compiled.add(v)
        assert v.warps == warps
        for argument, value in arguments.items():
            if isinstance(value, torch.Tensor):
                assert kernels._type(argument, v) == POINTERS[value.dtype], (name, argument)
                aligned = value.storage_offset() * value.element_size() % 16 == 0
            elif argument in v.constants:
                assert v.constants[argument] == value, (name, argument)
                continue
            else:
                assert kernels._type(argument, v) == "i32", (name, argument)
                assert value != 1, (name, argument)  # Triton makes that a constant
                aligned = value % 16 == 0 or "stride" not in argument
            assert aligned == (argument not in v.uneven), (name, argument, value)
    assert compiled == set(of_width)


@pytest.mark.parametrize(
    ("channels", "dtype", "launches", "between"),
    [
        (32, torch.bfloat16, 15, ["mlp_dw"]),
        (64, torch.bfloat16, 16, ["mlp_dx", "mlp_dw"]),
        (96, torch.bfloat16, 16, ["mlp_dx", "mlp_dw"]),
        (128, torch.bfloat16, 16, ["mlp_upstream", "mlp_hidden"]),
        (32, torch.float32, 16, ["mlp_dx", "mlp_dw"]),
        (64, torch.float32, 16, ["mlp_upstream", "mlp_hidden"]),
    ],
)
def test_launches_of_a_training_step_by_width(monkeypatch, channels, dtype, launches, between):
    names = [name for name, *_ in recorded_step(monkeypatch, channels, dtype)]
    assert len(names) == launches
    assert names[names.index("finish_depthwise") + 1 : names.index("unfold_branches")] == between


def test_folds_are_compiled_where_a_backward_serves_them(everything):
    served = {
        (v.constants["C"], v.size)
        for v in everything
        if (v.kernel, v.target) == ("fold_branches", "sm_90")
    }
    assert served == set(FOLDED)
    assert max(MLP_BACKWARD["hidden"]["sm_90 float32"]) == 64


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, []),
        ({"spill": 8}, []),
        ({"matrix": 0}, ["no HGMMA"]),
        ({"shared": 232449}, ["shared memory"]),
        ({"spill": 4, "matrix": 0}, ["no HGMMA"]),
        ({"registers": 255, "serialized": True}, []),
    ],
)
def test_offences(everything, change, words):
    reasons = kernels.offences(first(everything, "mlp_forward", "sm_90"), replace(FINE, **change))
    assert len(reasons) == len(words)
    for reason, word in zip(reasons, words, strict=True):
        assert word in reason


def test_no_tile_may_spill_much(everything):
    for target, size in (("sm_80", 2), ("sm_90", 2), ("sm_90", 4)):
        variant = first(everything, "mlp_forward", target, size=size)
        (reason,) = kernels.offences(variant, replace(FINE, spill=kernels.MAX_SPILL + 4))
        assert f"spills {kernels.MAX_SPILL + 4} bytes" in reason
        assert not kernels.offences(variant, replace(FINE, spill=kernels.MAX_SPILL))


def test_small_products_on_hopper_have_older_instructions(everything):
    variant = first(everything, "dw_convolve_toeplitz", "sm_90")
    assert not kernels.offences(variant, replace(FINE, spill=kernels.MAX_SPILL))
    spilt = replace(FINE, spill=kernels.MAX_SPILL + 4, matrix=0)
    spills, scalar = kernels.offences(variant, spilt)
    assert f"spills {kernels.MAX_SPILL + 4} bytes" in spills
    assert scalar == "no HMMA"


def test_depthwise_kernels_are_compiled_for_the_types_that_they_serve(everything):
    served = {}
    for v in everything:
        if v.function.startswith("dwconv"):
            served.setdefault((v.function.split(".")[0], v.size), set()).add(v.constants["K"])
    assert served == {
        ("dwconv", 2): {5}, ("dwconv", 4): {7}, ("dwconv_toeplitz", 2): set(dwconv.BAND_SIZES),
    }  # fmt: skip


def test_every_kernel_is_held_to_the_same_spill(everything):
    for variant in {v.kernel: v for v in everything if v.target == "sm_90"}.values():
        assert kernels.offences(variant, replace(FINE, spill=kernels.MAX_SPILL + 4))
        assert not kernels.offences(variant, replace(FINE, spill=kernels.MAX_SPILL))


def test_what_is_no_offence_elsewhere(everything):
    scalar = replace(FINE, matrix=0)
    assert not kernels.offences(first(everything, "mlp_forward", "sm_80"), scalar)
    assert not kernels.offences(first(everything, "mlp_forward", "sm_90", size=4), scalar)
    assert not kernels.offences(first(everything, "dw_weights", "sm_90"), scalar)
    # 64 KiB is all an MI300 has; its compiler's scratch memory is reported only
    amd = first(everything, "mlp_forward", "gfx942")
    assert not kernels.offences(amd, replace(FINE, spill=64))
    assert kernels.offences(amd, replace(FINE, shared=65537))
    assert kernels.offences(amd, "CompilationError: no") == [
        "does not compile: CompilationError: no"
    ]


def test_an_offence_fails_the_program_and_is_named(everything, monkeypatch, tmp_path, capsys):
    chosen = [
        first(everything, "mlp_forward", "sm_90"),
        first(everything, "mlp_backward dx", "sm_80"),
    ]
    monkeypatch.setattr(kernels, "variants", lambda: iter(chosen))
    monkeypatch.setattr(kernels, "compile_all", lambda todo: [FINE, replace(FINE, spill=220)])
    page = tmp_path / "page.md"
    with pytest.raises(kernels.typer.Exit) as failure:
        kernels.main(out=page)
    assert failure.value.exit_code == 1
    assert "mlp_backward dx" in (err := capsys.readouterr().err)
    assert "spills 220 bytes a thread" in err
    assert page.read_text().count("\n| mlp_") == 2


def test_the_table_shows_the_worst_variant_of_a_row(everything):
    v = first(everything, "mlp_forward", "sm_90")
    same = [u for u in everything if (u.row, u.kernel, u.target) == (v.row, v.kernel, v.target)]
    found = {u: replace(FINE, registers=100 + i) for i, u in enumerate(same)}
    found[same[1]] = replace(FINE, spill=4)
    (row,) = kernels.table_rows(found)
    assert (row.variant, row.compiled) == (same[1], len(same))


def test_registers_are_those_of_the_entry_function():
    log = """ptxas info    : Compiling entry function 'k' for 'sm_90a'
ptxas info    : Function properties for k
    8 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers
ptxas info    : Function properties for helper
    0 bytes stack frame, 16 bytes spill stores, 0 bytes spill loads
"""
    helper = "ptxas info    : Function properties for helper\n    0 bytes stack frame\n"
    assert parse_ptxas(log) == (168, 28)
    assert parse_ptxas(helper + log)[0] == 168
    with pytest.raises(ValueError, match="no entry function"):
        parse_ptxas(helper)


def test_amd_registers_hold_the_accumulators_once():
    asm = ".agpr_count: 196\n.private_segment_fixed_size: 24\n.vgpr_count: 452\n v_mfma_f32"
    found = amd_stats(asm, 16384, TARGETS["gfx942"], 4)
    assert found == Stats(452, 24, 16384, 1, 1)


@pytest.mark.studies
def test_a_small_configuration_compiles_for_every_gpu(everything):
    chosen = {
        v.target: i
        for i, v in enumerate(everything)
        if (v.kernel, v.size, v.constants.get("C")) == ("mlp_forward", 2, 32)
    }
    assert set(chosen) == set(TARGETS)
    # in a process of its own: this one may run kernels in the interpreter
    code = f"""if True:
        from benchmarks.kernels.compiled import compile_variant, offences
        from benchmarks.kernels.variants import variants
        everything = list(variants())
        for i in {list(chosen.values())}:
            v = everything[i]
            found = compile_variant(v)
            assert not offences(v, found), (v.target, offences(v, found))
            assert found.registers > 32 and found.matrix and found.programs, (v.target, found)"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_float32_has_tiles_of_its_own(monkeypatch):
    gpu = tiles.torch.device("cuda")
    monkeypatch.setattr(tiles, "INTERPRET", False)
    monkeypatch.setattr(tiles, "family", lambda device: "sm_90")
    tile = tiles.mlp_tile
    assert tile(MLP_FORWARD, gpu, 64) is MLP_FORWARD["sm_90"][64]
    assert tile(MLP_FORWARD, gpu, 64, 4) is MLP_FORWARD["sm_90 float32"][64]
    assert tile(MLP_FORWARD, gpu, 40, 4) is MLP_FORWARD["sm_90 float32"][64]
    assert tile(MLP_FORWARD, gpu, 256, 4) is None
    assert tile(MLP_BACKWARD["all"], gpu, 32, 4) is None  # not even a table
    # bfloat16 reaches kernels as float32 there, and nothing spills
    monkeypatch.setattr(tiles, "INTERPRET", True)
    assert tile(MLP_FORWARD, gpu, 256, 4) is MLP_FORWARD["sm_90"][256]


# StarNet-S4, batch 256, in microseconds: bytes of the star MLP, of its backward and of a depthwise
# convolution, operations of the latter, and the bytes of the star MLP unfused and by Inductor
S4 = {
    56: (32, 34.3, 51.4, 34.3, 7.3, 599, 462),
    28: (64, 17.2, 25.8, 17.1, 3.6, 300, 231),
    14: (128, 8.7, 13.1, 8.6, 1.8, 150, 116),
    7: (256, 4.8, 7.5, 4.3, 0.9, 75, 58),
}


@pytest.mark.parametrize("side", S4)
def test_floors_of_starnet_s4(side):
    width, forward, backward, depthwise, bands, eager, inductor = S4[side]
    rows, hidden = 256 * side**2, 4 * width
    k3 = floors.mlp_forward(rows, width, hidden)
    assert k3.micros == pytest.approx((forward, 25.0), abs=0.06)
    assert k3.floor == max(k3.micros)
    assert k3.eager / 3e6 == pytest.approx(eager, abs=0.6)
    assert k3.inductor / 3e6 == pytest.approx(inductor, abs=0.6)
    k4 = floors.mlp_backward_ideal(rows, width, hidden)
    assert k4.micros == pytest.approx((backward, 66.6), abs=0.06)
    k6 = floors.depthwise_forward(rows, width)
    assert k6.micros == pytest.approx((depthwise, bands), abs=0.06)


def test_the_shipped_backward_costs_more_than_one_pass():
    rows, hidden = 256 * 56**2, 128
    one = floors.mlp_backward_ideal(rows, 32, hidden)
    shipped = floors.mlp_backward(rows, 32, hidden)
    assert shipped.kernel == "star_mlp_backward all"
    assert shipped.flops == one.flops
    # 264 programs write sums of 128 x 98 floats, which are read once
    assert shipped.bytes - one.bytes == 2 * 4 * 264 * 128 * 98
    twice = floors.mlp_backward(256 * 28**2, 64, 256)
    assert (twice.kernel, twice.flops / one.flops) == ("star_mlp_backward dx + dw", 22 / 16)
    spilt = floors.mlp_backward(256 * 7**2, 256, 1024)
    assert spilt.kernel == "star_mlp_backward hidden + products"
    # 8 passes over (rows, hidden), 7 over (rows, channels), weights in and gradients out
    elements = 256 * 49 * (8 * 1024 + 7 * 256) + 6 * 256 * 1024
    assert spilt.bytes == 2 * elements
    with pytest.raises(ValueError, match="no star_mlp_backward tile"):
        floors.mlp_backward(64, 512, 2048)


def test_floors_of_llama_and_policies():
    tokens, width, hidden = floors.LLAMA
    assert 6 * tokens * width * hidden == pytest.approx(1.443e12, rel=1e-3)
    forward = floors.star_forward(tokens * hidden)
    assert forward.bytes == pytest.approx(352e6, rel=2e-3)
    assert forward.floor == pytest.approx(117.4, abs=0.1)
    assert floors.star_backward(tokens * hidden).floor == pytest.approx(195.7, abs=0.1)
    largest = floors.mlp_forward(4096, 256, 1024)
    assert largest.micros == pytest.approx((1.9, 8.15), abs=0.05)


def test_the_floor_table_has_every_workload(capsys):
    kernels.main(floor=True)
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 2 + 8 * 6 + 2 * 5 + 2 + 4 * 3
    assert "starnet_s4, 56x56, 32 -> 128 | star_mlp | 102.8 | 19.73 | 34.3 | 25.0 |" in "\n".join(
        lines
    )
