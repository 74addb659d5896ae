"""Penalties on coefficients, and coefficients that are learned, on images and on text."""

import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.coefficients.train import fit
from benchmarks.harness.comparison import (
    Difference,
    cells,
    difference,
    holm,
    mean_interval,
    plot_differences,
    with_half,
)
from benchmarks.harness.report import conditions, listed, markdown_table
from benchmarks.harness.runner import Job, Records
from benchmarks.harness.study import Study
from starlayers import StarMLP
from starlayers.coefficients import CoefficientPenalty, quadratic_form, spectrum
from starlayers.coefficients.modules import DynamicStarMLP, RankStarMLP, ScaledStarMLP

TASKS: dict[str, dict[str, Any]] = {
    "fashion": {"hidden": 64, "epochs": 8, "batch": 256, "lr": 2e-3},
    "reviews": {"hidden": 64, "epochs": 12, "batch": 128, "lr": 1e-3},
}
SMOKE = {"hidden": 8, "epochs": 1}
Net = StarMLP | RankStarMLP
#: value of "coefficients" in an arm's settings, which are in the records -> class of its net
CLASSES: dict[str, type[StarMLP]] = {
    "fixed": StarMLP,
    "scale": ScaledStarMLP,
    "dynamic": DynamicStarMLP,
}
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
#: chosen by `--tune`
CHOSEN: dict[str, dict[str, float]] = {
    "fashion": {"L2": 0.01, "L1": 0.01, "balance": 0.01, "weight decay": 0.01},
    "reviews": {"L2": 10.0, "L1": 10.0, "balance": 10.0, "weight decay": 10.0},
}
TUNING_SEED = 100
KEPT = (0.5, 0.1, 0.02, 0.005)
TERMS = 1000
#: standard deviation of the noise on pixels; share of a text's terms that are left out
NOISE = {"fashion": 0.3, "reviews": 0.3}
PRUNED_ON = 2000
TEXT = """\
## Study: should coefficients be penalised, or learned in other ways?

**The question.** How should the coefficients of the implicit space be distributed? Does it help
to make them small (L2), few (L1) or even (balance), or to give layers other coefficients: a
scale per channel, one that depends on the sample, rank 2?

**What was done.** Star MLPs without activation, so that the coefficients are all there is:
{image_hidden} products on Fashion-MNIST (784 pixels, {image_epochs} epochs), and {text_hidden}
on sentences of film reviews (the tf-idf of {terms:,} terms, {text_epochs} epochs). Rank 2 and
the dynamic scale have fewer products for the same number of parameters. Strengths were chosen by
log loss on a sixth of the training data, with a seed the study does not have (what was
tried). {seeds} seeds, the same batches for all; means with 95
% intervals. "Disturbed": noise of {noise:g} on pixels, or {left_out:.0f} % of a text's terms
left out. "Kept": each class keeps that share of its polynomial's coefficients, the largest.
Effective coefficients are the participation ratio.

**Images**

{images}
**Text**, where the plain net fits {fits:.1f} % of its training data

{texts}
![Accuracy against fixed](../figures/coefficients-penalties.png)

**The answer, in plain words.**

- *Accuracy hardly depends on any of it.* Of {family} comparisons, paired by seed, {better}
  better and {worse} worse by themselves; after Holm's correction {survivors}. {family} intervals
  of 95 % let about one be wrong.
- *Small helps where a net overfits.* On text L2, L1 and weight decay bring log loss from
  {loss_fixed:.3f} to {loss_l2:.3f}, {loss_l1:.3f} and {loss_decay:.3f}, and the calibration
  error from {cal_fixed:.1f} % to {cal_l2:.1f}, {cal_l1:.1f} and {cal_decay:.1f} %. Ordinary
  weight decay does that as well as a penalty on the coefficients.
- *Small also means robust, and prunable to a degree.* On images the L2 penalty gives {robust}
  points under noise (weight decay of its best strength {robust_decay}), and {pruned_gain:.1f}
  points when a tenth of the coefficients is kept. On images no net survives hard pruning: with 2
  % kept L1 falls from {image_l1:.1f} to {image_l1_two:.1f} %.
- *Few is possible at no cost on text, and only there.* With L1 a text net has {effective:.1f} %
  effective coefficients and {text_l1_half:.1f} % accuracy with one coefficient in 200 kept,
  {text_l1:.1f} % with all. That is a reason to use L1: nets that can be read, not nets that are
  better.
- *Even is not the way.* The balance penalty spread the coefficients of the text net from
  {even_fixed:.0f} % to {even_balance:.0f} % of what is possible. Its log loss fell less than
  with the other penalties, its accuracy changed by {balance}, and it pruned worst. Left alone,
  nets use a small part of their space.
- *Learned scales, dynamic scales and rank 2* are undecided in accuracy at equal parameters. On
  text, where there is too much freedom already, the dynamic scale has the worst log loss
  ({loss_dynamic:.3f}).

Weak points: one width and depth, few epochs; the best strengths on text were the largest tried,
on images the smallest.

**Conditions**

{conditions}
"""
TUNING_TEXT = """\
## Strengths tried in the study of penalties

Log loss and accuracy on a sixth of the training data, set aside, with a seed that the
study does not have. On images the weakest of {number} strengths was
best, on text the strongest: the ranges were too narrow on either side.

{table}
**Conditions**

{conditions}
"""


def jobs(seeds: int = 5, tasks: list[str] | None = None, smoke: bool = False) -> dict[str, Job]:
    """Make all jobs by name, seeds outermost: a study stopped early has whole seeds."""
    return {
        f"{task}-{arm.replace(' ', '_')}-seed{seed}": _job(
            task, arm, seed, CHOSEN[task].get(arm, 0.0), smoke
        )
        for seed in range(seeds)
        for task in tasks or TASKS
        for arm in ARMS
    }


def tuning_jobs(tasks: list[str] | None = None, smoke: bool = False) -> dict[str, Job]:
    """Make a job for every strength of every arm that has one, on data set aside."""
    return {
        f"{task}-{arm.replace(' ', '_')}-{strength}": _job(task, arm, TUNING_SEED, strength, smoke)
        for task in tasks or TASKS
        for arm in CHOSEN[task]
        for strength in STRENGTHS
    }


def _job(task: str, arm: str, seed: int, strength: float, smoke: bool) -> Job:
    recipe = TASKS[task] | (SMOKE if smoke else {})
    return {
        "arm": arm,
        "seed": seed,
        "task": task,
        "settings": ARMS[arm],
        "strength": strength,
        "recipe": recipe,
        "data": {"set_aside": seed == TUNING_SEED, "terms": TERMS, "small": smoke},
        "measured": {"disturbed": NOISE[task], "kept": list(KEPT), "pruned_on": PRUNED_ON},
    }


@cache
def data(task: str, aside: bool, small: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Load training inputs and classes, and those to judge by: test set or a part set aside."""
    x, y, x_test, y_test = _images() if task == "fashion" else _reviews()
    if aside:
        n = len(x) // 6
        x, y, x_test, y_test = x[n:], y[n:], x[:n], y[:n]
    if small:
        x, y, x_test, y_test = x[:512], y[:512], x_test[:256], y_test[:256]
    return x, y, x_test, y_test


def _images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from benchmarks.harness.images import benchmark_images

    images = benchmark_images()
    parts = [cast(Any, part).tensors for part in (images.train, images.test)]
    (x, y), (x_test, y_test) = ((p[0].flatten(1).float() / 255, p[1]) for p in parts)
    return x, y, x_test, y_test


def _reviews() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Load sentences of film reviews as weights of their most frequent terms (tf-idf)."""
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


def net_class(settings: dict[str, Any]) -> Callable[..., Net]:
    """Return what makes the net of an arm's settings, such as `{"model": {"rank": 2}}`."""
    options = settings.get("model", {})
    if "rank" in options:
        return partial(RankStarMLP, rank=options["rank"])
    return CLASSES[options.get("coefficients", "fixed")]


def model(job: Job, features: int, classes: int) -> Net:
    """Make a star MLP without activation, no larger than that of "fixed"."""
    kind, hidden = net_class(job["settings"]), job["recipe"]["hidden"]

    def made(kind: Callable[..., Net], hidden: int) -> Net:
        return kind(features, hidden, out_features=classes, act=None)

    most = _parameters(made(StarMLP, hidden))
    while hidden > 1 and _parameters(made(kind, hidden)) > 1.01 * most:
        hidden -= 1
    torch.manual_seed(job["seed"])
    return made(kind, hidden)


def _parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def train_one(job: Job) -> dict[str, Any]:
    """Train the job's arm, and measure its accuracy, whole, disturbed and pruned."""
    where = job["data"]
    x, y, x_test, y_test = data(job["task"], where["set_aside"], where["small"])
    recipe, settings, strength = job["recipe"], job["settings"], job["strength"]
    net = model(job, x.shape[1], int(y.max()) + 1)
    penalty = CoefficientPenalty(net, **settings["penalty"]) if "penalty" in settings else None
    began = time.perf_counter()
    decay = strength if "decay" in settings else 0.0
    fit(net, x, y, recipe, penalty=penalty, strength=strength, weight_decay=decay)
    seconds = time.perf_counter() - began
    metrics = _quality(net, job["task"], x_test, y_test) | {"seconds": seconds}
    metrics["parameters"] = _parameters(net)
    metrics |= {"train_accuracy": _accuracy(net, x[:10_000], y[:10_000])}
    if settings.get("model", {}).get("coefficients") != "dynamic":
        summary = spectrum(net)[""].summary()
        metrics |= {name: summary[name] for name in ("participation", "sparsity", "entropy")}
        metrics["pruned"] = _pruned(net, x_test[:PRUNED_ON], y_test[:PRUNED_ON])
    return metrics


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
def _pruned(net: Net, x: Tensor, y: Tensor) -> list[float]:
    """Return the accuracies when each class keeps the largest coefficients of its polynomial."""
    forms = quadratic_form(net)
    inputs = torch.cat([x, x.new_ones(len(x), 1)], 1)
    accuracies = []
    for share in KEPT:
        logits = []
        for q in forms:
            count = max(1, round(share * q.numel()))
            least = q.abs().flatten().kthvalue(q.numel() - count + 1).values
            logits.append(((inputs @ q.where(q.abs() >= least, 0)) * inputs).sum(1))
        accuracies.append(float((torch.stack(logits, 1).argmax(1) == y).double().mean()))
    return accuracies


MEASURES: dict[str, tuple[str, float, int]] = {
    "accuracy": ("accuracy, %", 100, 2),
    "log_loss": ("log loss", 1, 3),
    "calibration_error": ("calibration error, %", 100, 1),
    "disturbed": ("accuracy when disturbed, %", 100, 1),
    "train_accuracy": ("on training data, %", 100, 1),
    "participation": ("effective coefficients, %", 100, 1),
    "sparsity": ("sparsity", 1, 3),
}


Summary = dict[str, dict[str, dict[str, Any]]]


def summarise(records: Records) -> Summary:
    """Return task -> arm -> intervals of all measures, and differences to "fixed" by seed."""
    summary: Summary = {}
    for task in TASKS:
        for arm in ARMS:
            runs = _by_seed(records, task, arm)
            if not runs:
                continue
            row: dict[str, Any] = {"seeds": len(runs)}
            for name in (*MEASURES, "seconds", "parameters"):
                values = [m[name] for m in runs.values() if m.get(name) is not None]
                if values:
                    row[name] = mean_interval(values)
            if all("pruned" in m for m in runs.values()):
                row["pruned"] = [
                    mean_interval(v) for v in zip(*(m["pruned"] for m in runs.values()))
                ]
            if arm != "fixed":
                fixed = _by_seed(records, task, "fixed")
                row["differences"] = {
                    name: difference(
                        {seed: m[name] for seed, m in runs.items()},
                        {seed: m[name] for seed, m in fixed.items()},
                        scale=scale,
                    )
                    for name, scale in (("accuracy", 100), ("log_loss", 1), ("disturbed", 100))
                }
            summary.setdefault(task, {})[arm] = row
    return summary


def _by_seed(records: Records, task: str, arm: str) -> dict[int, dict[str, Any]]:
    return {
        r.seed: r.metrics
        for r in records.values()
        if r.seed is not None and r.arm == arm and (r.definition or {}).get("task") == task
    }


def against_fixed(summary: Summary, measure: str = "accuracy") -> dict[tuple[str, str], Difference]:
    """Return the differences to "fixed" by task and arm."""
    return {
        (task, arm): row["differences"][measure]
        for task, arms in summary.items()
        for arm, row in arms.items()
        if row.get("differences", {}).get(measure) is not None
    }


def table(arms: dict[str, dict[str, Any]], task: str) -> str:
    """Return the measures of a task's arms, with 95 % intervals."""
    header = ["arm", *(name for name, _, _ in MEASURES.values())]
    header += [f"{100 * share:g} % kept" for share in KEPT] + ["accuracy against fixed"]
    compared = against_fixed({task: arms})
    lines = []
    for arm, row in arms.items():
        line = cells(row, MEASURES)
        pruned = row.get("pruned", [None] * len(KEPT))
        line += ["" if p is None else with_half((100 * p[0], 100 * p[1]), 1) for p in pruned]
        d = compared.get((task, arm))
        lines.append([arm, *line, f"{d.text(2)} {d.verdict}" if d else "the baseline"])
    return markdown_table(header, lines)


def tables(records: Records) -> str:
    """Return a table for each task."""
    return "\n".join(f"{task}\n\n{table(arms, task)}" for task, arms in summarise(records).items())


def tuning_table(records: Records) -> str:
    """Return what each strength reaches on the data set aside."""
    lines = []
    for r in records.values():
        assert r.definition is not None
        assert r.arm is not None
        strength = f"{r.definition['strength']:g}"
        numbers = [f"{r.metrics['log_loss']:.4f}", f"{100 * r.metrics['accuracy']:.2f}"]
        lines.append([r.definition["task"], r.arm, strength, *numbers])
    return markdown_table(["task", "arm", "strength", "log loss", "accuracy, %"], lines)


def plot(records: Records, file: Path) -> None:
    """Draw the differences to "fixed", a panel a task."""
    panels: dict[str, dict[str, Difference]] = {}
    for (task, arm), d in against_fixed(summarise(records)).items():
        panels.setdefault(f"{task}: accuracy against fixed, points", {})[arm] = d
    if panels:
        plot_differences(panels, file)


def text(records: Records) -> str:
    """Make the page of the study of"""
    summary = summarise(records)
    images, texts = summary["fashion"], summary["reviews"]
    accuracy = against_fixed(summary)
    disturbed = against_fixed(summary, "disturbed")
    names = {f"{arm} ({task})": d for (task, arm), d in accuracy.items()}
    paired = holm({name: d.paired for name, d in names.items()})
    welch = holm({name: d.welch for name, d in names.items()})
    survivors = [n for n in names if paired[n] < 0.05 and welch[n] < 0.05]
    kept = {share: i for i, share in enumerate(KEPT)}
    recipes = TASKS

    def percent(arms: dict[str, Any], arm: str, measure: str = "accuracy") -> float:
        return float(100 * arms[arm][measure][0])

    def pruned(arms: dict[str, Any], arm: str, share: float) -> float:
        return float(100 * arms[arm]["pruned"][kept[share]][0])

    counts = {v: sum(d.verdict == v for d in accuracy.values()) for v in ("better", "worse")}
    return TEXT.format(
        image_hidden=recipes["fashion"]["hidden"],
        image_epochs=recipes["fashion"]["epochs"],
        text_hidden=recipes["reviews"]["hidden"],
        text_epochs=recipes["reviews"]["epochs"],
        terms=TERMS,
        seeds=images["fixed"]["seeds"],
        noise=NOISE["fashion"],
        left_out=100 * NOISE["reviews"],
        images=table(images, "fashion"),
        texts=table(texts, "reviews"),
        fits=percent(texts, "fixed", "train_accuracy"),
        family=len(accuracy),
        better=f"{counts['better']} {'is' if counts['better'] == 1 else 'are'}",
        worse=f"{counts['worse']} {'is' if counts['worse'] == 1 else 'are'}",
        survivors=f"{listed(survivors)} remain" if survivors else "none remains",
        loss_fixed=texts["fixed"]["log_loss"][0],
        loss_l2=texts["L2"]["log_loss"][0],
        loss_l1=texts["L1"]["log_loss"][0],
        loss_decay=texts["weight decay"]["log_loss"][0],
        loss_dynamic=texts["dynamic"]["log_loss"][0],
        cal_fixed=percent(texts, "fixed", "calibration_error"),
        cal_l2=percent(texts, "L2", "calibration_error"),
        cal_l1=percent(texts, "L1", "calibration_error"),
        cal_decay=percent(texts, "weight decay", "calibration_error"),
        robust=disturbed["fashion", "L2"].text(1),
        robust_decay=disturbed["fashion", "weight decay"].text(1),
        pruned_gain=pruned(images, "L2", 0.1) - pruned(images, "fixed", 0.1),
        image_l1=percent(images, "L1"),
        image_l1_two=pruned(images, "L1", 0.02),
        effective=percent(texts, "L1", "participation"),
        text_l1_half=pruned(texts, "L1", 0.005),
        text_l1=percent(texts, "L1"),
        even_fixed=percent(texts, "fixed", "participation"),
        even_balance=percent(texts, "balance", "participation"),
        balance=accuracy["reviews", "balance"].text(2),
        conditions=conditions(records.values()),
    )


STUDY = Study(
    "coefficients-penalties",
    "python -m benchmarks.coefficients penalties",
    jobs,
    train_one,
    tables,
    text,
    lambda records: {
        "coefficients-penalties.png": lambda file: plot(records, file),
    },
)


TUNING = Study(
    "coefficients-penalties",
    "python -m benchmarks.coefficients penalties --tune",
    tuning_jobs,
    train_one,
    tuning_table,
    lambda records: TUNING_TEXT.format(
        number=len(STRENGTHS),
        table=tuning_table(records),
        conditions=conditions(records.values()),
    ),
)
