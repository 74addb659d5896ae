"""Cost of a small star layer beside the same matrix products written out."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness.report import conditions, first_definition, markdown_table
from benchmarks.harness.runner import Job, Records
from benchmarks.harness.study import Study
from benchmarks.harness.timing import cpu_clock, interleave
from starlayers import StarMLP, StarOp

#: rows and channels of the input; the product has four times as many channels
SHAPES = ((1, 64), (8, 64), (8, 16))
TEXT = """\
## What a small layer costs

**Prediction.** At most 1.05 of the time of a module that calls `F.linear` for each of its linear
layers and multiplies, in inference and in a training step (forward and backward).

**What was done.** Layers of {expansion} times as many hidden channels, relu6, float32, one thread;
each layer and the module written out in turn, {calls} calls at a time, {rounds} rounds of CPU time.
The minimum is the least disturbed time.

{table}
**Conditions**

{conditions}
"""


class WrittenOut(nn.Module):
    """Products of two branches, and a linear layer behind them if `g`, by `F.linear`."""

    def __init__(self, dim: int, *, g: bool) -> None:
        super().__init__()
        self.f1, self.f2 = nn.Linear(dim, 4 * dim), nn.Linear(dim, 4 * dim)
        self.g = nn.Linear(4 * dim, dim) if g else None

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu6(F.linear(x, self.f1.weight, self.f1.bias))
        y = first * F.linear(x, self.f2.weight, self.f2.bias)
        return y if self.g is None else F.linear(y, self.g.weight, self.g.bias)


def pairs(dim: int) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Return name -> (our layer, the same written out, with its weights)."""
    layers = {"StarMLP": StarMLP(dim), "StarOp": StarOp(dim, 4 * dim)}
    made: dict[str, tuple[nn.Module, nn.Module]] = {}
    for name, layer in layers.items():
        plain = WrittenOut(dim, g=name == "StarMLP")
        plain.load_state_dict(layer.state_dict())
        made[name] = (layer, plain)
    return made


def repeated(module: nn.Module, x: Tensor, calls: int, *, training: bool) -> Callable[[], None]:
    """Return a function that calls a module so many times."""

    def inference() -> None:
        with torch.no_grad():
            for _ in range(calls):
                module(x)

    def step() -> None:
        for _ in range(calls):
            module(x).sum().backward()

    return step if training else inference


def job(smoke: bool = False) -> Job:
    """Make the job: shapes, calls and rounds."""
    sizes = {"calls": 10, "rounds": 2} if smoke else {"calls": 300, "rounds": 100}
    return {"arm": None, "seed": None, "shapes": SHAPES, "act": "relu6", "clock": "CPU", **sizes}


def work(job: Job) -> dict[str, Any]:
    """Time every layer and task in turn with the module written out."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows: dict[str, dict[str, float]] = {}
    for batch, dim in job["shapes"]:
        x = torch.randn(batch, dim)
        for name, (layer, plain) in pairs(dim).items():
            torch.testing.assert_close(layer(x), plain(x))  # no time of a wrong result
            for task in ("inference", "training"):
                calls = job["calls"] // (1 if task == "inference" else 3) or 1
                timed = interleave(
                    {
                        "ours": repeated(layer, x, calls, training=task == "training"),
                        "plain": repeated(plain, x, calls, training=task == "training"),
                    },
                    baselines=["plain"],
                    repeats=job["rounds"],
                    clock=cpu_clock,
                )
                rows[f"{name}, {batch} x {dim}, {task}"] = {
                    "ours_us": 1e3 * timed["ours"]["min_ms"] / calls,
                    "plain_us": 1e3 * timed["plain"]["min_ms"] / calls,
                    "minima": timed["ours"]["min_ms"] / timed["plain"]["min_ms"],
                    "median": timed["ours"]["ratio"],
                }
    return {"rows": rows}


def table(records: Records) -> str:
    """Return the times and ratios."""
    (record,) = records.values()
    header = ["layer", "us", "written out, us", "ratio of minima", "median ratio"]
    body = [
        [name, *(f"{r[k]:.1f}" for k in ("ours_us", "plain_us")), *(f"{r[k]:.3f}" for k in
         ("minima", "median"))]
        for name, r in record.metrics["rows"].items()
    ]  # fmt: skip
    return markdown_table(header, body)


def text(records: Records) -> str:
    """Make the page's part."""
    (record,) = records.values()
    return TEXT.format(
        expansion=4,
        **{name: first_definition(records)[name] for name in ("calls", "rounds")},
        table=table(records),
        conditions=conditions([record]),
    )


STUDY = Study(
    "core-overhead", "python -m benchmarks.core overhead", lambda: {"overhead": job()}, work,
    table, text,
)  # fmt: skip
