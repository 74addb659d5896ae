"""Star MLPs, gated attention and hybrids against their plain forms, at matched parameters."""

from pathlib import Path
from typing import Any

from benchmarks.harness.comparison import (
    Difference,
    difference,
    holm,
    mean_interval,
    plot_differences,
    with_half,
)
from benchmarks.harness.report import conditions, listed, markdown_table
from benchmarks.harness.runner import Job, Records
from benchmarks.harness.study import Study
from benchmarks.nlp.tasks import (
    BASELINE,
    LAYERS,
    METRICS,
    MODEL,
    RECIPES,
    VARIANTS,
    VOCABULARY,
    train_one,
)

SEEDS = {"sentiment": 5, "prose": 3, "translation": 3}
SMOKE: dict[str, dict[str, Any]] = {
    "sentiment": {"epochs": 1},
    "prose": {"steps": 2},
    "translation": {"epochs": 1},
}
DIGITS = {"bits_per_byte": 4}

Summary = dict[str, list[dict[str, Any]]]
TEXT = """\
## Study: star MLPs, gated attention and hybrids

**The question.** Do star MLPs, a gate after the attention, or a mixer of products help a
language model of equal size?

**What was done.** Small models ({smallest:.1f} to {largest:.1f} million parameters, width
{width}) trained from scratch on three real tasks, one recipe for all variants of a task. Every
MLP is as wide as makes its model's parameters equal to those of the plain one (to {match:.2f}
%). A variant of the MLP is compared with the plain GELU MLP, a variant of the token mixer with
plain attention under the same silu star MLP. Intervals are 95 %, of the difference paired by
seed (Student's t); P(improvement) is the share of all pairs of runs that the variant wins.
Nothing was tuned for any variant, learning rate and `initializer_range` included, and the runs
are short. Translation has the verses of fewer than {longest} tokens in both languages.

{tables}
![differences to the baseline](../figures/nlp-quality.png)

**The answer, in plain words.**

- *Of {family} comparisons {survivors} {survive} Holm's correction, both paired by seed and
  without pairing (Welch).* Everything else here is undecided as a family of comparisons; the
  verdicts in the tables are those of single comparisons, of which one in twenty comes out by
  chance.
- *The star MLPs did not help here, at this one rate.* On no task is one of the {stars} ahead of
  the plain GELU MLP. In translation their means are {chrf_low:.1f} to {chrf_high:.1f} points of
  chrF behind, and {chrf_worse} of {stars} intervals leave out 0; in prose {bits_low:.3f} to
  {bits_high:.3f} bits per byte, and {bits_worse} of {stars} do; on sentiment {sentiment_worse}
  do. No such difference survives the correction. This is a comparison at one learning rate,
  which was tuned for neither.
- *Whether the activation matters to a star is undecided*: relu6, gelu, silu and none differ by
  at most {apart:.3f} bits per byte on prose, but so few seeds are no test of equivalence. A
  second product per channel (rank 2) at equal parameters did not help.
- *A star after the attention*: {head:.2f} bits per byte ahead per head on prose and
  {channel:.2f} per channel; adjusted by Holm p = {head_p:.2f} and {channel_p:.2f}, so not
  decided as one of {family} comparisons. On translation and sentiment it is undecided.
- *Hybrids with `star_conv`* are {hybrid:.2f} bits per byte ahead on prose. On translation their
  BLEU is {hybrid_bleu:.1f} against {silu_bleu:.1f}, and chrF {hybrid_chrf:+.1f}, whose interval
  {hybrid_holds} 0; sentiment is undecided.

What this does not say: larger models trained for long are reported to gain from gated MLPs ("GLU
Variants Improve Transformer", arXiv 2002.05202). {seeds} seeds decide little; one rate for all
arms favours whichever it suits, and star MLPs start differently from plain ones at the same
`initializer_range`. Sentiment is sensitive to it: `examples/nlp_sentiment.py` starts smaller.

**Conditions**

{conditions}
"""


def jobs(smoke: bool = False) -> dict[str, Job]:
    """Make all jobs by name, seeds outermost: a study stopped early has whole seeds."""
    made = {}
    for seed in range(1 if smoke else max(SEEDS.values())):
        for task, recipe in RECIPES.items():
            if seed >= SEEDS[task]:
                continue
            for variant, options in VARIANTS.items():
                made[f"{task}-{variant.replace(' ', '-')}-seed{seed}"] = {
                    "arm": variant,
                    "seed": seed,
                    "task": task,
                    "options": options,
                    "model": MODEL,
                    "layers": LAYERS[task],
                    "vocabulary": VOCABULARY[task],
                    "recipe": {**recipe, **(SMOKE[task] if smoke else {})},
                    "small": smoke,
                }
    return made


def values(records: Records, task: str, variant: str, metric: str) -> dict[int, float]:
    """Return a metric's value by seed."""
    return {
        r.seed: r.metrics[metric]
        for r in records.values()
        if r.seed is not None and r.arm == variant and (r.definition or {}).get("task") == task
    }


def summarise(records: Records) -> Summary:
    """Return for each task its variants: means, and the difference to the baseline."""
    summary = {task: _summarise_task(records, task) for task in RECIPES}
    return {task: rows for task, rows in summary.items() if rows}


def _summarise_task(records: Records, task: str) -> list[dict[str, Any]]:
    rows = []
    for variant in VARIANTS:
        by_metric = {m: values(records, task, variant, m) for m in METRICS[task]}
        decisive, more = next(iter(METRICS[task].items()))
        if not by_metric[decisive]:
            continue
        baseline = BASELINE[variant]
        row: dict[str, Any] = {"variant": variant, "baseline": baseline, "task": task}
        row["seeds"] = len(by_metric[decisive])
        row["parameters"] = next(iter(values(records, task, variant, "parameters").values()))
        row |= {metric: mean_interval(by_seed.values()) for metric, by_seed in by_metric.items()}
        if variant != baseline:
            theirs = values(records, task, baseline, decisive)
            row["difference"] = difference(by_metric[decisive], theirs, sign=1 if more else -1)
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]], task: str) -> str:
    """Return a task's variants as Markdown, with 95 % intervals."""
    decisive = next(iter(METRICS[task]))
    header = ["variant", "against", *METRICS[task], f"{decisive}, better by", "P(improvement)", ""]
    lines = []
    for row in rows:
        means = [with_half(row[m], DIGITS.get(m, 2)) for m in METRICS[task]]
        d: Difference | None = row.get("difference")
        if d is None:
            lines.append([row["variant"], "-", *means, "-", "-", "the baseline"])
            continue
        compared = [d.text(DIGITS.get(decisive, 2)), f"{d.improvement:.2f}", d.verdict]
        lines.append([row["variant"], row["baseline"], *means, *compared])
    return markdown_table(header, lines)


def tables(records: Records) -> str:
    """Return a table for each task."""
    return "\n".join(
        f"{task}, {rows[0]['parameters'] / 1e6:.2f} M parameters\n\n{table(rows, task)}"
        for task, rows in summarise(records).items()
    )


def comparisons(summary: Summary) -> dict[str, Difference]:
    """Return all differences of the study, a family of comparisons."""
    return {
        f"{row['variant']} on {task}": row["difference"]
        for task, rows in summary.items()
        for row in rows
        if row.get("difference") is not None
    }


def plot(summary: Summary, file: Path) -> None:
    """Draw the differences, a panel a task."""
    panels = {
        f"{task}: {next(iter(METRICS[task]))}, better by": {
            f"{row['variant']}\nagainst {row['baseline']}": row["difference"]
            for row in rows
            if row.get("difference") is not None
        }
        for task, rows in summary.items()
    }
    plot_differences(panels, file)


def text(records: Records) -> str:
    """Make the page of the language study."""
    summary = summarise(records)
    by_name = {(task, row["variant"]): row for task, rows in summary.items() for row in rows}
    family = comparisons(summary)
    paired = holm({name: d.paired for name, d in family.items()})
    welch = holm({name: d.welch for name, d in family.items()})
    survivors = [name for name in family if paired[name] < 0.05 and welch[name] < 0.05]
    stars = [row["variant"] for row in summary["prose"] if row["variant"].startswith("star")]
    bits = [-family[f"{name} on prose"].mean for name in stars]
    chrf = [-family[f"{name} on translation"].mean for name in stars]
    acts = [by_name["prose", name]["bits_per_byte"][0] for name in stars if "rank" not in name]
    sizes = [row["parameters"] for rows in summary.values() for row in rows]
    match = max(
        abs(row["parameters"] / rows[0]["parameters"] - 1)
        for rows in summary.values()
        for row in rows
    )
    hybrid = family["hybrid on translation"]
    seeds = sorted({row["seeds"] for rows in summary.values() for row in rows})
    return TEXT.format(
        smallest=min(sizes) / 1e6,
        largest=max(sizes) / 1e6,
        width=MODEL["hidden_size"],
        match=100 * match,
        tables=tables(records),
        family=len(family),
        survivors="only the " + listed(survivors) if survivors else "none",
        survive="survives" if len(survivors) == 1 else "survive",
        stars=len(stars),
        longest=RECIPES["translation"]["longest"],
        **{
            name: sum(family[f"{star} on {task}"].verdict == "worse" for star in stars)
            for name, task in (
                ("chrf_worse", "translation"),
                ("bits_worse", "prose"),
                ("sentiment_worse", "sentiment"),
            )
        },
        chrf_low=min(chrf),
        chrf_high=max(chrf),
        bits_low=min(bits),
        bits_high=max(bits),
        apart=max(acts) - min(acts),
        head=family["gate per head on prose"].mean,
        channel=family["gate per channel on prose"].mean,
        head_p=paired["gate per head on prose"],
        channel_p=paired["gate per channel on prose"],
        hybrid=family["hybrid on prose"].mean,
        hybrid_bleu=by_name["translation", "hybrid"]["bleu"][0],
        silu_bleu=by_name["translation", "star silu"]["bleu"][0],
        hybrid_chrf=hybrid.mean,
        hybrid_holds="holds" if hybrid.verdict == "not decided" else "leaves out",
        seeds=listed(map(str, seeds)),
        conditions=conditions(records.values()),
    )


STUDY = Study(
    "nlp-quality",
    "python -m benchmarks.nlp quality",
    jobs,
    train_one,
    tables,
    text,
    lambda records: {"nlp-quality.png": lambda file: plot(summarise(records), file)},
)
