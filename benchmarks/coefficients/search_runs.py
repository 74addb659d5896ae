"""Runs of the studies of searching: data, nets, one search, one tuning."""

import copy
import time
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness.images import benchmark_images
from benchmarks.harness.runner import Job
from starlayers import StarBlock, StarMLP
from starlayers.coefficients import (
    CoefficientPenalty,
    apply_initialisation,
    coefficient_space,
    tune_coefficients,
)
from starlayers.coefficients import search as search_values
from starlayers.coefficients.modules import RankStarMLP
from starlayers.coefficients.scaling import star_layers

SEEDS = 5
METHODS = ("tpe", "gp", "cma", "random")
#: numbers only: CMA-ES takes no categories, and all methods get the same space
SEARCHED: tuple[str, ...] = ("l1", "l2", "balance", "gain1", "gain2", "offset", "rank")
SEARCHED += ("layer_scale_0", "layer_scale_1")
#: arm -> values without a search; more products per channel are more parameters
DEFAULTS: dict[str, dict[str, Any]] = {"defaults": {"rank": 1}, "defaults, rank 4": {"rank": 4}}
RECIPE = {
    "trials": 30,
    "steps": 300,
    "batch": 128,
    "lr": 3e-3,
    "penalty_every": 4,
    "train": 2000,
    "validation": 2000,
}
#: arm -> method and factors per layer
TUNED: dict[str, tuple[str, int]] = {
    "CMA-ES, 8 factors a layer": ("cma", 8),
    "TPE, 8 factors a layer": ("tpe", 8),
    "at random, 8 factors a layer": ("random", 8),
    "CMA-ES, 32 factors a layer": ("cma", 32),
    "gradients, 8 factors a layer": ("gradients", 8),
    "gradients, 32 factors a layer": ("gradients", 32),
}
TUNING = {"trials": 200, "width": 2.0, "steps": 100, "lr": 0.03}
SMOKE = {"trials": 4, "steps": 3, "train": 200, "validation": 200}

Split = tuple[Tensor, Tensor]


@cache
def images() -> dict[str, Split]:
    """Load standardised pixels and labels of Fashion-MNIST."""
    data = benchmark_images()
    return {
        name: (
            (part.tensors[0].float().flatten(1) / 255 - data.mean[0]) / data.std[0],
            part.tensors[1],
        )
        for name, part in (("train", data.train), ("test", data.test))
    }


def splits(recipe: dict[str, Any], seed: int) -> dict[str, Split]:
    """Draw training and validation images by the seed; return them and all test images."""
    pixels, labels = images()["train"]
    n, m = recipe["train"], recipe["validation"]
    drawn = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[: n + m]
    parts = {"train": drawn[:n], "validation": drawn[n:]}
    return {"test": images()["test"], **{k: (pixels[i], labels[i]) for k, i in parts.items()}}


def build(values: dict[str, Any], seed: int) -> nn.Module:
    """Make a net with two star layers, initialised by the values."""
    torch.manual_seed(seed)
    rank = values["rank"]
    mlps = [RankStarMLP(32, 64, rank=rank) if rank > 1 else StarMLP(32, 64) for _ in range(2)]
    blocks = [StarBlock(32, mlp, pre=nn.LayerNorm(32)) for mlp in mlps]
    net = nn.Sequential(nn.Linear(784, 32), *blocks, nn.LayerNorm(32), nn.Linear(32, 10))
    return apply_initialisation(net, values)


def fit(values: dict[str, Any], recipe: dict[str, Any], data: Split, seed: int) -> nn.Module:
    """Train a net of these values; the same for the same arguments."""
    net = build(values, seed)
    options = {"l1": {"p": 1}, "l2": {"p": 2}, "balance": {"p": None, "balance": 1.0}}
    penalties = {k: CoefficientPenalty(net, **v) for k, v in options.items() if k in values}
    optimizer = torch.optim.Adam(net.parameters(), recipe["lr"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe["steps"])
    generator = torch.Generator().manual_seed(seed)
    pixels, labels = data
    for step in range(recipe["steps"]):
        i = torch.randint(len(labels), (recipe["batch"],), generator=generator)
        loss = F.cross_entropy(net(pixels[i]), labels[i])
        if step % recipe["penalty_every"] == 0:
            for name, penalty in penalties.items():
                loss = loss + recipe["penalty_every"] * values[name] * penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


@torch.inference_mode()
def accuracy(net: nn.Module, data: Split) -> float:
    """Return the accuracy in percent."""
    pixels, labels = data
    return 100 * float((net(pixels).argmax(1) == labels).double().mean())


# Searching ----------------------------------------------------------------------------------------


def search_one(job: Job) -> dict[str, Any]:
    """Search with the job's method, and measure its best values on the test images."""
    recipe, seed = job["recipe"], job["seed"]
    data = splits(recipe, seed)

    def objective(trial: Any) -> float:
        net = fit(trial.params, recipe, data["train"], seed)
        trial.set_user_attr("test", accuracy(net, data["test"]))
        return accuracy(net, data["validation"])

    began = time.process_time()
    if job["arm"] in DEFAULTS:
        values = DEFAULTS[job["arm"]]
        net = fit(values, recipe, data["train"], seed)
        validation, test = (accuracy(net, data[split]) for split in ("validation", "test"))
        metrics: dict[str, Any] = {"best": values, "failed": 0, "curve": [validation]}
    else:
        space = {name: coefficient_space(2)[name] for name in SEARCHED}
        result = search_values(
            objective,
            space,
            method=job["arm"],
            trials=recipe["trials"],
            seed=seed,
            progress=False,
        )
        validation, test = result.value, result.study.best_trial.user_attrs["test"]
        metrics = {
            "best": result.best,
            "failed": len(result.failed),
            "curve": result.best_so_far,
            "trials": [[t.value, t.user_attrs.get("test")] for t in result.trials],
        }
    return {
        **metrics,
        "validation": validation,
        "test": test,
        "seconds": time.process_time() - began,
    }


def search_jobs(smoke: bool = False) -> dict[str, Job]:
    """Make all jobs by name, seeds outermost: a study stopped early has whole seeds."""
    recipe = RECIPE | (SMOKE if smoke else {})
    ranges = searched_ranges()
    return {
        f"{method.replace(', ', '-').replace(' ', '')}-seed{seed}": {
            "arm": method,
            "seed": seed,
            "recipe": recipe,
            **({"values": DEFAULTS[method]} if method in DEFAULTS else {"space": ranges}),
        }
        for seed in range(2 if smoke else SEEDS)
        for method in (*DEFAULTS, *METHODS)
    }


def searched_ranges() -> dict[str, list[Any]]:
    """Return for each value that is searched for: least, most, and if its scale is logarithmic."""
    space = {name: coefficient_space(2)[name] for name in SEARCHED}
    return {name: [d.low, d.high, d.log] for name, d in space.items()}


# Tuning -------------------------------------------------------------------------------------------


def by_gradients(net: nn.Module, data: Split, groups: int, recipe: dict[str, Any]) -> None:
    """Learn the factors of `tune_coefficients` by Adam on the log loss, and write them."""
    products = star_layers("gradients", net)
    groups_of = {name: p.groups(groups) for name, p in products.items()}
    logs = {name: torch.zeros(len(g), requires_grad=True) for name, g in groups_of.items()}
    which = {
        name: torch.cat([torch.full((len(g),), i) for i, g in enumerate(parts)])[
            torch.cat(parts).argsort()
        ]
        for name, parts in groups_of.items()
    }
    limit = torch.tensor(recipe["width"]).log()
    weights = dict(net.named_parameters())
    optimizer = torch.optim.Adam(logs.values(), recipe["lr"])
    for _ in range(recipe["steps"]):
        scaled = {}
        for name in products:
            s = logs[name].exp()[which[name]]
            scaled[f"{name}.f2.weight"] = weights[f"{name}.f2.weight"].detach() * s[:, None]
            scaled[f"{name}.f2.bias"] = weights[f"{name}.f2.bias"].detach() * s
        loss = F.cross_entropy(torch.func.functional_call(net, scaled, (data[0],)), data[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for log in logs.values():
            log.data.clamp_(-limit, limit)
    for name, p in products.items():
        p.write(logs[name].detach().exp()[which[name]])


def tune_one(job: Job) -> dict[str, Any]:
    """Train a net, tune it as the job says, and measure it before and after."""
    recipe, tuning, seed = job["recipe"], job["tuning"], job["seed"]
    data = splits(recipe, seed)
    net = fit(DEFAULTS["defaults"], recipe, data["train"], seed)
    tuned = copy.deepcopy(net)
    began = time.process_time()
    if job["method"] == "gradients":
        by_gradients(tuned, data["validation"], job["groups"], tuning)
    else:
        tune_coefficients(
            tuned,
            lambda m: accuracy(m, data["validation"]),
            method=job["method"],
            groups=job["groups"],
            trials=tuning["trials"],
            width=tuning["width"],
            seed=seed,
            progress=False,
        )
    seconds = time.process_time() - began
    return {
        "seconds": seconds,
        **{
            split: [accuracy(m, data[split]) for m in (net, tuned)]
            for split in ("train", "validation", "test")
        },
    }


def tune_jobs(smoke: bool = False) -> dict[str, Job]:
    """Make all jobs by name, seeds outermost."""
    recipe = {k: v for k, v in (RECIPE | (SMOKE if smoke else {})).items() if k != "trials"}
    tuning = TUNING | ({"trials": 4, "steps": 3} if smoke else {})
    return {
        f"{method}-{groups}-seed{seed}": {
            "arm": arm,
            "method": method,
            "groups": groups,
            "seed": seed,
            "recipe": recipe,
            "tuning": tuning,
        }
        for seed in range(2 if smoke else SEEDS)
        for arm, (method, groups) in TUNED.items()
    }
