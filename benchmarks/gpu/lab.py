"""What differs between a GPU and a dry run: sizes, compilers, CUDA graphs, clocks, counters."""

import gc
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any
from zlib import crc32

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

FLUSH_BYTES = 256 * 2**20  # several times the L2 cache of any GPU
LAUNCH = re.compile("cu(da)?(Launch|GraphLaunch|Memcpy|Memset)")

Run = Callable[[], object]
Tensors = Sequence[Tensor]


class Lab:
    """A GPU with full sizes."""

    device = torch.device("cuda")
    dry = False

    def size(self, full: Any, tiny: Any) -> Any:
        """Return the size to run at: `full` on a GPU, `tiny` in a dry run."""
        return full

    def randn(
        self,
        *shape: int,
        dtype: torch.dtype = torch.bfloat16,
        grad: bool = False,
        scale: float = 1,
        seed: int = 0,
    ) -> Tensor:
        """Return numbers that depend on the arguments alone, not on what was drawn before."""
        generator = torch.Generator(self.device).manual_seed(crc32(repr((shape, seed)).encode()))
        x = torch.randn(shape, generator=generator, device=self.device) * scale
        return x.to(dtype).requires_grad_(grad)

    def compiled(self, f: Callable[..., Any], mode: str | None = None) -> Callable[..., Any]:
        """Compile `f` for exactly the shapes it is called with."""
        return torch.compile(f, dynamic=False, mode=mode)

    def captured(self, run: Run) -> Run:
        """Return `run` as a CUDA graph, captured on the first call."""
        graph: torch.cuda.CUDAGraph | None = None

        def replay() -> None:
            nonlocal graph
            if graph is None:
                graph = _capture(run)
            graph.replay()

        return replay

    def clock(self, run: Run, sleep: float) -> tuple[float, float]:
        """Return the seconds until `run` has queued its launches, and until the GPU is done.

        The L2 cache is cold. The GPU sleeps for so many seconds before it begins: longer than the
        launches take to queue, and the second time is the GPU's own. With `sleep=0` both begin
        together, and the second time is what a caller waits for.
        """
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        if sleep:
            torch.cuda._sleep(int(sleep * self._cycles))
        else:
            torch.cuda.synchronize()
        start.record()
        began = time.perf_counter()
        run()
        queued = time.perf_counter() - began
        end.record()
        end.synchronize()
        return queued, start.elapsed_time(end) / 1e3

    @cached_property
    def _flush(self) -> Tensor:
        return torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self.device)

    @cached_property
    def _cycles(self) -> float:
        """Cycles of the GPU's clock a second, once it is awake."""
        cycles = 50_000_000
        for _ in range(3):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            torch.cuda._sleep(cycles)
            end.record()
            end.synchronize()
        return 1e3 * cycles / float(start.elapsed_time(end))

    def count(self, run: Run) -> dict[str, int]:
        """Count what the host launches in a run, and the kernels that the GPU executes for it."""
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            run()
            torch.cuda.synchronize()
        return counted(profiler.events() or ())

    def peak(self, run: Run) -> float:
        """Return the most memory, in MB, that a run adds."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6

    def held(self, forward: Run) -> float:
        """Return the memory, in MB, that the result of a forward keeps for its backward."""
        before = torch.cuda.memory_allocated()
        kept = forward()
        added = torch.cuda.memory_allocated() - before
        del kept
        return added / 1e6

    def prepare(self) -> None:
        """Let the baselines run as well as they can, and definitions in float32 be float32."""
        # a profiler that is set up anew for every count crashes CUDA graphs before CUDA 12.6
        os.environ |= {"DISABLE_CUPTI_LAZY_REINIT": "1", "TEARDOWN_CUPTI": "0"}
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

    def clean(self) -> None:
        """Leave nothing of one row for the next: memory, compiled code, shapes seen before.

        Raises:
            RuntimeError: the GPU does not answer this process any more, as after an access out of
                bounds.
        """
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def counted(events: Iterable[Any]) -> dict[str, int]:
    """Return the launches of the host and the kernels of the GPU among a profiler's events."""
    numbers = {"launches": 0, "kernels": 0}
    for event in events:
        if event.device_type == DeviceType.CUDA:
            numbers["kernels"] += not event.is_user_annotation
        else:
            numbers["launches"] += LAUNCH.match(event.name) is not None
    return numbers


def _capture(run: Run) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


class DryLab(Lab):
    """A CPU with tiny sizes and a plain stand-in for everything that needs a GPU.

    Kernels run in Triton's interpreter. Nothing is compiled, captured, timed or counted: every
    number is one of its unit.
    """

    device = torch.device("cpu")
    dry = True

    def size(self, full: Any, tiny: Any) -> Any:
        return tiny

    def compiled(self, f: Callable[..., Any], mode: str | None = None) -> Callable[..., Any]:
        return f

    def captured(self, run: Run) -> Run:
        return run

    def clock(self, run: Run, sleep: float) -> tuple[float, float]:
        return 1e-3, 1e-3

    def count(self, run: Run) -> dict[str, int]:
        return {"launches": 1, "kernels": 1}

    def peak(self, run: Run) -> float:
        return 1.0

    def held(self, forward: Run) -> float:
        return 1.0

    def prepare(self) -> None:
        torch.set_num_threads(1)

    def clean(self) -> None:
        pass  # collecting garbage takes longer than the rows


def make_lab(*, dry: bool) -> Lab:
    """Return the lab of a process, prepared."""
    lab = DryLab() if dry else Lab()
    lab.prepare()
    return lab
