"""Pages of the language studies: every number in them comes from the records."""

from benchmarks.harness.comparison import holm
from benchmarks.harness.report import conditions, listed, template
from benchmarks.harness.runner import Records
from benchmarks.harness.study import Study
from benchmarks.nlp import quality, speed
from benchmarks.nlp.tasks import MODEL, RECIPES, train_one


def quality_text(records: Records) -> str:
    """Make the page of the language study."""
    summary = quality.summarise(records)
    by_name = {(task, row["variant"]): row for task, rows in summary.items() for row in rows}
    family = quality.comparisons(summary)
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
    return template(__file__, "quality").format(
        smallest=min(sizes) / 1e6,
        largest=max(sizes) / 1e6,
        width=MODEL["hidden_size"],
        match=100 * match,
        tables=quality.tables(records),
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


QUALITY = Study(
    "nlp-quality",
    "python -m benchmarks.nlp quality",
    quality.jobs,
    train_one,
    quality.tables,
    quality_text,
    lambda records: {
        "nlp-quality.png": lambda file: quality.plot(quality.summarise(records), file)
    },
)


def speed_table(records: Records) -> str:
    """Return the table of the one record."""
    (record,) = records.values()
    assert record.definition is not None
    return speed.table(record.metrics, record.definition["length"])


def speed_text(records: Records) -> str:
    """Make the page of the speed of language models."""
    (record,) = records.values()
    assert record.definition is not None
    rows = record.metrics
    plain, hybrid, star = rows["plain gelu"], rows["hybrid"], rows["star silu"]
    stars = [row for name, row in rows.items() if name.startswith("star")]
    return template(__file__, "speed").format(
        **{name: record.definition[name] for name in ("batch", "length", "new", "prompt")},
        table=speed_table(records),
        worst=100 * (max(row["train"]["ratio"] for row in stars) - 1),
        more=100 * (star["kept_bytes"] / plain["kept_bytes"] - 1),
        hybrid_train=hybrid["train"]["ratio"],
        hybrid_generate=hybrid["generate"]["ratio"],
        cache=hybrid["cache_bytes"] / plain["cache_bytes"],
        conditions=conditions([record]),
    )


SPEED = Study(
    "nlp-speed",
    "python -m benchmarks.nlp speed",
    lambda: {"nlp-speed": speed.job()},
    speed.work,
    speed_table,
    speed_text,
)
STUDIES = (QUALITY, SPEED)
