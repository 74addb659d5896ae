"""Our StarNet against timm's on the CPU: inference and training step, both layouts, interleaved."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from benchmarks.common import RESULTS, environment, interleave, markdown_table, write_json
from starlayers import use_backend, vision
from starlayers.vision import to_timm_state_dict

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
# What the project promises for S4 at batch 32, against timm's eager model in its best layout.
TARGETS = {"forward": 0.85, "fused forward": 0.75, "training step": 1.0}


def run(model: str, smoke: bool, out: Path = RESULTS) -> None:
    """Each task in a process of its own: one that has trained before allocates memory faster."""
    name = "starnet_s050" if smoke else model
    rows: list[dict[str, Any]] = []
    for task in ("inference", "training"):
        for batch in (1, 2) if smoke else (1, 32):
            command = [sys.executable, "-m", "benchmarks.vision_speed", task, name, str(batch)]
            command += ["smoke"] if smoke else []
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows += json.loads(done.stdout.splitlines()[-1])
    print(table(rows))
    content = {"model": name, "rows": rows, "targets": TARGETS, "environment": environment()}
    write_json(out / ("speed-smoke.json" if smoke else f"speed-{name}.json"), content)


def measure(task: str, name: str, batch: int, smoke: bool) -> list[dict[str, Any]]:
    size = 64 if smoke else 224
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    variants, baselines = _variants(task, name, x, compiled=not smoke)
    repeats = 2 if smoke else 15 if batch > 1 else 40
    warmup = 1 if smoke else 3
    timings = interleave(variants, baselines=baselines, repeats=repeats, warmup=warmup)
    return [{"task": task, "batch": batch, "variant": k, **v} for k, v in timings.items()]


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
    """No timing of a wrong result."""
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
    body = [
        [
            row["task"],
            str(row["batch"]),
            row["variant"],
            f"{row['median_ms']:.0f}",
            f"{row['ratio']:.2f}",
        ]
        for row in rows
    ]
    return markdown_table(["task", "batch", "variant", "median ms", "ratio to best timm"], body)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2], int(sys.argv[3]), len(sys.argv) > 4)))
