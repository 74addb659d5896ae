"""Launches of compiled kernels are those that Triton itself would make, without a GPU."""

import subprocess
import sys

import pytest

#: compares what `launch_compiled` launches with what Triton's JIT chooses, for random arguments
CHILD = """
from benchmarks.harness import fake_gpu
fake_gpu.install()
import random
import torch
from starlayers.kernels.device.compiled import _compiled, launch_compiled
from starlayers.kernels.device.tile import merge_statistics

draw = random.Random(0)
dtypes = (torch.float32, torch.float16, torch.bfloat16)
seen, launches = set(), 0
for _ in range(300):
    def memory(*shape):
        size = 1
        for n in shape:
            size *= n
        offset = draw.choice((0, 0, 1, 2, 4, 8))
        return torch.empty(size + 8, dtype=draw.choice(dtypes))[offset : offset + size].view(shape)

    tiles = draw.choice((1, 2, 15, 16, 17, 48, 2**31 + 16))
    args = (memory(4, 3, 8), memory(8), memory(8), tiles)
    options = {"C": draw.choice((1, 8)), "BT": draw.choice((1, 16)), "BC": 8,
               "num_warps": draw.choice((4, 8))}
    ours = launch_compiled(merge_statistics, (1,), args, options)
    again = launch_compiled(merge_statistics, (1,), args, dict(options))
    theirs = merge_statistics[(1,)](*args, **options)
    assert ours is theirs and again is theirs, (args, options)
    seen.add(id(theirs))
    launches += 1
print(launches, len(seen), len(_compiled))

# equal numbers of other types are other constants
from starlayers.kernels.device import compiled
x = torch.empty(16)
kinds = {compiled._kind(merge_statistics, (x, 1), {"C": c}) for c in (1, 1.0, True)}
assert len(kinds) == 3
# what Triton has to look at itself
assert compiled._kind(merge_statistics, (x, 1.5), {}) is None
assert compiled._kind(merge_statistics, (x, None), {}) is None
from triton import knobs
knobs.runtime.launch_enter_hook.add(lambda *_: None)
assert compiled._kind(merge_statistics, (x, 1), {}) is None
knobs.runtime.launch_enter_hook.calls.clear()

# a table that is full begins again
compiled.MOST_COMPILED = 2
for n in (3, 5, 7):
    launch_compiled(merge_statistics, (1,), (x, x, x, n), {"C": 8, "BT": 1, "BC": 8})
assert len(_compiled) <= 2
print("done")
"""


@pytest.mark.slow
def test_a_compiled_kernel_is_launched_where_triton_would_choose_it():
    done = subprocess.run(
        [sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    launches, kernels, kinds = map(int, done.stdout.split("\n")[0].split())
    assert launches == 300
    assert 20 < kernels <= kinds
    assert done.stdout.endswith("done\n")
