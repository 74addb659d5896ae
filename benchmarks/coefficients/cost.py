"""Time and memory that a penalty on the coefficients adds to a training step of StarNet-S4."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness.report import conditions, first_definition, markdown_table
from benchmarks.harness.runner import Job, Records
from benchmarks.harness.study import Study
from benchmarks.harness.timing import cpu_clock, interleave
from starlayers import StarOp
from starlayers.coefficients import CoefficientPenalty, quadratic_form
from starlayers.vision import starnet_s4

BASELINE = "no penalty"
ARMS: dict[str, dict[str, Any]] = {
    "p=2": {"p": 2},
    "p=2 and balance": {"p": 2, "balance": 0.1},
    "p=1": {"p": 1},
    "p=1, its bound": {"p": 1, "bound": True},
}
STRENGTH = 1e-4
TEXT = """\
## Cost of a penalty on the coefficients

**What was done.** A training step of {model} at batch {batch}, {image} x {image}, on one core,
without and with each penalty in turn; medians of {repeats} rounds of CPU time, the machine busy
with other work, whose noise is a percent or two of a step. Memory in multiples of that of the
model's parameters.

{table}
**What this shows.** The bound of `p=1` costs {bound:.1f} % of a step where the norm itself costs
{full:.1f} %, and the norm `p=2` costs {two:.1f} %.

**Conditions**

{conditions}
"""


class LargestTensor(TorchDispatchMode):
    """Mode that records the size of the largest tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else [result]:
            if isinstance(t, Tensor):
                self.largest = max(self.largest, t.untyped_storage().nbytes())
        return result


def memory(penalty: CoefficientPenalty) -> dict[str, int]:
    """Return the bytes kept for the backward, and those of the largest tensor of both passes."""
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with LargestTensor() as tensors, saved_tensors_hooks(keep, lambda t: t):
        penalty().backward()
    return {"kept": sum(kept.values()), "largest": tensors.largest}


def check() -> None:
    """Raise where a penalty differs from that of the matrices: no time of a wrong result."""
    op = StarOp(12, 6, act=None, dtype=torch.float64)
    q = quadratic_form(op)
    for p, expected in ((2, q.square().sum()), (1, q.abs().sum())):
        penalty = CoefficientPenalty(op, p, normalise=False)()
        torch.testing.assert_close(penalty, expected)
        parameters = list(op.parameters())
        for a, b in zip(
            torch.autograd.grad(penalty, parameters),
            torch.autograd.grad(expected, parameters, retain_graph=True),
        ):
            torch.testing.assert_close(a, b)


def steps(
    model: nn.Module, penalties: dict[str, CoefficientPenalty], batch: int, size: int
) -> dict[str, Callable[[], object]]:
    """Return training steps without and with each of the penalties."""
    x = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(1000, (batch,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def step(penalty: CoefficientPenalty | None) -> None:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels)
        if penalty is not None:
            loss = loss + STRENGTH * penalty()
        loss.backward()
        optimizer.step()

    named = {BASELINE: None, **penalties}
    return {name: (lambda p=penalty: step(p)) for name, penalty in named.items()}


def job(smoke: bool = False) -> Job:
    """Make the job: penalties and sizes that are timed."""
    sizes = {"batch": 2, "image": 64, "repeats": 2}
    if not smoke:
        sizes = {"batch": 32, "image": 224, "repeats": 21}
    model = {"model": "starnet_s4", "penalties": ARMS, "strength": STRENGTH, "clock": "CPU"}
    return {"arm": None, "seed": None, **model, **sizes}


def work(job: Job) -> dict[str, Any]:
    """Time training steps without and with each penalty in turn, and each penalty alone."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    check()
    model = starnet_s4().train()
    penalties = {name: CoefficientPenalty(model, **options) for name, options in ARMS.items()}
    runs = steps(model, penalties, job["batch"], job["image"])
    repeats = job["repeats"]
    whole = interleave(runs, baselines=[BASELINE], repeats=repeats, clock=cpu_clock)
    # a step is some hundred times as long as its penalty: by itself that is measured more finely
    alone = interleave(
        {name: (lambda p=penalty: p().backward()) for name, penalty in penalties.items()},
        baselines=[next(iter(penalties))],
        repeats=repeats,
        clock=cpu_clock,
    )
    for name, penalty in penalties.items():
        whole[name] |= {
            "penalty_ms": alone[name]["median_ms"],
            "penalty_share": alone[name]["median_ms"] / whole[BASELINE]["median_ms"],
            **memory(penalty),
        }
    return {"parameter_bytes": sum(p.nbytes for p in model.parameters()), "rows": whole}


def table(result: dict[str, Any]) -> str:
    """Return times and memory of the penalties."""
    header = [
        "penalty",
        "step, s of CPU",
        "x no penalty",
        "penalty alone, ms",
        "share of a step",
        "kept, x parameters",
        "largest tensor, x parameters",
    ]
    body = []
    for name, row in result["rows"].items():
        cells = [name, f"{row['median_ms'] / 1e3:.2f}", f"{row['ratio']:.3f}"]
        if "penalty_ms" in row:
            cells += [f"{row['penalty_ms']:.1f}", f"{100 * row['penalty_share']:.2f} %"]
            cells += [f"{row[k] / result['parameter_bytes']:.2f}" for k in ("kept", "largest")]
        else:
            cells += ["-"] * 4
        body.append(cells)
    return markdown_table(header, body)


def text(records: Records) -> str:
    """Make the page of the cost of a penalty."""
    (record,) = records.values()
    share = {
        name: 100 * row["penalty_share"]
        for name, row in record.metrics["rows"].items()
        if "penalty_share" in row
    }
    fields = {n: first_definition(records)[n] for n in ("model", "batch", "image", "repeats")}
    return TEXT.format(
        **fields,
        table=table(record.metrics),
        bound=share["p=1, its bound"],
        full=share["p=1"],
        two=share["p=2"],
        conditions=conditions([record]),
    )


STUDY = Study(
    "coefficients-cost",
    "python -m benchmarks.coefficients cost",
    lambda: {"cost": job()},
    work,
    lambda records: table(next(iter(records.values())).metrics),
    text,
)
