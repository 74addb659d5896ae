"""Search for coefficients of a star classifier, then tune those of the best net.

Four methods of Optuna search seven numbers (penalty, initial scales, rank) of a small net on 2,000
images by its validation accuracy; then the product of every channel of the best net gets a factor,
without gradients. Expect gains on the validation images that are smaller on the test images.
One to two minutes on a CPU. The searches are kept in `search.db` and go on where they ended.

python examples/star_search.py                         # Fashion-MNIST
python examples/star_search.py --trials 100            # continues the last call
python examples/star_search.py --data digits --methods "tpe cma"
"""

import copy
from pathlib import Path
from typing import Annotated, Any

import _report
import torch
import typer
from _pixels import Split, plot_search, splits
from torch import nn

from starlayers import StarBlock
from starlayers.coefficients import (
    CoefficientPenalty,
    apply_initialisation,
    coefficient_space,
    search,
    tune_coefficients,
)
from starlayers.coefficients.modules import RankStarMLP
from starlayers.datasets.images import load_images

#: name of a net -> validation and test accuracy
Accuracies = dict[str, tuple[float, float]]
#: numbers only, because CMA-ES has no categorical values and all methods get the same space
SEARCHED = ("l2", "gain1", "gain2", "offset", "rank", "layer_scale_0", "layer_scale_1")


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


def main(
    data: Annotated[str, typer.Option(help="fashion-mnist or digits")] = "fashion-mnist",
    methods: Annotated[str, typer.Option(help="of search")] = "tpe gp cma random",
    trials: Annotated[int, typer.Option(help="of each method")] = 30,
    steps: Annotated[int, typer.Option(help="of training in a trial")] = 250,
    tuning: Annotated[int, typer.Option(help="trials of tuning")] = 300,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="folder of the run")] = Path("runs/star_search"),
) -> Accuracies:
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
    net, held_out = copy.deepcopy(nets[best]), parts["validation"]
    tuned = tune_coefficients(net, lambda m: accuracy(m, held_out), trials=tuning, seed=seed)
    accuracies[f"{best}, tuned"] = measured(net)
    plot_search(results, accuracies, tuned.scales, out / "star_search.png")
    rows = [(name, f"{v:.2%}", f"{test:.2%}") for name, (v, test) in accuracies.items()]
    _report.table(("coefficients", "validation", "test"), rows)
    chosen = {k: float(f"{v:.3g}") for k, v in results[best].best.items()}
    print(f"the best of {best}: {chosen}; star_search.png, {best}/*.png and search.db in {out}")
    return accuracies


if __name__ == "__main__":
    _report.run(main, __doc__)
