"""Parse Bibles of the SWORD project: chapters, and verses aligned between two languages.

The modules are in SWORD's zText format (compressed blocks and an index of verses) and contain OSIS
markup.
"""

import html
import re
import struct
import zlib
from itertools import groupby
from pathlib import Path

from starlayers.datasets.packages import debian_package

__all__ = ["ENGLISH", "SPANISH", "chapters", "verse_pairs"]

# Debian package and SWORD module; both number their verses alike, so equal positions are equal
# verses
ENGLISH = ("sword-text-kjv", "engKJV2006eb")
SPANISH = ("sword-text-sparv", "spaRV1909eb")

# titles of psalms are scripture (the Spanish module has them in the verse), other titles are not
NOT_SCRIPTURE = re.compile(
    r"<note\b.*?</note>|<title\b(?![^>]*canonical=\"true\")[^>]*>.*?</title>", re.DOTALL
)
TAG_WITHIN_WORDS = re.compile(r"</?(?:w|q|seg|divineName|transChange|foreign)\b[^>]*>")
TAG = re.compile(r"<[^>]*>")
USFM_MARKS = re.compile(r"\\\+?\w+\*?|¶|[][]")  # left over from the source of the module
# the Spanish module lacks some spaces between marked-up words; pronouns follow verbs without one
MISSING_SPACE = re.compile(
    r"(?<=\w)(?=<)(?:<[^>]*>)+(?!(?:me|te|se|lo|la|le|nos|os|los|las|les)\b)(?=\w)"
)
CHAPTER_START = re.compile(r"<chapter [^>]*\bsID=")
STRONGS_NUMBER = re.compile(r"strong:(\w+)")


def chapters() -> list[str] | None:
    """Read the 1,189 chapters of the King James Bible, or return `None` without its package."""
    entries = _read_module(*ENGLISH)
    if entries is None:
        return None
    verses: dict[int, list[str]] = {}
    for chapter, entry in _number_chapters(entries):
        verses.setdefault(chapter, []).append(plain(entry))
    return [" ".join(filter(None, texts)) for texts in verses.values()]


def verse_pairs() -> list[tuple[str, str]] | None:
    """Read pairs of English (King James) and Spanish (Reina-Valera 1909) verses.

    In some chapters the Spanish verses are numbered differently. Strong's numbers (of the Hebrew
    and Greek words behind the text, which both modules contain) reveal this: a pair that shares
    hardly any is left out, and so is a chapter with three such pairs.

    Returns:
        The pairs, or `None` without the packages.
    """
    english, spanish = _read_module(*ENGLISH), _read_module(*SPANISH)
    if english is None or spanish is None:
        return None
    pairs = []
    entries = zip(_number_chapters(english), _number_chapters(spanish), strict=True)
    for _, group in groupby(entries, key=lambda both: both[0][0]):
        verses = [(e, plain(e), s, plain(s, add_spaces=True)) for (_, e), (_, s) in group]
        verses = [v for v in verses if v[1] and v[3]]
        matching = [(v[1], v[3]) for v in verses if _is_same_verse(*v)]
        if len(verses) - len(matching) < 3:
            pairs += matching
    return pairs


def plain(osis: str, *, add_spaces: bool = False) -> str:
    """Remove markup, notes and headings from an entry.

    Args:
        osis: text with OSIS markup.
        add_spaces: separate words that have only tags between them.
    """
    text = NOT_SCRIPTURE.sub("", osis)
    if add_spaces:
        text = MISSING_SPACE.sub(" ", text)
    text = TAG.sub(" ", TAG_WITHIN_WORDS.sub("", text))
    return " ".join(USFM_MARKS.sub(" ", html.unescape(text)).split())


def _is_same_verse(english: str, english_plain: str, spanish: str, spanish_plain: str) -> bool:
    a, b = set(STRONGS_NUMBER.findall(english)), set(STRONGS_NUMBER.findall(spanish))
    if not 1 / 3 < len(spanish_plain) / len(english_plain) < 3:
        return False
    fewer = min(len(a), len(b))
    return fewer < 2 or len(a & b) >= 0.3 * fewer


def _number_chapters(entries: list[str]) -> list[tuple[int, str]]:
    """Pair entries with the number of their chapter; entries before the first chapter are out."""
    chapter, numbered = 0, []
    for entry in entries:
        chapter += bool(CHAPTER_START.search(entry))
        numbered.append((chapter, entry))
    return [(chapter, entry) for chapter, entry in numbered if chapter]


def _read_module(package: str, module: str) -> list[str] | None:
    folder = debian_package(package, f"/usr/share/sword/modules/texts/ztext/{module}")
    if folder is None:
        return None
    return _read_testament(folder, "ot") + _read_testament(folder, "nt")


def _read_testament(folder: Path, name: str) -> list[str]:
    compressed = (folder / f"{name}.bzz").read_bytes()
    index = struct.iter_unpack("<III", (folder / f"{name}.bzs").read_bytes())
    blocks = [zlib.decompress(compressed[start : start + size]) for start, size, _ in index]
    verses = struct.iter_unpack("<IIH", (folder / f"{name}.bzv").read_bytes())
    # a missing entry has length 0 and any position
    return [
        blocks[block][start : start + size].decode() if size else ""
        for block, start, size in verses
    ]
