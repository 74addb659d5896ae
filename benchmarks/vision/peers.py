"""StarNets against networks of similar size, trained with one recipe on Fashion-MNIST."""

from typing import Any

from torch import nn

from benchmarks.harness.comparison import mean_interval, with_half
from benchmarks.harness.report import markdown_table
from benchmarks.harness.runner import Job, Records
from benchmarks.vision.training import recipe, train_on_images

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
    """Make the network for 28x28 grey images: as published, but its first stride is 1.

    That is the least change that leaves every network more than one pixel at its end, and it is
    the same for all of them.
    """
    import timm
    import torchvision

    from starlayers import vision

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


def train_one(job: Job) -> dict[str, Any]:
    """Train the job's network from its seed."""
    import torch

    torch.manual_seed(job["seed"])
    return train_on_images(build(job["arm"]), job)


def jobs(seeds: int = 3, smoke: bool = False) -> dict[str, Job]:
    """Make a job for every network and seed."""
    size = {"train": 256, "test": 256} if smoke else {"train": None, "test": None}
    common = {"data": "fashion-mnist", "recipe": recipe(smoke, **RECIPE), **size}
    models = (MODELS[0], MODELS[3]) if smoke else MODELS
    return {
        f"{model.replace(' ', '-')}-seed{seed}": {
            "arm": model,
            "seed": seed,
            "first_stride": 1,
            **common,
        }
        for seed in range(seeds)
        for model in models
    }


def cost_job(names: list[str], smoke: bool) -> Job:
    """Make the job that measures what the networks cost."""
    repeats = 3 if smoke else 50
    return {"arm": None, "seed": None, "models": names, "batches": [1, 32], "repeats": repeats}


def cost(job: Job) -> dict[str, Any]:
    """Count parameters and multiply-adds, and time one image and a batch, networks in turn."""
    import torch

    from benchmarks.harness.timing import interleave
    from starlayers.vision.cost import multiply_adds

    models = {name: build(name).eval() for name in job["models"]}
    costs: dict[str, dict[str, float]] = {name: {} for name in models}
    for name, model in models.items():
        costs[name]["parameters"] = sum(p.numel() for p in model.parameters())
        costs[name]["multiply_adds"] = multiply_adds(model, (1, 28, 28))
    for batch in job["batches"]:
        x = torch.randn(batch, 1, 28, 28).contiguous(memory_format=torch.channels_last)

        def forward(model: nn.Module, x: torch.Tensor = x) -> torch.Tensor:
            with torch.inference_mode():
                return model(x)  # type: ignore[no-any-return]

        runs = {name: lambda m=m: forward(m) for name, m in models.items()}
        first = job["models"][0]
        times = interleave(runs, baselines=[first], repeats=job["repeats"], warmup=3)
        for name in models:
            costs[name][f"ms_batch_{batch}"] = times[name]["median_ms"]
    return costs


def summarise(records: Records) -> dict[str, tuple[int, tuple[float, float]]]:
    """Return for each network the number of seeds and the interval of its accuracy."""
    summary = {}
    for model in MODELS:
        values = [100 * r.metrics["test_accuracy"] for r in records.values() if r.arm == model]
        if values:
            summary[model] = (len(values), mean_interval(values))
    return summary


def accuracy_table(records: Records) -> str:
    """Return accuracies with their intervals; the mean alone of a single seed."""
    lines = [
        [model, str(seeds), with_half(pair, 2) if seeds > 1 else f"{pair[0]:.2f}"]
        for model, (seeds, pair) in summarise(records).items()
    ]
    return markdown_table(["model", "seeds", "accuracy, %"], lines)


def cost_table(costs: dict[str, dict[str, float]]) -> str:
    """Return sizes and times of the networks."""
    header = ["model", "parameters, M", "MACs, M", "ms, batch 1", "ms, batch 32"]
    lines = [
        [
            name,
            f"{row['parameters'] / 1e6:.2f}",
            f"{row['multiply_adds'] / 1e6:.1f}",
            f"{row['ms_batch_1']:.1f}",
            f"{row['ms_batch_32']:.1f}",
        ]
        for name, row in costs.items()
    ]
    return markdown_table(header, lines)
