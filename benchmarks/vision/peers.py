"""StarNets against networks of similar size, trained with one recipe on Fashion-MNIST."""

from typing import Any

from torch import nn

from benchmarks.harness.comparison import mean_interval, with_half
from benchmarks.harness.images import recipe, train_on_images
from benchmarks.harness.report import conditions, listed, markdown_table
from benchmarks.harness.runner import Job, Records, current
from benchmarks.harness.study import Study

NAME = "vision-peers"
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
TEXT = """\
## Study: StarNets and networks of similar size

**What was done.** One recipe on Fashion-MNIST ({epochs} epochs, AdamW, peak rate {lr:g}, label
smoothing {smoothing:g}, flips; tuned for none of the networks), each network as published except
that its first strided layer keeps stride 1.

{accuracies}
Size, multiply-adds (MACs) and median latency in milliseconds on the CPU, networks timed in turn:

{costs}
**What this shows, and what it does not.**

- *{seeds} each so far: differences of a few tenths mean nothing, and no difference has an
  interval.* The StarNets are at {star_low:.1f} to {star_high:.1f} %, the others at
  {peer_low:.1f} to {peer_high:.1f} % after equally many epochs.
- The StarNets have up to {macs:.1f} times the multiply-adds of the network with the next larger
  number of parameters, and the latency of one image is about the same.
- {epochs} epochs are a short race and say nothing about the end of a long one.
- In the study and not run yet: {missing}.

**Conditions**

{conditions}
The costs:

{cost_conditions}
"""


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


def text(records: Records) -> str:
    """Make the page of the networks of similar size."""
    summary = summarise(records)
    cost = current(NAME, COSTS.jobs())["cost"]
    accuracy = {name: mean for name, (_, (mean, _)) in summary.items()}
    star, other = (
        [value for name, value in accuracy.items() if name.startswith("starnet") is ours]
        for ours in (True, False)
    )
    counts = sorted({seeds for seeds, _ in summary.values()})
    first = next(iter(records.values()))
    assert first.definition is not None
    return TEXT.format(
        epochs=first.definition["recipe"]["epochs"],
        lr=first.definition["recipe"]["lr"],
        smoothing=first.definition["recipe"]["label_smoothing"],
        accuracies=accuracy_table(records),
        costs=cost_table(cost.metrics),
        seeds="One seed" if counts == [1] else f"{listed(map(str, counts))} seeds",
        star_low=min(star),
        star_high=max(star),
        peer_low=min(other),
        peer_high=max(other),
        macs=_most_macs(cost.metrics),
        missing=listed(name for name in MODELS if name not in summary),
        conditions=conditions(records.values()),
        cost_conditions=conditions([cost]),
    )


def _most_macs(costs: dict[str, dict[str, float]]) -> float:
    """Return the largest ratio of a StarNet's MACs to those of the next larger other network."""
    others = [c for name, c in costs.items() if not name.startswith("starnet")]
    ratios = []
    for name, ours in costs.items():
        larger = [c for c in others if c["parameters"] >= ours["parameters"]]
        if name.startswith("starnet") and larger:
            nearest = min(larger, key=lambda c: c["parameters"])
            ratios.append(ours["multiply_adds"] / nearest["multiply_adds"])
    return max(ratios)


STUDY = Study(
    NAME,
    "python -m benchmarks.vision peers",
    jobs,
    train_one,
    accuracy_table,
    text,
)


COSTS = Study(
    NAME,
    "python -m benchmarks.vision peers",
    lambda: {"cost": cost_job(list(summarise(current(NAME, jobs()))), smoke=False)},
    cost,
    lambda records: cost_table(next(iter(records.values())).metrics),
    lambda _: "",
)
