"""Deep stacks of stars without norms on a formula: PyTorch's start and the near-linear one."""

from collections import defaultdict
from itertools import pairwise
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.comparison import mean_interval
from benchmarks.harness.records import Record
from benchmarks.harness.report import conditions, first_definition, markdown_table
from benchmarks.harness.runner import Job, Records
from benchmarks.harness.study import Study
from starlayers import StarOp

LAYERS, STAR_WIDTH, MLP_WIDTH = 5, 32, 46
RATES = (1e-3, 3e-3, 1e-2)
#: name -> options of the stars; `None` for the MLP
ARMS: dict[str, dict[str, Any] | None] = {
    "GELU MLP": None,
    "star": {"act": None},
    "star, near-linear": {"act": None, "offset": 1.0, "init": "near_linear"},
    "star silu": {"act": "silu"},
    "star silu, near-linear": {"act": "silu", "offset": 1.0, "init": "near_linear"},
}
TEXT = """\
## The start of deep stacks

**Prediction.** {layers} star layers without norms reach at least the accuracy of a GELU MLP of the
same size if they start near-linear (`init="near_linear"`, `offset=1`); with PyTorch's start they
are a hundred times worse.

**What was done.** Feynman I.24.6, `m (omega^2 + omega_0^2) x^2 / 4`, inputs uniform in [1, 3],
{points} points to train on, as many for validation and for the test, all scaled by the mean and
deviation of those to train on; {layers} hidden layers and a linear one, about {parameters:,}
parameters in every arm, AdamW, {steps} full-batch steps, a cosine. `-log10 NMSE` on test, means
over {seeds} seeds at each rate, and with 95 % intervals at the rate with the best mean on
validation: more is better, 2 more is a hundred times less error.

{table}
**What this shows.** At rate {low:g} stars without activation come to {near:.2f} from the
near-linear start and to {usual:.2f} from PyTorch's, {times:.0f} times the error, where the MLP is
at {mlp:.2f}. With the rate tuned for each arm the three are at {near_tuned:.2f}, {usual_tuned:.2f}
and {mlp_tuned:.2f}: the near-linear start is level with the MLP within the intervals, and what
remains of the default's handicap is a factor of {times_tuned:.0f} in the error.

**Conditions**

{conditions}
"""


def network(arm: str) -> nn.Sequential:
    """Build the network of an arm."""
    options = ARMS[arm]
    sizes = [4, *[STAR_WIDTH if options is not None else MLP_WIDTH] * LAYERS]
    layers: list[nn.Module] = []
    for n, width in pairwise(sizes):
        if options is None:
            layers += [nn.Linear(n, width), nn.GELU()]
        else:
            layers.append(StarOp(n, width, **options))
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 1))


def points(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw inputs (count, 4) and values (count, 1) of the formula."""
    draw = torch.Generator().manual_seed(seed)
    x = 1 + 2 * torch.rand(count, 4, generator=draw, dtype=torch.float64)
    m, omega, omega0, length = x.T
    return x, (m * (omega**2 + omega0**2) * length**2 / 4)[:, None]


def jobs(smoke: bool = False, seeds: int = 3) -> dict[str, Job]:
    """Make the jobs: every arm at every rate and seed."""
    sizes = {"points": 500, "steps": 20 if smoke else 1500, "layers": LAYERS}
    return {
        f"{arm}, {rate}, {seed}": {"arm": arm, "seed": seed, "rate": rate, **sizes,
                                   "options": ARMS[arm]}
        for arm in ARMS
        for rate in (RATES[:1] if smoke else RATES)
        for seed in range(1 if smoke else seeds)
    }  # fmt: skip


def work(job: Job) -> dict[str, Any]:
    """Train one network; return its error on validation and test."""
    torch.manual_seed(job["seed"])
    net = network(job["arm"])
    drawn = [points(job["points"], 1000 * job["seed"] + part) for part in range(3)]
    scales = [(t.mean(0), t.std(0)) for t in drawn[0]]
    data = [
        tuple(((t - mean) / deviation).float() for t, (mean, deviation) in zip(part, scales))
        for part in drawn
    ]
    optimizer = torch.optim.AdamW(net.parameters(), lr=job["rate"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, job["steps"])
    x, y = data[0]
    for _ in range(job["steps"]):
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        errors = [((net(a) - b).square().mean() / b.var()).item() for a, b in data[1:]]
    parameters = sum(p.numel() for p in net.parameters())
    return {"validation_nmse": errors[0], "test_nmse": errors[1], "parameters": parameters}


def accuracy(nmse: float) -> float:
    """Return `-log10` of an error; -10 for one that is not finite."""
    error = torch.tensor(nmse, dtype=torch.float64)
    return -error.log10().item() if error.isfinite() else -10.0


def rate_of(record: Record) -> float:
    """Return the learning rate of a run."""
    return float((record.definition or {})["rate"])


def by_rate(records: Records, metric: str) -> dict[str, dict[float, list[float]]]:
    """Return arm -> rate -> accuracies of the seeds."""
    runs: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records.values():
        runs[record.arm or ""][rate_of(record)].append(accuracy(record.metrics[metric]))
    return runs


def tuned(records: Records) -> dict[str, float]:
    """Return arm -> rate with the best mean on validation."""
    runs = by_rate(records, "validation_nmse")
    return {arm: max(rates, key=lambda r: mean(rates[r])) for arm, rates in runs.items()}


def table(records: Records) -> str:
    """Return the accuracies of the arms."""
    body, best = [], tuned(records)
    for arm, rates in by_rate(records, "test_nmse").items():
        cells = [arm, *(f"{mean(rates[rate]):.2f}" for rate in rates), f"{best[arm]:g}"]
        values = rates[best[arm]]
        half = f" +- {mean_interval(values)[1]:.2f}" if len(values) > 1 else ""
        body.append([*cells, f"{mean(values):.2f}{half}"])
    columns = sorted({rate_of(r) for r in records.values()})
    header = [
        "hidden layers",
        *(f"rate {rate:g}" for rate in columns),
        "tuned rate",
        "at that rate",
    ]
    return markdown_table(header, body)


def text(records: Records) -> str:
    """Make the page's part."""
    runs, best = by_rate(records, "test_nmse"), tuned(records)
    names = {"near": "star, near-linear", "usual": "star", "mlp": "GELU MLP"}
    low = min(RATES)
    at_low = {key: mean(runs[arm][low]) for key, arm in names.items()}
    at_best = {f"{key}_tuned": mean(runs[arm][best[arm]]) for key, arm in names.items()}
    d = first_definition(records)
    return TEXT.format(
        **{name: d[name] for name in ("layers", "points", "steps")},
        seeds=len({r.seed for r in records.values()}),
        parameters=next(iter(records.values())).metrics["parameters"],
        table=table(records),
        low=low,
        **at_low,
        **at_best,
        times=10 ** (at_low["near"] - at_low["usual"]),
        times_tuned=10 ** (at_best["near_tuned"] - at_best["usual_tuned"]),
        conditions=conditions(records.values()),
    )


STUDY = Study("core-start", "python -m benchmarks.core start", jobs, work, table, text)
