"""Bibles of the SWORD project (zText modules of OSIS text): verses that line up, and chapters."""

import html
import re
import struct
import zlib
from itertools import groupby
from pathlib import Path

from starlayers.datasets.packages import debian_package

__all__ = ["ENGLISH", "SPANISH", "chapters", "verse_pairs"]

# Debian package and module; both number their verses alike, so equal places are equal verses
ENGLISH = ("sword-text-kjv", "engKJV2006eb")
SPANISH = ("sword-text-sparv", "spaRV1909eb")

# titles of psalms are scripture (the Spanish text has them in the verse), other titles are not
ASIDE = re.compile(
    r"<note\b.*?</note>|<title\b(?![^>]*canonical=\"true\")[^>]*>.*?</title>", re.DOTALL
)
WITHIN_WORDS = re.compile(r"</?(?:w|q|seg|divineName|transChange|foreign)\b[^>]*>")
ANY_TAG = re.compile(r"<[^>]*>")
LEFT_OVER = re.compile(r"\\\+?\w+\*?|¶|[][]")  # of the USFM source, paragraph marks, brackets
# the Spanish module forgets some spaces between marked-up words; pronouns after verbs belong there
FORGOTTEN_SPACE = re.compile(
    r"(?<=\w)(?=<)(?:<[^>]*>)+(?!(?:me|te|se|lo|la|le|nos|os|los|las|les)\b)(?=\w)"
)
CHAPTER = re.compile(r"<chapter [^>]*\bsID=")
STRONG = re.compile(r"strong:(\w+)")


def chapters() -> list[str] | None:
    """The 1,189 chapters of the King James Bible, or `None` where the package cannot be had."""
    entries = _entries(*ENGLISH)
    if entries is None:
        return None
    found: dict[int, list[str]] = {}
    for chapter, entry in _by_chapter(entries):
        found.setdefault(chapter, []).append(plain(entry))
    return [" ".join(filter(None, verses)) for verses in found.values()]


def verse_pairs() -> list[tuple[str, str]] | None:
    """English (King James) and Spanish (Reina-Valera 1909) verses, or `None` without packages.

    In some chapters the Spanish verses are numbered otherwise. Strong's numbers (those of the
    Hebrew and Greek words behind the text, which both modules carry) tell: a pair that hardly
    shares any is left out, and so is a chapter with three such pairs.
    """
    english, spanish = _entries(*ENGLISH), _entries(*SPANISH)
    if english is None or spanish is None:
        return None
    pairs = []
    entries = zip(_by_chapter(english), _by_chapter(spanish), strict=True)
    for _, group in groupby(entries, key=lambda both: both[0][0]):
        verses = [(e, plain(e), s, plain(s, spaces=True)) for (_, e), (_, s) in group]
        verses = [v for v in verses if v[1] and v[3]]
        same = [(v[1], v[3]) for v in verses if _same_verse(*v)]
        if len(verses) - len(same) < 3:
            pairs += same
    return pairs


def plain(osis: str, *, spaces: bool = False) -> str:
    """The words of an entry without markup, notes and headings; `spaces` mends forgotten ones."""
    text = ASIDE.sub("", osis)
    if spaces:
        text = FORGOTTEN_SPACE.sub(" ", text)
    text = ANY_TAG.sub(" ", WITHIN_WORDS.sub("", text))
    return " ".join(LEFT_OVER.sub(" ", html.unescape(text)).split())


def _same_verse(english: str, english_plain: str, spanish: str, spanish_plain: str) -> bool:
    a, b = set(STRONG.findall(english)), set(STRONG.findall(spanish))
    if not 1 / 3 < len(spanish_plain) / len(english_plain) < 3:
        return False
    fewer = min(len(a), len(b))
    return fewer < 2 or len(a & b) >= 0.3 * fewer


def _by_chapter(entries: list[str]) -> list[tuple[int, str]]:
    """Entries with the number of their chapter; every chapter begins with a heading's entry."""
    chapter, numbered = 0, []
    for entry in entries:
        chapter += bool(CHAPTER.search(entry))
        numbered.append((chapter, entry))
    return [(chapter, entry) for chapter, entry in numbered if chapter]


def _entries(package: str, module: str) -> list[str] | None:
    folder = debian_package(package, f"/usr/share/sword/modules/texts/ztext/{module}")
    if folder is None:
        return None
    return _testament(folder, "ot") + _testament(folder, "nt")


def _testament(folder: Path, name: str) -> list[str]:
    packed = (folder / f"{name}.bzz").read_bytes()
    index = struct.iter_unpack("<III", (folder / f"{name}.bzs").read_bytes())
    blocks = [zlib.decompress(packed[start : start + size]) for start, size, _ in index]
    places = struct.iter_unpack("<IIH", (folder / f"{name}.bzv").read_bytes())
    # an entry left out points anywhere, with length 0
    return [blocks[b][at : at + size].decode() if size else "" for b, at, size in places]
