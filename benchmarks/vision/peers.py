"""StarNets against peers of similar size, trained with one recipe on Fashion-MNIST."""

from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import nn

from benchmarks.common import (
    RESULTS,
    environment,
    interleave,
    markdown_table,
    mean_interval,
    run_study,
    write_json,
)
from benchmarks.data import benchmark_images
from starlayers import vision
from starlayers.vision.cost import multiply_adds

MODELS = [
    "starnet_s050",
    "starnet_s100",
    "starnet_s150",
    "timm mobilenetv3_small_050",
    "timm mobilenetv3_small_100",
    "timm lcnet_050",
    "timm efficientnet_lite0",
    "torchvision shufflenet_v2_x0_5",
]
RECIPE = {
    "epochs": 2,
    "batch_size": 128,
    "lr": 4e-3,
    "weight_decay": 0.05,
    "label_smoothing": 0.1,
    "flip": 0.5,
}


def build(name: str) -> nn.Module:
    """The network for 28x28 grey images: as published, but the first strided layer keeps stride 1.

    That is the least change that leaves every network more than one pixel at its end, and it is
    the same for all of them.
    """
    if name.startswith("starnet"):
        model: nn.Module = getattr(vision, name)(num_classes=10, in_chans=1, stem_stride=1)
        return model
    library, peer = name.split()
    if library == "timm":
        model = timm.create_model(peer, num_classes=10, in_chans=1)
    else:
        model = getattr(torchvision.models, peer)(num_classes=10)
        old = model.conv1[0]
        model.conv1[0] = nn.Conv2d(1, old.out_channels, 3, stride=2, padding=1, bias=False)
    strided = (m for m in model.modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2))
    next(strided).stride = (1, 1)
    return model


def train_one(job: dict[str, Any]) -> dict[str, Any]:
    from starlayers.vision.training import TrainConfig, train

    data = benchmark_images(train=job["train"], test=job["test"])
    torch.manual_seed(job["seed"])
    model = build(job["model"])
    result = train(model, data, TrainConfig(**job["recipe"], seed=job["seed"]), progress=False)
    return {"test_accuracy": result.test_accuracy, "history": result.history}


def jobs(seeds: int, smoke: bool) -> dict[str, dict[str, Any]]:
    recipe = {**RECIPE, "epochs": 1, "batch_size": 64} if smoke else RECIPE
    size = {"train": 256, "test": 256} if smoke else {"train": None, "test": None}
    models = (MODELS[0], MODELS[3]) if smoke else MODELS
    return {
        f"{model.replace(' ', '-')}-seed{seed}": {
            "model": model,
            "seed": seed,
            "recipe": recipe,
            **size,
        }
        for seed in range(seeds)
        for model in models
    }


def costs(names: list[str], smoke: bool) -> dict[str, dict[str, float]]:
    """Parameters, multiply-adds and latency for one image and for 32, interleaved."""
    models = {name: build(name).eval() for name in names}
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    for name, model in models.items():
        found[name]["parameters"] = sum(p.numel() for p in model.parameters())
        found[name]["multiply_adds"] = multiply_adds(model, (1, 28, 28))
    for batch in (1, 32):
        x = torch.randn(batch, 1, 28, 28).contiguous(memory_format=torch.channels_last)

        def forward(model: nn.Module, x: torch.Tensor = x) -> torch.Tensor:
            with torch.inference_mode():
                return model(x)  # type: ignore[no-any-return]

        runs = {name: lambda m=m: forward(m) for name, m in models.items()}
        repeats = 3 if smoke else 50
        timings = interleave(runs, baselines=[names[0]], repeats=repeats, warmup=3)
        for name in names:
            found[name][f"ms_batch_{batch}"] = timings[name]["median_ms"]
    return found


def run(seeds: int, processes: int, smoke: bool, out: Path = RESULTS) -> None:
    folder = out / ("peers-smoke" if smoke else "peers")
    todo = jobs(seeds, smoke)
    records = run_study(folder, todo, train_one, processes=processes)
    names = list(dict.fromkeys(record["job"]["model"] for record in records.values()))
    cost = costs(names, smoke)
    rows = []
    for name in names:
        values = [100 * r["test_accuracy"] for r in records.values() if r["job"]["model"] == name]
        rows.append(
            {"model": name, "seeds": len(values), "accuracy": mean_interval(values), **cost[name]}
        )
    print(table(rows))
    write_json(folder.with_suffix(".json"), {"rows": rows, "environment": environment()})


def table(rows: list[dict[str, Any]]) -> str:
    header = [
        "model",
        "seeds",
        "accuracy %",
        "parameters M",
        "MACs M",
        "ms, batch 1",
        "ms, batch 32",
    ]
    body = [
        [
            row["model"],
            str(row["seeds"]),
            "{:.2f} ± {:.2f}".format(*row["accuracy"]),
            f"{row['parameters'] / 1e6:.2f}",
            f"{row['multiply_adds'] / 1e6:.1f}",
            f"{row['ms_batch_1']:.1f}",
            f"{row['ms_batch_32']:.1f}",
        ]
        for row in rows
    ]
    return markdown_table(header, body)
