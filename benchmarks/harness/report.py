"""Pages of evidence: Markdown and figures made from records alone."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.harness.records import Record

DOCS = Path(__file__).parents[2] / "docs"
NOTICE = "<!-- Written by `{command}` from {sources}; do not edit. -->\n"
#: packages whose versions a page states, where a run has them
STATED = ("python", "torch", "timm", "transformers", "peft", "stable-baselines3", "gymnasium")
STATED += ("optuna", "cmaes")


def markdown_table(header: list[str], lines: list[list[str]]) -> str:
    """Return a GitHub table."""
    content = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in content) + "\n"


@dataclass(frozen=True)
class Page:
    """Page of a study.

    Args:
        study: name of the study; the page is docs/evidence/<study>.md.
        command: command that writes the page.
        text: Markdown, with everything but the notice at its head.
        figures: file name in docs/figures -> function that draws into a file.
        sources: names of the studies whose records the page is made from; its own by default.
    """

    study: str
    command: str
    text: str
    figures: Mapping[str, Callable[[Path], None]] = field(default_factory=dict)
    sources: tuple[str, ...] = ()

    @property
    def markdown(self) -> str:
        """Content of the page's file."""
        files = [f"benchmarks/results/{name}.jsonl" for name in self.sources or (self.study,)]
        notice = NOTICE.format(command=self.command, sources=" and ".join(files))
        return f"{notice}\n{self.text.strip()}\n"

    def write(self, docs: Path = DOCS) -> None:
        """Write the page and draw its figures."""
        for folder in ("evidence", "figures"):
            (docs / folder).mkdir(parents=True, exist_ok=True)
        (docs / "evidence" / f"{self.study}.md").write_text(self.markdown)
        for name, draw in self.figures.items():
            draw(docs / "figures" / name)


def conditions(records: Iterable[Record]) -> str:
    """Return a list of the conditions under which the records were made."""
    found = list(records)
    seeds = sorted({r.seed for r in found if r.seed is not None})
    lines = [f"runs: {len(found)}" + (f", of seeds {_ranges(seeds)}" if seeds else "")]
    commands = dict.fromkeys(f"`{r.command}`" if r.command else "unknown" for r in found)
    lines.append("command: " + "; ".join(commands))
    if repaired := sum("command_repaired" in r.marks for r in found):
        lines[-1] += f" (completed later in {repaired} of {len(found)} records)"
    lines.append("date: " + _distinct(r.date for r in found))
    hardware = [r.hardware for r in found]
    processor = _distinct(f"{h['cpu']}, {h['cores']} cores" for h in hardware)
    threads = _distinct(f"{h['threads']}" for h in hardware)
    lines.append(f"hardware: {processor}; threads of a run: {threads}")
    versions = {
        name: _distinct(r.versions.get(name) for r in found)
        for name in STATED
        if all(r.versions.get(name) for r in found)
    }
    lines.append("versions: " + ", ".join(f"{name} {v}" for name, v in versions.items()))
    if repaired := sum(r.marks.get("definition_from") == "repaired" for r in found):
        lines.append(
            f"definition of the arms: filled in later in {repaired} of {len(found)} records"
        )
    if unknown_definitions := sum(r.definition is None for r in found):
        lines.append(f"definition of the arms: unknown in {unknown_definitions} records")
    if transcribed := sum("metrics_from" in r.marks for r in found):
        lines.append(f"values: transcribed by hand in {transcribed} of {len(found)} records")
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


def template(module: str, name: str) -> str:
    """Read the text of a page: a Markdown file beside a module, with {fields} for numbers."""
    return Path(module).with_name(f"{name}.md").read_text()
