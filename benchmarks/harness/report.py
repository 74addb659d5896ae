"""Parts of pages of evidence: tables, conditions, lists."""

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.harness.records import Record

#: packages whose versions a page states, where a run has them
STATED = ("python", "torch", "timm", "transformers", "peft", "stable-baselines3", "gymnasium")
STATED += ("optuna", "cmaes", "liger-kernel", "onnxruntime", "openvino", "nncf")


def markdown_table(header: list[str], lines: list[list[str]]) -> str:
    """Return a GitHub table."""
    content = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in content) + "\n"


def first_definition(records: Mapping[str, Record]) -> dict[str, Any]:
    """Return the definition of the first record, for settings that all runs have in common."""
    definition = next(iter(records.values())).definition
    assert definition is not None
    return definition


def conditions(runs: Iterable[Record]) -> str:
    """Return a list of the conditions under which the records were made."""
    records = list(runs)
    seeds = sorted({r.seed for r in records if r.seed is not None})
    lines = [f"runs: {len(records)}" + (f", of seeds {_ranges(seeds)}" if seeds else "")]
    commands = dict.fromkeys(f"`{r.command}`" if r.command else "unknown" for r in records)
    lines.append("command: " + "; ".join(commands))
    if repaired := sum("command_repaired" in r.marks for r in records):
        lines[-1] += f" (completed later in {repaired} of {len(records)} records)"
    lines.append("date: " + _distinct(r.date for r in records))
    hardware = [r.hardware for r in records]
    processor = _distinct(f"{h['cpu']}, {h['cores']} cores" for h in hardware)
    threads = _distinct(f"{h['threads']}" for h in hardware)
    lines.append(f"hardware: {processor}; threads of a run: {threads}")
    versions = {
        name: _distinct(r.versions.get(name) for r in records)
        for name in STATED
        if all(r.versions.get(name) for r in records)
    }
    lines.append("versions: " + ", ".join(f"{name} {v}" for name, v in versions.items()))
    if repaired := sum(r.marks.get("definition_from") == "repaired" for r in records):
        lines.append(
            f"definition of the arms: filled in later in {repaired} of {len(records)} records"
        )
    if unknown_definitions := sum(r.definition is None for r in records):
        lines.append(f"definition of the arms: unknown in {unknown_definitions} records")
    if transcribed := sum("metrics_from" in r.marks for r in records):
        lines.append(f"values: transcribed by hand in {transcribed} of {len(records)} records")
    return "\n".join(f"- {line}" for line in lines) + "\n"


def _distinct(values: Iterable[str | None]) -> str:
    return " and ".join(dict.fromkeys(v or "unknown" for v in values))


def _ranges(seeds: list[int]) -> str:
    whole = seeds == list(range(seeds[0], seeds[-1] + 1)) and len(seeds) > 1
    return f"{seeds[0]} to {seeds[-1]}" if whole else ", ".join(map(str, seeds))


def listed(names: Iterable[str], none: str = "none") -> str:
    """Return names as "a, b and c"; `none` where there are none."""
    *most, last = [*names] or [none]
    return f"{', '.join(most)} and {last}" if most else last
