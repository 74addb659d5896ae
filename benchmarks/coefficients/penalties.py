"""Study 2: penalties on coefficients, and coefficients that are learned, on images and on text."""

import time
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.coefficients_train import fit
from benchmarks.common import markdown_table, mean_interval, run_study, write_json
from benchmarks.comparison import measured, plot_differences, shown, verdict
from starlayers import StarMLP
from starlayers.coefficients import CoefficientPenalty, quadratic_form, spectrum

Records = dict[str, dict[str, Any]]

TASKS: dict[str, dict[str, Any]] = {
    "fashion": {"hidden": 64, "epochs": 8, "batch": 256, "lr": 2e-3},
    "reviews": {"hidden": 64, "epochs": 12, "batch": 128, "lr": 1e-3},
}
SMOKE = {"hidden": 8, "epochs": 1}
#: strengths are the best of `STRENGTHS` on data set aside, with a seed the study does not have
ARMS: dict[str, dict[str, Any]] = {
    "fixed": {},
    "L2": {"penalty": {"p": 2}},
    "L1": {"penalty": {"p": 1}},
    "balance": {"penalty": {"p": None, "balance": 1.0}},
    "weight decay": {"decay": True},
    "scale": {"model": {"coefficients": "scale"}},
    "dynamic": {"model": {"coefficients": "dynamic"}},
    "rank 2": {"model": {"rank": 2}},
}
STRENGTHS = (1e-2, 1e-1, 1.0, 10.0)
#: found by `--tune`
CHOSEN: dict[str, dict[str, float]] = {
    "fashion": {"L2": 0.01, "L1": 0.01, "balance": 0.01, "weight decay": 0.01},
    "reviews": {"L2": 10.0, "L1": 10.0, "balance": 10.0, "weight decay": 10.0},
}
TUNING_SEED = 100
KEPT = (0.5, 0.1, 0.02, 0.005)
TERMS = 1000
#: standard deviation of what is added to pixels; share of a text's terms that are left out
NOISE = {"fashion": 0.3, "reviews": 0.3}
PRUNED_ON = 2000


def jobs(seeds: int, tasks: list[str], smoke: bool) -> Records:
    """All runs by name, seeds outermost: a study stopped early has whole seeds."""
    return {
        f"{task}-{arm.replace(' ', '_')}-seed{seed}": _job(
            task, arm, seed, CHOSEN[task].get(arm, 0.0), smoke
        )
        for seed in range(seeds)
        for task in tasks
        for arm in ARMS
    }


def tuning_jobs(tasks: list[str], smoke: bool) -> Records:
    """Every strength of everything that has one, on data set aside."""
    return {
        f"{task}-{arm.replace(' ', '_')}-{strength}": _job(task, arm, TUNING_SEED, strength, smoke)
        for task in tasks
        for arm in CHOSEN[task]
        for strength in STRENGTHS
    }


def _job(task: str, arm: str, seed: int, strength: float, smoke: bool) -> dict[str, Any]:
    recipe = TASKS[task] | (SMOKE if smoke else {})
    return {
        "task": task, "arm": arm, "settings": ARMS[arm], "strength": strength, "seed": seed,
        "recipe": recipe, "small": smoke,
    }  # fmt: skip


@cache
def data(task: str, aside: bool, small: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training inputs and classes, and those to judge by: the test set, or a part set aside."""
    x, y, x_test, y_test = _images() if task == "fashion" else _reviews()
    if aside:
        n = len(x) // 6
        x, y, x_test, y_test = x[n:], y[n:], x[:n], y[:n]
    if small:
        x, y, x_test, y_test = x[:512], y[:512], x_test[:256], y_test[:256]
    return x, y, x_test, y_test


def _images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from benchmarks.data import benchmark_images

    images = benchmark_images()
    parts = [cast(Any, part).tensors for part in (images.train, images.test)]
    (x, y), (x_test, y_test) = ((p[0].flatten(1).float() / 255, p[1]) for p in parts)
    return x, y, x_test, y_test


def _reviews() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sentences of film reviews as weights of their most frequent terms (tf-idf)."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    from starlayers.datasets.text import load_sentiment

    splits = load_sentiment().splits
    vectors = TfidfVectorizer(max_features=TERMS, sublinear_tf=True)
    train = vectors.fit_transform(splits["train"]["text"])
    test = vectors.transform(splits["test"]["text"])
    # a mean square of about 1 / 10, as that of pixels
    x, x_test = (TERMS**0.5 / 3 * torch.tensor(m.toarray()).float() for m in (train, test))
    y, y_test = (torch.tensor(splits[s]["label"]) for s in ("train", "test"))
    return x, y, x_test, y_test


def model(job: dict[str, Any], features: int, classes: int) -> StarMLP:
    """A star MLP without activation, as wide as makes it no larger than that of "fixed"."""
    options, hidden = dict(job["settings"].get("model", {})), job["recipe"]["hidden"]

    def made(hidden: int, **options: Any) -> StarMLP:
        return StarMLP(features, hidden, out_features=classes, act=None, **options)

    most = _parameters(made(hidden))
    while options and hidden > 1 and _parameters(made(hidden, **options)) > 1.01 * most:
        hidden -= 1
    torch.manual_seed(job["seed"])
    return made(hidden, **options)


def _parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def train_one(job: dict[str, Any]) -> dict[str, Any]:
    """Train the job's arm and measure what its coefficients are good for."""
    x, y, x_test, y_test = data(job["task"], job["seed"] == TUNING_SEED, job["small"])
    recipe, settings, strength = job["recipe"], job["settings"], job["strength"]
    net = model(job, x.shape[1], int(y.max()) + 1)
    penalty = CoefficientPenalty(net, **settings["penalty"]) if "penalty" in settings else None
    began = time.perf_counter()
    decay = strength if "decay" in settings else 0.0
    fit(net, x, y, recipe, penalty=penalty, strength=strength, weight_decay=decay)
    seconds = time.perf_counter() - began
    found = _quality(net, job["task"], x_test, y_test) | {"seconds": seconds}
    found["parameters"] = _parameters(net)
    found |= {"train_accuracy": _accuracy(net, x[:10_000], y[:10_000])}
    if settings.get("model", {}).get("coefficients") != "dynamic":
        summary = spectrum(net)[""].summary()
        found |= {name: summary[name] for name in ("participation", "sparsity", "entropy")}
        found["pruned"] = _pruned(net, x_test[:PRUNED_ON], y_test[:PRUNED_ON])
    return found


@torch.no_grad()
def _accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((net(x).argmax(1) == y).double().mean())


@torch.no_grad()
def _quality(net: nn.Module, task: str, x: Tensor, y: Tensor) -> dict[str, float]:
    from torchmetrics.functional.classification import multiclass_calibration_error

    logits = net(x)
    draw = torch.Generator().manual_seed(0)
    if task == "fashion":
        disturbed = x + NOISE[task] * torch.randn(x.shape, generator=draw)
    else:
        disturbed = x * (torch.rand(x.shape, generator=draw) > NOISE[task])
    error = multiclass_calibration_error(
        logits.softmax(1), y, num_classes=logits.shape[1], n_bins=15
    )
    return {
        "accuracy": _accuracy(net, x, y),
        "log_loss": float(F.cross_entropy(logits, y)),
        "calibration_error": float(error),
        "disturbed": _accuracy(net, disturbed, y),
    }


@torch.no_grad()
def _pruned(net: StarMLP, x: Tensor, y: Tensor) -> list[float]:
    """Accuracy when each class keeps the largest share of the coefficients of its polynomial."""
    forms = quadratic_form(net)
    inputs = torch.cat([x, x.new_ones(len(x), 1)], 1)
    found = []
    for share in KEPT:
        logits = []
        for q in forms:
            count = max(1, round(share * q.numel()))
            least = q.abs().flatten().kthvalue(q.numel() - count + 1).values
            logits.append(((inputs @ q.where(q.abs() >= least, 0)) * inputs).sum(1))
        found.append(float((torch.stack(logits, 1).argmax(1) == y).double().mean()))
    return found


MEASURES: dict[str, tuple[str, float, int]] = {
    "accuracy": ("accuracy, %", 100, 2),
    "log_loss": ("log loss", 1, 3),
    "calibration_error": ("calibration error, %", 100, 1),
    "disturbed": ("accuracy when disturbed, %", 100, 1),
    "train_accuracy": ("on training data, %", 100, 1),
    "participation": ("effective coefficients, %", 100, 1),
    "sparsity": ("sparsity", 1, 3),
}


def summarise(records: Records) -> dict[str, dict[str, dict[str, Any]]]:
    """task -> arm -> intervals of every measure, and of the difference to "fixed" by seed."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for task in TASKS:
        runs = {
            arm: {r["job"]["seed"]: r for r in records.values()
                  if (r["job"]["task"], r["job"]["arm"]) == (task, arm)}
            for arm in ARMS
        }  # fmt: skip
        for arm, by_seed in runs.items():
            if not by_seed:
                continue
            row: dict[str, Any] = {"seeds": len(by_seed)}
            for name in (*MEASURES, "seconds", "parameters"):
                values = [r[name] for r in by_seed.values() if r.get(name) is not None]
                if values:
                    row[name] = mean_interval(values)
            if all("pruned" in r for r in by_seed.values()):
                row["pruned"] = [
                    mean_interval(v) for v in zip(*(r["pruned"] for r in by_seed.values()))
                ]
            if arm != "fixed":
                both = by_seed.keys() & runs["fixed"].keys()
                apart = {
                    name: mean_interval(by_seed[s][name] - runs["fixed"][s][name] for s in both)
                    for name in ("accuracy", "log_loss", "disturbed")
                }
                row["better by"] = tuple(100 * v for v in apart["accuracy"])
                row["differences"] = apart
            rows.setdefault(task, {})[arm] = row
    return rows


def tables(rows: dict[str, dict[str, dict[str, Any]]]) -> str:
    text = ""
    for task, arms in rows.items():
        header = ["arm", *(name for name, _, _ in MEASURES.values())]
        header += [f"{100 * share:g} % kept" for share in KEPT] + ["accuracy against fixed"]
        lines = []
        for arm, row in arms.items():
            cells = measured(row, MEASURES)
            pruned = row.get("pruned", [None] * len(KEPT))
            cells += ["" if p is None else shown((100 * p[0], 100 * p[1]), 1) for p in pruned]
            against = shown(row["better by"], 2, "+") if "better by" in row else ""
            lines.append([arm, *cells, f"{against} {verdict(row)}".strip()])
        text += f"{task}\n\n{markdown_table(header, lines)}\n"
    return text


def run(folder: Path, *, seeds: int, tasks: list[str], processes: int, smoke: bool) -> None:
    """Run what is missing, and write table, figure and summary beside the runs."""
    report = folder / "penalties"
    records = run_study(report, jobs(seeds, tasks, smoke), train_one, processes=processes)
    rows = summarise(records)
    text = tables(rows)
    print(text)
    environment = next(iter(records.values()))["environment"]
    settings = {"arms": ARMS, "strengths": CHOSEN, "kept": KEPT}
    write_json(report.with_suffix(".json"), {"rows": rows, **settings, "environment": environment})
    report.with_suffix(".md").write_text(text)
    panels = {
        f"{task}: accuracy against fixed, points": {a: r for a, r in arms.items() if a != "fixed"}
        for task, arms in rows.items()
    }
    if min(row["seeds"] for arms in rows.values() for row in arms.values()) > 1:
        plot_differences(panels, report.with_suffix(".png"))


def tune(folder: Path, *, tasks: list[str], processes: int, smoke: bool) -> None:
    """Run and tabulate what the strengths were chosen by."""
    runs = tuning_jobs(tasks, smoke)
    records = run_study(folder / "penalties-tuning", runs, train_one, processes=processes)
    lines = [
        [r["job"]["task"], r["job"]["arm"], f"{r['job']['strength']:g}", f"{r['log_loss']:.4f}",
         f"{100 * r['accuracy']:.2f}"]
        for r in records.values()
    ]  # fmt: skip
    text = markdown_table(["task", "arm", "strength", "log loss", "accuracy, %"], lines)
    print(text)
    (folder / "penalties-tuning.md").write_text(text)
