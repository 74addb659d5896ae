"""Pages of the studies of coefficients: every number in them comes from the records."""

from math import factorial
from typing import Any

from benchmarks.coefficients import cost, dimension, eigen, penalties, search, search_runs
from benchmarks.harness.comparison import holm
from benchmarks.harness.report import conditions, listed, markdown_table, template
from benchmarks.harness.runner import Records
from benchmarks.harness.study import Study
from starlayers.coefficients import implicit_dimension

COMMAND = "python -m benchmarks.coefficients"


def _definition(records: Records) -> dict[str, Any]:
    """Return the definition of the first record."""
    definition = next(iter(records.values())).definition
    assert definition is not None
    return definition


def dimension_text(records: Records) -> str:
    """Make the page of the study of dimensions."""
    summary = dimension.summarise(records)
    one, two, both = (summary[kind] for kind in ("star", "star, two layers", "sum"))
    lines = []
    for d in [n for n in sorted(one) if n in (2, 4, 8, max(two), max(one))]:
        cells = [_ranks(one[d]), f"{one[d]['paper']:,.0f}"]
        cells += [_ranks(two[d]), f"{two[d]['paper']:,.0f}"] if d in two else ["", ""]
        lines.append([str(d), *cells, _ranks(both[d])])
    header = ["d", "star: rank", "paper", "two layers: rank", "paper", "sum: rank"]
    return template(__file__, "dimension").format(
        one_low=min(one),
        one_high=max(one),
        two_low=min(two),
        two_high=max(two),
        too_many=int(implicit_dimension(max(one), 2)),
        seeds=len({r.seed for r in records.values()}),
        ranks=len(records),
        right=len(records) - len(dimension.wrong(records)),
        table=markdown_table(header, lines),
        **{f"limit{n}": factorial(2**n) / 2 ** (2 ** (n - 1)) for n in (2, 3, 4)},
        factor=max(row["paper"] / row["count"] for row in two.values()),
        conditions=conditions(records.values()),
    )


def _ranks(row: dict[str, Any]) -> str:
    return ", ".join(f"{rank:,}" for rank in sorted(set(row["ranks"])))


DIMENSION = Study(
    "coefficients-dimension",
    f"{COMMAND} dimension",
    dimension.jobs,
    dimension.measure,
    dimension.tables,
    dimension_text,
    lambda records: {
        "coefficients-dimension.png": lambda file: dimension.plot(records, file),
    },
)


def penalties_text(records: Records) -> str:
    """Make the page of the study of penalties."""
    summary = penalties.summarise(records)
    images, texts = summary["fashion"], summary["reviews"]
    accuracy = penalties.against_fixed(summary)
    disturbed = penalties.against_fixed(summary, "disturbed")
    names = {f"{arm} ({task})": d for (task, arm), d in accuracy.items()}
    paired = holm({name: d.paired for name, d in names.items()})
    welch = holm({name: d.welch for name, d in names.items()})
    survivors = [n for n in names if paired[n] < 0.05 and welch[n] < 0.05]
    kept = {share: i for i, share in enumerate(penalties.KEPT)}
    recipes = penalties.TASKS

    def percent(arms: dict[str, Any], arm: str, measure: str = "accuracy") -> float:
        return float(100 * arms[arm][measure][0])

    def pruned(arms: dict[str, Any], arm: str, share: float) -> float:
        return float(100 * arms[arm]["pruned"][kept[share]][0])

    counts = {v: sum(d.verdict == v for d in accuracy.values()) for v in ("better", "worse")}
    return template(__file__, "penalties").format(
        image_hidden=recipes["fashion"]["hidden"],
        image_epochs=recipes["fashion"]["epochs"],
        text_hidden=recipes["reviews"]["hidden"],
        text_epochs=recipes["reviews"]["epochs"],
        terms=penalties.TERMS,
        seeds=images["fixed"]["seeds"],
        noise=penalties.NOISE["fashion"],
        left_out=100 * penalties.NOISE["reviews"],
        images=penalties.table(images, "fashion"),
        texts=penalties.table(texts, "reviews"),
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


PENALTIES = Study(
    "coefficients-penalties",
    f"{COMMAND} penalties",
    penalties.jobs,
    penalties.train_one,
    penalties.tables,
    penalties_text,
    lambda records: {
        "coefficients-penalties.png": lambda file: penalties.plot(records, file),
    },
)

PENALTIES_TUNING = Study(
    "coefficients-penalties-tuning",
    f"{COMMAND} penalties --tune",
    penalties.tuning_jobs,
    penalties.train_one,
    penalties.tuning_table,
    lambda records: template(__file__, "penalties-tuning").format(
        number=len(penalties.STRENGTHS),
        table=penalties.tuning_table(records),
        conditions=conditions(records.values()),
    ),
)


def eigen_text(records: Records) -> str:
    """Make the page of the study of eigenfeatures."""
    summary = eigen.summarise(records)
    plain = summary["plain"]
    others = {arm: row for arm, row in summary.items() if arm != "plain"}
    clean = [row for arm, row in summary.items() if "decay" in arm or "penalty" in arm]
    definition = _definition(records)
    at = {k: i for i, k in enumerate(plain["curves"]["k"])}
    enough = [row["enough"][0] for row in summary.values()]
    ranks = [row["effective_rank"][0] for row in clean]
    rough = [row["roughness"][0] for row in clean]
    costs = [100 * (plain["test_accuracy"][0] - r["test_accuracy"][0]) for r in others.values()]
    return template(__file__, "eigen").format(
        hidden=definition["recipe"]["hidden"],
        epochs=definition["recipe"]["epochs"],
        noise=eigen.ARMS["noise"]["noise"],
        decay=eigen.ARMS["decay"]["weight_decay"],
        strength=eigen.ARMS["L2 penalty"]["penalty"][0],
        vectors=plain["curves"]["k"][-1],
        seeds=plain["seeds"],
        measures=eigen.measures_table(summary),
        eigenvectors=eigen.curve_table(summary, "accuracy", "eigenvectors"),
        products=eigen.curve_table(summary, "products", "products"),
        enough_low=min(enough),
        enough_high=max(enough),
        loss=100 * eigen.LOSS,
        ten=100 * plain["curves"]["accuracy"][at[10]][0],
        five=100 * plain["curves"]["products"][at[5]][0],
        rank_plain=plain["effective_rank"][0],
        rank_noise=summary["noise"]["effective_rank"][0],
        rough_plain=plain["roughness"][0],
        rough_noise=summary["noise"]["roughness"][0],
        rank_low=min(ranks),
        rank_high=max(ranks),
        rough_low=min(rough),
        rough_high=max(rough),
        cost_low=min(costs),
        cost_high=max(costs),
        l2=100 * summary["L2 penalty"]["test_accuracy"][0],
        only_decay=100 * summary["decay"]["test_accuracy"][0],
        conditions=conditions(records.values()),
    )


EIGEN = Study(
    "coefficients-eigen",
    f"{COMMAND} eigen",
    eigen.jobs,
    eigen.train_one,
    eigen.tables,
    eigen_text,
    lambda records: {
        "coefficients-eigen.png": lambda file: eigen.plot_curves(records, file),
        "coefficients-eigen-pictures.png": lambda file: eigen.plot_pictures(records, file),
    },
)

EIGEN_TUNING = Study(
    "coefficients-eigen-tuning",
    f"{COMMAND} eigen --tune",
    eigen.tuning_jobs,
    eigen.train_one,
    eigen.tuning_table,
    lambda records: template(__file__, "eigen-tuning").format(
        aside=eigen.TUNING_SIZES["set_aside"],
        table=eigen.tuning_table(records),
        conditions=conditions(records.values()),
    ),
)


def cost_text(records: Records) -> str:
    """Make the page of the cost of a penalty."""
    (record,) = records.values()
    share = {
        name: 100 * row["penalty_share"]
        for name, row in record.metrics["rows"].items()
        if "penalty_share" in row
    }
    fields = {n: _definition(records)[n] for n in ("model", "batch", "image", "repeats")}
    return template(__file__, "cost").format(
        **fields,
        table=cost.table(record.metrics),
        bound=share["p=1, its bound"],
        full=share["p=1"],
        two=share["p=2"],
        conditions=conditions([record]),
    )


COST = Study(
    "coefficients-cost",
    f"{COMMAND} cost",
    lambda: {"coefficients-cost": cost.job()},
    cost.work,
    lambda records: cost.table(next(iter(records.values())).metrics),
    cost_text,
)


def search_text(records: Records) -> str:
    """Make the page of the study of searches."""
    summary = search.search_summary(records)
    validation = {m: summary[m]["differences"]["validation", "random"] for m in ("tpe", "gp")}
    gains = [
        row["differences"]["test", "defaults"].mean
        for method, row in summary.items()
        if method not in search_runs.DEFAULTS
    ]
    mean = {arm: summary[arm]["test"][0] for arm in search_runs.DEFAULTS}
    recipe = _definition(records)["recipe"]
    return template(__file__, "search").format(
        **{name: recipe[name] for name in ("train", "validation", "steps", "trials")},
        seeds=summary["defaults"]["seeds"],
        table=search.search_table(records),
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
    f"{COMMAND} searches search",
    search_runs.search_jobs,
    search_runs.search_one,
    search.search_table,
    search_text,
    lambda records: {
        "coefficients-search.png": lambda file: search.plot_search(records, file),
    },
)


def tune_text(records: Records) -> str:
    """Make the page of the study of tuning."""
    summary = search.tune_summary(records)
    gains = [row["gain"] for arm, row in summary.items() if not arm.startswith("gradients")]
    validation, test = ([g[split] for g in gains] for split in ("validation", "test"))
    verdicts = dict.fromkeys(d.verdict for d in test)
    definition = _definition(records)
    return template(__file__, "tune").format(
        trials=definition["tuning"]["trials"],
        validation=definition["recipe"]["validation"],
        seeds=next(iter(summary.values()))["seeds"],
        table=search.tune_table(records),
        low=min(d.mean for d in validation),
        high=max(d.mean for d in validation),
        test_low=min(d.mean for d in test),
        test_high=max(d.mean for d in test),
        test_verdict=listed(verdicts),
        conditions=conditions(records.values()),
    )


TUNE = Study(
    "coefficients-tune",
    f"{COMMAND} searches tune",
    search_runs.tune_jobs,
    search_runs.tune_one,
    search.tune_table,
    tune_text,
    lambda records: {
        "coefficients-tune.png": lambda file: search.plot_tune(records, file),
    },
)
STUDIES = (DIMENSION, PENALTIES, PENALTIES_TUNING, EIGEN, EIGEN_TUNING, COST, SEARCH, TUNE)
