"""Searches for coefficients, and tuning of trained nets, by methods without gradients.

`search`: a small net with two star layers learns 2,000 images of Fashion-MNIST; its penalty,
initial distribution and rank are searched for on 2,000 others by TPE, a Gaussian process, CMA-ES
and at random, at equal trials, beside the defaults. `tune`: the factors of the products of trained
nets are tuned on the accuracy on 2,000 other images, without gradients and, for comparison, by
gradients of the log loss on the same images. The 10,000 test images choose nothing.
"""

from pathlib import Path
from typing import Any

from benchmarks.coefficients.search_runs import (
    DEFAULTS,
    METHODS,
    TUNED,
    search_jobs,
    search_one,
    tune_jobs,
    tune_one,
)
from benchmarks.harness.comparison import (
    Difference,
    difference,
    mean_interval,
    plot_differences,
    with_half,
)
from benchmarks.harness.report import conditions, first_definition, listed, markdown_table
from benchmarks.harness.runner import Records
from benchmarks.harness.study import Study

#: split and arm that a method is compared on and with
COMPARED = [*(("test", name) for name in DEFAULTS), ("validation", "random"), ("test", "random")]
NAMES = {"tpe": "TPE", "gp": "Gaussian process", "cma": "CMA-ES", "random": "at random"}
TEXT = """\
## Study: can coefficients be searched for?

**The question.** Can the distribution of coefficients be optimised from outside, by Bayesian
optimisation or evolution, instead of by gradients?

**What was done.** A net with two star layers learns {train:,} images of Fashion-MNIST in {steps}
steps. Searched for are the strengths of the L1, L2 and balance penalties, the gains of both
branches at the start, the offset, the rank and a factor per layer, on the accuracy on
{validation:,} other images, with {trials} trials of each method. "defaults" is one net without
any of it, "defaults, rank 4" the same with more parameters. The 10,000 test images choose
nothing. {seeds} seeds, means with 95 % intervals; the bar is a search at random.

{table}
![The best trial so far, and what it is worth](../figures/coefficients-search.png)

**The answer, in plain words.**

- *No method is better than chance here.* On the images they search on, TPE and Gaussian
  processes find {tpe} and {gp} points more than a search at random ({tpe_verdict} and
  {gp_verdict}); on the test images nothing.
- *Searching {trials} nets gains no more than giving one net rank 4*: {low:+.2f} to {high:+.2f}
  points at {trials} times the cost against {rank4:+.2f} at once, and none of these is decided.
- So `search` is for metrics that gradients cannot reach and that come with enough data, not a
  way to better coefficients. Keep a test set. Tuning a trained net tells
  the same.

Weak points: a small net and {trials} trials; all methods begin with the same random draws, a
third of the trials. With thousands of trials, or on a metric that differs from the loss more
than accuracy does, it may come out otherwise.

**Conditions**

{conditions}
"""
TUNE_TEXT = """\
## Study: can a trained net's products be tuned?

**The question.** Can the products of a net that is trained be tuned on the metric itself,
without gradients?

**What was done.** The default net of the study of searches is trained;
then only factors of its products are changed, by {trials} trials on {validation:,} images that
it was not trained on, or by gradients of the log loss on the same images. The 10,000 test images
choose nothing. {seeds} seeds, means with 95 % intervals.

{table}
![What is gained, and where](../figures/coefficients-tune.png)

**The answer, in plain words.**

- *Tuning learns the validation set.* The gradient-free methods gain {low:.2f} to {high:.2f}
  points there; on other images {test_low:+.2f} to {test_high:+.2f}, {test_verdict}. On
  {validation:,} images half a point is ten predictions, and so many trials find ten by luck.
- So `tune_coefficients` is for metrics that gradients cannot reach and that come with enough
  data, not a way to better coefficients. Keep a test set.

Weak points: a small net and few trials.

**Conditions**

{conditions}
"""


def by_seed(records: Records, arm: str, metric: str) -> dict[int, float]:
    """Return a metric of an arm by seed."""
    return {
        r.seed: r.metrics[metric] for r in records.values() if r.arm == arm and r.seed is not None
    }


def search_summary(records: Records) -> dict[str, dict[str, Any]]:
    """Return for each method its accuracies, CPU seconds and differences."""
    summary = {}
    for method in (*DEFAULTS, *METHODS):
        runs = [r.metrics for r in records.values() if r.arm == method]
        if not runs:
            continue
        differences = {
            (split, against): difference(
                by_seed(records, method, split), by_seed(records, against, split)
            )
            for split, against in COMPARED
            if against != method not in DEFAULTS
        }
        summary[method] = {
            "seeds": len(runs),
            **{m: mean_interval(r[m] for r in runs) for m in ("validation", "test", "seconds")},
            "differences": {key: d for key, d in differences.items() if d is not None},
        }
    return summary


def search_table(records: Records) -> str:
    """Return the accuracies of each method, and its differences to others."""
    header = ["method", "seeds", "validation, %", "test, %"]
    header += [f"{split}, over {NAMES.get(name, name)}" for split, name in COMPARED] + ["CPU s/run"]
    lines = []
    for method, row in search_summary(records).items():
        line = [NAMES.get(method, method), str(row["seeds"])]
        line += [with_half(row[split], 2) for split in ("validation", "test")]
        for key in COMPARED:
            d: Difference | None = row["differences"].get(key)
            line.append(f"{d.text(2)}, {d.verdict}" if d else "-")
        lines.append([*line, f"{row['seconds'][0]:.1f}"])
    return markdown_table(header, lines)


def tune_summary(records: Records) -> dict[str, dict[str, Any]]:
    """Return for each arm its accuracies before, its gains and CPU seconds."""
    summary = {}
    for arm in TUNED:
        runs = {r.seed: r.metrics for r in records.values() if r.arm == arm and r.seed is not None}
        if not runs:
            continue
        gains = {
            split: difference(
                {seed: m[split][1] for seed, m in runs.items()},
                {seed: m[split][0] for seed, m in runs.items()},
            )
            for split in ("train", "validation", "test")
        }
        before = {s: mean_interval(m[s][0] for m in runs.values()) for s in ("validation", "test")}
        validation, test = gains["validation"], gains["test"]
        assert validation is not None
        assert test is not None
        summary[arm] = {
            "seeds": len(runs),
            "before": before,
            "gain": gains,
            # of the means: a ratio of single runs may divide by a gain near 0
            "share that holds": test.mean / (validation.mean or float("nan")),
            "seconds": mean_interval(m["seconds"] for m in runs.values()),
        }
    return summary


def tune_table(records: Records) -> str:
    """Return the gains of each arm on the validation and on the test images."""
    header = ["arm", "seeds", "test before, %", "validation gain", "test gain", ""]
    header += ["share that holds", "CPU s/run"]
    lines = [
        [
            arm,
            str(row["seeds"]),
            with_half(row["before"]["test"], 2),
            *(row["gain"][split].text(2) for split in ("validation", "test")),
            row["gain"]["test"].verdict,
            f"{row['share that holds']:.2f}",
            f"{row['seconds'][0]:.1f}",
        ]
        for arm, row in tune_summary(records).items()
    ]
    return markdown_table(header, lines)


def plot_search(records: Records, file: Path) -> None:
    """Draw the best validation accuracy over the trials, and the accuracy of the best on test."""
    from matplotlib.figure import Figure

    rows = search_summary(records)
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, method in enumerate(METHODS):
        if method not in rows:
            continue
        curves = [r.metrics["curve"] for r in records.values() if r.arm == method]
        points = [mean_interval(at) for at in zip(*curves)]
        x = range(1, len(points) + 1)
        left.plot(x, [m for m, _ in points], color=f"C{i}", label=NAMES[method])
        if len(curves) > 2:
            low, high = ([m + sign * half for m, half in points] for sign in (-1, 1))
            left.fill_between(x, low, high, color=f"C{i}", alpha=0.12, lw=0)
    if "defaults" in rows:
        level = rows["defaults"]["validation"][0]
        left.axhline(level, color="k", ls=":", lw=1, label="the defaults")
        left.set_ylim(level - 1, None)
    left.set(xlabel="trials", ylabel="best validation accuracy so far, %")
    left.legend(fontsize=8)
    for i, (method, row) in enumerate(rows.items()):
        colour = "k" if method in DEFAULTS else f"C{METHODS.index(method)}"
        for shift, split, marker in ((-0.12, "validation", "s"), (0.12, "test", "o")):
            mean, half = row[split]
            right.errorbar(
                i + shift, mean, half, fmt=marker, color=colour, capsize=3,
                mfc=colour if split == "test" else "w", label=split if i == 0 else None,
            )  # fmt: skip
    right.set_xticks(range(len(rows)), [NAMES.get(m, m) for m in rows], fontsize=8)
    right.set_ylabel("accuracy of the best trial, %")
    right.legend(fontsize=8)
    for ax in (left, right):
        ax.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


def plot_tune(records: Records, file: Path) -> None:
    """Draw the gains, a panel a split."""
    summary = tune_summary(records)
    panels = {
        f"{split} accuracy, points gained": {arm: r["gain"][split] for arm, r in summary.items()}
        for split in ("validation", "test")
    }
    plot_differences(panels, file, shared_names=True)


def search_text(records: Records) -> str:
    """Make the page of the study of searches."""
    summary = search_summary(records)
    validation = {m: summary[m]["differences"]["validation", "random"] for m in ("tpe", "gp")}
    gains = [
        row["differences"]["test", "defaults"].mean
        for method, row in summary.items()
        if method not in DEFAULTS
    ]
    mean = {arm: summary[arm]["test"][0] for arm in DEFAULTS}
    recipe = first_definition(records)["recipe"]
    return TEXT.format(
        **{name: recipe[name] for name in ("train", "validation", "steps", "trials")},
        seeds=summary["defaults"]["seeds"],
        table=search_table(records),
        tpe=validation["tpe"].text(2),
        gp=validation["gp"].text(2),
        tpe_verdict=validation["tpe"].verdict,
        gp_verdict=validation["gp"].verdict,
        low=min(gains),
        high=max(gains),
        rank4=mean["defaults, rank 4"] - mean["defaults"],
        conditions=conditions(records.values()),
    )


SEARCH = Study(
    "coefficients-search",
    "python -m benchmarks.coefficients searches search",
    search_jobs,
    search_one,
    search_table,
    search_text,
    lambda records: {
        "coefficients-search.png": lambda file: plot_search(records, file),
    },
)


def tune_text(records: Records) -> str:
    """Make the page of the study of tuning."""
    summary = tune_summary(records)
    gains = [row["gain"] for arm, row in summary.items() if not arm.startswith("gradients")]
    validation, test = ([g[split] for g in gains] for split in ("validation", "test"))
    verdicts = dict.fromkeys(d.verdict for d in test)
    definition = first_definition(records)
    return TUNE_TEXT.format(
        trials=definition["tuning"]["trials"],
        validation=definition["recipe"]["validation"],
        seeds=next(iter(summary.values()))["seeds"],
        table=tune_table(records),
        low=min(d.mean for d in validation),
        high=max(d.mean for d in validation),
        test_low=min(d.mean for d in test),
        test_high=max(d.mean for d in test),
        test_verdict=listed(verdicts),
        conditions=conditions(records.values()),
    )


TUNE = Study(
    "coefficients-tune",
    "python -m benchmarks.coefficients searches tune",
    tune_jobs,
    tune_one,
    tune_table,
    tune_text,
    lambda records: {
        "coefficients-tune.png": lambda file: plot_tune(records, file),
    },
)
