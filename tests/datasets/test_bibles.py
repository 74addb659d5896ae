"""Parser of Bibles, on small modules made here."""

import struct
import zlib

import pytest

from starlayers.datasets import bibles


def write_module(folder, testaments):
    """A module in the format of SWORD's zText: blocks of text and an index of entries."""
    folder.mkdir()
    for name, blocks in testaments.items():
        compressed, index, entries = b"", b"", b""
        for number, texts in enumerate(blocks):
            joined = "".join(texts).encode()
            block = zlib.compress(joined)
            index += struct.pack("<III", len(compressed), len(block), len(joined))
            compressed += block
            start = 0
            for text in texts:
                size = len(text.encode())
                # an entry without text points anywhere
                entries += struct.pack("<IIH", number if size else 999, start, size)
                start += size
        (folder / f"{name}.bzz").write_bytes(compressed)
        (folder / f"{name}.bzs").write_bytes(index)
        (folder / f"{name}.bzv").write_bytes(entries)
    return folder


def verse(text, *numbers):
    first, *rest = text.split()
    return " ".join([f'<w lemma="{" ".join(f"strong:{n}" for n in numbers)}">{first}</w>', *rest])


CHAPTER = '<chapter osisID="x" sID="x"/>'
ENGLISH = {
    "ot": [
        ["<title>Genesis</title>", CHAPTER, verse("In the beginning", "H1", "H2"), "", "Light was"],
        [CHAPTER, verse("Second chapter", "H3", "H4", "H5", "H6")],
    ],
    "nt": [[CHAPTER, verse("Jesus wept", "G1", "G2")]],
}
SPANISH = {
    "ot": [
        ["", CHAPTER, verse("EN el principio", "H2", "H9"), "falta", "<w>Hubo</w><w>luz</w>"],
        [CHAPTER, verse("Capítulo segundo", "H3", "H7", "H8", "H9")],
    ],
    "nt": [[CHAPTER, verse("Y lloró Jesús", "G1", "G2")]],
}


@pytest.fixture
def modules(monkeypatch, tmp_path):
    """Puts small modules in place of the packages'; returns them and what was asked for."""
    folders = {
        "sword-text-kjv": write_module(tmp_path / "en", ENGLISH),
        "sword-text-sparv": write_module(tmp_path / "es", SPANISH),
    }
    asked = []

    def package(name, folder):
        asked.append((name, folder))
        return folders.get(name)

    monkeypatch.setattr(bibles, "debian_package", package)
    return folders, asked


def test_chapters_of_both_testaments(modules):
    _, asked = modules
    assert bibles.chapters() == ["In the beginning Light was", "Second chapter", "Jesus wept"]
    folder = "/usr/share/sword/modules/texts/ztext"
    assert asked == [("sword-text-kjv", f"{folder}/engKJV2006eb")]


def test_verses_that_share_strongs_numbers_are_pairs(modules):
    _, asked = modules
    assert bibles.verse_pairs() == [
        ("In the beginning", "EN el principio"),
        ("Light was", "Hubo luz"),
        ("Jesus wept", "Y lloró Jesús"),
    ]  # the second chapter shares one number of four
    assert [name for name, _ in asked] == ["sword-text-kjv", "sword-text-sparv"]
    assert asked[1][1].endswith("/spaRV1909eb")


@pytest.mark.parametrize("missing", ["sword-text-kjv", "sword-text-sparv"])
def test_without_a_package_there_is_nothing(modules, missing):
    folders, _ = modules
    del folders[missing]
    assert bibles.verse_pairs() is None
    assert (bibles.chapters() is None) == (missing == "sword-text-kjv")


@pytest.mark.parametrize(
    ("english", "spanish", "lengths", "same"),
    [
        ("ABCDEFGHIJ", "ABCKLMNOPQ", (10, 10), True),  # 3 of 10
        ("ABCDEFGHIJ", "ABKLMNOPQR", (10, 10), False),  # 2 of 10
        ("ABCDEFG", "ABKLMNOPQR", (10, 10), False),  # 2 of 7
        ("ABCDEF", "ABKLMNOPQR", (10, 10), True),  # 2 of 6
        ("AB", "CD", (10, 10), False),
        ("A", "CD", (10, 10), True),  # too few numbers to tell
        ("", "CD", (10, 10), True),
        ("AB", "AB", (10, 30), False),  # three times as long
        ("AB", "AB", (10, 29), True),
        ("AB", "AB", (30, 10), False),
        ("AB", "AB", (29, 10), True),
    ],
)
def test_conditions_of_a_pair(english, spanish, lengths, same):
    osis = [" ".join(f"strong:{number}" for number in numbers) for numbers in (english, spanish)]
    a, b = ("x" * n for n in lengths)
    assert bibles._is_same_verse(osis[0], a, osis[1], b) == same


@pytest.mark.parametrize(("different", "kept"), [(2, 3), (3, 0)])
def test_a_chapter_with_three_other_verses_is_left_out(monkeypatch, tmp_path, different, kept):
    verses = [verse(f"verse {i}", "H1", "H2") for i in range(3)]
    others = [verse(f"other {i}", "H3", "H4") for i in range(different)]
    same = [verse(f"verse {i}", "H1", "H2") for i in range(3 + different)]
    for name, texts in (("en", same), ("es", verses + others)):
        write_module(tmp_path / name, {"ot": [[CHAPTER, *texts]], "nt": [[CHAPTER]]})
    folders = iter([tmp_path / "en", tmp_path / "es"])
    monkeypatch.setattr(bibles, "debian_package", lambda *a: next(folders))
    assert len(bibles.verse_pairs()) == kept


@pytest.mark.parametrize(
    ("osis", "text"),
    [
        ('<w lemma="x">And</w> <q who="J">I <w>say</w></q>.<note>a <b>c</b></note> ', "And I say."),
        ('<title canonical="true" type="psalm">A Psalm.</title> <l s="a"/>Sing', "A Psalm. Sing"),
        ("<title><foreign>ALEPH.</foreign></title> ¶ One<l/>two &amp; \\nd 3", "One two & 3"),
        ("<w>in</w><q>asmuch</q>", "inasmuch"),
    ],
)
def test_plain_text_of_osis(osis, text):
    assert bibles.plain(osis) == text


def test_forgotten_spaces_between_spanish_words():
    osis = "<w>uno</w><transChange>llamado</transChange><w>Lázaro</w>, <w>Dad</w><w>me</w>"
    assert bibles.plain(osis, add_spaces=True) == "uno llamado Lázaro, Dadme"
    assert bibles.plain(osis) == "unollamadoLázaro, Dadme"
