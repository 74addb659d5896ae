"""All pages of evidence from the records: `python -m benchmarks.evidence`."""

from benchmarks import examples
from benchmarks.coefficients.__main__ import PAGES as COEFFICIENTS
from benchmarks.core.__main__ import PAGE as CORE
from benchmarks.harness.study import DOCS, NOTICE, Page
from benchmarks.nlp.__main__ import PAGE as NLP
from benchmarks.rl.__main__ import PAGE as RL
from benchmarks.starify.__main__ import PAGE as STARIFY
from benchmarks.vision.__main__ import PAGE as VISION

PAGES = (CORE, VISION, NLP, STARIFY, RL, *COEFFICIENTS)
PAGES += (Page("examples", "Evidence: examples", (examples.STUDY,)),)
INDEX = """\
# Evidence

{notice}

What was measured, by which command, on what. Each page is written from the records of its studies
in `benchmarks/results/`, one line of JSON a run; no number in them is typed by hand. The
tables of the kernels lie beside them, as compiled (`kernels-compiled.md`) and as measured on a GPU
(`kernels-measured.md`).

Intervals are 95 %. "Better" and "worse" mean that the interval of a single comparison leaves out
0, "not decided" that it does not; a study of many comparisons says which survive a correction for
their number.

{pages}
"""


def contents() -> dict[str, str]:
    """Return file name -> content of every page, without figures."""
    texts = {f"{page.name}.md": page.markdown() for page in PAGES}
    lines = []
    for page in PAGES:
        lines.append(f"- [{page.title}]({page.name}.md)")
        headings = [h for h in texts[f"{page.name}.md"].splitlines() if h.startswith("## ")]
        lines += [f"    - {heading.removeprefix('## ')}" for heading in headings]
    return {"index.md": INDEX.format(notice=NOTICE, pages="\n".join(lines)), **texts}


def main() -> None:
    """Write every page, its figures, and the index."""
    for page in PAGES:
        page.write()
        print(f"docs/evidence/{page.name}.md")
    (DOCS / "evidence" / "index.md").write_text(contents()["index.md"])


if __name__ == "__main__":
    main()
