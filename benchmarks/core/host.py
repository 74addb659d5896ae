"""Time that Python needs to launch a fused StarBlock2d, on a machine without a GPU."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.harness import fake_gpu
from benchmarks.harness.report import conditions, first_definition, markdown_table
from benchmarks.harness.runner import Job, Records
from benchmarks.harness.study import Study
from benchmarks.harness.timing import cpu_clock, interleave

TEXT = """\
## What launching a fused block costs

**Prediction.** A fused StarBlock2d needs at most the host time of its definition: without gradients
three launches and nothing else, so a tenth of it.

**What was done.** A block of {channels} channels on one image of {side} x {side}, one thread. The
driver below Triton launches nothing; the definition computes its small convolutions on the CPU,
which is a part of its time. Fused block and definition in turn, {calls} calls at a time, {rounds}
rounds of CPU time. Operations are those of PyTorch that would launch a kernel of their own. For
StarNet-S4, folded, on one image of 32 x 32, ours is what happens around the launch of a CUDA graph:
the network is compared with what was captured, input and result are copied. Tracing is what
torch.compile does before it generates code, of two blocks with gradients.

{table}
**Conditions**

{conditions}
"""


#: row of a whole network in a graph
REPLAYED = "StarNet-S4, fuse(graph=True)"
#: row of the time that tracing takes
TRACED = "two blocks traced, training"


def job(smoke: bool = False) -> Job:
    """Make the job: block, calls and rounds."""
    sizes = {"calls": 2, "rounds": 2, "traces": 1}
    sizes = sizes if smoke else {"calls": 100, "rounds": 30, "traces": 9}
    return {"arm": None, "seed": None, "channels": 32, "side": 7, "clock": "CPU", **sizes}


def work(job: Job) -> dict[str, Any]:
    """Measure in a process of its own, in which nothing was imported with a GPU that computes."""
    command = [sys.executable, "-m", "benchmarks.core.host", json.dumps(job)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return {"rows": json.loads(done.stdout.splitlines()[-1])}


def measure(job: Job) -> dict[str, dict[str, float]]:
    """Time a block without gradients, with its norms folded, and in a training step."""
    fake_gpu.install()
    from starlayers import use_backend
    from starlayers.vision import StarBlock2d

    torch.set_num_threads(1)
    torch.manual_seed(0)
    channels, side = job["channels"], job["side"]
    shape = (1, channels, side, side)
    x = torch.randn(shape).to(memory_format=torch.channels_last)
    folded, plain = (StarBlock2d(channels).bfloat16().eval() for _ in range(2))
    folded.fuse()
    training = StarBlock2d(channels)
    with_grad = x.bfloat16().requires_grad_()  # as the layer in front of it yields it
    upstream = torch.randn_like(x.bfloat16())

    def inference(block: Any) -> Callable[[], None]:
        image = x.bfloat16()

        def call() -> None:
            with torch.inference_mode():
                block(image)

        return call

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            y = training(with_grad)
        torch.autograd.grad(y, (with_grad, *training.parameters()), upstream)

    cases = {"inference": inference(plain), "folded": inference(folded), "training step": step}
    rows: dict[str, dict[str, float]] = {}
    for name, call in cases.items():
        call()
        call()
        with fake_gpu.launched() as kernels:
            call()
        with fake_gpu.operations() as operations:
            call()

        def defined(call: Callable[[], None] = call) -> None:
            with use_backend("eager"):
                call()

        calls = job["calls"]
        timed = interleave(
            {"ours": _times(call, calls), "definition": _times(defined, calls)},
            baselines=["definition"],
            repeats=job["rounds"],
            clock=cpu_clock,
        )
        rows[name] = {
            "launches": len(kernels),
            "operations": len(operations),
            "ours_us": 1e3 * timed["ours"]["min_ms"] / calls,
            "definition_us": 1e3 * timed["definition"]["min_ms"] / calls,
            "ratio": timed["ours"]["ratio"],
        }
    timed = interleave(
        {"ours": _times(_whole(graph=True), job["calls"]), "definition": _whole(graph=False)},
        baselines=["definition"],
        repeats=job["rounds"],
        clock=cpu_clock,
    )
    rows[REPLAYED] = {
        "launches": 1,
        "ours_us": 1e3 * timed["ours"]["min_ms"] / job["calls"],
        "definition_us": 1e3 * timed["definition"]["min_ms"],
        "ratio": timed["ours"]["ratio"] / job["calls"],
    }
    timed = interleave(
        {"ours": partial(_trace, channels), "definition": partial(_trace, channels, "eager")},
        baselines=["definition"],
        repeats=job["traces"],
        clock=cpu_clock,
    )
    rows[TRACED] = {
        "ours_us": 1e3 * timed["ours"]["min_ms"],
        "definition_us": 1e3 * timed["definition"]["min_ms"],
        "ratio": timed["ours"]["ratio"],
    }
    return rows


def _whole(graph: bool) -> Callable[[], None]:
    """Return a call of a folded StarNet-S4, by a graph that launches nothing or step by step."""
    from starlayers.vision import graphs, starnet_s4

    def capture(model: Any, source: torch.Tensor, pool: object) -> tuple[Any, torch.Tensor]:
        return SimpleNamespace(replay=lambda: None), graphs.run(model, source)

    graphs.capture = capture
    graphs.DEVICES.add("cpu")
    model, image = starnet_s4().fuse(graph=graph), torch.randn(1, 3, 32, 32)

    def call() -> None:
        with torch.inference_mode():
            model(image)

    return call


def _trace(channels: int, backend: str = "auto") -> None:
    """Trace two blocks, forward and backward, without generating code."""
    from starlayers import use_backend
    from starlayers.vision import StarBlock2d

    torch._dynamo.reset()
    blocks = torch.nn.Sequential(*(StarBlock2d(channels) for _ in range(2)))
    compiled = torch.compile(blocks, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, channels, 14, 14).bfloat16().to(memory_format=torch.channels_last)
    with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
        y = compiled(x.requires_grad_())
    y.sum().backward()


def _times(call: Callable[[], None], calls: int) -> Callable[[], None]:
    def repeated() -> None:
        for _ in range(calls):
            call()

    return repeated


def table(records: Records) -> str:
    """Return launches, operations and times."""
    (record,) = records.values()
    header = ["block", "launches", "operations", "us", "definition, us", "median ratio"]
    body = [
        [name, str(r.get("launches", "")), str(r.get("operations", "")), f"{r['ours_us']:.1f}",
         f"{r['definition_us']:.1f}", f"{r['ratio']:.2f}"]
        for name, r in record.metrics["rows"].items()
    ]  # fmt: skip
    return markdown_table(header, body)


def text(records: Records) -> str:
    """Make the page's part."""
    (record,) = records.values()
    names = ("channels", "side", "calls", "rounds")
    return TEXT.format(
        **{name: first_definition(records)[name] for name in names},
        table=table(records),
        conditions=conditions([record]),
    )


STUDY = Study(
    "core-host", "python -m benchmarks.core host", lambda: {"host": job()}, work, table, text
)

if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
