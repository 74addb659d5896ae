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


#: compares the launches of a recorded block with those of the ops, on another input
BLOCK = """
from benchmarks.harness import fake_gpu
fake_gpu.install()
import torch
from starlayers.kernels.registration import recorded_launches
from starlayers.vision import StarBlock2d, fused_block

block = StarBlock2d(32).bfloat16().eval()
x, other = (torch.randn(1, 7, 7, 32).bfloat16() for _ in range(2))
with torch.no_grad():
    fused_block.compute(block, x)
    (recorded,) = block.recordings.values()
    with recorded_launches() as launches:
        fused_block.fused_block(block, other)
    assert len(recorded.program.steps) == len(launches) == 3
    for step, launch in zip(recorded.program.steps, launches):
        places = dict(step.places)
        for i, (kept, argument) in enumerate(zip(step.arguments, launch.arguments)):
            if i in places:
                assert kept is None and isinstance(argument, torch.Tensor)
            elif isinstance(argument, torch.Tensor):
                assert torch.equal(kept, argument) and kept.dtype == argument.dtype, i
            else:
                assert kept == argument and type(kept) is type(argument), i
    with fake_gpu.launched() as names:
        fused_block.compute(block, other)
    assert names == [launch.kernel.fn.__name__ for launch in launches]
    # another alignment is another kind, of kernels that Triton compiled for it
    shifted = torch.randn(1 + 7 * 7 * 32).bfloat16()[1:].view(1, 7, 7, 32)
    fused_block.compute(block, shifted)
    aligned, unaligned = (r.program for r in block.recordings.values())
    assert aligned.steps[0].run is not unaligned.steps[0].run
print("done")
"""


#: counts launches, and operations of PyTorch, of convolutions and of a whole network
NETWORK = """
from benchmarks.harness import fake_gpu
fake_gpu.install()
import torch
from starlayers.vision import ConvNorm, StarNet

net = StarNet(32, (1, 2), stage_strides=(2, 2), num_classes=5).bfloat16().eval()
x = torch.randn(1, 3, 64, 64).bfloat16()
block = ["dw_convolve_toeplitz", "mlp_forward", "dw_convolve_toeplitz"]
for fold in (False, True):
    if fold:
        net.fuse()
    with torch.no_grad():
        y = net._stem(x)
        for i in range(2):
            y = net._stage(i, y)
        with fake_gpu.operations() as tail:
            net.forward_head(net.norm(y))
        with fake_gpu.operations() as operations:
            net(x)
        with fake_gpu.launched() as names:
            net(x)
    assert names == ["convolve", "convolve", *block, "convolve", *block, *block], names
    assert operations == tail, (operations, tail)
    assert y.is_contiguous(memory_format=torch.channels_last)

layer = net.stages[1][0]
images = torch.randn(2, 1, 32, 8, 8).bfloat16().transpose(2, -1).contiguous().transpose(2, -1)
with torch.no_grad():
    layer(images[0])
    kept = len(layer.recordings)
    with fake_gpu.launched() as names, fake_gpu.operations() as operations:
        layer(images[1])
    assert (names, operations, len(layer.recordings)) == (["convolve"], [], kept)
    # another alignment is another kind, of a kernel that Triton compiled for it
    shifted = torch.randn(1 + 8 * 8 * 32).bfloat16()[1:].view(1, 8, 8, 32).permute(0, 3, 1, 2)
    layer(shifted)
    *_, aligned, unaligned = (r.program for r in layer.recordings.values())
    assert aligned.steps[0].run is not unaligned.steps[0].run
    # what "auto" declines is the definition, without a launch
    for change in (torch.Tensor.float, lambda t: t.contiguous()):
        other = ConvNorm(32, 64, 3, stride=2).to(change(images[0]).dtype).eval()
        with fake_gpu.launched() as names:
            other(change(images[0]))
        assert names == [] and "recordings" not in other.__dict__
print("done")
"""


@pytest.mark.slow
def test_convolutions_of_a_network_are_a_launch_each():
    done = subprocess.run(
        [sys.executable, "-c", NETWORK], capture_output=True, text=True, timeout=600
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-2000:]


@pytest.mark.slow
def test_recorded_launches_have_the_arguments_of_the_ops():
    done = subprocess.run(
        [sys.executable, "-c", BLOCK], capture_output=True, text=True, timeout=600
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-2000:]


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
