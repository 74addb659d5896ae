"""The built site: its pages, and links between them that lead nowhere."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parents[2]


def build(folder: Path) -> None:
    """Build the site strictly."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"mkdocs build --strict failed:\n{done.stdout}{done.stderr}")


@dataclass
class Page(HTMLParser):
    """Addresses in a page, and the anchors that others may link to."""

    text: str
    anchors: set[str] = field(default_factory=set)
    addresses: list[str] = field(default_factory=list)

    def __post_init__(self):
        super().__init__()
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.anchors |= {named[name] for name in ("id", "name") if named.get(name)}
        self.addresses += [named[name] for name in ("href", "src") if named.get(name)]


def pages(folder: Path) -> dict[Path, Page]:
    """Return the pages of a site; the error page, whose links are those of a server, is none."""
    files = (f for f in sorted(folder.rglob("*.html")) if f.name != "404.html")
    return {file: Page(file.read_text()) for file in files}


def broken_links(folder: Path) -> Iterator[str]:
    """Yield every link within the site to a file or an anchor that is not there.

    linkchecker, which PyPI has, fetches each page and looks at anchors in a plug-in alone; a site
    of files needs neither fetching nor more than this.
    """
    known = pages(folder)
    for file, page in known.items():
        for address in page.addresses:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            anchor = unquote(parts.fragment)
            place = f"{file.relative_to(folder)}: {address}"
            if not target.is_file():
                yield f"{place}: no such file"
            elif anchor and target in known and anchor not in known[target].anchors:
                yield f"{place}: no such anchor"
