"""Search for coefficients of a star classifier, then tune those of the best net.

python examples/star_search.py                         # Fashion-MNIST, two minutes on a CPU
python examples/star_search.py --trials 100            # continues the last call
python examples/star_search.py --data digits --methods "tpe cma"
"""

import copy
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure
from torch import Tensor, nn

from starlayers import StarBlock
from starlayers.coefficients import (
    CoefficientPenalty,
    SearchResult,
    apply_initialisation,
    coefficient_space,
    search,
    tune_coefficients,
)
from starlayers.coefficients.modules import RankStarMLP
from starlayers.datasets.images import load_images

Split = tuple[Tensor, Tensor]
#: name of a net -> validation and test accuracy
Accuracies = dict[str, tuple[float, float]]
#: numbers only, because CMA-ES has no categorical values and all methods get the same space
SEARCHED = ("l2", "gain1", "gain2", "offset", "rank", "layer_scale_0", "layer_scale_1")


def splits(data: Any, seed: int, limit: int = 2000) -> dict[str, Split]:
    """Draw few images for training and as many for validation; take all test images."""
    n = min(limit, len(data.train) // 2)
    drawn = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))
    halves = {"train": drawn[:n], "validation": drawn[n : 2 * n]}
    parts = {name: data.train[i] for name, i in halves.items()} | {"test": data.test[:]}
    return {
        name: ((pixels.float().flatten(1) / 255 - data.mean[0]) / data.std[0], labels)
        for name, (pixels, labels) in parts.items()
    }


def fit(values: dict[str, Any], data: Split, steps: int, seed: int) -> nn.Module:
    """Train a net with two star layers of these values; equal arguments, equal nets."""
    torch.manual_seed(seed)
    mlps = [RankStarMLP(32, 64, rank=values.get("rank", 1)) for _ in range(2)]
    blocks = [StarBlock(32, mlp, pre=nn.LayerNorm(32)) for mlp in mlps]
    pixels, labels = data
    net = nn.Sequential(nn.Linear(pixels.shape[1], 32), *blocks, nn.Linear(32, 10))
    apply_initialisation(net, values)
    penalty, strength = CoefficientPenalty(net, p=2), values.get("l2", 0.0)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        i = torch.randint(len(labels), (128,))
        loss = nn.functional.cross_entropy(net(pixels[i]), labels[i]) + strength * penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


@torch.inference_mode()
def accuracy(net: nn.Module, data: Split) -> float:
    pixels, labels = data
    return float((net(pixels).argmax(1) == labels).double().mean())


def plot(results: dict[str, SearchResult], scores: Accuracies, scales: Any, file: Path) -> None:
    """Draw accuracy over trials, accuracy of the nets, and factors of the products."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    progress, final, factors = figure.subplots(1, 3)
    for name, result in results.items():
        curve = [100 * value for value in result.best_so_far]
        progress.step(range(1, len(curve) + 1), curve, where="post", label=name)
    progress.axhline(100 * scores["defaults"][0], color="k", ls=":", label="defaults")
    progress.set(xlabel="trials", ylabel="best validation accuracy so far, %")
    for i, pair in enumerate(scores.values()):
        final.plot([i, i], [100 * p for p in pair], color="0.8", zorder=0)
    for name, values in zip(("validation", "test"), zip(*scores.values())):
        final.plot(range(len(scores)), [100 * v for v in values], "o", label=name)
    final.set_xticks(range(len(scores)), scores, rotation=30, ha="right")
    final.set(ylabel="accuracy, %")
    for name, scale in scales.items():
        factors.plot(scale.sort(descending=True).values, label=f"layer {name}")
    factors.axhline(1, color="k", ls=":")
    factors.set(xlabel="products of a layer, sorted", ylabel="factor after tuning")
    for ax in (progress, final, factors):
        ax.grid(alpha=0.3)
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    figure.savefig(file, dpi=120)


def main(
    data: Annotated[str, typer.Option(help="fashion-mnist or digits")] = "fashion-mnist",
    methods: Annotated[str, typer.Option(help="of search")] = "tpe gp cma random",
    trials: Annotated[int, typer.Option(help="of each method")] = 30,
    steps: Annotated[int, typer.Option(help="of training in a trial")] = 250,
    tuning: Annotated[int, typer.Option(help="trials of tuning")] = 300,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="folder of the run")] = Path("runs/star_search"),
) -> Accuracies:
    """Compare search methods, then tune the products of the best net."""
    torch.set_num_threads(1)  # nets this small are slower with a second thread
    images = load_images(data)
    parts = splits(images, seed)
    sizes = ", ".join(f"{len(labels)} {name}" for name, (_, labels) in parts.items())
    print(f"data: {images.source}; images: {sizes}; seed {seed}")
    space = {name: coefficient_space(layers=2)[name] for name in SEARCHED}

    def objective(trial: Any) -> float:
        return accuracy(fit(trial.params, parts["train"], steps, seed), parts["validation"])

    def measured(net: nn.Module) -> tuple[float, float]:
        return accuracy(net, parts["validation"]), accuracy(net, parts["test"])

    accuracies: Accuracies = {"defaults": measured(fit({}, parts["train"], steps, seed))}
    nets, results = {}, {}
    for method in methods.split():
        # the name has all options that trials depend on: other options are another study
        name = f"{method}-{images.name}-steps{steps}-seed{seed}"
        options = {"trials": trials, "storage": out / "search.db", "name": name, "seed": seed}
        results[method] = search(objective, space, method=method, **options)
        nets[method] = fit(results[method].best, parts["train"], steps, seed)
        accuracies[method] = measured(nets[method])
    best = max(results, key=lambda method: results[method].value)
    results[best].plot(out / best)
    net = copy.deepcopy(nets[best])
    tuned = tune_coefficients(
        net, lambda m: accuracy(m, parts["validation"]), trials=tuning, seed=seed
    )
    accuracies[f"{best}, tuned"] = measured(net)
    plot(results, accuracies, tuned.scales, out / "star_search.png")
    print(f"{'':16}validation    test")
    for name, (validation, test) in accuracies.items():
        print(f"{name:16}{validation:10.2%}{test:8.2%}")
    chosen = {k: float(f"{v:.3g}") for k, v in results[best].best.items()}
    print(f"the best of {best}: {chosen}; star_search.png, {best}/*.png and search.db in {out}")
    return accuracies


if __name__ == "__main__":
    typer.run(main)
