"""Our StarNet against timm's on the CPU: inference and training, both layouts, in turn."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import nn

from benchmarks.harness.report import conditions, markdown_table
from benchmarks.harness.runner import Job, Records
from benchmarks.harness.study import Study
from benchmarks.harness.timing import interleave
from starlayers import use_backend, vision
from starlayers.vision import to_timm_state_dict

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
# What the project promises for S4 at batch 32, against timm's eager model in its best layout.
TARGETS = {"forward": 0.85, "fused forward": 0.75, "training step": 1.0}
TEXT = """\
## Speed: StarNet on a CPU

**What was done.** {model} at {image}x{image}, float32. Each task and batch size runs in a
process of its own, with its variants in turn after a check that all outputs agree. Times are
medians; ratios are medians within rounds to timm's eager model in whichever layout is faster.
Absolute times are of a shared machine and mean little.

{table}
**What this shows.**

- At batch {large} the [fused star MLP](../backends.md) gives nearly all of the gain: inference
  takes {fused:.2f} of timm's time, and {eager:.2f} with the eager backend, where our model
  computes what timm's does.
- A training step, most of which is convolutions and recomputed products, is about level
  ({training:.2f}).
- At batch 1 the hidden activation is small and there is little to gain ({one:.2f}); there
  `torch.compile` of timm's model is ahead of us ({compiled:.2f}).

A process that has trained before has heap to reuse and pays fewer page faults, which is why
every task has a process of its own.

**Conditions**

{conditions}
"""


def job(model: str = "starnet_s4", smoke: bool = False) -> Job:
    """Make the job: networks, batch sizes and images that are timed."""
    common = {"arm": None, "seed": None, "smoke": smoke}
    if smoke:
        return {**common, "model": "starnet_s050", "batches": [2], "image": 64}
    return {**common, "model": model, "batches": [1, 32], "image": 224}


def work(job: Job) -> dict[str, Any]:
    """Measure each task in a process of its own.

    A process that has trained before allocates memory faster.
    """
    rows: list[dict[str, Any]] = []
    for task in ("inference", "training"):
        for batch in job["batches"]:
            command = [sys.executable, "-m", "benchmarks.vision.speed", json.dumps(job), task]
            done = subprocess.run(
                [*command, str(batch)], stdout=subprocess.PIPE, text=True, check=True
            )
            rows += json.loads(done.stdout.splitlines()[-1])
    return {"rows": rows, "targets": TARGETS}


def measure(job: Job, task: str, batch: int) -> list[dict[str, Any]]:
    """Time all variants of a task in turn."""
    size, smoke = job["image"], job["smoke"]
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    variants, baselines = _variants(task, job["model"], x, compiled=not smoke)
    repeats = 2 if smoke else 15 if batch > 1 else 40
    warmup = 1 if smoke else 3
    times = interleave(variants, baselines=baselines, repeats=repeats, warmup=warmup)
    return [{"task": task, "batch": batch, "variant": k, **v} for k, v in times.items()]


def _variants(
    task: str, name: str, x: torch.Tensor, *, compiled: bool
) -> tuple[dict[str, Callable[[], object]], list[str]]:
    images = {layout: x.contiguous(memory_format=f) for layout, f in LAYOUTS.items()}
    ours = getattr(vision, name)()
    peers = {k: timm.create_model(name).to(memory_format=f) for k, f in LAYOUTS.items()}
    for p in peers.values():
        p.load_state_dict(to_timm_state_dict(ours))
    models: dict[str, tuple[nn.Module, str]] = {
        **{f"timm {layout}": (p, layout) for layout, p in peers.items()},
        "ours NCHW": (ours, "NCHW"),
        "ours channels_last": (ours, "channels_last"),
    }
    baselines = [f"timm {layout}" for layout in LAYOUTS]
    if compiled:
        models["timm channels_last, torch.compile"] = (
            torch.compile(peers["channels_last"]),  # type: ignore[dict-item]
            "channels_last",
        )
    make = _inference if task == "inference" else _training
    if task == "inference":
        fused = getattr(vision, name)()
        fused.load_state_dict(ours.state_dict())
        models["ours channels_last, fuse()"] = (fused.eval().fuse(), "channels_last")
    _check(models, images)
    runs = {key: make(m, images[layout]) for key, (m, layout) in models.items()}
    runs["ours channels_last, eager backend"] = _eager(make(ours, images["channels_last"]))
    return runs, baselines


def _check(models: dict[str, tuple[nn.Module, str]], images: dict[str, torch.Tensor]) -> None:
    """Raise where a variant computes something else than timm: no timing of a wrong result."""
    with torch.inference_mode():
        outputs = {k: m.eval()(images[layout]) for k, (m, layout) in models.items()}
    reference = outputs["timm NCHW"]
    for key, y in outputs.items():
        torch.testing.assert_close(y, reference, rtol=1e-4, atol=1e-5, msg=f"{key} differs")


def _inference(model: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    def run() -> object:
        model.eval()
        with torch.inference_mode():
            return model(x)

    return run


def _training(model: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    target = torch.zeros(len(x), dtype=torch.long)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def run() -> object:
        model.train()
        nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()
        return None

    return run


def _eager(run: Callable[[], object]) -> Callable[[], object]:
    def eager() -> object:
        with use_backend("eager"):
            return run()

    return eager


def table(rows: list[dict[str, Any]]) -> str:
    """Return medians, and ratios to timm's faster layout."""
    lines = [
        [
            row["task"],
            str(row["batch"]),
            row["variant"],
            f"{row['median_ms']:.0f}",
            f"{row['ratio']:.2f}",
        ]
        for row in rows
    ]
    return markdown_table(["task", "batch", "variant", "median ms", "ratio to best timm"], lines)


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))


def text(records: Records) -> str:
    """Make the page of StarNet's"""
    (record,) = records.values()
    assert record.definition is not None
    rows = record.metrics["rows"]
    ratio = {(row["task"], row["batch"], row["variant"]): row["ratio"] for row in rows}
    large = max(record.definition["batches"])
    ours = "ours channels_last"
    return TEXT.format(
        model=record.definition["model"],
        image=record.definition["image"],
        table=table(rows),
        large=large,
        fused=ratio["inference", large, ours],
        eager=ratio["inference", large, f"{ours}, eager backend"],
        training=ratio["training", large, ours],
        one=ratio["inference", 1, ours],
        compiled=ratio["inference", 1, "timm channels_last, torch.compile"],
        conditions=conditions([record]),
    )


STUDY = Study(
    "vision-speed",
    "python -m benchmarks.vision speed",
    lambda: {"speed": job()},
    work,
    lambda records: table(next(iter(records.values())).metrics["rows"]),
    text,
)
