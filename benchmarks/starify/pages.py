"""Pages of the starify studies: every number in them comes from the records."""

from typing import Any

from benchmarks.harness.comparison import holm
from benchmarks.harness.report import conditions, listed, markdown_table, template
from benchmarks.harness.runner import Records, of_arms
from benchmarks.harness.study import Study
from benchmarks.starify import quality, speed
from benchmarks.starify.arms import PAST
from benchmarks.starify.train import train_one

NAME = "starify-quality"


def quality_text(records: Records) -> str:
    """Make the page of the starify study."""
    summary = quality.summarise(records)
    arms = {row["arm"]: row for row in summary}
    differences = quality.compare(records)
    names = {
        " ".join([arm, "against", other, f"({m})"]): (arm, other, m)
        for arm, other, m in differences
    }
    paired = holm({name: differences[key].paired for name, key in names.items()})
    welch = holm({name: differences[key].welch for name, key in names.items()})
    survivors = [name for name in names if paired[name] < 0.05 and welch[name] < 0.05]
    accuracy = {(arm, other): d for (arm, other, m), d in differences.items() if m == "accuracy"}
    gates = [accuracy[arm, "plain"].mean for arm in ("star full", "star low rank", "star scale")]
    first = next(iter(records.values())).definition
    assert first is not None
    past = of_arms(NAME, list(PAST))
    past_accuracies = [r.metrics["test"]["accuracy"] for r in past.values()]
    chance = 51.0
    head, low, scale = (
        arms[a]["trainable"] for a in ("head alone", "low-rank gate alone", "scale gate alone")
    )
    grids = [len(grid) for grid in quality.GRIDS.values()]
    return template(__file__, "quality").format(
        parameters=arms["plain"]["parameters"] / 1e6,
        steps=first["recipe"]["steps"],
        batch=first["recipe"]["batch"],
        seeds=arms["plain"]["seeds"],
        tuning_steps=quality.TUNING_STEPS,
        fewest=min(grids),
        most=max(grids),
        frozen=len(quality.FROZEN),
        arms=quality.arms_table(summary),
        differences=quality.differences_table(differences),
        family=len(differences),
        survivors="only " + listed(survivors) if survivors else "none",
        survive="survives" if len(survivors) == 1 else "survive",
        within=max(map(abs, gates)),
        widened=accuracy["widened", "plain"].text(2),
        against_widened=accuracy["star full", "widened"].verdict,
        full_widened=accuracy["star full", "widened"].text(2),
        share=100 * arms["full gate alone"]["trainable"] / arms["plain"]["parameters"],
        alone=accuracy["full gate alone", "plain"].text(2),
        alone_verdict=accuracy["full gate alone", "plain"].verdict,
        lora_loss=-differences["low-rank gate alone", "LoRA", "log_loss"].mean,
        lora=-accuracy["low-rank gate alone", "LoRA"].mean,
        lora_more=100 * (arms["LoRA"]["trainable"] / low - 1),
        ia3_more=100 * ((arms["IA3"]["trainable"] - head) / (scale - head) - 1),
        past=past_table(past),
        chance=sum(a <= chance for a in past_accuracies),
        past_runs=len(past),
        chance_level=f"{chance:g}",
        head=quality.with_half(arms["head alone"]["test accuracy"], 1),
        full=quality.with_half(arms["star full"]["test accuracy"], 1),
        conditions=conditions(records.values()),
        past_conditions=conditions(past.values()),
    )


def past_table(past: Records) -> str:
    """Return the single runs of the arms that can no longer be run."""
    lines = []
    for r in past.values():
        test = r.metrics["test"]
        lines.append(
            [r.arm or "", str(r.seed), f"{test['accuracy']:.1f}", f"{test['log_loss']:.3f}"]
        )
    return markdown_table(["arm", "seed", "test accuracy, %", "test log loss"], lines)


QUALITY = Study(
    NAME,
    "python -m benchmarks.starify quality",
    quality.jobs,
    train_one,
    quality.tables,
    quality_text,
    lambda records: {
        "starify-quality.png": lambda file: quality.plot(quality.compare(records), file)
    },
)


def tuning_text(records: Records) -> str:
    """Make the page of the settings that were tried."""
    grids = [len(grid) for grid in quality.GRIDS.values()]
    return template(__file__, "tuning").format(
        steps=quality.TUNING_STEPS,
        fewest=min(grids),
        most=max(grids),
        table=quality.tuning_table(records),
        conditions=conditions(records.values()),
    )


TUNING = Study(
    "starify-tuning",
    "python -m benchmarks.starify tune",
    quality.tuning_jobs,
    train_one,
    quality.tuning_table,
    tuning_text,
)


def speed_tables(records: Records) -> str:
    """Return a table for each family of models."""
    (record,) = records.values()
    return "\n".join(f"{family}\n\n{speed.table(rows)}" for family, rows in record.metrics.items())


def speed_text(records: Records) -> str:
    """Make the page of the speed of starified models."""
    (record,) = records.values()
    assert record.definition is not None
    rows: dict[str, Any] = record.metrics["decoder"]
    return template(__file__, "speed").format(
        **record.definition["families"],
        encoder_table=speed.table(record.metrics["encoder"]),
        decoder_table=speed.table(rows),
        kept=rows["fused"]["kept_bytes"] / rows[speed.BASELINE]["kept_bytes"],
        train=rows["fused"]["train"]["ratio"],
        recompute=rows["fused, recompute"]["train"]["ratio"],
        conditions=conditions([record]),
    )


SPEED = Study(
    "starify-speed",
    "python -m benchmarks.starify speed",
    lambda: {"starify-speed": speed.job()},
    speed.work,
    speed_tables,
    speed_text,
)
STUDIES = (QUALITY, TUNING, SPEED)
