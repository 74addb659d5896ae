"""Build the site, follow its links, and visit every page in a browser, on a phone and a desk.

python -m tests.site.check                # all pages, 390 and 1,280 px, light and dark
python -m tests.site.check --save         # and screenshots of three pages into docs/figures/site/
python -m tests.site.check --built site   # a site that is built already

Needs Chromium (`apt-get install chromium`) and playwright, which drives it.
"""

import argparse
import io
import itertools
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from tests.site.links import ROOT, broken_links, build, pages

WIDTHS = {390: 844, 1280: 800}
SCHEMES = ("light", "dark")
FIGURES = ROOT / "docs" / "figures" / "site"
SAVED = {"home": "index.html", "quickstart": "quickstart.html", "gallery": "gallery.html"}
MAX_BYTES = 80_000
#: code, which may hold dollars, and then formulas
CODE = re.compile(r"^( *)(```|~~~).*?^\1\2|`[^`\n]+`", flags=re.DOTALL | re.MULTILINE)
MATHS = re.compile(r"\$\$.+?\$\$|(?<![\\$\w])\$[^\s$](?:[^$\n]*[^\s$])?\$(?!\w)", flags=re.DOTALL)

#: what is wrong with the page that is open, as a list of sentences
INSPECT = """async (formulas) => {
  const wrong = [], root = document.scrollingElement
  const tell = (e) => `<${e.localName} class="${e.className}"> ` +
    e.textContent.trim().replace(/\\s+/g, " ").slice(0, 40)
  // what scrolls in a box of its own makes no page wide
  const boxed = (e) => {
    while ((e = e.parentElement) && e !== document.body)
      if (getComputedStyle(e).overflowX !== "visible") return true
    return false
  }
  for (const image of document.images) {
    image.loading = "eager"
    await image.decode().catch(() => 0)
    if (!image.naturalWidth) wrong.push(`no image ${image.src}`)
  }
  if (root.scrollWidth > innerWidth) {
    const wide = [...document.querySelectorAll("main *")].filter(
      (e) => e.getBoundingClientRect().right > innerWidth + 1 && !boxed(e))
    wrong.push(`${root.scrollWidth} px wide: ${wide.slice(0, 3).map(tell).join("; ")}`)
  }
  const maths = [...document.querySelectorAll("math")]
  if (maths.length < formulas) wrong.push(`${maths.length} of ${formulas} formulas`)
  if (document.querySelector(".arithmatex, merror")) wrong.push("a formula is no MathML")
  if (maths.some((e) => !e.getBoundingClientRect().width)) wrong.push("a formula has no width")
  for (const code of document.querySelectorAll("pre > code")) {
    code.dataset.mdCopying = ""  // as the copy button does
    if (code.innerText.startsWith(">>>")) wrong.push(`copied with prompts: ${tell(code)}`)
    delete code.dataset.mdCopying
  }
  return wrong
}"""


def formulas(page: str) -> int:
    """Return how many formulas the source of a page has."""
    source = ROOT / "docs" / Path(page).with_suffix(".md")
    return len(MATHS.findall(CODE.sub("", source.read_text()))) if source.exists() else 0


def visit(browser, folder: Path, width: int, scheme: str, shots: Path | None) -> Iterator[str]:
    """Open every page of a site in a window; yield what is wrong, with page, width and scheme."""
    size = {"width": width, "height": WIDTHS[width]}
    context = browser.new_context(viewport=size, color_scheme=scheme)
    tab = context.new_page()
    seen: list[str] = []
    tab.on("console", lambda m: seen.append(f"console: {m.text}") if m.type == "error" else None)
    tab.on("pageerror", lambda error: seen.append(f"script: {error}"))
    tab.on("request", lambda r: seen.append(f"asks {r.url}") if r.url.startswith("http") else None)
    # what is left of the page before, such as its icon, is aborted, and is no fault
    tab.on(
        "requestfailed",
        lambda r: None if r.failure == "net::ERR_ABORTED" else seen.append(f"not loaded: {r.url}"),
    )
    for file in pages(folder):
        page = file.relative_to(folder).as_posix()
        tab.goto(file.as_uri())
        found = tab.evaluate(INSPECT, formulas(page)) + seen
        yield from (f"{page} {width} {scheme}: {wrong}" for wrong in found)
        seen.clear()
    tab.goto((folder / "index.html").as_uri())
    if width > 1000:  # elsewhere the field lies behind a button
        tab.locator(".md-search__input").press_sequentially("StarMLP")  # it listens for keys
        results = tab.locator(".md-search-result__item").first
        try:
            results.wait_for(timeout=10_000)
        except Exception as error:  # playwright's own, which importing this file does not need
            yield f"search {width} {scheme}: finds no StarMLP ({type(error).__name__})"
    for name, page in SAVED.items() if shots else ():
        tab.goto((folder / page).as_uri())
        tab.evaluate(INSPECT, 0)  # waits for the images
        save(tab.screenshot(), shots / f"{name}-{width}-{scheme}.webp")
    context.close()


def save(png: bytes, file: Path) -> None:
    """Write a screenshot as WebP, of the best quality that keeps it small."""
    file.parent.mkdir(parents=True, exist_ok=True)
    for quality in range(90, 10, -10):
        buffer = io.BytesIO()
        Image.open(io.BytesIO(png)).convert("RGB").save(buffer, "webp", quality=quality)
        if buffer.tell() < MAX_BYTES:
            break
    file.write_bytes(buffer.getvalue())


def main() -> None:
    """Run the checks; exit with 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--built", type=Path, help="folder of a built site")
    parser.add_argument("--save", action="store_true", help=f"write screenshots into {FIGURES}")
    args = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise SystemExit(
            "make docs-check needs Chromium, and there is none: apt-get install chromium"
        )
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise SystemExit("make docs-check needs playwright: pip install playwright") from error

    start = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as playwright:
        folder = (args.built or Path(temporary)).resolve()
        if args.built is None:
            build(folder)
        wrong = list(broken_links(folder))
        # --no-sandbox: containers have no user namespaces, and the pages are our own
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for width, scheme in itertools.product(WIDTHS, SCHEMES):
            wrong += visit(browser, folder, width, scheme, FIGURES if args.save else None)
        browser.close()
        number = len(pages(folder))
    print(*wrong, sep="\n" if wrong else "")
    seconds = time.monotonic() - start
    print(
        f"{number} pages, {len(WIDTHS) * len(SCHEMES)} times: {len(wrong)} faults, {seconds:.0f} s"
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
