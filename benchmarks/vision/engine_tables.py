"""Tables and conclusions of the study of engines, from its rows."""

from collections import Counter
from typing import Any

from benchmarks.harness.report import listed, markdown_table

#: largest ratio of our graph to timm's in the same engine that the project promises
PROMISE = 1.02


def _cell(values: list[float] | None) -> str:
    return "" if values is None else "{1:.2f} ({0:.2f}-{2:.2f})".format(*values)


def _by_run(rows: list[dict[str, Any]]) -> tuple[list[str], dict[tuple[str, str, str], Any]]:
    """Return the headings of the runs, and rows by engine, precision and graph, then by heading."""
    made: dict[tuple[str, str, str], dict[str, Any]] = {}
    headings: dict[str, None] = {}
    for row in rows:
        heading = f"{row['model'].replace('starnet_s', 'S')}, batch {row['batch']}"
        headings[heading] = None
        made.setdefault((row["engine"], row["precision"], row["graph"]), {})[heading] = row
    return list(headings), made


def ratio_table(rows: list[dict[str, Any]]) -> str:
    """Return the ratios to the baseline."""
    headings, made = _by_run(rows)
    lines = [[*key, *(_cell(row[h]["ratio"]) for h in headings)] for key, row in made.items()]
    return markdown_table(["engine", "precision", "graph", *headings], lines)


def pair_table(rows: list[dict[str, Any]]) -> str:
    """Return the ratios of our graph to timm's in the same engine."""
    headings, made = _by_run(rows)
    lines = [
        [*key[:2], *(_cell(row[h]["to_timm"]) for h in headings)]
        for key, row in made.items()
        if key[2] == "ours" and row[headings[0]]["to_timm"]
    ]
    return markdown_table(["engine", "precision", *headings], lines)


def graph_table(graphs: dict[str, dict[str, dict[str, int]]]) -> str:
    """Return the operations of the ONNX graphs."""
    lines = [
        [model, graph, str(counts["nodes"]), str(counts["transposes"])]
        for model, found in graphs.items()
        for graph, counts in found.items()
    ]
    return markdown_table(["network", "graph", "nodes", "Transposes"], lines)


def accuracy_table(metrics: dict[str, Any]) -> str:
    """Return the accuracies before and after int8."""
    tools = {"onnx": "onnxruntime", "openvino": "OpenVINO (NNCF)"}
    lines = [
        [
            tools[name],
            f"{result['float32']:.2%}",
            f"{result['int8']:.2%}",
            f"{100 * (result['int8'] - result['float32']):+.2f}",
        ]
        for name, result in metrics["results"].items()
    ]
    return markdown_table(["engine", "float32, PyTorch", "int8", "points"], lines)


def gains(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, float]]:
    """Return how many times as fast other engines are as PyTorch, by engine and then by run."""
    headings, made = _by_run(rows)
    medians = {key: {h: row[h]["median_ms"] for h in headings} for key, row in made.items()}
    fastest = {h: min(m[h] for k, m in medians.items() if k[0] == "PyTorch") for h in headings}
    return {
        key[:2]: {h: fastest[h] / m[h] for h in headings}
        for key, m in medians.items()
        if key[0] != "PyTorch" and key[2] == "ours"
    }


def gain_table(rows: list[dict[str, Any]]) -> str:
    """Return how many times as fast other engines are as PyTorch."""
    headings, _ = _by_run(rows)
    lines = [
        [engine, precision, *(f"{gain[h]:.1f}" for h in headings)]
        for (engine, precision), gain in gains(rows).items()
    ]
    return markdown_table(["engine", "precision", *headings], lines)


def choice(rows: list[dict[str, Any]]) -> str:
    """Return in words which engine is the fastest, in float32 and in any precision."""
    found = gains(rows)
    words = []
    for start, kinds in (
        ("In float32", ["float32"]),
        ("In any precision", ["float32", "bfloat16", "int8"]),
    ):
        able = {key: gain for key, gain in found.items() if key[1] in kinds}
        cases = next(iter(able.values()))
        winners = Counter(max(able, key=lambda key: able[key][h]) for h in cases)
        best = [
            f"{engine} {precision} (in {n} of {len(cases)} cases)"
            for (engine, precision), n in winners.most_common()
        ]
        most = [max(gain[h] for gain in able.values()) for h in cases]
        words.append(
            f"{start} the fastest is {listed(best)}, {min(most):.1f} to {max(most):.1f} times as "
            "fast as PyTorch."
        )
    return " ".join(words)


def promise(rows: list[dict[str, Any]]) -> str:
    """Return in words where our graph is within the promise of timm's, and where it is not."""
    headings, made = _by_run(rows)
    cases = {
        f"{key[0]} {key[1]} {h}": row[h]["to_timm"][1]
        for key, row in made.items()
        for h in headings
        if key[2] == "ours" and key[0] in ("onnxruntime", "OpenVINO") and key[1] != "int8"
    }
    over = [f"{case} ({ratio:.3f})" for case, ratio in cases.items() if ratio > PROMISE]
    kept = f"at most {PROMISE} of its time in {len(cases) - len(over)} of {len(cases)} cases"
    span = f"{min(cases.values()):.3f} to {max(cases.values()):.3f}"
    return f"{kept} of float32 and bfloat16 ({span})" + (
        f"; not: {', '.join(over)}." if over else "."
    )
