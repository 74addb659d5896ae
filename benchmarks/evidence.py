"""All pages of evidence, docs/evidence/*.md: made from the records, never by hand."""

from pathlib import Path

from benchmarks.coefficients.pages import STUDIES as COEFFICIENTS
from benchmarks.examples import STUDIES as EXAMPLES
from benchmarks.harness.report import DOCS
from benchmarks.harness.study import Study
from benchmarks.nlp.pages import STUDIES as NLP
from benchmarks.rl.pages import STUDIES as RL
from benchmarks.starify.pages import STUDIES as STARIFY
from benchmarks.vision.pages import STUDIES as VISION

#: heading of the index -> its studies
DOMAINS: dict[str, tuple[Study, ...]] = {
    "Vision": VISION,
    "Language": NLP,
    "Starify": STARIFY,
    "Reinforcement learning": RL,
    "Coefficients": COEFFICIENTS,
    "Examples": EXAMPLES,
}
INDEX = """\
# Evidence

<!-- Written by `python -m benchmarks`; do not edit. -->

What was measured, by which command, on what. Each page is written from the records of its study
in `benchmarks/results/`, one line of JSON a run; no number in them is typed by hand. Kernels have
pages of their own: [as compiled](../kernels-compiled.md) and
[as measured on a GPU](../kernels-measured.md).

Intervals are 95 %. "Better" and "worse" mean that the interval of a single comparison leaves out
0, "not decided" that it does not; a study of many comparisons says which survive a correction for
their number.
"""


def index(titles: dict[str, str]) -> str:
    """Return the index of the pages; `titles` are study -> title."""
    parts = [INDEX]
    for domain, studies in DOMAINS.items():
        links = [f"- [{titles[s.name]}]({s.name}.md)" for s in studies]
        parts.append(f"\n## {domain}\n\n" + "\n".join(links) + "\n")
    return "".join(parts)


def contents() -> dict[str, str]:
    """Return file name -> content of every page, without figures."""
    pages = [study.page() for studies in DOMAINS.values() for study in studies]
    titles = {page.study: page.text.lstrip().splitlines()[0].removeprefix("# ") for page in pages}
    texts = {f"{page.study}.md": page.markdown for page in pages}
    return {"index.md": index(titles), **texts}


def write(docs: Path = DOCS) -> None:
    """Write every page, its figures, and the index."""
    for studies in DOMAINS.values():
        for study in studies:
            study.page().write(docs)
            print(f"docs/evidence/{study.name}.md")
    (docs / "evidence" / "index.md").write_text(contents()["index.md"])
